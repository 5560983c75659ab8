"""Whole models through the native step: against the NumPy reference, and against themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sinterlm.errors import RuntimeFault
from sinterlm.ir.quant import CodedMatrix
from sinterlm.ir.reference import RefBatch, RefCache, run
from sinterlm.runtime.batch import RowSampling, StepBatch, StepResult
from sinterlm.runtime.model import KvMemory, Model
from tests.native.conftest import MakeTiny
from tests.native.tiny import CONFIGS, MAX_LEN, Tiny, prefill, step_batch

IDS = [int(i) for i in np.random.default_rng(1).integers(0, 130, 90)]
PAGES = [5, 3, 60, 0, 17, 33, 2]


def reference_logits(tiny: Tiny, ids: list[int], precision: str) -> np.ndarray:
    batch = RefBatch(
        np.array(ids), np.arange(len(ids)), np.zeros(len(ids), np.int64), np.arange(len(ids))
    )
    return run(tiny.plan.graph, tiny.stored(), batch, RefCache(), precision)["logits"]


class TestAgainstReference:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_fp32(self, tiny: MakeTiny, name: str) -> None:
        made = tiny(name, "fp32")
        with made.open() as model:
            got = prefill(model, IDS, PAGES, 40)
        want = reference_logits(made, IDS, "fp64")
        assert np.abs(got - want).max() < 2e-4 * np.abs(want).max()

    def test_long_context(self, tiny: MakeTiny) -> None:
        """Past one chunk of attention and one span of the rope table."""
        made = tiny("gqa3-tied-window", "fp32")
        ids = [int(i) for i in np.random.default_rng(2).integers(0, 130, 300)]
        with made.open() as model:
            got = prefill(model, ids, list(range(40, 21, -1)), 64)
        want = reference_logits(made, ids, "fp64")
        assert np.abs(got - want).max() < 2e-4 * np.abs(want).max()

    @pytest.mark.parametrize("name", CONFIGS)
    def test_bf16(self, tiny: MakeTiny, name: str) -> None:
        """Far closer to the twin that rounds where kernels do than to exact arithmetic."""
        made = tiny(name, "bf16")
        with made.open() as model:
            got = prefill(model, IDS, PAGES, 64)
        twin = reference_logits(made, IDS, "bf16")
        exact = reference_logits(made, IDS, "fp64")
        error = np.sqrt(np.mean((got - twin) ** 2))
        assert error < 0.5 * np.sqrt(np.mean((got - exact) ** 2))

    @pytest.mark.parametrize(
        "name,dtype",
        [
            ("gqa3-tied-window", "int8"), ("odd-everything", "int4"), ("gqa5-bias", "int4-fp32"),
            ("gqa3-tied-window", "int4-weights"),
        ],
    )  # fmt: skip
    def test_quantised(self, tiny: MakeTiny, name: str, dtype: str) -> None:
        """Far closer to the twin that codes activations where kernels do than to one that does not,
        and that one has the same weights."""
        made = tiny(name, dtype)
        with made.open() as model:
            got = prefill(model, IDS, PAGES, 64)
        twin = reference_logits(made, IDS, made.graph.dtype)
        error = np.sqrt(np.mean((got - twin) ** 2))
        wide = replace(made.plan.graph, formats={})
        floats = {
            n: w.dequantise() if isinstance(w, CodedMatrix) else w for n, w in made.stored().items()
        }
        batch = RefBatch.of((0, 0, IDS))
        batch = replace(batch, rows=np.arange(len(IDS)))
        exact = run(wide, floats, batch, RefCache(), "fp64")["logits"]
        assert error < 0.5 * np.sqrt(np.mean((got - exact) ** 2))
        assert np.sqrt(np.mean((got - exact) ** 2)) < 0.1 * np.std(exact)

    @pytest.mark.parametrize(
        "name,dtype",
        [
            ("gqa3-tied-window", "fp32+kv8"), ("odd-everything", "bf16+kv8"),
            ("gqa5-bias", "int8+kv8"),
        ],
    )  # fmt: skip
    def test_kv_in_codes(self, tiny: MakeTiny, name: str, dtype: str) -> None:
        """Far closer to the twin that stores codes than to one that stores numbers."""
        made = tiny(name, dtype)
        assert made.bundle.manifest.kv_cache_dtype == "int8"
        with made.open() as model:
            got = prefill(model, IDS, PAGES, 64)
        twin = reference_logits(made, IDS, made.graph.dtype)
        batch = replace(RefBatch.of((0, 0, IDS)), rows=np.arange(len(IDS)))
        wide = replace(made.plan.graph, kv_in_codes=False)
        other = run(wide, made.stored(), batch, RefCache(), made.graph.dtype)["logits"]
        error, apart = (np.sqrt(np.mean((got - x) ** 2)) for x in (twin, other))
        assert error < 0.5 * apart
        assert apart < 0.1 * np.std(other)


class TestInvariance:
    """Row by row the same bytes, however the work is cut."""

    @pytest.mark.parametrize(
        "name,dtype",
        [
            ("gqa3-tied-window", "bf16"), ("odd-everything", "fp32"), ("odd-everything", "int4"),
            ("gqa3-tied-window", "fp32+kv8"), ("odd-everything", "bf16+kv8"),
        ],
    )  # fmt: skip
    def test_chunks_threads_and_pages(self, tiny: MakeTiny, name: str, dtype: str) -> None:
        made = tiny(name, dtype)
        with made.open(num_threads=1) as model:
            want = prefill(model, IDS, PAGES, 64)
        for threads, chunk, page_tokens in [(1, 1, 16), (2, 7, 32), (3, 33, 48), (7, 64, 16)]:
            with made.open(num_threads=threads, page_tokens=page_tokens) as model:
                got = prefill(model, IDS, PAGES[::-1], chunk)
            assert got.tobytes() == want.tobytes(), (threads, chunk, page_tokens)

    def test_neighbours(self, tiny: MakeTiny) -> None:
        """A prefill, a decode and a chunk in one step equal the three alone."""
        made = tiny("gqa5-bias", "bf16")
        sequences = [(IDS[:40], [1, 2, 3], 20), (IDS[10:51], [4, 5, 6], 40), (IDS[50:53], [7], 0)]
        with made.open() as model:
            alone = [prefill(model, ids, pages, 64)[first:] for ids, pages, first in sequences]
        with made.open() as model:
            for ids, pages, first in sequences:
                if first:
                    prefill(model, ids[:first], pages, 64)
            runs = [(pages, first, ids[first:]) for ids, pages, first in sequences]
            together = model.step(step_batch(*runs)).logits
        assert together is not None
        assert together.tobytes() == np.concatenate(alone).tobytes()

    @pytest.mark.parametrize("dtype", ["bf16", "fp32+kv8"])
    def test_dirty_pages(self, tiny: MakeTiny, dtype: str) -> None:
        """What a page held before is never seen."""
        made = tiny("gqa3-tied-window", dtype)
        with made.open() as model:
            clean = prefill(model, IDS[:33], [0, 1, 2], 7)
            prefill(model, IDS[40:88], [2, 1, 0], 48)
            assert prefill(model, IDS[:33], [0, 1, 2], 7).tobytes() == clean.tobytes()

    def test_copied_and_mapped_weights(
        self, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made, logits = tiny("gqa5-bias", "bf16"), []
        for copy in (True, False):
            monkeypatch.setattr("sinterlm.runtime.model.fits_copy", lambda _, copy=copy: copy)
            with made.open() as model:
                assert model.describe()["huge_pages"] is copy
                logits.append(prefill(model, IDS[:20], PAGES, 20))
        assert logits[0].tobytes() == logits[1].tobytes()


class TestCallersMemory:
    def test_pages_and_hidden_states(self, tiny: MakeTiny) -> None:
        """Pages of the caller's with room between them; logits from hidden states, row by row."""
        made = tiny("gqa5-bias", "bf16")
        with made.open() as model:
            want = prefill(model, IDS[:40], PAGES, 40)
        shape = made.bundle.manifest.shape
        head = 2 * 16 * shape.head_dim
        stride = shape.num_kv_heads * (head + 32) + 64
        memory = [np.full(64 * stride, 0x7FC0, np.uint16) for _ in range(shape.num_layers)]
        with made.open() as model:
            addresses = tuple(layer.ctypes.data for layer in memory)
            model.bind_kv(KvMemory(addresses, 64, 16, stride, head + 32))
            hidden = np.zeros((40, shape.hidden_size), np.float32)
            for first, last in ((0, 7), (7, 40)):
                batch = step_batch((PAGES, first, IDS[first:last]), rows=[], want_logits=False)
                model.hidden(batch, hidden[first:last])
            got = model.head(hidden)
            again = prefill(model, IDS[:40], PAGES, 40)
        assert np.allclose(got, want, rtol=2e-2, atol=2e-2 * np.abs(want).max())
        assert again.tobytes() == want.tobytes()
        between = memory[0].reshape(64, stride)[:, shape.num_kv_heads * (head + 32) :]
        assert (between == 0x7FC0).all(), "what lies between pages is not ours"


