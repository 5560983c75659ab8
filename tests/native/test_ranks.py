"""Two ranks of a model, as threads: logits and tokens of the whole, and failures that are told.

The libraries are compiled without optimisation, which is twice as fast and changes no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

from sinterlm.errors import RuntimeFault, UnsupportedModelError, UsageError
from sinterlm.frontend.decoder import build_graph
from sinterlm.frontend.parts import Part
from sinterlm.ir.graph import Graph
from sinterlm.ir.reference import RefBatch, RefCache, run
from sinterlm.options import IsaName
from sinterlm.runtime.batch import RowSampling
from sinterlm.runtime.model import Model
from sinterlm.runtime.ranks import RankLink
from tests.ir.graphs import config, random_weights
from tests.libraries import BuildLibrary
from tests.native.conftest import MakeTiny
from tests.native.tiny import QUANTISED, Tiny, compile_tiny, prefill, step_batch
from tests.ranks import Meeting, side_by_side

#: GQA 2 on each rank, every bias, q/k norm, a window, and widths that need padding once split.
WHOLE = config(
    vocab=131, hidden=100, layers=2, heads=8, kv_heads=4, head_dim=16, ffn=132,
    qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True, windows=(0, 24),
)  # fmt: skip
IDS = [int(i) for i in np.random.default_rng(3).integers(0, 131, 40)]
PAGES = [5, 3, 60, 0, 17]
GREEDY = RowSampling()


@dataclass
class Split:
    """One model whole, and in two parts."""

    graph: Graph  #: of the whole
    weights: dict[str, np.ndarray]  #: of the whole, as floats
    parts: list[Tiny]
    compile_whole: Callable[[], Tiny]  #: at the first call

    @contextmanager
    def open(self, threads: tuple[int, int] = (1, 2)) -> Iterator[tuple[Meeting, list[Model]]]:
        """Both ranks, with different numbers of workers."""
        meeting = Meeting(2)
        with ExitStack() as opened:
            models = [
                opened.enter_context(part.open(num_threads=n, link=meeting.link(rank)))
                for rank, (part, n) in enumerate(zip(self.parts, threads, strict=True))
            ]
            yield meeting, models


MakeSplit = Callable[[str], Split]


@pytest.fixture(scope="module")
def split(
    tmp_path_factory: pytest.TempPathFactory, isa: IsaName, build_library: BuildLibrary
) -> MakeSplit:
    made: dict[str, Split] = {}

    def make(dtype: str) -> Split:
        if dtype not in made:
            wide, scheme = QUANTISED.get(dtype, (dtype, None))
            graph = build_graph(WHOLE, wide)
            weights = random_weights(graph, seed=4)
            for name in weights:  # what is split decides the tokens
                if "o_proj" in name or "down_proj" in name:
                    weights[name] *= 4

            def compiled(graph: Graph, weights: dict[str, np.ndarray]) -> Tiny:
                folder = tmp_path_factory.mktemp(dtype)
                return compile_tiny(graph, scheme, weights, isa, folder, build_library, ["-O0"])

            def compiled_part(part: Part) -> Tiny:
                graph = build_graph(part.config(WHOLE), wide, num_ranks=2)
                return compiled(graph, {name: part.slice(name, w) for name, w in weights.items()})

            made[dtype] = Split(
                graph, weights, [compiled_part(Part(rank, 2)) for rank in range(2)],
                cache(lambda: compiled(graph, weights)),
            )  # fmt: skip
        return made[dtype]

    return make


def twin_logits(made: Split, ids: list[int], precision: str = "fp64") -> np.ndarray:
    """The NumPy reference on the whole weights, which knows nothing of ranks."""
    batch = replace(RefBatch.of((0, 0, ids)), rows=np.arange(len(ids)))
    return run(made.graph, made.weights, batch, RefCache(), precision)["logits"]


def greedy(model: Model, count: int) -> list[int]:
    """``count`` greedy tokens after IDS, each fed back."""
    ids, first = list(IDS), 0
    for _ in range(count):
        rows, run = [len(ids) - first - 1], (PAGES, first, ids[first:])
        result = model.step(step_batch(run, rows=rows, sampling=(GREEDY,), want_logits=False))
        first = len(ids)
        ids.append(int(result.tokens[0]))
    return ids[len(IDS) :]


class TestSameModel:
    def test_fp32_logits(self, split: MakeSplit) -> None:
        made = split("fp32")
        want = twin_logits(made, IDS)
        with made.open() as (meeting, models):
            got = side_by_side([lambda m=m: prefill(m, IDS, PAGES, 17) for m in models])
        assert meeting.sums == 2 * WHOLE.num_layers * 3, "two sums a layer in each of three chunks"
        assert np.array_equal(*got), "ranks hold the same stream, bit for bit"
        assert np.abs(got[0] - want).max() < 2e-4 * np.abs(want).max()

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["bf16", "int8"])
    def test_narrow_logits(self, split: MakeSplit, dtype: str) -> None:
        """About as near to exact arithmetic as the whole library is."""
        made = split(dtype)
        exact = twin_logits(made, IDS)
        with made.compile_whole().open() as model:
            whole = prefill(model, IDS, PAGES, 40)
        with made.open() as (_, models):
            got = side_by_side([lambda m=m: prefill(m, IDS, PAGES, 40) for m in models])
        assert np.array_equal(*got)
        errors = [np.sqrt(np.mean((x - exact) ** 2)) for x in (got[0], whole)]
        assert errors[0] < 1.5 * errors[1] < 0.15 * np.std(exact), errors

    @pytest.mark.parametrize(("dtype", "near"), [("fp32", 1e-4), ("bf16", 0.02)])
    def test_greedy_tokens(self, split: MakeSplit, dtype: str, near: float) -> None:
        """Every token is the best of the whole model's twin, fed with the same tokens, or stands
        near to it: shares of the logits' spread."""
        made = split(dtype)
        with made.open() as (_, models):
            one, two = side_by_side([lambda m=m: greedy(m, 24) for m in models])
        assert one == two and len(set(one)) > 4
        precision = "fp64" if dtype == "fp32" else dtype
        logits = twin_logits(made, IDS + one, precision)[len(IDS) - 1 : -1]
        behind = logits.max(1) - logits[np.arange(24), one]
        assert behind.max() < near * np.std(logits)
        assert np.count_nonzero(behind) <= 1, "ties are rare"

    def test_several_steps_in_one_call(self, split: MakeSplit) -> None:
        """Between steps each rank feeds itself what it drew."""

        def run(model: Model) -> tuple[list[int], list[int]]:
            one_by_one = greedy(model, 6)
            again = step_batch((PAGES, len(IDS), one_by_one[:1]), rows=[0], want_logits=False,
                               sampling=(GREEDY,))  # fmt: skip
            return one_by_one[1:], [int(r.tokens[0]) for r in model.decode(again, 5)]

        with split("bf16").open((2, 1)) as (_, models):
            for one_by_one, at_once in side_by_side([lambda m=m: run(m) for m in models]):
                assert at_once == one_by_one

    def test_workers_change_nothing(self, split: MakeSplit) -> None:
        results = []
        for threads in ((1, 1), (2, 3), (7, 1)):
            with split("bf16").open(threads) as (_, models):
                calls = [lambda m=m: prefill(m, IDS, PAGES, 40) for m in models]
                results += side_by_side(calls)
        assert all(np.array_equal(result, results[0]) for result in results)


