"""How sequences end, what they report, and what the door refuses."""

from __future__ import annotations

import gc
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinterlm.engine.engine import GIL_SWITCH_INTERVAL, Engine
from sinterlm.engine.outputs import CompletionOutput, Delta, RequestOutput
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import PromptError, UsageError
from tests.engine.fakes import FakeModel, make_engine
from tests.engine.texts import chat_assets, token_id, vocab_size

EOS = token_id("<|eos|>")


def text_engine(**options: int) -> Engine:
    return make_engine(vocab_size=vocab_size(), assets=chat_assets(), **options)


def script(engine: Engine, text: str, ending: list[int] | None = None) -> None:
    """Make the model say ``text`` whatever it is asked, unless the bias bars a token."""
    tokens = engine.tokenizer.encode(text) + (ending or [])
    model = engine._model
    assert isinstance(model, FakeModel)
    plain_step = model.step

    def step(batch):  # type: ignore[no-untyped-def]
        result = plain_step(batch)
        for i, row in enumerate(batch.sampling):
            said = tokens[min(row.position - 1, len(tokens) - 1)]
            barred = row.bias_ids[np.isneginf(row.bias)].tolist()
            result.tokens[i] = said if said not in barred else 0
        return result

    model.step = step  # type: ignore[method-assign]


def run(
    engine: Engine, params: SamplingParams, *, stream: bool = False, prompt: tuple[int, ...] = (1,)
) -> tuple[CompletionOutput, list[Delta], RequestOutput]:
    engine.add_request("r", prompt, params, stream=stream)
    deltas: list[Delta] = []
    while engine.has_unfinished:
        deltas += engine.step()
    output = deltas[-1].output
    assert output is not None
    return output.outputs[0], deltas, output


def test_the_first_delta_of_the_first_sequence_tells_what_the_prompt_scored() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, n=2, prompt_logprobs=1)
    _, deltas, output = run(text_engine(), params, stream=True, prompt=(5, 6, 7))
    told = [d for d in deltas if d.prompt_logprobs is not None]
    assert [d.index for d in told] == [0] and told[0] is next(d for d in deltas if d.index == 0)
    assert told[0].prompt_logprobs == output.prompt_logprobs
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 3


@pytest.mark.parametrize("stream", [True, False])
def test_eos_ends_and_is_not_shown(stream: bool) -> None:
    engine = text_engine()
    script(engine, "hi €", [EOS])
    done, deltas, output = run(engine, SamplingParams(max_tokens=50), stream=stream)
    assert (done.text, done.finish_reason, done.stop_reason) == ("hi €", "stop", None)
    assert done.token_ids[-1] == EOS and len(done.token_ids) == 7
    assert "".join(d.text for d in deltas) == ("hi €" if stream else "")
    assert sum(len(d.token_ids) for d in deltas) == 7
    assert deltas[-1].finish_reason == "stop" and deltas[0].finish_reason is None
    assert output.metrics.ttft is not None
    assert 0 <= output.metrics.ttft <= output.metrics.finished_time - output.metrics.arrival_time


def test_ignore_eos() -> None:
    engine = text_engine()
    script(engine, "a", [EOS])
    done, _, _ = run(engine, SamplingParams(max_tokens=5, ignore_eos=True))
    assert done.token_ids[1:] == (EOS,) * 4 and done.finish_reason == "length"


def test_stop_token_id_is_reported() -> None:
    engine = text_engine()
    script(engine, "abc")
    (b,) = engine.tokenizer.encode("b")
    done, _, _ = run(engine, SamplingParams(stop_token_ids=[b]))
    assert (done.text, done.stop_reason, done.finish_reason) == ("a", b, "stop")


@pytest.mark.parametrize(("include", "text"), [(False, "say "), (True, "say hello€")])
def test_stop_string_over_several_tokens(include: bool, text: str) -> None:
    engine = text_engine()
    script(engine, "say hello€ and more")
    params = SamplingParams(
        stop=["never", "hello€"], max_tokens=50, include_stop_str_in_output=include
    )
    done, deltas, _ = run(engine, params, stream=True)
    assert (done.text, done.stop_reason, done.finish_reason) == (text, "hello€", "stop")
    assert "".join(d.text for d in deltas) == text


