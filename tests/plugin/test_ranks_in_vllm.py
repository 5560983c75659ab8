"""``--tensor-parallel-size 2`` with SinterLM inside vLLM's workers. Slow: vLLM starts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from sinterlm import LLM, SamplingParams
from tests.plugin.conftest import vllm_environment
from tests.plugin.families import CONFIGS, write_tiny
from tests.plugin.test_in_vllm import answers, check_same, told
from tests.plugin.test_vllm_serves import is_healthy

pytestmark = pytest.mark.slow
RANKS = ("--tensor-parallel-size", "2", "--kv-bytes", str(64 << 20))
PROMPTS = [[(i * i * 7 + i) % 515 for i in range(1, n)] for n in (6, 40, 90)]
START_S, END_S = 600, 60


@pytest.fixture(autouse=True)
def one_cpu_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM by itself wants a NUMA node for each rank."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("two ranks take two CPUs")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cpus[0]}|{cpus[1]}")


@pytest.mark.parametrize(
    ("name", "dtype"), [("deepseek-r1-distill-llama", "float32"), ("qwen3", "bfloat16")]
)
def test_two_ranks_draw_what_one_draws(
    python: Path, beside: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    """The embedded engine is the one rank. Again from the prefix cache, too."""
    model = write_tiny(name, tmp_path)
    done = answers(python, beside, [model], PROMPTS, *RANKS, "--dtype", dtype)
    for rank in range(2):
        assert f"rank {rank} of 2, CPUs" in done.stdout + done.stderr
    two = told(done)[str(model)]
    assert two["again"] == two["tokens"]
    params = SamplingParams(
        temperature=0, max_tokens=32, ignore_eos=True, logprobs=2, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    with LLM(str(model), dtype=dtype, max_model_len=512) as llm:
        one = [output.outputs[0] for output in llm.generate(prompts, params)]
    same = [check_same(ours, own) for ours, own in zip(two["tokens"], one, strict=True)]
    assert sum(same) >= (len(PROMPTS) if dtype == "float32" else len(PROMPTS) - 1), same


def test_what_does_not_divide_is_left_to_vllm(python: Path, beside: Path, tmp_path: Path) -> None:
    """One KV head, which vLLM gives to both ranks."""
    assert CONFIGS["qwen2.5"]["num_key_value_heads"] == 1
    model = write_tiny("qwen2.5", tmp_path)
    done = answers(python, beside, [model], PROMPTS, *RANKS, "--dtype", "float32", switch="on")
    told(done)
    reason = "tensor_parallel_size=2 does not divide num_kv_heads=1"
    assert (done.stdout + done.stderr).count(f"leaves this model to vLLM: {reason}") == 2


@pytest.fixture
def served(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model with SmolLM2's tokenizer."""
    tiny = {**CONFIGS["deepseek-r1-distill-llama"], "vocab_size": 49152}
    monkeypatch.setitem(CONFIGS, "served", tiny)
    folder = write_tiny("served", tmp_path)
    for file in model.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def test_a_killed_rank_ends_the_server(
    python: Path, beside: Path, served: Path, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "log"
    command = [
        python, "-m", "sinterlm", "vllm", "serve", served, "--port", str(port),
        "--served-model-name", "tiny", "--max-model-len", "8192", "--max-num-seqs", "4",
        "--kv-cache-memory-bytes", str(64 << 20), "--tensor-parallel-size", "2",
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out,
            env=vllm_environment(python, beside, SINTERLM_VLLM="require"),
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + START_S
        while not is_healthy(url):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(1)
        status: list[int] = []
        client = threading.Thread(target=lambda: status.append(complete(url, max_tokens=8000)))
        client.start()
        time.sleep(2)
        assert client.is_alive(), "the request ended before a rank could be killed"
        worker = re.search(r"Worker_TP1 pid=(\d+)", log.read_text())
        assert worker is not None
        os.kill(int(worker[1]), signal.SIGKILL)
        client.join(END_S)
        assert status == [500], log.read_text()[-3000:]
        process.wait(END_S)
        text = log.read_text()
        assert "died unexpectedly" in text
        # The other rank's sum fails where the connection breaks while it waits; where it waits in
        # shared memory nothing breaks, and vLLM ends that rank itself.
        ends = ("the sum over 2 ranks failed on rank 0", "workers still running after SIGTERM")
        assert any(end in text for end in ends), text[-3000:]
    finally:
        process.kill()
        process.wait(END_S)


def complete(url: str, max_tokens: int) -> int:
    """The status of one completion; 0 where the connection broke."""
    body = f'{{"model": "tiny", "prompt": "A", "max_tokens": {max_tokens}, "ignore_eos": true}}'
    request = urllib.request.Request(
        f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
