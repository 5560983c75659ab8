"""Which GEMM weights are stored in codes, and in which: the one place that decides it.

A scheme is what the user asked for; a checkpoint's own codes (``stored``) come first, since they
are kept as they are. Norm weights and biases stay fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

from sinterlm.errors import CheckpointError, UsageError
from sinterlm.ir import ops
from sinterlm.ir.graph import Graph
from sinterlm.ir.quant import ActDType, GemmFormat
from sinterlm.options import QUANT_GROUPS, CompileOptions

#: Activations along k that share a scale, where heads are a multiple of it.
ACT_GROUP = 64


@dataclass(frozen=True)
class Scheme:
    """What ``--quantization``, ``--quant-group`` and ``--act-dtype`` ask for."""

    bits: Literal[8, 4]
    group: int  #: weights along k that share a scale; 0 = all of an output channel
    act: ActDType

    def format(self) -> GemmFormat:
        """The format of a matrix that nothing speaks against."""
        return GemmFormat(self.bits, self.group, symmetric=True, act=self.act, act_group=ACT_GROUP)

    def head_format(self) -> GemmFormat:
        """lm_head and the embedding table: 8 bits per channel, since every logit passes here and
        a table's rows are read one at a time."""
        return GemmFormat(8, 0, symmetric=True, act=self.act, act_group=ACT_GROUP)


def scheme_of(options: CompileOptions) -> Scheme | None:
    """What the options ask for; None where they ask for no codes. Raises UsageError."""
    bits, group, act = options.quantization, options.quant_group, options.act_dtype
    if bits not in (None, "int8", "int4"):
        raise UsageError(f"--quantization {bits!r} is not supported; supported: int8, int4")
    if group not in (None, *QUANT_GROUPS):
        raise UsageError(
            f"--quant-group {group} is not supported; supported: "
            f"{', '.join(map(str, QUANT_GROUPS))} (0 = one scale per output channel)"
        )
    if act not in (None, "int8", "bf16"):
        raise UsageError(f"--act-dtype {act!r} is not supported; choose int8 or bf16")
    if act == "bf16" and options.dtype == "fp32":
        raise UsageError("--act-dtype bf16 asks for bf16 operands, and --dtype fp32 for fp32 ones")
    if bits is None:
        for flag, value in (("--quant-group", group), ("--act-dtype", act)):
            if value is not None:
                raise UsageError(f"{flag} says how to quantise; give --quantization int8 or int4")
        return None
    default = 0 if bits == "int8" else 32
    return Scheme(
        bits=8 if bits == "int8" else 4,
        group=default if group is None else group,
        act="graph" if act == "bf16" else "int8",
    )


def choose_formats(
    graph: Graph, scheme: Scheme | None, stored: Mapping[str, GemmFormat] | None = None
) -> Graph:
    """``graph``, fused, with a format for each matrix that is to be stored in codes.

    ``stored`` are the formats of matrices whose codes the checkpoint brings. Raises
    CheckpointError where weights that one GEMM reads together are stored in different ways.
    """
    formats: dict[str, GemmFormat] = {}
    for op in graph.ops:
        for name in matrices(op):
            form = (stored or {}).get(name) or _asked(op, scheme)
            if form is not None:
                formats[name] = _fit_heads(op, form, graph.config.head_dim)
        _check_alike(op, formats)
    return replace(graph, formats=formats)


def matrices(op: ops.Op) -> tuple[str, ...]:
    """The matrices that a fused op multiplies by, or gathers rows of."""
    if isinstance(op, ops.EmbedNorm):
        return (op.table,)
    if isinstance(op, ops.NormQkvRopeKv):
        return (op.q_weight, op.k_weight, op.v_weight)
    if isinstance(op, ops.NormGateUpAct):
        return (op.gate_weight, op.up_weight)
    if isinstance(op, ops.OResidual | ops.DownResidual | ops.NormLmHeadSample):
        return (op.weight,)
    return ()


def _asked(op: ops.Op, scheme: Scheme | None) -> GemmFormat | None:
    if scheme is None:
        return None
    is_end = isinstance(op, ops.EmbedNorm | ops.NormLmHeadSample)
    return scheme.head_format() if is_end else scheme.format()


def _fit_heads(op: ops.Op, form: GemmFormat, head_dim: int) -> GemmFormat:
    """Attention finishes a head at a time, so the groups of its output must not cross heads."""
    if form.act != "int8" or not isinstance(op, ops.OResidual):
        return form
    return replace(form, act_group=gcd(form.act_group, head_dim))


def _check_alike(op: ops.Op, formats: Mapping[str, GemmFormat]) -> None:
    names = matrices(op)
    found = {formats.get(name) for name in names}
    if len(found) > 1:
        shown = ", ".join(f"{n}: {f.name if (f := formats.get(n)) else 'not'}" for n in names)
        raise CheckpointError(
            f"{op.kind} reads weights that are quantised in different ways ({shown}), and one "
            "GEMM takes one format"
        )


def main_format(graph: Graph) -> str | None:
    """The format of most of a graph's coded weights, ``int4 w4g32-a8g64``; None: all are wide."""
    sizes: Counter[GemmFormat] = Counter()
    for name, form in graph.formats.items():
        rows, depth = graph.weights[name].shape
        sizes[form] += rows * depth
    if not sizes:
        return None
    form = sizes.most_common(1)[0][0]
    return f"int{form.bits} {form.name}"
