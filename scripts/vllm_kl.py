"""Greedy answers of SinterLM alone, inside vLLM, and of stock vLLM, and how far each is from fp32.

    python scripts/vllm_kl.py HF_FOLDER [--engines-dir DIR] [--json]

The reference is SinterLM's fp32. KL(fp32 || each) in nats is over the whole vocabulary, of the
tokens of fp32's own greedy answers, teacher-forced: alone by ``LLM.forward_logits``, in vLLM by
``prompt_logprobs=-1``. Tables in Markdown, or one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sinterlm import LLM, SamplingParams
from sinterlm.bench.eval_metrics import compare
from sinterlm.options import QuantizationName

SCRIPT = Path(__file__).with_name("vllm_greedy.py")
PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Write a short poem about the sea.",
    "Explain in simple words why the sky is blue.",
    "Name the planets of the solar system in order.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train covers 120 km in 2 hours. How fast is it?",
    "Give me three tips for a good night's sleep.",
    "Tell me a story about a fox and a crow.",
)
TOKENS = 32
PARAMS = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)

#: Arm -> quantization of SinterLM alone, or what vLLM's environment gets.
ARMS: dict[str, QuantizationName | dict[str, str] | None] = {
    "alone, bf16": None,
    "plugin, bf16": {"SINTERLM_VLLM": "require"},
    "stock, bf16": {"SINTERLM_VLLM": "off"},
    "alone, int8": "int8",
    "plugin, int8": {"SINTERLM_VLLM": "require", "SINTERLM_QUANTIZATION": "int8"},
}


@dataclass(frozen=True)
class Arm:
    """What one of them did with each prompt."""

    tokens: list[list[int]]
    texts: list[str]
    kl: list[float]  #: mean over the tokens forced
    most_kl: float  #: of any token
    top1: float  #: share of tokens where fp32 prefers the same one
    first: list[int | None]  #: index of the first token that is not that of SinterLM alone
    margin: list[float | None]  #: there, by how much fp32 prefers the one to the other (logits)


def main() -> None:
    """Run them all and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--engines-dir", type=Path, default=Path("build/bench/engines"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    python = args.engines_dir.resolve() / "vllm/bin/python"
    if not python.exists():
        sys.exit(f"{python} is missing; run: sinterlm bench setup vllm+sinterlm")
    model = str(args.model.resolve())
    with LLM(model, dtype="fp32", max_model_len=512) as reference:
        found = measure(reference, model, python)
    print(json.dumps({k: asdict(v) for k, v in found.items()}) if args.json else tables(found))


def measure(reference: LLM, model: str, python: Path) -> dict[str, Arm]:
    """Every arm beside ``reference``, which is fp32."""
    prompts = [
        list(reference.chat_prompt([{"role": "user", "content": text}])["prompt_token_ids"])
        for text in PROMPTS
    ]
    forced = answers(reference, prompts)
    logits = forced_logits(reference, prompts, forced)
    found: dict[str, Arm] = {}
    for name, how in ARMS.items():
        if not isinstance(how, dict):
            with LLM(model, quantization=how, max_model_len=512) as llm:
                tokens, scores = answers(llm, prompts), forced_logits(llm, prompts, forced)
            beside = tokens
        else:
            tokens, scores = in_vllm(python, model, how, prompts, forced)
            beside = found["alone, int8" if "int8" in name else "alone, bf16"].tokens
        deltas = compare(logits, scores, np.concatenate(forced).astype(np.int32))
        pairs = [parted(reference, *three) for three in zip(prompts, tokens, beside, strict=True)]
        found[name] = Arm(
            tokens=tokens,
            texts=[reference.tokenizer.decode(ids) for ids in tokens],
            kl=deltas.kl.reshape(len(PROMPTS), TOKENS).mean(axis=1).tolist(),
            most_kl=float(deltas.kl.max()),
            top1=float(deltas.agrees.mean()),
            first=[first for first, _ in pairs],
            margin=[margin for _, margin in pairs],
        )
    return found


