"""The passes, in order, and why in this order. Every graph in between is verified and dumped, and
means what the first one meant: the reference runs each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sinterlm.ir import ops
from sinterlm.ir.graph import Graph
from sinterlm.ir.plan import MatrixOrder, Plan
from sinterlm.ir.quant import GemmFormat
from sinterlm.ir.text import graph_text
from sinterlm.ir.verify import verify
from sinterlm.passes.formats import Scheme, choose_formats
from sinterlm.passes.fuse_attention import fuse_o_residual, fuse_qkv
from sinterlm.passes.fuse_ends import fuse_embed, fuse_head
from sinterlm.passes.fuse_mlp import fuse_down_residual, fuse_gate_up
from sinterlm.passes.layout import layout_weights
from sinterlm.passes.memory import plan_memory
from sinterlm.passes.rewrite import PassError
from sinterlm.passes.sensitivity import ErrorOf

#: What is left when all passes have run.
FUSED: tuple[type[ops.Op], ...] = (
    ops.EmbedNorm,
    ops.NormQkvRopeKv,
    ops.Attention,
    ops.OResidual,
    ops.NormGateUpAct,
    ops.DownResidual,
    ops.NormLmHeadSample,
)


@dataclass(frozen=True)
class Pass:
    """One rewrite of the graph, and the reason for its place."""

    run: Callable[[Graph], Graph]
    why_here: str

    @property
    def name(self) -> str:
        """The function's name."""
        return self.run.__name__


#: Readers of a norm come first: each leaves a split_norm on the residual stream. Then the writers
#: of the stream take the split_norms in.
PIPELINE: tuple[Pass, ...] = (
    Pass(fuse_qkv, "splits the attention norms"),
    Pass(fuse_gate_up, "splits the MLP norms"),
    Pass(fuse_head, "splits the final norm: after this, no rmsnorm is left"),
    Pass(fuse_o_residual, "takes in the split MLP norm, so after fuse_gate_up"),
    Pass(
        fuse_down_residual,
        "takes in the next layer's split attention norm or the final one, so after fuse_qkv and "
        "fuse_head; knows its matmul by the fused activation, so after fuse_gate_up",
    ),
    Pass(fuse_embed, "takes in the first layer's split attention norm, so after fuse_qkv"),
)


def plan(
    graph: Graph,
    dump_dir: Path | None = None,
    scheme: Scheme | None = None,
    stored: Mapping[str, GemmFormat] | None = None,
    error_of: ErrorOf | None = None,
    order: MatrixOrder = "panels",
) -> Plan:
    """Fuse a graph of plain ops, choose the formats of its matrices, and place weights and
    activations. ``stored`` are the formats of those whose codes the checkpoint brings; ``order`` is
    how the target wants its matrices.

    ``dump_dir`` receives ``00-frontend.txt``, then one file per pass. Raises PassError and
    VerifyError, both our own bugs, and what ``choose_formats`` raises.
    """
    fused = choose_formats(fuse(graph, dump_dir), scheme, stored, error_of)
    _dump(fused, len(PIPELINE) + 1, "formats", dump_dir)
    return Plan(fused, layout_weights(fused, order), plan_memory(fused))


def fuse(graph: Graph, dump_dir: Path | None = None) -> Graph:
    """The fused graph alone."""
    verify(graph)
    _dump(graph, 0, "frontend", dump_dir)
    for number, step in enumerate(PIPELINE, start=1):
        graph = step.run(graph)
        verify(graph)
        _dump(graph, number, step.name, dump_dir)
    for op in graph.ops:
        if not isinstance(op, FUSED):
            raise PassError(f"no pass took in {op.kind} of {op.writes[0]!r}")
    return graph


def _dump(graph: Graph, number: int, name: str, dump_dir: Path | None) -> None:
    if dump_dir is None:
        return
    dump_dir.mkdir(parents=True, exist_ok=True)
    path = dump_dir / f"{number:02d}-{name}.txt"
    path.write_text(graph_text(graph), encoding="utf-8")