class TestFailures:
    @pytest.mark.parametrize("at", [0, 3])
    def test_a_sum_that_fails_ends_the_step_on_every_rank(self, split: MakeSplit, at: int) -> None:
        with split("fp32").open() as (meeting, models):
            calls = [lambda m=m: prefill(m, IDS, PAGES, 40) for m in models]
            before = side_by_side(calls)
            meeting.fails_at = meeting.sums + at
            one, two = side_by_side(calls)
            assert isinstance(one, RuntimeFault) and "rank 0" in str(one)
            assert isinstance(one.__cause__, ConnectionError)
            assert isinstance(two, RuntimeFault) and "over 2 ranks failed on rank 1" in str(two)
            meeting.mend()
            assert np.array_equal(before, side_by_side(calls)), "the next step is a step again"

    def test_open_refuses(self, split: MakeSplit, tiny: MakeTiny) -> None:
        made = split("bf16")
        with pytest.raises(RuntimeFault, match="one of 2 ranks"):
            made.parts[0].open()
        with pytest.raises(RuntimeFault, match="the model is whole"):
            tiny("gqa5-bias", "bf16").open(link=RankLink(0, lambda data: None))
        with pytest.raises(RuntimeFault, match="rank is 2 and must be in"):
            made.parts[0].open(link=RankLink(2, lambda data: None))

    def test_describes_itself(self, split: MakeSplit) -> None:
        with split("fp32").open() as (_, models):
            assert models[0].describe()["num_ranks"] == 2
            assert models[0].describe()["shape"]["num_heads"] == WHOLE.num_heads // 2


class TestPart:
    def test_a_size_that_does_not_divide(self) -> None:
        with pytest.raises(UnsupportedModelError, match="does not divide num_kv_heads=4"):
            Part(0, 3).config(WHOLE)
        with pytest.raises(UnsupportedModelError, match="intermediate_size=133"):
            Part(0, 2).config(config(heads=4, kv_heads=2, ffn=133))

    @pytest.mark.parametrize("rank", [-1, 2])
    def test_a_rank_that_there_is_not(self, rank: int) -> None:
        with pytest.raises(UsageError, match=f"tensor_parallel_rank={rank}"):
            Part(rank, 2)

    def test_parts_make_up_the_whole(self) -> None:
        q = np.arange(24, dtype=np.float32).reshape(6, 4)
        both = [Part(rank, 2) for rank in range(2)]
        for name, axis in [("self_attn.q_proj", 0), ("mlp.up_proj", 0), ("mlp.down_proj", 1)]:
            name = f"model.layers.1.{name}.weight"
            pieces = [part.slice(name, q) for part in both]
            assert np.array_equal(np.concatenate(pieces, axis), q)
            assert {piece.shape for piece in pieces} == {both[0].shape(name, q.shape)}
        for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.bias"):
            assert both[1].slice(name, q) is q and both[1].shape(name, q.shape) == q.shape
