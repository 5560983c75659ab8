"""SinterLM inside an installed vLLM draws the tokens that it draws alone. Slow: vLLM starts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sinterlm import LLM, CompletionOutput, SamplingParams
from tests.conftest import ROOT
from tests.plugin.conftest import vllm_environment
from tests.plugin.families import CONFIGS, write_tiny

PROMPTS = [
    "The planets of the solar system in order are",
    "Once upon a time there was a king who",
    "def fibonacci(n):",
    *(f"Count from {n} to {n + 20}: {n}, {n + 1}," for n in range(1, 9)),
]


def answers(
    python: Path, beside: Path, models: list[Path], prompts: list[Any], *arguments: str,
    switch: str = "require", in_one_process: bool = False,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """What scripts/vllm_greedy.py does in that vLLM."""
    environment = vllm_environment(python, beside, SINTERLM_VLLM=switch)
    if in_one_process:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return subprocess.run(
        [python, ROOT / "scripts/vllm_greedy.py", *models, *arguments], input=json.dumps(prompts),
        env=environment, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON object that the script ends with."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"/')))
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kv_bytes", [1 << 30, 24 << 20], ids=["roomy", "preempting"])
def test_same_tokens_as_alone(python: Path, beside: Path, model: Path, kv_bytes: int) -> None:
    done = answers(python, beside, [model], PROMPTS, "--kv-bytes", str(kv_bytes))
    inside = told(done)[str(model)]
    assert "SinterLM runs this model" in done.stdout + done.stderr
    assert inside["tokens"] == inside["again"]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=2)
    with LLM(str(model), max_model_len=512) as llm:
        alone = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
    same = [check_same(ours, own) for ours, own in zip(inside["tokens"], alone, strict=True)]
    assert sum(same) >= len(PROMPTS) - 2, same


def check_same(inside: list[int], alone: CompletionOutput) -> bool:
    """Whether all tokens are equal; the first that is not must have been a near tie, since the
    last norm is rounded at another place where hidden states leave the library."""
    assert alone.logprobs is not None
    for token, own, near in zip(inside, alone.token_ids, alone.logprobs, strict=True):
        if token != own:
            best, second = sorted((entry.logprob for entry in near.values()), reverse=True)[:2]
            assert token in near and best - second < 0.1
            return False
    return True


@pytest.mark.slow
def test_families_in_fp32_draw_what_stock_draws(python: Path, beside: Path, tmp_path: Path) -> None:
    """Tiny models with real configs. Where the tokens part, stock must have been near a tie."""
    models = [write_tiny(name, tmp_path) for name in CONFIGS]
    prompts = [[(i * i * 7 + i) % 515 for i in range(1, n)] for n in (6, 40, 90)]
    flags = ("--dtype", "float32", "--kv-bytes", str(64 << 20))
    run = answers(python, beside, models, prompts, *flags, in_one_process=True)
    ours = told(run)
    assert (run.stdout + run.stderr).count("SinterLM runs this model") == len(models)
    stock = told(
        answers(python, beside, models, prompts, *flags, switch="off", in_one_process=True)
    )
    for model in map(str, models):
        assert ours[model]["again"] == ours[model]["tokens"]
        for got, want, margins in zip(
            ours[model]["tokens"], stock[model]["tokens"], stock[model]["margins"], strict=True
        ):
            parted = next(
                (i for i, pair in enumerate(zip(got, want, strict=True)) if len(set(pair)) > 1),
                None,
            )
            assert parted is None or margins[parted] < 1e-3, (model, parted)


@pytest.mark.slow
def test_require_says_what_is_left_to_vllm(python: Path, beside: Path, model: Path) -> None:
    done = answers(python, beside, [model], ["x"], "--dtype", "float16")
    assert done.returncode != 0
    assert "dtype torch.float16 is not supported" in done.stdout + done.stderr