class TestSampling:
    def test_greedy_and_logprobs(self, tiny: MakeTiny) -> None:
        made = tiny("gqa5-bias", "bf16")
        sampling = tuple(RowSampling(num_logprobs=n) for n in (2, 0, -1))
        with made.open() as model:
            batch = step_batch(
                (PAGES, 0, IDS[:30]), rows=[3, 11, 29], sampling=sampling, max_logprobs=2
            )
            got = model.step(batch)
        assert got.logits is not None
        logits = got.logits.astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        assert got.tokens.tolist() == logits.argmax(1).tolist()
        np.testing.assert_allclose(got.logprobs[:2], logprobs.max(1)[:2], atol=1e-5)
        assert got.ranks.tolist() == [1, 1, 0] and np.isnan(got.logprobs[2])
        assert got.top_ids[0].tolist() == np.argsort(-logits[0])[:2].tolist()

    @pytest.mark.parametrize("dtype", ["bf16", "fp32", "int8"])
    def test_kept_logits_draw_alike(self, tiny: MakeTiny, dtype: str) -> None:
        """Without a wish for logits, rows are drawn while they are made."""
        made = tiny("gqa3-tied-window", dtype)
        rows = [3, 11, 12, 29]
        sampling = (
            RowSampling(num_logprobs=-1), RowSampling(temperature=0.9, seed=3, num_logprobs=-1),
            RowSampling(temperature=0.9, top_k=5, num_logprobs=-1), RowSampling(num_logprobs=0),
        )  # fmt: skip
        with made.open(num_threads=3) as model:
            kept, early = (
                model.step(
                    step_batch((PAGES, 0, IDS[:30]), rows=rows, sampling=sampling, want_logits=want)
                )
                for want in (True, False)
            )
        assert early.logits is None and kept.tokens.tolist() == early.tokens.tolist()
        assert kept.logprobs.tobytes() == early.logprobs.tobytes()

    def test_slots_remember_the_last_token(self, tiny: MakeTiny) -> None:
        """Token id -1 is what the sequence's slot sampled in the step before."""
        made = tiny("gqa5-bias", "bf16")
        greedy = RowSampling(), RowSampling()
        with made.open(num_slots=4) as model:
            first = step_batch(
                ([1], 0, IDS[:5]), ([2], 0, IDS[5:12]), rows=[4, 11], sampling=greedy, slots=[3, 0]
            )
            tokens = model.step(first).tokens
            blind = step_batch(([2], 7, [-1]), ([1], 5, [-1]), slots=[0, 3])
            seen = step_batch(([2], 7, [int(tokens[1])]), ([1], 5, [int(tokens[0])]))
            assert model.step(blind).logits.tobytes() == model.step(seen).logits.tobytes()

    def test_a_step_may_draw_nothing(self, tiny: MakeTiny) -> None:
        made = tiny("gqa5-bias", "bf16")
        with made.open() as model:
            want = prefill(model, IDS[:20], [1, 2], 20)[12:]
            result = model.step(step_batch(([3, 4], 0, IDS[:12]), rows=[], want_logits=False))
            assert result.tokens.size == 0 and result.logits is None
            got = model.step(step_batch(([3, 4], 12, IDS[12:20]))).logits
            assert got is not None and got.tobytes() == want.tobytes()


