"""Recorded steps are the steps that ran, and pretended ones leave the engine as real ones would."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import numpy as np
import pytest

from sinterlm.artifact.bundle import Bundle
from sinterlm.bench.phases import PhasedEngine
from sinterlm.bench.recording import RecordingModel, StepRecord
from sinterlm.bench.setup import open_recording, random_prompts
from sinterlm.engine.llm import LLM
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import UsageError
from sinterlm.options import EngineOptions
from sinterlm.runtime.roofline import Step

OPTIONS = EngineOptions(
    max_model_len=64, max_num_seqs=4, max_num_batched_tokens=24, block_size=16, num_threads=1
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


def engine_of(llm: LLM, model: RecordingModel, budget: int = 24) -> PhasedEngine:
    return PhasedEngine(llm, model, page_tokens=16, max_num_seqs=4, max_num_batched_tokens=budget)


def record(starts: list[int], contexts: list[int], rows: list[int]) -> StepRecord:
    arrays = (np.array(column, np.int32) for column in (starts, contexts, rows))
    return StepRecord(0.0, 1.0, *arrays)


def test_each_sequence_gets_its_own_tokens_context_and_rows() -> None:
    mixed = record([0, 1, 6, 9], [10, 5, 30], [0, 8])
    assert mixed.sequences() == [Step(1, 10, 1), Step(5, 5, 0), Step(3, 30, 1)]
    assert not mixed.is_decode
    assert record([0, 1, 2], [10, 5], [0, 1]).is_decode
    assert not record([0, 1, 2], [10, 5], [1]).is_decode  # a prefill chunk of one token


def test_records_hold_every_token_once(tiny: Bundle) -> None:
    with open_recording(tiny, OPTIONS) as (llm, model):
        prompts = random_prompts(3, 20, tiny.manifest.shape.vocab_size, seed=1)
        with model.recording() as records:
            llm.generate([{"prompt_token_ids": ids} for ids in prompts], GREEDY)
        llm.generate({"prompt_token_ids": prompts[0]}, GREEDY)  # after the recording: not in it
    sequences = [one for r in records for one in r.sequences()]
    assert sum(one.num_tokens for one in sequences) == 3 * (20 + 4)
    assert sum(one.num_rows for one in sequences) == 3 * 5
    assert max(one.context_len for one in sequences) == 24
    assert all(before.end <= after.start for before, after in pairwise(records))


def test_the_phased_engine_draws_what_the_llm_does(tiny: Bundle) -> None:
    with open_recording(tiny, OPTIONS) as (llm, model):
        ids = random_prompts(1, 20, tiny.manifest.shape.vocab_size, seed=2)[0]
        expected = llm.generate({"prompt_token_ids": ids}, GREEDY)[0].outputs[0]
        engine = engine_of(llm, model)
        engine.add_request("a", ids, GREEDY, stream=True)
        deltas = [delta for _ in range(5) for delta in engine.step()]
        phases = engine.phases
        engine.close()
    assert deltas[-1].output is not None
    assert deltas[-1].output.outputs[0].token_ids == expected.token_ids
    assert deltas[-1].output.outputs[0].text == expected.text
    assert all(seconds > 0 for seconds in phases.parts.values()), phases.parts
    assert sum(phases.parts.values()) < phases.engine_s


def test_pretending_puts_sequences_at_their_context(tiny: Bundle) -> None:
    with open_recording(tiny, OPTIONS) as (llm, model):
        engine = engine_of(llm, model, budget=100)  # more than the model could really step
        for name in "ab":
            engine.add_request(name, list(range(1, 41)), GREEDY)
        before = model.op_counters()
        with model.pretending():
            assert [delta.token_ids for delta in engine.step()] == [(0,), (0,)]
        assert model.op_counters() == before
        with model.recording() as records:
            engine.step()
        engine.close()
    assert [r.sequences() for r in records] == [[Step(1, 41, 1), Step(1, 41, 1)]]


def test_fill_kv_writes_every_page(tiny: Bundle) -> None:
    with open_recording(tiny, OPTIONS) as (llm, model):
        llm.generate({"prompt_token_ids": list(range(1, 17))}, GREEDY)  # page 0 holds something
        pages = llm.plan.num_pages
        model.fill_kv(pages)
        kv = model._kv
        assert kv is not None
        nbytes = llm.plan.page_bytes // kv.num_layers
        for base in (ctypes.c_void_p * kv.num_layers).from_address(kv.kv_base):
            first = ctypes.string_at(base, nbytes)
            assert any(first)
            last = ctypes.string_at(base + (pages - 1) * nbytes, nbytes)
            assert last == first
        with pytest.raises(UsageError, match=f"{pages} pages"):
            model.fill_kv(pages + 1)


def test_prompts_are_the_same_for_the_same_seed() -> None:
    first = random_prompts(2, 30, 50, seed=3)
    assert first == random_prompts(2, 30, 50, seed=3) != random_prompts(2, 30, 50, seed=4)
    assert {len(ids) for ids in first} == {30}
    assert all(0 <= token < 50 for ids in first for token in ids)
