"""The sampler against its NumPy reference, and against itself on other threads and ISA levels."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinterlm.backends.cxx.isa import available_isas
from sinterlm.ir import reference_sampling as reference
from sinterlm.ir.reference_sampling import RowSampling
from sinterlm.options import IsaName
from tests.native.conftest import Build
from tests.native.samplers import SampleLib, mask_of, row_of

_FLOAT, _SEED = ctypes.c_float, ctypes.c_uint64
_FLOATS = ctypes.POINTER(ctypes.c_float)


@pytest.fixture(scope="module")
def lib(build: Build, isa: IsaName) -> SampleLib:
    return SampleLib(build("samplelib.cpp", isa))


def logits_of(seed: int, rows: int, vocab: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(np.float32)


def near_edge(logits: np.ndarray, params: RowSampling) -> bool:
    """Whether some token stands within rounding of the edge that min_p or top_p draws."""
    if params.temperature == 0:
        return False
    scores = reference.adjust(logits, params)
    order = reference.best_first(scores, np.flatnonzero(scores > -np.inf))
    weight = np.exp(scores[order].astype(np.float64) - float(scores[order[0]]))
    if np.any(np.abs(weight - params.min_p) < 1e-5 * params.min_p):
        return True
    weight = weight[weight >= params.min_p]
    if params.top_k > 0:
        weight = weight[: params.top_k]
    share = np.cumsum(weight) / weight.sum()
    return params.top_p < 1 and bool(np.any(np.abs(share - params.top_p) < 1e-6))


def check_row(lib: SampleLib, logits: np.ndarray, params: RowSampling, threads: int = 1) -> bool:
    """Compare one row with the reference; False where rounding may decide."""
    want = reference.sample(logits, params)
    width = params.num_logprobs
    got = lib.sample(logits[None], [row_of(params, logits.size)], threads, width)
    assert (got.bad, got.none) == (-1, -1)
    assert got.top_ids[0].tolist() == list(want.top_ids)
    np.testing.assert_allclose(got.top_logprobs[0], want.top_logprobs, atol=2e-6, rtol=1e-6)
    if want.gap < 1e-4 or near_edge(logits, params):
        return False
    assert got.tokens[0] == want.token_id
    assert got.ranks[0] == want.rank
    np.testing.assert_allclose(got.logprobs[0], want.logprob, atol=2e-6, rtol=1e-6)
    return True


VOCAB = st.sampled_from([1, 3, 17, 64, 200, 4095, 4097, 9001])


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, RowSampling]:
    vocab = draw(VOCAB)
    ids = st.integers(0, vocab - 1)
    tokens = st.lists(ids, max_size=12).map(tuple)
    logits = logits_of(draw(st.integers(0, 10**6)), 1, vocab, draw(st.sampled_from([0.3, 3, 9])))[0]
    if draw(st.booleans()):
        logits = np.round(logits)  # many ties
    allowed = draw(st.none() | st.lists(ids, min_size=1, max_size=30).map(tuple))
    params = RowSampling(
        temperature=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.5])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.5, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 20, 100000])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2, 0.8])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25])),
        seed=draw(st.integers(0, 2**64 - 1)),
        position=draw(st.integers(0, 2**31 - 1)),
        num_logprobs=draw(st.integers(0, min(vocab, 8))),
        prompt_tokens=draw(tokens),
        output_tokens=draw(tokens),
        bias=draw(st.dictionaries(ids, st.sampled_from([-4.0, 2.5, 50.0]), max_size=4)),
        allowed=allowed,
    )
    return logits, params


class TestAgainstReference:
    @settings(max_examples=300)
    @given(rows())
    def test_any_parameters(self, lib: SampleLib, row: tuple[np.ndarray, RowSampling]) -> None:
        check_row(lib, *row)

    @pytest.mark.parametrize(
        "params",
        [
            RowSampling(),
            RowSampling(temperature=0.8),
            RowSampling(temperature=0.8, top_p=0.9),
            RowSampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01),
            RowSampling(temperature=0.8, min_p=0.1),
            RowSampling(repetition_penalty=1.3, prompt_tokens=(1, 2, 3), output_tokens=(3, 3)),
        ],
        ids=["greedy", "temperature", "top_p", "top_k", "min_p", "penalty"],
    )
    def test_most_rows_are_decided(self, lib: SampleLib, params: RowSampling) -> None:
        """A comparison that rounding excuses too often would prove nothing."""
        decided = 0
        for i in range(40):
            varied = replace(params, seed=i, position=i, num_logprobs=5)
            decided += check_row(lib, logits_of(i, 1, 5000)[0], varied)
        assert decided >= 36


class TestDraws:
    def test_follow_the_softmax(self, lib: SampleLib) -> None:
        """20000 positions of one seed: counts within 4.5 sigma of the probabilities."""
        logits, draws = logits_of(5, 1, 40, 1.5), 20000
        params = [
            row_of(RowSampling(temperature=1.3, seed=11, position=p), 40) for p in range(draws)
        ]
        got = lib.sample(np.repeat(logits, draws, 0), params)
        p = np.exp(reference.log_softmax(logits[0] / np.float32(1.3)))
        sigma = np.sqrt(draws * p * (1 - p))
        assert np.all(np.abs(np.bincount(got.tokens, minlength=40) - draws * p) < 4.5 * sigma + 1)

    @settings(max_examples=25)
    @given(st.lists(rows(), min_size=1, max_size=5), st.sampled_from([2, 3, 7]))
    def test_threads_and_neighbours_change_nothing(
        self, lib: SampleLib, batch: list[tuple[np.ndarray, RowSampling]], threads: int
    ) -> None:
        vocab = batch[0][0].size
        same = [(x, p) for x, p in batch if x.size == vocab]
        params = [row_of(p, vocab) for _, p in same]
        together = lib.sample(np.stack([x for x, _ in same]), params, threads, 8)
        for i, (x, _) in enumerate(same):
            alone = lib.sample(x[None], [params[i]], 1, 8)
            assert alone.tokens[0] == together.tokens[i]
            assert alone.logprobs.tobytes() == together.logprobs[i : i + 1].tobytes()
            assert alone.top_logprobs.tobytes() == together.top_logprobs[i : i + 1].tobytes()

    def test_isa_levels_agree_bit_for_bit(self, build: Build) -> None:
        logits = logits_of(3, 6, 20000)
        params = [
            RowSampling(num_logprobs=5),
            RowSampling(temperature=1.0, seed=1, num_logprobs=5),
            RowSampling(temperature=0.7, top_p=0.9, seed=2, num_logprobs=5),
            RowSampling(temperature=0.7, top_k=50, min_p=0.02, seed=3, num_logprobs=5),
            RowSampling(temperature=2.0, min_p=0.2, seed=4, num_logprobs=5),
            RowSampling(repetition_penalty=2.0, output_tokens=(5, 9), num_logprobs=5),
        ]
        rows = [row_of(p, 20000) for p in params]
        results = {
            isa: SampleLib(build("samplelib.cpp", isa)).sample(logits, rows, 2, 5).bytes()
            for isa in available_isas()
        }
        assert len(set(results.values())) == 1

    def test_steps_leave_no_trace(self, lib: SampleLib) -> None:
        """Counts of penalised tokens are cleared between rows and steps."""
        logits = logits_of(8, 3, 300)
        params = [
            row_of(RowSampling(frequency_penalty=0.5, output_tokens=(i, i, 7)), 300)
            for i in range(3)
        ]
        once = lib.sample(logits, params, 1)
        assert lib.sample(logits, params, 1, repeat=3).bytes() == once.bytes()


class TestEdges:
    def test_ties_go_to_the_lower_id(self, lib: SampleLib) -> None:
        logits = np.zeros((1, 9000), np.float32)
        assert lib.sample(logits, [row_of(RowSampling(), 9000)]).tokens[0] == 0
        logits[0, [4095, 4096, 8999]] = 1
        row = row_of(RowSampling(num_logprobs=3), 9000)
        got = lib.sample(logits, [row], 2, 3)
        assert got.tokens[0] == 4095 and got.ranks[0] == 1
        assert got.top_ids.tolist() == [[4095, 4096, 8999]]

    def test_unasked_outputs_are_marked(self, lib: SampleLib) -> None:
        silent, brief = row_of(RowSampling(), 50), row_of(RowSampling(num_logprobs=2), 50)
        silent.num_logprobs = -1
        got = lib.sample(logits_of(1, 2, 50), [silent, brief], 1, 3)
        assert np.isnan(got.logprobs[0]) and got.ranks[0] == 0 and (got.top_ids[0] == -1).all()
        assert got.top_ids[1, 2] == -1 and np.isnan(got.top_logprobs[1, 2])
        assert np.isfinite(got.logprobs[1]) and (got.top_ids[1, :2] >= 0).all()

    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
    def test_damaged_logits_are_found(self, lib: SampleLib, poison: float) -> None:
        logits = logits_of(2, 4, 5000)
        logits[2, 4999] = poison
        rows = [row_of(RowSampling(temperature=t), 5000) for t in (0, 1, 0, 1)]
        got = lib.sample(logits, rows, 3)
        assert got.bad == 2 and got.none == -1
        assert got.tokens[2] == -7 and (got.tokens[[0, 1, 3]] >= 0).all()

    @pytest.mark.parametrize("vocab", [1, 63, 64, 1000, 9001])
    def test_drawn_early_is_drawn_alike(self, lib: SampleLib, vocab: int) -> None:
        """Greedy and plain rows may be drawn from logits that are not kept; others wait."""
        logits = np.round(logits_of(6, 6, vocab) * 2) / 2  # with ties
        kinds = [RowSampling(), RowSampling(temperature=0.7, seed=5, position=9),
                 RowSampling(temperature=2.0, seed=1), RowSampling(temperature=1.0, top_p=0.8),
                 RowSampling(bias={0: -3.0}), RowSampling()]  # fmt: skip
        rows = [row_of(kind, vocab) for kind in kinds]
        for row in rows[:5]:
            row.num_logprobs = -1
        want = lib.sample(logits, rows, 1, 2)
        assert (want.tokens >= 0).all()
        for threads in (1, 3):
            assert lib.sample(logits, rows, threads, 2, early=True).bytes() == want.bytes()

    def test_damage_is_found_early_too(self, lib: SampleLib) -> None:
        logits = logits_of(2, 4, 5000)
        rows = [row_of(RowSampling(temperature=t), 5000) for t in (0, 1, 0, 1)]
        for row in rows:
            row.num_logprobs = -1
        for bad, poison in ((2, np.nan), (1, np.inf), (1, -np.inf), (0, np.nan)):
            logits[bad, 4999 - bad] = poison
            got = lib.sample(logits, rows, 3, early=True)
            assert got.bad == bad and got.none == -1 and got.tokens[3] >= 0

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_nothing_allowed(self, lib: SampleLib, temperature: float) -> None:
        rows = [row_of(RowSampling(temperature=temperature, top_p=0.9), 70) for _ in range(3)]
        rows[1].allowed = mask_of([], 70)
        got = lib.sample(logits_of(2, 3, 70), rows)
        assert (got.bad, got.none) == (-1, 1)

    def test_banned_by_bias(self, lib: SampleLib) -> None:
        logits = logits_of(4, 1, 100)
        best = int(logits.argmax())
        row = row_of(RowSampling(bias={best: -np.inf}), 100)
        got = lib.sample(logits, [row], 1)
        assert got.tokens[0] == reference.best_first(logits[0], np.arange(100))[1]
        assert got.ranks[0] == 2  # of the raw logits


class TestMath:
    def test_exp(self, lib: SampleLib) -> None:
        x = np.linspace(-87.2, 20, 100003).astype(np.float32)
        want = np.exp(x.astype(np.float64))
        assert np.max(np.abs(lib.map("st_exp", x) / want - 1)) < 2.5e-7
        edge = np.array([0, -87.4, -1e30, -np.inf], np.float32)
        assert lib.map("st_exp", edge).tolist() == [1, 0, 0, 0]

    def test_log(self, lib: SampleLib) -> None:
        rng = np.random.default_rng(0)
        near_one = 1 - 2.0 ** -rng.uniform(1, 24, 40000)
        x = np.concatenate([near_one, 2.0 ** rng.uniform(-24, 5, 40000)]).astype(np.float32)
        want = np.log(x.astype(np.float64))
        error = np.abs(lib.map("st_log", x) - want) / np.maximum(np.abs(want), 1e-30)
        assert np.max(error[want != 0]) < 3e-7

    def test_log_double(self, lib: SampleLib) -> None:
        x = np.concatenate([np.linspace(0.5, 3, 1000), 2.0 ** np.linspace(-30, 30, 1000)])
        np.testing.assert_allclose(lib.map("st_log_double", x), np.log(x), rtol=1e-14, atol=1e-15)

    @pytest.mark.parametrize("n", [1, 15, 16, 17, 255, 257, 4096])
    def test_sum_exp(self, lib: SampleLib, n: int) -> None:
        x = logits_of(n, 1, n)[0]
        got = lib.dll.st_sum_exp(x.ctypes.data_as(_FLOATS), n, _FLOAT(float(x.max())))
        want = np.exp(x.astype(np.float64) - float(x.max())).sum()
        assert abs(got / want - 1) < 1e-6

    def test_gumbel(self, lib: SampleLib) -> None:
        """The noise itself: the generator is a contract, since seeds must keep their meaning."""
        y = np.zeros(8192, np.float32)
        lib.dll.st_gumbel(_SEED(0xDEADBEEFCAFEF00D), 12345, y.ctypes.data_as(_FLOATS), y.size)
        want = reference.gumbel(0xDEADBEEFCAFEF00D, 12345, np.arange(y.size))
        np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)
