"""Tiny decoders for GPUs, planned and packed as a bundle's would be."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.launch import launch_table
from sinterlm.backends.gpu.simulator import Simulator
from sinterlm.backends.gpu.table import Table
from sinterlm.ir.bf16 import to_bf16
from sinterlm.ir.graph import DecoderConfig, Graph
from sinterlm.ir.plan import MatrixOrder, Plan
from sinterlm.ir.quant import ActDType, CodedMatrix, GemmFormat
from sinterlm.passes.coding import in_format
from sinterlm.passes.formats import Scheme
from sinterlm.passes.packing import packed_chunks
from sinterlm.passes.pipeline import plan
from tests.gpu.oplib import coded
from tests.ir.graphs import config, plain_graph, random_weights

#: Between them: tied and not, every bias, q/k norm, windows, GQA 1, 3, 5, padding of MLP and head.
CONFIGS: dict[str, DecoderConfig] = {
    "llama-tied": config(
        vocab=150, hidden=64, heads=6, kv_heads=2, head_dim=32, ffn=128, tied=True
    ),
    "qwen3": config(
        vocab=131, hidden=64, heads=2, kv_heads=2, head_dim=32, ffn=129, qk_norm=True, o_bias=True,
        mlp_bias=True,
    ),
    "qwen2-window": config(
        vocab=200, hidden=64, heads=10, kv_heads=2, head_dim=64, ffn=70, qkv_bias=True, layers=2,
        windows=(0, 8),
    ),
}  # fmt: skip


@dataclass
class TinyGpu:
    graph: Graph
    weights: dict[str, np.ndarray | CodedMatrix]  #: as floats, or the codes that are packed
    plan: Plan
    table: Table
    packed: np.ndarray  #: bytes of the weights file

    def simulator(self, **sizes: int) -> Simulator:
        return Simulator(self.table, self.packed, self.graph.config.rope, **sizes)


def fp8(device: str, asked: bool = True, act: ActDType = "graph") -> Scheme:
    """``--quantization fp8`` on a device; or none, for what a checkpoint brings."""
    return Scheme(8 if asked else None, None, act, asked, DEVICES[device].fp8)


def tiny(
    name: str, device: str, scheme: Scheme | None = None, stored: GemmFormat | None = None,
    order: MatrixOrder = "tiles", kv_fp8: bool = False,
) -> TinyGpu:  # fmt: skip
    """A model; ``scheme`` with act "graph", as a GPU has it. ``stored`` is the format of the
    projections in the checkpoint; ``order`` "pitched" is for the vendor's GEMM; ``kv_fp8``: an fp8
    KV cache, with scales of all kinds."""
    graph = plain_graph(CONFIGS[name], "bf16")
    if kv_fp8:
        scales = ((0.0117, 0.5), (1.0, 0.0031))[: graph.config.num_layers]
        graph = replace(graph, kv_scales=scales)
    weights = random_weights(graph, seed=len(name))
    projections = [n for n, w in graph.weights.items() if n[0].isdigit() and len(w.shape) == 2]
    brought = {n: coded(weights[n], stored) for n in projections} if stored else {}
    formats = dict.fromkeys(brought, stored) if stored else {}
    made = plan(graph, scheme=scheme, stored=formats, order=order)
    packed = np.zeros(made.layout.nbytes, np.uint8)

    def read(tensor: str, dtype: str) -> np.ndarray:
        return to_bf16(weights[tensor]) if dtype == "bf16" else weights[tensor]

    def read_coded(tensor: str, form: GemmFormat) -> CodedMatrix | None:
        return brought[tensor].written_as(form.code) if tensor in brought else None

    for offset, chunk in packed_chunks(made.layout, read, read_coded=read_coded):
        packed[offset : offset + chunk.nbytes] = np.frombuffer(chunk, np.uint8)
    held: dict[str, np.ndarray | CodedMatrix] = dict(weights)
    for weight, form in made.graph.formats.items():
        held[weight] = brought.get(weight) or in_format(weights[weight], form)
    return TinyGpu(graph, held, made, launch_table(made, DEVICES[device]), packed)
