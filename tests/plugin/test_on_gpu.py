"""SinterLM inside vLLM on a real GPU: `pytest -m gpu tests/plugin`, with ENGINES_DIR naming the
folder of an environment `vllm` that has torch for the device. Skipped where there is none."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sinterlm import LLM, SamplingParams
from tests.conftest import ROOT
from tests.plugin.conftest import vllm_environment

TRAINED = ROOT / "tests/assets/tiny-llama"
SCRIPT = ROOT / "scripts/vllm_ab.py"
PROMPTS: list[Any] = [{"prompt_token_ids": ids} for ids in ([5, 17, 99, 3, 120, 8, 64], [1],
                                                            [130, 22, 22])]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("run", ["eager_tokens", "tokens"], ids=["eager", "graphs"])
def test_the_cpus_tokens(python: Path, beside: Path, run: str) -> None:
    """Eagerly, and with vLLM's graphs."""
    asked = [python, "-c", "import torch; print(torch.cuda.is_available())"]
    if "True" not in subprocess.run(asked, capture_output=True, text=True, check=True).stdout:
        pytest.skip("torch sees no GPU")
    done = subprocess.run(
        [python, SCRIPT, TRAINED, TRAINED, "--run", run], capture_output=True, text=True,
        env=vllm_environment(python, beside, SINTERLM_VLLM="require"), timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with LLM(str(TRAINED), max_model_len=256, kv_cache_memory_bytes=4 << 20) as llm:
        alone = [list(answer.outputs[0].token_ids) for answer in llm.generate(PROMPTS, greedy)]
    (line,) = (text for text in done.stdout.splitlines() if text.startswith("result: "))
    assert json.loads(line.removeprefix("result: ")) == alone
