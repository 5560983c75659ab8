"""A tool that the model must call. Usage: python examples/serve_tools.py [BASE_URL]

Needs `pip install openai` and: `sinterlm serve smollm2 --tool-call-parser hermes`.
"""

import json
import os
import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionToolParam

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}},
              "required": ["city"], "additionalProperties": False}  # fmt: skip
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "weather", "description": "Weather of a city", "parameters": PARAMETERS},
}


def main(base_url: str) -> None:
    """Print the call that the model makes: its name, and arguments that fit the schema."""
    client = OpenAI(base_url=base_url, api_key=os.environ.get("SINTERLM_API_KEY", "none"))
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        temperature=0.0,
    )
    for call in answer.choices[0].message.tool_calls or []:
        if call.type == "function":
            print(call.function.name, json.loads(call.function.arguments))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1")