class TestSeveralSteps:
    """Steps of one call equal the same steps one by one, byte for byte."""

    ROWS = (
        RowSampling(num_logprobs=2, position=30),
        RowSampling(temperature=0.8, top_p=0.9, seed=3, num_logprobs=0, position=7),
    )
    STARTS = ((PAGES, IDS[:30]), ([9, 8], IDS[40:47]))

    def begin(self, model: Model) -> list[int]:
        """Both prompts in the cache; the first token of each."""
        runs = [(pages, 0, ids) for pages, ids in self.STARTS]
        rows = [len(runs[0][2]) - 1, len(runs[0][2]) + len(runs[1][2]) - 1]
        return model.step(step_batch(*runs, rows=rows, sampling=self.ROWS, max_logprobs=2)).tokens

    def decodes(self, tokens: list[int], done: int, stops: tuple[int, ...] = ()) -> StepBatch:
        """The step after ``done`` steps, fed ``tokens``."""
        runs = [
            (pages, len(ids) + done, [int(token)])
            for (pages, ids), token in zip(self.STARTS, tokens, strict=True)
        ]
        rows = tuple(
            replace(row, position=row.position + 1 + done, stop_tokens=np.array(stops, np.int32))
            for row in self.ROWS
        )
        return step_batch(*runs, rows=[0, 1], sampling=rows, max_logprobs=2, want_logits=False)

    def one_by_one(self, model: Model, steps: int) -> list[StepResult]:
        tokens, results = self.begin(model), []
        for done in range(steps):
            results.append(model.step(self.decodes(tokens, done)))
            tokens = results[-1].tokens
        return results

    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_equal_single_steps(self, tiny: MakeTiny, threads: int) -> None:
        made = tiny("gqa5-bias", "bf16")
        with made.open() as model:
            want = self.one_by_one(model, 20)
        with made.open(num_threads=threads) as model:
            got = model.decode(self.decodes(self.begin(model), 0), 20)
        assert len(got) == 20
        for a, b in zip(got, want, strict=True):
            for name in ("tokens", "logprobs", "ranks", "top_ids", "top_logprobs"):
                assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name

    def test_a_stop_token_ends_the_call(self, tiny: MakeTiny) -> None:
        made = tiny("gqa5-bias", "bf16")
        with made.open() as model:
            want = [result.tokens.tolist() for result in self.one_by_one(model, 20)]
            stop = want[6][1]
            first = next(i for i, tokens in enumerate(want) if stop in tokens)
            batch = self.decodes(self.begin(model), 0, stops=(stop,))
            got = model.decode(batch, 20)
            assert [result.tokens.tolist() for result in got] == want[: first + 1]
            # What was cached and drawn goes on as if it had been step by step.
            more = model.decode(self.decodes(want[first], first + 1), 19 - first)
        assert [result.tokens.tolist() for result in more] == want[first + 1 :]

    def test_slots_hold_the_last_step(self, tiny: MakeTiny) -> None:
        made = tiny("gqa5-bias", "bf16")
        with made.open(num_slots=2) as model:
            batch = replace(self.decodes(self.begin(model), 0), slots=np.array([1, 0], np.int32))
            last = model.decode(batch, 5)[-1].tokens
            runs = [(pages, len(ids) + 5, [-1]) for pages, ids in self.STARTS]
            blind = model.step(step_batch(*runs, slots=[1, 0])).logits
            runs = [(p, len(i) + 5, [int(t)]) for (p, i), t in zip(self.STARTS, last, strict=True)]
            seen = model.step(step_batch(*runs)).logits
        assert blind is not None and seen is not None and blind.tobytes() == seen.tobytes()

    @pytest.mark.parametrize(
        "change,steps,message",
        [
            ({"want_logits": True}, 2, "flags 3"),
            ({"sample_rows": np.array([0], np.int32), "sampling": ROWS[:1]}, 2, "1 sample rows"),
            ({"sampling": (RowSampling(presence_penalty=0.5),) * 2}, 3, "has penalties"),
            ({}, MAX_LEN, "beyond max_model_len"),
            ({}, 100, "page_table_stride"),
            ({}, 0, "num_steps is 0"),
        ],
    )
    def test_refused(
        self, tiny: MakeTiny, change: dict[str, Any], steps: int, message: str
    ) -> None:
        with tiny("gqa5-bias", "bf16").open() as model:
            batch = replace(self.decodes(self.begin(model), 0), **change)
            with pytest.raises(RuntimeFault, match=message):
                model.decode(batch, steps)


