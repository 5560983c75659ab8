"""A compile side small enough to reason about: one matrix, copied row by row; a library in C++."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from sinterlm.artifact.manifest import OpCost
from sinterlm.artifact.progress import Progress
from sinterlm.artifact.text import TextAssets
from sinterlm.compile import Job
from sinterlm.ir.graph import DecoderConfig, Graph, Rope
from sinterlm.ir.plan import MemoryPlan, PackedTensor, Plan, Segment, WeightLayout
from sinterlm.ir.quant import GemmFormat

ROWS, COLUMNS = 64, 16
WEIGHT_BYTES = ROWS * COLUMNS * 2


def config(vocab_size: int = 32) -> DecoderConfig:
    return DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        intermediate_size=24,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope=Rope((1.0, 0.01)),
    )


class FakeCheckpoint:
    """A folder holding ``weights.safetensors`` (raw bytes) and ``config.json``."""

    def __init__(self, path: Path, vocab_size: int = 32) -> None:
        self.path: Path | None = path
        self.name = path.name
        self.config = config(vocab_size)
        self.files = (path / "weights.safetensors",)
        self.text = TextAssets(chat_template=(path / "config.json").read_text())
        self.digests = 0
        self.reads = 0
        self.read_exact = self.read_coded = None  # ``chunks`` stands for them

    def __enter__(self) -> FakeCheckpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def origin(self, name: str, form: GemmFormat) -> str:
        return ""

    @property
    def whole(self) -> FakeCheckpoint:
        return self

    def digest_from(self, whole_digest: str) -> str:
        return whole_digest

    def digest(self, progress: Progress | None = None) -> str:
        self.digests += 1
        return hashlib.sha256(self.files[0].read_bytes()).hexdigest()

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        self.reads += 1
        data = self.files[0].read_bytes()
        for at in range(0, WEIGHT_BYTES, 512):
            yield at, memoryview(data)[at : at + 512]


def write_checkpoint(folder: Path, fill: int, config_text: str = "{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.safetensors").write_bytes(bytes([fill]) * WEIGHT_BYTES)
    (folder / "config.json").write_text(config_text)
    return folder


def plan(job: Job, checkpoint: FakeCheckpoint) -> Plan:
    tensor = PackedTensor(
        "embed", "rows", "bf16", ROWS, COLUMNS, COLUMNS,
        (Segment("embed", 0, ROWS, 0),), 0, WEIGHT_BYTES,
    )  # fmt: skip
    layout = WeightLayout((tensor,), WEIGHT_BYTES, 7)
    return Plan(Graph(checkpoint.config, job.dtype, ()), layout, MemoryPlan((), 64, 64))


def emit(job: Job, made: Plan) -> str:
    vocab = made.graph.config.vocab_size
    return f'#include "abi.h"\nextern "C" SL_API int vocab_size() {{ return {vocab}; }}\n'


def costs() -> tuple[OpCost, ...]:
    return (OpCost("embed_norm", -1, WEIGHT_BYTES, 8, 0, 0, 16, 0, 0),)
