"""Tiny models as real bundles: planned, emitted, compiled and packed as any other."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.manifest import (
    ABI_VERSION,
    FORMAT_VERSION,
    Constants,
    FileRef,
    Manifest,
    ModelShape,
)
from sinterlm.backends.cpu.emit import emit
from sinterlm.ir.bf16 import to_bf16
from sinterlm.ir.graph import DecoderConfig, Graph
from sinterlm.ir.plan import Plan
from sinterlm.ir.quant import CodedMatrix
from sinterlm.options import IsaName
from sinterlm.passes.formats import Scheme
from sinterlm.passes.packing import packed_chunks
from sinterlm.passes.pipeline import plan
from sinterlm.passes.quantise import quantise
from sinterlm.runtime.batch import RowSampling, StepBatch
from sinterlm.runtime.model import Model
from tests.ir.graphs import config, plain_graph, random_weights
from tests.libraries import BuildLibrary

MAX_LEN = 400


@dataclass
class Tiny:
    """A bundle and all it was made of."""

    graph: Graph
    weights: dict[str, np.ndarray]  #: as floats
    plan: Plan
    bundle: Bundle

    @property
    def config(self) -> DecoderConfig:
        return self.graph.config

    def stored(self) -> dict[str, np.ndarray | CodedMatrix]:
        """The weights as the bundle has them: in codes where the plan says so."""
        formats = self.plan.graph.formats
        return {
            name: quantise(w, form.bits, form.group, form.symmetric)
            if (form := formats.get(name))
            else w
            for name, w in self.weights.items()
        }

    def open(self, **changes: Any) -> Model:
        """A Model with room for 64 tokens, 8 sequences, 64 rows, and 64 pages of 16 tokens."""
        pages, page_tokens = changes.pop("pages", 64), changes.pop("page_tokens", 16)
        sizes = {"num_threads": 2, "max_tokens": 64, "max_seqs": 8, "max_sample_rows": 64}
        model = Model(self.bundle, **{**sizes, "max_model_len": MAX_LEN, **changes})
        model.alloc_kv(pages, page_tokens)
        return model


#: Between them: tied and not, every bias, q/k norm, padding of every width, windows, GQA 3, 1, 5.
CONFIGS = {
    "gqa3-tied-window": config(
        vocab=150, hidden=96, layers=3, heads=6, tied=True, windows=(0, 24, 0)
    ),
    "odd-everything": config(
        vocab=131, hidden=100, heads=3, kv_heads=3, head_dim=48, ffn=129, qk_norm=True,
        qkv_bias=True, o_bias=True, mlp_bias=True,
    ),
    "gqa5-bias": config(vocab=300, hidden=80, heads=5, kv_heads=1, ffn=70, qkv_bias=True),
}  # fmt: skip


#: dtype names beyond bf16 and fp32: the graph's dtype, and how its matrices are quantised. Behind
#: any name, "+kv8" puts KV in codes.
QUANTISED = {
    "int8": ("bf16", Scheme(8, 0, "int8")),
    "int4": ("bf16", Scheme(4, 32, "int8")),
    "int4-fp32": ("fp32", Scheme(4, 128, "int8")),
    "int4-weights": ("bf16", Scheme(4, 64, "graph")),
}


def build_tiny(
    name: str,
    dtype: str,
    isa: IsaName,
    folder: Path,
    build: BuildLibrary,
    flags: Sequence[str] = (),
) -> Tiny:
    """A model in ``folder``, its library compiled by ``build``."""
    weights_dtype = dtype.removesuffix("+kv8")
    in_codes = weights_dtype != dtype
    dtype, scheme = QUANTISED.get(weights_dtype, (weights_dtype, None))
    graph = replace(plain_graph(CONFIGS[name], dtype), kv_in_codes=in_codes)
    weights = random_weights(graph, seed=len(name))
    return compile_tiny(graph, scheme, weights, isa, folder, build, flags)


def compile_tiny(
    graph: Graph, scheme: Scheme | None, weights: dict[str, np.ndarray], isa: IsaName, folder: Path,
    build: BuildLibrary, flags: Sequence[str] = (),
) -> Tiny:  # fmt: skip
    """The model of ``graph`` in ``folder``."""
    made = plan(graph, scheme=scheme)
    shutil.copy(build(emit(made, isa), isa, flags), folder / "model.so")
    write_weights(made, weights, folder / "weights.bin")
    return Tiny(graph, weights, made, bundle_of(made, isa, folder))


def write_weights(made: Plan, weights: dict[str, np.ndarray], path: Path) -> None:
    def read(name: str, dtype: str) -> np.ndarray:
        return to_bf16(weights[name]) if dtype == "bf16" else weights[name]

    data = np.zeros(made.layout.nbytes, np.uint8)
    for offset, chunk in packed_chunks(made.layout, read):
        data[offset : offset + chunk.nbytes] = np.frombuffer(chunk, np.uint8)
    path.write_bytes(data.tobytes())


def bundle_of(made: Plan, isa: IsaName, folder: Path) -> Bundle:
    c = made.graph.config

    def ref(name: str) -> FileRef:
        raw = (folder / name).read_bytes()
        return FileRef(name, len(raw), hashlib.sha256(raw).hexdigest())

    manifest = Manifest(
        format_version=FORMAT_VERSION,
        abi_version=ABI_VERSION,
        sinterlm_version="0",
        target="cpu",
        isa=isa,
        dtype=made.graph.dtype,
        quantization=None,
        kv_cache_dtype=made.graph.kv_dtype,
        model="tiny",
        code_key="",
        weights_key="",
        layout_hash=made.layout.layout_hash,
        max_model_len=c.max_position_embeddings,
        shape=ModelShape(
            c.architecture, c.vocab_size, c.hidden_size, c.num_layers, c.num_heads,
            c.num_kv_heads, c.head_dim, c.intermediate_size,
        ),
        constants=Constants(
            c.rms_norm_eps, c.rms_norm_eps, c.attention_scale, c.rope.attention_factor,
            c.rope.inv_freq, c.sliding_windows or (0,) * c.num_layers,
        ),
        ops=(),
        activation_bytes_per_token=made.memory.bytes_per_token,
        activation_bytes_per_row=made.memory.bytes_per_row,
        library=ref("model.so"),
        weights=ref("weights.bin"),
        text=None,
    )  # fmt: skip
    return Bundle(folder, manifest, "0" * 64)


def step_batch(
    *runs: tuple[list[int], int, list[int]],
    rows: list[int] | None = None,
    sampling: tuple[RowSampling, ...] = (),
    max_logprobs: int = 0,
    want_logits: bool = True,
    slots: list[int] | None = None,
) -> StepBatch:
    """A step of ``(pages, first position, token ids)`` runs; by default every row's logits."""
    lengths = [len(ids) for _, _, ids in runs]
    contexts = [first + len(ids) for _, first, ids in runs]
    table = np.zeros((len(runs), max(len(pages) for pages, _, _ in runs)), np.int32)
    for row, (pages, _, _) in zip(table, runs, strict=True):
        row[: len(pages)] = pages
    total = sum(lengths)
    return StepBatch(
        token_ids=np.array([t for _, _, ids in runs for t in ids], np.int32),
        positions=np.concatenate(
            [np.arange(first, first + len(ids), dtype=np.int32) for _, first, ids in runs]
        ),
        query_start=np.cumsum([0, *lengths]).astype(np.int32),
        context_lens=np.array(contexts, np.int32),
        page_table=table,
        sample_rows=np.array(range(total) if rows is None else rows, np.int32),
        sampling=sampling,
        slots=None if slots is None else np.array(slots, np.int32),
        want_logits=want_logits,
        max_logprobs=max_logprobs,
    )


def prefill(model: Model, ids: list[int], pages: list[int], chunk: int) -> np.ndarray:
    """Logits [len, V] of a sequence fed in chunks."""
    out = []
    for first in range(0, len(ids), chunk):
        run = pages, first, ids[first : first + chunk]
        logits = model.step(step_batch(run)).logits
        assert logits is not None
        out.append(logits)
    return np.concatenate(out)