class TestFacts:
    def test_counters_say_what_ran(self, tiny: MakeTiny) -> None:
        made = tiny("gqa3-tied-window", "bf16")
        with made.open() as model:
            before = model.describe()
            prefill(model, IDS[:20], [1, 2], 10)
            after = model.describe()
        assert [op["calls"] for op in before["ops"]] == [0] * 7
        calls = {op["name"]: op["calls"] for op in after["ops"]}
        assert calls["embed_norm"] == calls["norm_lm_head_sample"] == 2
        assert calls["attention"] == calls["down_residual"] == 6
        assert all(op["ns"] > 0 for op in after["ops"])
        assert after["isa"] == made.bundle.manifest.isa and after["num_threads"] == 2
        assert after["layout_hash"] == made.plan.layout.layout_hash
        assert after["shape"]["vocab_size"] == 150

    def test_bytes_per_page(self, tiny: MakeTiny) -> None:
        with tiny("gqa5-bias", "bf16").open() as model:
            assert model.kv_bytes_per_page(64) == 2 * 64 * 16 * 1 * 2 * 2
            assert model.describe()["kv_cache_dtype"] == "bf16"
        with tiny("gqa5-bias", "int8+kv8").open() as model:
            assert model.kv_bytes_per_page(64) == 2 * 64 * (16 + 4) * 1 * 2
            assert model.describe()["kv_cache_dtype"] == "int8"

    @pytest.mark.slow
    def test_probe(self, tiny: MakeTiny) -> None:
        with tiny("gqa5-bias", "bf16").open() as model:
            gflops, gbytes = model.probe(0.2)
        assert 1 < gbytes < 2000 and 1 < gflops < 1e6
