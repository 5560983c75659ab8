"""Which GEMM weights are stored in codes, and in which: the one place that decides it.

A scheme is what the user asked for. Codes that a checkpoint brings (``stored``) are kept as they
are, unless other ones were asked for. Norm weights and biases stay fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

from sinterlm.errors import UnsupportedModelError, UsageError
from sinterlm.ir import ops
from sinterlm.ir.fp8 import Fp8Name
from sinterlm.ir.graph import Graph
from sinterlm.ir.quant import PANEL_COLUMNS, ActDType, GemmFormat
from sinterlm.options import DEFAULT_QUANT_GROUP, QUANT_GROUPS, CompileOptions
from sinterlm.passes.sensitivity import ErrorOf, wide_enough

#: Activations along k that share a scale, where heads are a multiple of it.
ACT_GROUP = 64
#: The same for fp8, where the depth is a multiple of it.
FP8_ACT_GROUP = 128


@dataclass(frozen=True)
class Scheme:
    """What ``--quantization``, ``--quant-group`` and ``--act-dtype`` ask for; None = nothing."""

    bits: Literal[8, 4] | None = None
    group: int | None = None  #: weights along k that share a scale; 0 = all of an output channel
    act: ActDType | None = None
    is_fp8: bool = False  #: weights as fp8 numbers of 8 bits
    fp8: Fp8Name | None = None  #: as the target writes them; None = it has no kernels for them

    def format(self, op: ops.Op) -> GemmFormat | None:
        """The format of a matrix that comes as floats; None = it stays wide.

        lm_head and the embedding table take 8 bits per channel, since every logit passes there and
        a table's rows are read one at a time: whole numbers, whose error is smaller than fp8's.
        """
        if self.bits is None:
            return None
        bits, group = self.bits, DEFAULT_QUANT_GROUP[self.bits]
        if _is_end(op):
            bits, group = 8, 0
        elif self.is_fp8:
            assert self.fp8 is not None, "scheme_of refuses targets without fp8"
            return GemmFormat(8, 0, True, self.act or "graph", FP8_ACT_GROUP, self.fp8)
        elif self.group is not None:
            group = self.group
        act = "graph" if self.act == "fp8" else self.act or "int8"
        return GemmFormat(bits, group, True, act=act, act_group=ACT_GROUP)

    def keep(self, op: ops.Op, stored: GemmFormat) -> GemmFormat | None:
        """The format of a matrix whose codes the checkpoint has, with activations as asked for;
        None where other codes were asked for."""
        asked = self.format(op)
        if asked is not None:
            other_group = self.group not in (None, stored.group) and not _is_end(op)
            wants_fp8 = self.is_fp8 and (stored.is_fp8 or not _is_end(op))
            if asked.bits != stored.bits or other_group or wants_fp8 != stored.is_fp8:
                return None
        if stored.is_fp8:
            if self.fp8 is None:
                return None
            stored = replace(stored, code=self.fp8)
        if self.act == "fp8":
            rounds = stored.is_fp8 and not _is_end(op)
            return replace(stored, act="fp8" if rounds else "graph", act_group=FP8_ACT_GROUP)
        if self.act is None:
            return stored
        return replace(stored, act=self.act, act_group=ACT_GROUP)


def scheme_of(
    options: CompileOptions, only_act: ActDType | None = None, fp8: Fp8Name | None = None
) -> Scheme:
    """What the options ask for, or the target, which may have one kind of activations alone, and
    perhaps kernels for fp8. Raises UsageError."""
    bits, group, act = options.quantization, options.quant_group, options.act_dtype
    if bits not in (None, "int8", "int4", "fp8"):
        raise UsageError(f"--quantization {bits!r} is not supported; supported: int8, int4, fp8")
    if bits == "fp8" and fp8 is None:
        raise UsageError(
            f"--quantization fp8 is not supported with --target {options.target}, which has no "
            "instruction for fp8; give int8, or a GPU's name as --target"
        )
    if bits == "fp8" and group not in (None, 0):
        raise UsageError(
            f"--quant-group {group} is of int8 and int4; fp8 has one scale per output channel, "
            "leave it out"
        )
    if group not in (None, *QUANT_GROUPS):
        raise UsageError(
            f"--quant-group {group} is not supported; supported: "
            f"{', '.join(map(str, QUANT_GROUPS))} (0 = one scale per output channel)"
        )
    if act not in (None, "int8", "bf16", "fp8"):
        raise UsageError(f"--act-dtype {act!r} is not supported; choose int8, bf16 or fp8")
    if act == "fp8" and (fp8 is None or bits not in (None, "fp8")):
        raise UsageError(
            "--act-dtype fp8 goes with fp8 weights and a GPU's name as --target; give bf16, or "
            "leave it out"
        )
    if act == "bf16" and options.dtype == "fp32":
        raise UsageError("--act-dtype bf16 asks for bf16 operands, and --dtype fp32 for fp32 ones")
    if bits is None and group is not None:
        raise UsageError("--quant-group says how to quantise; give --quantization int8 or int4")
    return Scheme(
        bits=None if bits is None else 4 if bits == "int4" else 8,
        group=group,
        act=only_act if act is None else "graph" if act == "bf16" else act,
        is_fp8=bits == "fp8",
        fp8=fp8,
    )


def choose_formats(
    graph: Graph,
    scheme: Scheme | None = None,
    stored: Mapping[str, GemmFormat] | None = None,
    error_of: ErrorOf | None = None,
) -> Graph:
    """``graph``, fused, with a format for each matrix that is to be stored in codes.

    ``stored`` are the formats of matrices whose codes the checkpoint brings. Weights that one GEMM
    reads together take one format: where what is stored differs, they come as floats. Floats that
    lose too much by ``error_of`` take a wider format, or none. Raises UnsupportedModelError where
    fp8 would have to be widened, which loses, though no other codes were asked for.
    """
    scheme, stored = scheme or Scheme(), stored or {}
    formats: dict[str, GemmFormat] = {}
    for op in graph.ops:
        kept = {scheme.keep(op, stored[n]) if n in stored else None for n in op.matrices}
        form = kept.pop() if len(kept) == 1 else None
        if form is None:
            form = scheme.format(op)
            if scheme.bits is None:
                _refuse_fp8(op, stored, scheme)
            if error_of is not None:
                form = wide_enough(op.matrices, form, error_of)
        if form is not None:
            form = _fit_heads(op, form, graph.config.head_dim)
            if form.act == "fp8" and op.matrices:
                depth = graph.weights[op.matrices[0]].shape[1]
                padded = -(-depth // PANEL_COLUMNS) * PANEL_COLUMNS
                form = replace(form, act_group=gcd(form.act_group, padded))
            formats |= dict.fromkeys(op.matrices, form)
    return replace(graph, formats=formats)


def _is_end(op: ops.Op) -> bool:
    return isinstance(op, ops.EmbedNorm | ops.NormLmHeadSample)


def _fit_heads(op: ops.Op, form: GemmFormat, head_dim: int) -> GemmFormat:
    """Attention finishes a head at a time, so the groups of its output must not cross heads. A
    panel of several heads, which come from several blocks, has a scale for every column."""
    if form.rows > 1 and isinstance(op, ops.NormQkvRopeKv) and head_dim % PANEL_COLUMNS:
        form = replace(form, rows=1)
    if form.act != "int8" or not isinstance(op, ops.OResidual):
        return form
    return replace(form, act_group=gcd(form.act_group, head_dim))


def _refuse_fp8(op: ops.Op, stored: Mapping[str, GemmFormat], scheme: Scheme) -> None:
    """Products of an fp8 number and its scale are no bf16 numbers, so to widen is to lose."""
    name = next((n for n in op.matrices if n in stored and stored[n].is_fp8), None)
    if name is None:
        return
    if scheme.fp8 is None:
        raise UnsupportedModelError(
            f"{name} is stored in fp8, which this target has no kernels for; give --quantization "
            "int8 to store it anew, --dtype fp32 for floats, or a GPU's name as --target"
        )
    raise UnsupportedModelError(
        f"{name} is stored in fp8, and not all of {', '.join(op.matrices)}, which one GEMM reads, "
        "are stored alike; give --quantization fp8 or int8 to store them anew"
    )


def main_format(graph: Graph, origin: Callable[[str, GemmFormat], str]) -> str | None:
    """For people, the format of most of a graph's coded weights: ``int4 w4g32-a8g64``, ``fp8
    e4m3fn``, and what ``origin`` says of one of them in it. None: all are wide."""
    sizes: Counter[GemmFormat] = Counter()
    for name, form in graph.formats.items():
        rows, depth = graph.weights[name].shape
        sizes[form] += rows * depth
    if not sizes:
        return None
    form = sizes.most_common(1)[0][0]
    one = next(name for name, found in graph.formats.items() if found == form)
    source = origin(one, form)
    kind = "fp8" if form.is_fp8 else f"int{form.bits}"
    return f"{kind} {form.name}" + (f", {source}" if source else "")
