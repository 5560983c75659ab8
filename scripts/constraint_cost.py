"""What following a grammar costs per token: advancing it and making the next mask, CPU time.

python scripts/constraint_cost.py smollm2
python scripts/constraint_cost.py smollm2 --vocabulary 151936   as large as Qwen's
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import numpy as np

from sinterlm.artifact.text import TextAssets
from sinterlm.compile import compile_model
from sinterlm.engine.constraints import Grammars
from sinterlm.engine.structured import StructuredOutputs
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.options import CompileOptions

DOCUMENT = json.dumps(
    {
        "name": "John Smith the great",
        "age": 42,
        "tags": ["a", "b and c", "d"],
        "address": {"street": "Main Street 12", "lines": ["one two three four", "five six"]},
    }
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {"type": "object"},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WANTED = {
    "schema": StructuredOutputs(json=SCHEMA),
    "json_object": StructuredOutputs(json_object=True),
    "regex": StructuredOutputs(regex=r"\{.*\}"),
}


def main() -> None:
    """Follow one document again and again, with each kind of constraint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--vocabulary", type=int, help="tokens; default: the model's own")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    bundle = compile_model(CompileOptions(model=args.model))
    assets, vocab_size = bundle.text(), bundle.manifest.shape.vocab_size
    if args.vocabulary:
        assets = widened(assets, args.vocabulary)
        vocab_size = args.vocabulary
    grammars = Grammars(Tokenizer(assets), vocab_size)
    grammars.prepare(WANTED["json_object"])
    print(f"{vocab_size} tokens, {len(DOCUMENT)} characters of JSON")
    ids = Tokenizer(assets).encode(DOCUMENT, add_special_tokens=False)
    for name, wanted in WANTED.items():
        grammars.prepare(wanted)
        micros = []
        for _ in range(args.rounds):
            constraint = grammars.constraint(wanted)
            for token_id in ids:
                start = time.thread_time()
                constraint.advance(token_id)
                micros.append(1e6 * (time.thread_time() - start))
        steady = np.array(micros[len(ids) :])  # the first round fills the lexer's tables
        print(
            f"{name}: median {np.median(steady):.1f} us per token, mean {steady.mean():.1f}, "
            f"p99 {np.percentile(steady, 99):.0f}"
        )


def widened(assets: TextAssets, size: int) -> TextAssets:
    """The same tokenizer with pairs of its own short words as further ones."""
    assert assets.tokenizer_json is not None
    tokenizer = json.loads(assets.tokenizer_json)
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    words = [word for word in vocab if 2 <= len(word) <= 6]
    rng = np.random.default_rng(0)
    while len(vocab) < size:
        first, second = rng.integers(0, len(words), 2)
        vocab.setdefault(words[first] + words[second], len(vocab))
    return replace(assets, tokenizer_json=json.dumps(tokenizer))


if __name__ == "__main__":
    main()