def test_included_stop_token_is_shown() -> None:
    engine = text_engine()
    script(engine, "a", [EOS])
    params = SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False)
    assert run(engine, params)[0].text == "a<|eos|>"


def test_min_tokens_bars_every_ending() -> None:
    engine = text_engine()
    script(engine, "xx", [EOS])
    params = SamplingParams(min_tokens=5, stop=["x"], stop_token_ids=[7], max_tokens=9)
    engine.add_request("r", [1], params)
    request = engine._groups["r"].requests[0]
    assert request.row.bias_ids.tolist() == [7, EOS] and np.all(np.isneginf(request.row.bias))
    engine.reset()
    done, _, _ = run(engine, params)
    assert EOS not in done.token_ids[:5] and done.token_ids[5] == EOS
    assert done.finish_reason == "stop" and done.text.startswith("xx")


def test_min_tokens_keeps_the_users_bias() -> None:
    engine = text_engine()
    params = SamplingParams(min_tokens=2, logit_bias={3: 4.0, EOS: 9.0})
    engine.add_request("r", [1], params)
    request = engine._groups["r"].requests[0]
    first = dict(zip(request.row.bias_ids.tolist(), request.row.bias.tolist(), strict=True))
    assert first == {3: 4.0, EOS: -np.inf}
    engine.step()
    engine.step()
    later = dict(zip(request.row.bias_ids.tolist(), request.row.bias.tolist(), strict=True))
    assert later == {3: 4.0, EOS: 9.0}


def test_length_and_context_end_a_sequence() -> None:
    engine = make_engine(max_model_len=10)
    done, _, _ = run(engine, SamplingParams(max_tokens=3))
    assert len(done.token_ids) == 3 and done.finish_reason == "length"
    done, _, _ = run(engine, SamplingParams(max_tokens=99), prompt=(1, 2, 3, 4))
    assert len(done.token_ids) == 6 and done.finish_reason == "length"


@pytest.mark.parametrize("wanted", [0, 3])
def test_logprobs(wanted: int) -> None:
    engine = text_engine()
    done, deltas, _ = run(engine, SamplingParams(logprobs=wanted, max_tokens=6))
    assert done.logprobs is not None and len(done.logprobs) == 6
    for token, entry, delta in zip(done.token_ids, done.logprobs, deltas, strict=True):
        assert next(iter(entry)) == token and delta.logprobs == entry
        assert len(entry) == max(1, wanted)  # the fake always draws its best token
        assert [e.rank for e in entry.values()] == list(range(1, len(entry) + 1))
        assert entry[token].decoded_token == engine.tokenizer.token_text(token)
    assert done.cumulative_logprob == pytest.approx(-0.5 * 6)


def test_without_logprobs() -> None:
    done, deltas, _ = run(make_engine(), SamplingParams())
    assert done.logprobs is None and done.cumulative_logprob is None
    assert deltas[0].logprobs is None


def test_penalties_see_prompt_and_output() -> None:
    engine = make_engine()
    engine.add_request("r", [5, 6], SamplingParams(frequency_penalty=1.0, max_tokens=4))
    request = engine._groups["r"].requests[0]
    for count in range(4):
        engine.step()
        assert request.row.prompt_tokens.tolist() == [5, 6]
        assert request.row.output_tokens.tolist() == request.tokens.output.tolist()[:count]


