"""Complete several prompts at once. Usage: python examples/generate.py [MODEL]"""

import sys

from sinterlm import LLM, SamplingParams

PROMPTS = [
    "The capital of Italy is",
    "Water boils at",
    "Once upon a time",
]


def main(model: str) -> None:
    """Print each prompt with its completion."""
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=24, seed=7)
    with LLM(model) as llm:
        for output in llm.generate(PROMPTS, params):
            print(f"{output.prompt}|{output.outputs[0].text}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
