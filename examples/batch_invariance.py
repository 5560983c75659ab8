"""The same request alone and in company. Usage: python examples/batch_invariance.py [MODEL]"""

import sys

from sinterlm import LLM, RequestOutput, SamplingParams

QUESTION = "Name three fruits."
COMPANY = ["What is 2 + 2?", "Write a long story about a dragon and a clock.", "Hi!"]


def fingerprint(output: RequestOutput) -> list[tuple[int, str]]:
    """Each drawn token with the exact bits of its logprob."""
    first = output.outputs[0]
    rows = zip(first.token_ids, first.logprobs or [], strict=True)
    return [(token, row[token].logprob.hex()) for token, row in rows]


def main(model: str) -> None:
    """Say whether company changes an answer; exit with 1 if it does."""
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=32, logprobs=0)
    with LLM(model) as llm:
        prompts = [[{"role": "user", "content": text}] for text in (QUESTION, *COMPANY)]
        alone = llm.chat(prompts[0], params)[0]
        together = llm.chat(prompts, params)[0]
    same = fingerprint(alone) == fingerprint(together)
    print(together.outputs[0].text)
    print("bit-identical" if same else "DIFFERENT")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
