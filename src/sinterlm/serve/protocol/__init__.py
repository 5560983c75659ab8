"""The nouns of OpenAI's protocol as vLLM extends it: requests, answers, and a rule per field."""