def test_seeds() -> None:
    def tokens(engine_seed: int, params: SamplingParams, before: int = 0) -> list[tuple[int, ...]]:
        engine = make_engine(seed=engine_seed)
        for i in range(before):
            engine.add_request(f"before {i}", [9], SamplingParams(max_tokens=1))
        *_, output = run(engine, params)
        return [o.token_ids for o in output.outputs]

    own = SamplingParams(seed=7, n=3)
    assert tokens(0, own) == tokens(1, own, before=2), "a seed of its own decides alone"
    assert len(set(tokens(0, own))) == 3, "the n sequences differ"
    assert tokens(0, own)[0] == tokens(0, SamplingParams(seed=7))[0]
    free = SamplingParams()
    assert tokens(0, free) == tokens(0, free)
    assert tokens(0, free) != tokens(1, free) != tokens(1, free, before=1)


def test_n_sequences_come_back_in_order() -> None:
    engine = text_engine(max_num_seqs=2)
    *_, output = run(engine, SamplingParams(n=5, seed=1, max_tokens=4))
    assert [o.index for o in output.outputs] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"), ([97], "97 at index 0"), ([1, -1], "-1 at index 1"), ([1] * 128, "128"),
        ([1.0], "integer"), ([[1]], "flat"), (["a"], "integer"), ([2**70], "integer"),
        ([True], "integer"), (5, "list"), ([[1], [1, 2]], "list"),
    ],
)  # fmt: skip
def test_bad_prompts(prompt: object, words: str) -> None:
    engine = make_engine()
    with pytest.raises(PromptError, match=words):
        engine.add_request("r", prompt, SamplingParams())  # type: ignore[arg-type]
    assert not engine.has_unfinished


def test_bad_requests() -> None:
    engine = make_engine()
    with pytest.raises(UsageError, match="tokenizer"):
        engine.add_request("r", [1], SamplingParams(stop="x"))
    with pytest.raises(UsageError, match="min_tokens=100"):
        engine.add_request("r", [1] * 60, SamplingParams(min_tokens=100, max_tokens=100))
    engine.add_request("r", [1], SamplingParams())
    with pytest.raises(UsageError, match="'r' is already running"):
        engine.add_request("r", [1], SamplingParams())


def test_forward_logits_in_chunks() -> None:
    whole = make_engine(max_num_seqs=64, max_num_batched_tokens=64)
    chunked = make_engine(max_num_seqs=3)
    ids = np.arange(50, dtype=np.int32)
    logits = whole.forward_logits(ids, 97)
    assert logits.shape == (50, 97) and logits.dtype == np.float32
    np.testing.assert_array_equal(logits, chunked.forward_logits(ids, 97))
    assert chunked.scheduler.pool.num_free == chunked.scheduler.pool.num_pages


@settings(max_examples=30)
@given(st.integers(1, 30), st.booleans())
def test_an_interruption_anywhere_leaves_the_engine_usable(step: int, while_running: bool) -> None:
    engine = make_engine(num_pages=8, page_tokens=3)
    expected = run(engine, SamplingParams(temperature=0.0))[0].token_ids
    model = engine._model
    assert isinstance(model, FakeModel)
    model.fail_at = {model.num_steps + step: KeyboardInterrupt()}
    try:
        for i in range(4):
            engine.add_request(str(i), [i], SamplingParams(max_tokens=18))
        while engine.has_unfinished:
            engine.step()
    except KeyboardInterrupt:
        if while_running:
            engine.abort(["0"])
        engine.reset()
    assert run(engine, SamplingParams(temperature=0.0))[0].token_ids == expected
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


def test_switch_interval_is_low_while_an_engine_runs() -> None:
    gc.collect()
    found = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        first = make_engine()
        run(first, SamplingParams())
        second = make_engine()  # finds it lowered already
        run(second, SamplingParams())
        assert sys.getswitchinterval() == pytest.approx(GIL_SWITCH_INTERVAL)
        first.close()
        assert sys.getswitchinterval() == pytest.approx(0.005)
        run(second, SamplingParams())  # lowers it again for itself
        assert sys.getswitchinterval() == pytest.approx(GIL_SWITCH_INTERVAL)
        second.close()
        second.close()
        assert sys.getswitchinterval() == pytest.approx(0.005)
    finally:
        sys.setswitchinterval(found)
