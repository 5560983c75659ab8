"""An answer that fits a JSON schema. Usage: python examples/serve_structured.py [BASE_URL]

Needs `pip install openai` and a server: `sinterlm serve smollm2`.
"""

import json
import os
import sys

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99999999},
    },
    "required": ["city", "population"],
    "additionalProperties": False,
}


def main(base_url: str) -> None:
    """Print the object; whatever the model knows, it has exactly these two keys."""
    client = OpenAI(base_url=base_url, api_key=os.environ.get("SINTERLM_API_KEY", "none"))
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "The capital of France and its population, as JSON"}],
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}},
        temperature=0.0,
    )
    print(json.loads(answer.choices[0].message.content or ""))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1")
