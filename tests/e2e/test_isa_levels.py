"""Every ISA level this machine has compiles a tiny model and passes its goldens."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from sinterlm import LLM
from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.isa import available_isas
from sinterlm.compile import compile_model
from sinterlm.options import CompileOptions
from tests.e2e.support import MODELS, load_golden

from .test_goldens import FP32_TOLERANCE, assert_bf16_close, greedy_tokens

MODEL = "llama-llama3-gqa4"
LEVELS = available_isas()
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"


def _open(level: str, dtype: str, cache_dir: Path) -> LLM:
    return LLM(
        str(MODELS / MODEL), dtype=dtype, isa=level, cache_dir=cache_dir, num_threads=2,
        kv_cache_memory_bytes=8 << 20,
    )  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
def test_bf16(level: str, cache_dir: Path) -> None:
    golden = load_golden(MODEL)
    with _open(level, "bf16", cache_dir) as llm:
        assert_bf16_close(llm, golden)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_fp32(level: str, cache_dir: Path) -> None:
    golden = load_golden(MODEL)
    with _open(level, "fp32", cache_dir) as llm:
        for prompt, logits in zip(golden.prompts, golden.logits, strict=True):
            error = np.abs(llm.forward_logits(prompt) - logits).max()
            assert error <= FP32_TOLERANCE * np.abs(logits).max()
        assert greedy_tokens(llm, golden) == [g.tolist() for g in golden.greedy]


def _job(bundle: Bundle, prompt: NDArray[np.int32]) -> str:
    """job.h of driver.c: what the run side takes from a manifest, and a prompt."""
    manifest, constants = bundle.manifest, bundle.manifest.constants
    assert manifest.weights is not None
    numbers = {
        "LAYOUT_HASH": f"{manifest.layout_hash}ull",
        "WEIGHTS": f'"{bundle.weights_path}"',
        "WEIGHTS_BYTES": manifest.weights.nbytes,
        "RMS_EPS": repr(constants.rms_eps),
        "QK_EPS": repr(constants.qk_eps),
        "ATTENTION_SCALE": repr(constants.attention_scale),
        "ROPE_FACTOR": repr(constants.rope_attention_factor),
        "VOCAB": manifest.shape.vocab_size,
    }
    lines = [f"#define JOB_{name} {value}" for name, value in numbers.items()]
    for name, kind, values in (
        ("inv_freq", "double", constants.inv_freq),
        ("windows", "int32_t", constants.windows),
        ("prompt", "int32_t", prompt.tolist()),
    ):
        lines.append(f"static const {kind} {name}[] = {{{', '.join(map(repr, values))}}};")
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which(EMULATOR)),
    reason=f"needs {CROSS} (g++-aarch64-linux-gnu) and {EMULATOR} (qemu-user)",
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_aarch64_gives_the_bytes_of_x86_generic(
    dtype: Literal["bf16", "fp32"],
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cross-compiled, run under an emulator by the C ABI alone, compared bit for bit."""
    golden = load_golden(MODEL)
    with _open("generic", dtype, cache_dir) as llm:
        expected = llm.forward_logits(golden.prompts[-1])
    monkeypatch.setenv("SINTERLM_CXX", CROSS)
    bundle = compile_model(
        CompileOptions(
            str(MODELS / MODEL), dtype=dtype, isa="generic", cache_dir=tmp_path / "cache"
        )
    )
    header = bundle.library_path.read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and header[18] == 183, "an ELF for aarch64"
    (tmp_path / "job.h").write_text(_job(bundle, golden.prompts[-1]))
    here, program = Path(__file__).parent, tmp_path / "driver"
    include = here.parents[1] / "src/sinterlm/artifact"
    subprocess.run(
        [CROSS.replace("g++", "gcc"), here / "driver.c", bundle.library_path, f"-I{include}",
         f"-I{tmp_path}", "-o", program],
        check=True,
    )  # fmt: skip
    libraries = {
        "QEMU_LD_PREFIX": "/usr/aarch64-linux-gnu",
        "LD_LIBRARY_PATH": str(bundle.library_path.parent),
    }
    done = subprocess.run(
        [EMULATOR, program], env=os.environ | libraries, capture_output=True, check=True
    )
    got = np.frombuffer(done.stdout, np.float32).reshape(expected.shape)
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
