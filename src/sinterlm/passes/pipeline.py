"""The passes, in order, and why in this order. Every graph in between is verified and dumped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sinterlm.ir.graph import Graph
from sinterlm.ir.plan import Plan
from sinterlm.ir.text import graph_text
from sinterlm.ir.verify import verify
from sinterlm.passes.fuse_attention import fuse_o_residual, fuse_qkv
from sinterlm.passes.fuse_mlp import fold_norms, fuse_down_residual, fuse_gate_up, fuse_head
from sinterlm.passes.layout import layout_weights
from sinterlm.passes.memory import plan_memory


@dataclass(frozen=True)
class Pass:
    """One rewrite of the graph, and the reason for its place."""

    run: Callable[[Graph], Graph]
    why_here: str

    @property
    def name(self) -> str:
        """The function's name."""
        return self.run.__name__


PIPELINE: tuple[Pass, ...] = (
    Pass(fuse_qkv, "reads the attention norm, which must still be an op"),
    Pass(fuse_o_residual, "takes the weight of the MLP norm, so before that norm is gone"),
    Pass(fuse_gate_up, "reads the MLP norm"),
    Pass(fuse_down_residual, "finds its matmul behind the fused activation"),
    Pass(fuse_head, "reads the final norm"),
    Pass(fold_norms, "last: drops the norms, once nobody reads their output any more"),
)


def plan(graph: Graph, dump_dir: Path | None = None) -> Plan:
    """Fuse a graph of plain ops and place its weights and activations.

    ``dump_dir`` receives ``00-frontend.txt``, then one file per pass. Raises PassError and
    VerifyError, both our own bugs.
    """
    verify(graph)
    _dump(graph, 0, "frontend", dump_dir)
    for number, step in enumerate(PIPELINE, start=1):
        graph = step.run(graph)
        verify(graph, folded=step is PIPELINE[-1])
        _dump(graph, number, step.name, dump_dir)
    return Plan(graph, layout_weights(graph), plan_memory(graph))


def _dump(graph: Graph, number: int, name: str, dump_dir: Path | None) -> None:
    if dump_dir is None:
        return
    dump_dir.mkdir(parents=True, exist_ok=True)
    path = dump_dir / f"{number:02d}-{name}.txt"
    path.write_text(graph_text(graph), encoding="utf-8")