def answers(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of each prompt."""
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], PARAMS)
    return [list(output.outputs[0].token_ids) for output in outputs]


def forced_logits(llm: LLM, prompts: list[list[int]], forced: list[list[int]]) -> Any:
    """Logits [tokens forced, V] before each token of ``forced``."""
    rows = [
        llm.forward_logits([*ids, *more[:-1]])[-len(more) :]
        for ids, more in zip(prompts, forced, strict=True)
    ]
    return np.concatenate(rows)


def in_vllm(
    python: Path, model: str, variables: dict[str, str], prompts: list[list[int]],
    forced: list[list[int]],
) -> tuple[list[list[int]], Any]:  # fmt: skip
    """The same two of a vLLM."""
    openmp = python.parents[1] / "lib/libiomp5.so"
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        **({"LD_PRELOAD": str(openmp)} if openmp.exists() else {}), **variables,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sinterlm-kl-") as folder:
        scores = Path(folder) / "scores.npy"
        command = [str(python), str(SCRIPT), model, "--max-tokens", str(TOKENS), "--forced",
                   json.dumps(forced), "--scores", str(scores)]  # fmt: skip
        done = subprocess.run(
            command, input=json.dumps(prompts), env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
        line = next(text for text in done.stdout.splitlines() if text.startswith('{"/'))
        return json.loads(line)[model]["tokens"], np.load(scores)


def parted(
    reference: LLM, prompt: list[int], tokens: list[int], beside: list[int]
) -> tuple[int | None, float | None]:
    """Where ``tokens`` leave ``beside`` behind ``prompt``, and fp32's margin between the two."""
    for at, (one, other) in enumerate(zip(tokens, beside, strict=True)):
        if one != other:
            row = reference.forward_logits([*prompt, *tokens[:at]])[-1]
            return at, abs(float(row[one] - row[other]))
    return None, None


def tables(found: dict[str, Arm]) -> str:
    """Answers in bf16; where tokens part; KL."""
    alone, plugin, stock = (found[f"{name}, bf16"] for name in ("alone", "plugin", "stock"))
    lines = ["| prompt | SinterLM alone | plugin | stock |", "|---|---|---|---|"]
    for i, prompt in enumerate(PROMPTS):
        others = " | ".join(shown(arm, alone, i) for arm in (plugin, stock))
        lines.append(f"| {prompt} | {one_line(alone.texts[i])} | {others} |")
    names = list(ARMS)
    lines += ["", "| KL to fp32, 1e-5 nats | " + " | ".join(names) + " |"]
    lines += ["|---|" + "---|" * len(names)]
    for i, prompt in enumerate(PROMPTS):
        cells = (f"{1e5 * found[name].kl[i]:.1f}" for name in names)
        lines.append(f"| {prompt} | " + " | ".join(cells) + " |")
    rows: dict[str, Callable[[Arm], str]] = {
        "mean": lambda arm: f"{1e5 * np.mean(arm.kl):.1f}",
        "largest of a token": lambda arm: f"{1e5 * arm.most_kl:.0f}",
        "same best token as fp32": lambda arm: f"{arm.top1:.1%}",
        "answers equal to SinterLM alone": lambda arm: f"{arm.first.count(None)} of {len(PROMPTS)}",
    }
    for title, value in rows.items():
        lines.append(f"| **{title}** | " + " | ".join(value(found[name]) for name in names) + " |")
    return "\n".join(lines)


def shown(arm: Arm, beside: Arm, i: int) -> str:
    """Answer ``i`` of an arm, from where it differs."""
    at = arm.first[i]
    if at is None:
        return "the same"
    pairs = zip(arm.texts[i], beside.texts[i], strict=False)
    common = next((n for n, (one, other) in enumerate(pairs) if one != other), 0)
    margin = f"{arm.margin[i]:.3f}"
    return f"… {one_line(arm.texts[i][common:])} (from token {at + 1}, margin {margin})"


def one_line(text: str) -> str:
    """For a cell."""
    return text.replace("\n", "⏎").replace("|", "\\|")


if __name__ == "__main__":
    main()
