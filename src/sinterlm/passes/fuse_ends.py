"""Fusions of both ends of the model: the head with its norm and the draw, the embedding with the
first norm's first half."""

from __future__ import annotations

from sinterlm.ir.graph import Graph
from sinterlm.ir.ops import (
    Embed,
    EmbedNorm,
    LmHead,
    NormLmHeadSample,
    RmsNorm,
    Sample,
    SplitNorm,
)
from sinterlm.passes.rewrite import Matcher, Rewrite, ssq_of, xw_of


def fuse_head(graph: Graph) -> Graph:
    """The final norm, the projection of the sampled rows and the draw become one op.

    before:  x ─ rmsnorm ─ lm_head(rows) ─ logits ─ sample ─ ids
    after:   x ─ split_norm ─ x.xw, x.ssq ─ norm_lm_head_sample(rows) ─ ids
    """
    match = Matcher(graph, "fuse_head")
    rewrite = Rewrite(match)
    for sample in match.all(Sample):
        head = match.writer(sample.logits, LmHead)
        norm = match.writer(head.x, RmsNorm)
        split = SplitNorm(norm.x, xw_of(norm.x), ssq_of(norm.x), norm.weight)
        fused = NormLmHeadSample(
            xw=split.xw,
            ssq=split.ssq,
            rows=head.rows,
            ids=sample.ids,
            eps=norm.eps,
            weight=head.weight,
        )
        rewrite.replace([norm, head, sample], [split, fused])
    return rewrite.apply()


def fuse_embed(graph: Graph) -> Graph:
    """The embedding writes what the first norm's readers need.

    before:  tokens ─ embed ─ x ─ split_norm ─ x.xw, x.ssq
    after:   tokens ─ embed_norm ─ x, x.xw, x.ssq
    """
    match = Matcher(graph, "fuse_embed")
    rewrite = Rewrite(match)
    for embed in match.all(Embed):
        split = match.reader(embed.y, SplitNorm)
        fused = EmbedNorm(
            tokens=embed.tokens,
            x=embed.y,
            xw=split.xw,
            ssq=split.ssq,
            table=embed.table,
            norm_weight=split.norm_weight,
        )
        rewrite.replace([embed, split], [fused])
    return rewrite.apply()
