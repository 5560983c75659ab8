"""SinterLM inside an installed vLLM draws the tokens that it draws alone. Slow: vLLM starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sinterlm import LLM, CompletionOutput, SamplingParams
from tests.plugin.families import CONFIGS, write_tiny

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    "The planets of the solar system in order are",
    "Once upon a time there was a king who",
    "def fibonacci(n):",
    *(f"Count from {n} to {n + 20}: {n}, {n + 1}," for n in range(1, 9)),
]


@pytest.fixture(scope="module")
def python() -> Path:
    engines = Path(os.environ.get("ENGINES_DIR") or ROOT / "build/bench/engines")
    python = engines / "vllm/bin/python"
    if not python.exists():
        pytest.skip(f"vLLM is not installed in {engines}: make bench-setup does")
    return python


@pytest.fixture(scope="module")
def beside(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SinterLM installed beside that vLLM, which itself stays as it is."""
    target = tmp_path_factory.mktemp("beside")
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--target", target]
    subprocess.run([*pip, ROOT, "gguf"], check=True)
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a Hugging Face folder."""
    made = tmp_path_factory.mktemp("weights")
    command = [sys.executable, "-m", "sinterlm", "bench", "make-checkpoint", "smollm2"]
    subprocess.run([*command, "--output", made], check=True)
    return made / "hf"


def answers(
    python: Path, beside: Path, models: list[Path], prompts: list[Any], *arguments: str,
    switch: str = "require", in_one_process: bool = False,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """What scripts/vllm_greedy.py does in that vLLM."""
    environment = {
        **os.environ, "PYTHONPATH": str(beside), "HF_HUB_OFFLINE": "1",
        "SINTERLM_VLLM": switch, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_one_process else "1",
    }  # fmt: skip
    openmp = python.parents[1] / "lib/libiomp5.so"
    if openmp.exists():
        environment["LD_PRELOAD"] = str(openmp)
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
