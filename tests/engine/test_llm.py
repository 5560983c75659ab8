"""The Python front: prompts in, outputs out, one caller at a time, and a close that waits."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sinterlm.artifact.text import TextAssets
from sinterlm.engine.llm import LLM
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import BundleError, PromptError, ResourceError, UsageError
from tests.engine.fake_bundle import OPTIONS, FakeBundle, load, open_fake
from tests.engine.fakes import FakeModel
from tests.engine.texts import BOS, chat_assets, token_id, vocab_size

GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


@pytest.fixture
def llm() -> Iterator[LLM]:
    with load() as llm:
        yield llm


def test_generate_takes_every_shape_of_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode("hello")
    assert ids[0] == token_id(BOS)
    one = llm.generate("hello", GREEDY)
    many = llm.generate(
        ["hello", {"prompt": "hello"}, {"prompt_token_ids": ids},
         {"prompt": "shown", "prompt_token_ids": np.array(ids)}],
        GREEDY,
    )  # fmt: skip
    assert len(one) == 1 and [o.prompt for o in many] == ["hello", "hello", None, "shown"]
    for output in one + many:
        assert output.finished and output.prompt_token_ids == tuple(ids)
        assert output.outputs[0].token_ids == one[0].outputs[0].token_ids
        assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)
    assert llm.generate([], GREEDY) == []


def test_parameters_per_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 2, 3)]
    outputs = llm.generate(["a", "b", "c"], params)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3]
    with pytest.raises(UsageError, match="3 sampling_params were given for 2 prompts"):
        llm.generate(["a", "b"], params)
    with pytest.raises(UsageError, match="sampling_params"):
        llm.generate("a", {"temperature": 0})  # type: ignore[arg-type]


def test_defaults_come_from_the_checkpoint() -> None:
    assets = chat_assets(generation={"temperature": 0.0, "max_new_tokens": 3})
    with load(assets) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=3)
        assert len(llm.generate("a")[0].outputs[0].token_ids) <= 3


@pytest.mark.parametrize(
    ("isa", "asked", "expected"), [("avx512bf16", None, 256), ("amx", None, 512), ("amx", 7, 7)]
)
def test_prompt_tokens_beside_decodes(isa: str, asked: int | None, expected: int) -> None:
    bundle: Any = FakeBundle(chat_assets(), isa=isa)
    options = replace(OPTIONS, max_mixed_prefill_tokens=asked)
    with LLM.from_bundle(bundle, options, open_model=open_fake) as llm:  # type: ignore[arg-type]
        assert llm._engine.scheduler.limits.max_mixed_prefill_tokens == expected


def test_max_tokens_none_fills_the_context(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    done = llm.generate({"prompt_token_ids": [3] * 100}, params)[0].outputs[0]
    assert (len(done.token_ids), done.finish_reason) == (28, "length")


def test_a_bias_that_leaves_nothing_to_draw_is_refused_alone(llm: LLM) -> None:
    never = dict.fromkeys(range(vocab_size()), -math.inf)
    with pytest.raises(UsageError, match="logit_bias and bad_words forbid all"):
        llm.generate("a", SamplingParams(logit_bias=never))
    ending = llm.tokenizer.eos_token_ids
    only_end = {i: bias for i, bias in never.items() if i not in ending}
    with pytest.raises(UsageError, match="logit_bias and bad_words forbid all"):
        llm.generate("a", SamplingParams(logit_bias=only_end, min_tokens=1))
    assert llm.generate("a", SamplingParams(logit_bias=only_end))[0].outputs[0].token_ids


def test_chat(llm: LLM) -> None:
    talk = [{"role": "user", "content": "hello"}]
    one = llm.chat(talk, GREEDY)
    assert one[0].prompt == f"{BOS}<|im_start|>user\nhello<|eos|><|im_start|>assistant\n"
    assert one[0].prompt_token_ids.count(token_id(BOS)) == 1
    two = llm.chat([talk, talk], GREEDY, add_generation_prompt=False)
    assert len(two) == 2 and not (two[0].prompt or "").endswith("assistant\n")
    with pytest.raises(UsageError, match="empty"):
        llm.chat([], GREEDY)
    with pytest.raises(UsageError, match="put the one into a list"):
        llm.chat(talk[0], GREEDY)  # type: ignore[arg-type]


def test_stream_adds_up_to_generate(llm: LLM) -> None:
    whole = llm.generate("hello", GREEDY)[0].outputs[0]
    deltas = list(llm.stream("hello", GREEDY))
    assert "".join(d.text for d in deltas) == whole.text
    assert sum((d.token_ids for d in deltas), ()) == whole.token_ids
    assert deltas[-1].output is not None and deltas[-1].output.outputs[0] == whole
    assert all(d.output is None for d in deltas[:-1])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"), ({}, "keys"), ({"prompt_token_ids": []}, "empty"), (7, "int"),
        ({"prompt": 7}, "text"), ({"prompt_ids": [1]}, "prompt_ids"),
        ({"prompt_token_ids": "12"}, "list"), ("a" * 200, "201 tokens.*128"),
        ({"prompt_token_ids": [10**6]}, "1000000"),
    ],
)  # fmt: skip
def test_bad_prompts_stop_everything_before_it_starts(llm: LLM, prompt: Any, words: str) -> None:
    steps = llm.model.num_steps  # type: ignore[attr-defined]
    with pytest.raises(PromptError, match=words):
        llm.generate(prompt, GREEDY)
    with pytest.raises(PromptError, match=words):
        llm.stream(prompt, GREEDY)
    with pytest.raises(PromptError, match=rf"prompts\[1\]: .*{words}"):
        llm.generate(["fine", prompt], GREEDY)
    assert llm.model.num_steps == steps  # type: ignore[attr-defined]
    assert len(llm.generate("fine", GREEDY)) == 1


def test_model_without_tokenizer() -> None:
    with load(TextAssets()) as llm:
        output = llm.generate({"prompt_token_ids": [1, 2]}, GREEDY)[0].outputs[0]
        assert output.text == "" and len(output.token_ids) == 5
        with pytest.raises(UsageError, match=r"no tokenizer\.json"):
            llm.generate("hello")
        with pytest.raises(UsageError, match="no chat template"):
            llm.chat([{"role": "user", "content": "a"}])


def test_forward_logits(llm: LLM) -> None:
    logits = llm.forward_logits([1, 2, 3])
    assert logits.shape == (3, vocab_size()) and logits.dtype == np.float32
    np.testing.assert_array_equal(llm.forward_logits([1, 2]), logits[:2])
    assert len(llm.forward_logits([1] * 128)) == 128
    for bad in ([], [1] * 129, [vocab_size()]):
        with pytest.raises(PromptError):
            llm.forward_logits(bad)


def test_interruption_leaves_it_usable(llm: LLM) -> None:
    model: Any = llm.model
    expected = llm.generate("hello", GREEDY)[0].outputs[0].token_ids
    for error in (KeyboardInterrupt(), RuntimeError("boom")):
        model.fail_at = {model.num_steps + 3: error}
        with pytest.raises(type(error)):
            llm.generate(["a", "b", "c", "d", "e", "f"], GREEDY)
        pool = llm._engine.scheduler.pool
        assert not llm._engine.has_unfinished and pool.num_free == pool.num_pages
        assert llm.generate("hello", GREEDY)[0].outputs[0].token_ids == expected


def test_dropped_stream_frees_the_engine(llm: LLM) -> None:
    for how in ("close", "drop"):
        stream = llm.stream("hello", GREEDY)
        next(stream)
        assert llm._engine.has_unfinished
        if how == "close":
            stream.close()
        del stream
        pool = llm._engine.scheduler.pool
        assert not llm._engine.has_unfinished and pool.num_free == pool.num_pages
    assert len(llm.generate("hello", GREEDY)) == 1


def test_a_thread_that_would_wait_for_itself_is_told(llm: LLM) -> None:
    stream = llm.stream("hello", GREEDY)
    next(stream)
    with pytest.raises(UsageError, match="still reading a stream"):
        llm.generate("hello", GREEDY)
    assert len(list(stream)) == 4  # and the stream goes on
    unread = llm.stream("hello", GREEDY)
    assert len(llm.generate("hello", GREEDY)) == 1  # one that was never read holds nothing
    unread.close()


def test_stream_may_be_dropped_by_another_thread(llm: LLM) -> None:
    stream = llm.stream("hello", GREEDY)
    next(stream)
    other = threading.Thread(target=stream.close)
    other.start()
    other.join()
    assert len(llm.generate("hello", GREEDY)) == 1


def test_threads_take_turns(llm: LLM) -> None:
    prompts = [f"prompt {i}" for i in range(8)]
    expected = {p: llm.generate(p, GREEDY)[0].outputs[0].token_ids for p in prompts}
    got: dict[str, Any] = {}

    def ask(prompt: str) -> None:
        got[prompt] = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids

    threads = [threading.Thread(target=ask, args=(p,)) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_close_waits_for_the_running_call() -> None:
    llm = load()
    model: Any = llm.model
    running, go_on = threading.Event(), threading.Event()
    step = model.step

    def slow_step(batch: Any) -> Any:
        running.set()
        assert go_on.wait(20) and not model.closed
        return step(batch)

    model.step = slow_step
    outputs: list[Any] = []
    caller = threading.Thread(target=lambda: outputs.extend(llm.generate("hello", GREEDY)))
    caller.start()
    assert running.wait(20)
    closers = [threading.Thread(target=llm.close) for _ in range(2)]
    for closer in closers:
        closer.start()
    assert not model.closed
    go_on.set()
    for thread in (caller, *closers):
        thread.join(20)
    assert len(outputs) == 1 and model.closed
    llm.close()


def test_closed() -> None:
    with load() as llm:
        pass
    assert llm.model.closed  # type: ignore[attr-defined]
    for call in (lambda: llm.generate("a"), lambda: llm.forward_logits([1])):
        with pytest.raises(UsageError, match="closed"):
            call()
    with pytest.raises(UsageError, match="closed"):
        next(llm.stream("a"))


def test_close_inside_a_stream_ends_it() -> None:
    llm = load()
    stream = llm.stream("hello", GREEDY)
    next(stream)
    llm.close()
    with pytest.raises(UsageError, match="closed while"):
        next(stream)


def test_model_that_cannot_get_its_cache_is_closed() -> None:
    opened: list[FakeModel] = []

    class Full(FakeModel):
        def alloc_kv(self, num_pages: int, page_tokens: int) -> None:
            if opened:
                raise ResourceError("no memory")
            opened.append(self)

    def open_full(bundle: FakeBundle, **sizes: Any) -> FakeModel:
        return Full(1, 16)

    bundle: Any = FakeBundle(chat_assets())
    with pytest.raises(ResourceError):
        LLM.from_bundle(bundle, OPTIONS, open_model=open_full)  # type: ignore[arg-type]
    assert opened[0].closed


def test_code_alone_cannot_run() -> None:
    bundle: Any = FakeBundle(chat_assets(), has_weights=False)
    with pytest.raises(BundleError, match="code-only"):
        LLM.from_bundle(bundle, OPTIONS, open_model=open_fake)  # type: ignore[arg-type]


def test_progress_is_counted(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY, use_tqdm=True)
    assert capsys.readouterr().err.endswith("2/2 prompts\n")
    llm.generate(["a", "b"], GREEDY)
    assert capsys.readouterr().err == ""


def test_constructor_refuses_before_it_looks_for_a_model() -> None:
    for options, words in (
        ({"dtype": "int3"}, "int3"),
        ({"block_size": 24}, "block_size=24"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"cpu_ids": 5}, "cpu_ids=5"),
        ({"cache_dir": ""}, "cache_dir=''"),
        ({"seed": None}, "seed=None"),
    ):
        with pytest.raises(UsageError, match=words):
            LLM("/nowhere", **options)  # type: ignore[arg-type]


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys, sinterlm; heavy = {'numpy', 'tokenizers', 'jinja2'} & set(sys.modules); "
        "assert not heavy, heavy; from sinterlm import SamplingParams, RequestOutput; "
        "assert SamplingParams(n=2).n == 2; assert 'LLM' in dir(sinterlm)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


def test_a_lent_engine_refuses_everybody_else(llm: LLM) -> None:
    engine = llm.lend_engine()
    for call in (
        lambda: llm.generate("a", GREEDY), lambda: list(llm.stream("a", GREEDY)),
        lambda: llm.forward_logits([3]), llm.close,
    ):  # fmt: skip
        with pytest.raises(UsageError, match="is being served; stop its server first"):
            call()
    with pytest.raises(UsageError, match="in use; a server needs it"):
        llm.lend_engine()
    engine.admit(engine.make_request("r", [3, 4], GREEDY))
    assert len(engine.step()) == 1
    llm.return_engine()
    assert not engine.has_unfinished
    assert llm.generate("a", GREEDY)[0].finished
    stream = llm.stream("a", GREEDY)
    next(stream)
    with pytest.raises(UsageError, match="in use; a server needs it"):
        llm.lend_engine()
    stream.close()
    llm.close()
    with pytest.raises(UsageError, match="closed"):
        llm.lend_engine()
