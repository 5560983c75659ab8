"""Stream an answer over HTTP. Usage: python examples/serve_chat.py [BASE_URL]

Needs `pip install openai` and a server: `sinterlm serve smollm2`.
"""

import os
import sys

from openai import OpenAI


def main(base_url: str) -> None:
    """Print the answer as it comes, then how many tokens it took."""
    client = OpenAI(base_url=base_url, api_key=os.environ.get("SINTERLM_API_KEY", "none"))
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0.0,
        max_completion_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        for choice in event.choices:
            print(choice.delta.content or "", end="", flush=True)
        if event.usage is not None:
            print(f"\n[{event.usage.completion_tokens} tokens]")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1")
