"""Answer a question, streaming. Usage: python examples/chat.py [MODEL] [QUESTION]"""

import sys

from sinterlm import LLM, SamplingParams


def main(model: str, question: str) -> None:
    """Print the greedy answer token by token, then how fast it came."""
    messages = [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": question},
    ]
    with LLM(model) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=64)
        for delta in llm.stream(llm.chat_prompt(messages), params):
            print(delta.text, end="", flush=True)
            if delta.output is not None:
                ttft = delta.output.metrics.ttft or 0.0
                print(f"\n[first token after {ttft * 1e3:.0f} ms]", file=sys.stderr)


if __name__ == "__main__":
    main(*(sys.argv[1:] + ["smollm2", "What is the capital of France?"][len(sys.argv) - 1 :]))
