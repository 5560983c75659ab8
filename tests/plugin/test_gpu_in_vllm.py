"""vLLM's own engine drives a GPU library without a GPU (gpu_in_vllm.py). Slow: vLLM starts, and
Triton's interpreter computes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sinterlm import LLM, SamplingParams
from sinterlm.compile import compile_model
from sinterlm.options import CompileOptions
from tests.conftest import ROOT
from tests.gpu.host import build_driver
from tests.plugin.conftest import vllm_environment

TRAINED = ROOT / "tests/assets/tiny-llama"
#: One that is longer than a step of 12 tokens holds.
PROMPTS = ["The old man looked at the sea and said that it was too", "In the", "She said that"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_cpus_tokens(
    python: Path, beside: Path, tmp_path: Path, test_environment: Path
) -> None:
    """Chunked prefill, mixed steps, decode, and once more from the prefix cache."""
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    options: dict[str, Any] = {"max_model_len": 64, "kv_cache_memory_bytes": 4 << 20}
    with LLM(str(TRAINED), num_threads=1, cache_dir=test_environment, **options) as llm:
        answers = llm.generate(PROMPTS, greedy)
    prompts = [list(answer.prompt_token_ids) for answer in answers]
    assert len(prompts[0]) > 12
    # Compiled here: in a process that interprets kernels, none can be compiled.
    compile_model(CompileOptions(str(TRAINED), target="gfx942", max_model_len=64,
                                 cache_dir=test_environment))  # fmt: skip
    environment = vllm_environment(
        python, beside, SINTERLM_VLLM="require", VLLM_ENABLE_V1_MULTIPROCESSING="0",
        TRITON_INTERPRET="1", SINTERLM_GPU_DRIVER=str(build_driver(tmp_path, "hip")),
        SINTERLM_CACHE_DIR=str(test_environment),
    )  # fmt: skip
    environment["PYTHONPATH"] += f":{ROOT}"
    driver = environment["SINTERLM_GPU_DRIVER"]
    command = [python, "-m", "tests.plugin.gpu_in_vllm", TRAINED, driver]
    done = subprocess.run(
        command, input=json.dumps(prompts), env=environment, capture_output=True, text=True,
        timeout=1800, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "SinterLM runs this model: bf16, gfx942" in done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == []
    assert found["ran"]["final_norm"] > 4
    assert found["tokens"] == [list(answer.outputs[0].token_ids) for answer in answers]
    assert found["again"] == found["tokens"]
