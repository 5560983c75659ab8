"""Which versions of vLLM SinterLM runs in, on this machine; a Markdown table.

    python scripts/vllm_matrix.py HF_FOLDER [VERSION...] [--engines-dir DIR]

Each version gets an environment of its own (``DIR/vllm-VERSION``, 3.5 GB), made unless it is there.
Greedy tokens inside vLLM are set beside those of SinterLM alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from sinterlm import LLM, SamplingParams
from sinterlm.bench.engines.environment import Environment
from sinterlm.bench.engines.vllm import install

VERSIONS = ("0.30.0", "0.31.0", "0.32.0")
SCRIPT = Path(__file__).with_name("vllm_greedy.py")
PROMPTS = ["The planets of the solar system in order are", "Once upon a time there was a king who"]
TOKENS = 24


def main() -> None:
    """Run each and print its row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--engines-dir", type=Path, default=Path("build/bench/engines"))
    args = parser.parse_args()
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    with LLM(str(args.model), max_model_len=512) as llm:
        outputs = llm.generate(PROMPTS, params)
    alone = [list(output.outputs[0].token_ids) for output in outputs]
    print("| vLLM | SinterLM inside | tokens equal to SinterLM's own |\n|---|---|---|")
    for version in args.versions:
        environment = Environment(args.engines_dir.resolve() / f"vllm-{version}")
        install(environment, "sinterlm", version)
        print(f"| {version} | {row(environment, args.model, alone)} |", flush=True)


def row(environment: Environment, model: Path, alone: list[list[int]]) -> str:
    """Whether ours ran, and how many tokens are equal; or how it ended."""
    variables = {**os.environ, "SINTERLM_VLLM": "on", "HF_HUB_OFFLINE": "1",
                 "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}  # fmt: skip
    done = subprocess.run(
        [environment.python, SCRIPT, model.resolve(), "--max-tokens", str(TOKENS)], env=variables,
        input=json.dumps(PROMPTS), capture_output=True, text=True, check=False,
    )  # fmt: skip
    log = (done.stdout + done.stderr).splitlines()
    told = [line.partition("SinterLM ")[2] for line in log if "SinterLM " in line]
    answer = next((line for line in reversed(done.stdout.splitlines()) if line[:1] == "{"), None)
    if done.returncode or answer is None:
        print(done.stderr[-2000:], file=sys.stderr)
        return f"failed: {log[-1] if log else done.returncode} | none"
    (inside,) = json.loads(answer).values()
    pairs = [zip(own, its, strict=True) for own, its in zip(alone, inside["tokens"], strict=True)]
    equal = sum(a == b for pair in pairs for a, b in pair)
    return f"{told[0] if told else 'not a word of it'} | {equal} of {TOKENS * len(PROMPTS)}"


if __name__ == "__main__":
    main()
