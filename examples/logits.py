"""Perplexity of a text. Usage: python examples/logits.py [MODEL] [TEXT]"""

import sys

import numpy as np

from sinterlm import LLM

TEXT = "The Earth goes around the Sun once a year, and the Moon goes around the Earth."


def perplexity(llm: LLM, text: str) -> float:
    """exp of the mean negative log-likelihood (nats) of each token after the first."""
    ids = llm.tokenizer.encode(text)
    logits = llm.forward_logits(ids).astype(np.float64)[:-1]  # row i predicts token i + 1
    log_norm = np.logaddexp.reduce(logits, axis=1)
    drawn = logits[np.arange(len(ids) - 1), ids[1:]]
    return float(np.exp(np.mean(log_norm - drawn)))


def main(model: str, text: str) -> None:
    """Print the perplexity of ``text`` under ``model``, in fp32."""
    with LLM(model, dtype="fp32") as llm:
        print(f"perplexity {perplexity(llm, text):.3f}")


if __name__ == "__main__":
    main(*(sys.argv[1:] + ["smollm2", TEXT][len(sys.argv) - 1 :]))
