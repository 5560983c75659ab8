"""The bridge on a fake model: order, one wake-up per step, refusals, and no leaks."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
from typing import Any

import pytest

from sinterlm.engine.outputs import Delta
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import (
    DrainingError,
    PromptError,
    QueueFullError,
    ResourceError,
    UsageError,
)
from sinterlm.runtime.batch import StepBatch, StepResult
from sinterlm.serve.bridge import Bridge
from tests.engine.fake_bundle import load
from tests.engine.fakes import FakeModel
from tests.serve.bridges import (
    GREEDY,
    LONG,
    QuickModel,
    gated,
    load_on,
    read,
    run,
    running,
    submission,
    until,
)

# ---- the way of a request


def test_streams_give_what_the_offline_engine_gives() -> None:
    llm = load()
    prompts = [(3 + i, 4, 5 + i % 7) for i in range(20)]
    alone = llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY)

    async def test() -> None:
        async with running(llm) as bridge:
            assert bridge.is_ready and bridge.failure is None
            streams = [
                bridge.submit(submission(f"r{i}", p, prompt=f"text {i}"))
                for i, p in enumerate(prompts)
            ]
            for i, (deltas, offline) in enumerate(
                zip(await asyncio.gather(*map(read, streams)), alone, strict=True)
            ):
                output = deltas[-1].output
                assert output is not None and output.outputs == offline.outputs
                assert (output.request_id, output.prompt) == (f"r{i}", f"text {i}")
                assert [d.output for d in deltas[:-1]] == [None] * 4
                assert [t for d in deltas for t in d.token_ids] == list(
                    offline.outputs[0].token_ids
                )
                assert "".join(d.text for d in deltas) == offline.outputs[0].text
            assert all(s.abort_reason is None for s in streams)

    run(test)
    llm.close()


def test_with_an_interval_tokens_come_together_and_stay_the_same() -> None:
    llm, model = gated()

    async def test() -> list[list[Delta]]:
        answers = []
        for interval in (1, 4):
            async with running(llm, stream_interval=interval) as bridge:
                answers.append(await read(bridge.submit(submission(params=LONG))))
        return answers

    each, together = asyncio.run(asyncio.wait_for(test(), 60))
    assert together[:-1] == each[:-1] and {len(delta.token_ids) for delta in together} == {1}
    assert together[-1].output is not None and each[-1].output is not None
    assert together[-1].output.outputs == each[-1].output.outputs
    assert model.num_repeats == 25, "the first token comes with the prompt, then 4 by 4"
    llm.close()


def test_all_sequences_of_a_request_come_in_one_stream() -> None:
    llm = load()

    async def test() -> None:
        params = SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True)
        async with running(llm) as bridge:
            deltas = await read(bridge.submit(submission(params=params)))
            assert len(deltas) == 12
            output = deltas[-1].output
            assert output is not None and len(output.outputs) == 3
            for done in output.outputs:
                mine = [d for d in deltas if d.index == done.index]
                assert [d.token_ids[0] for d in mine] == list(done.token_ids)

    run(test)
    llm.close()


class PermittedModel(FakeModel):
    """Runs as many steps as it has permits."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.permits = threading.Semaphore(0)

    def step(self, batch: StepBatch) -> StepResult:
        assert self.permits.acquire(timeout=30)
        return super().step(batch)


def test_a_token_waits_for_no_further_step() -> None:
    llm, model = load_on(PermittedModel, 2)

    async def test() -> None:
        async with running(llm) as bridge:
            stream = bridge.submit(submission())
            for _ in range(5):
                model.permits.release()
                delta = await asyncio.wait_for(anext(stream), 20)
            assert delta.output is not None
            other, dropped = bridge.submit(submission("s")), bridge.submit(submission("t"))
            model.permits.release()
            await anext(other)
            dropped.cancel()
            other.cancel()
            model.permits.release()  # the one that had begun
            assert (await read(dropped))[-1].finish_reason == "abort"

    run(test)
    llm.close()


def test_one_wake_up_carries_a_whole_step() -> None:
    llm, model = gated()

    async def test() -> None:
        async with running(llm) as bridge:
            loop = asyncio.get_running_loop()
            posted: list[Any] = []
            original = loop.call_soon_threadsafe

            def counting(fn: Any, *args: Any) -> Any:
                posted.append(args)
                return original(fn, *args)

            loop.call_soon_threadsafe = counting  # type: ignore[assignment,method-assign]
            model.gate.clear()
            streams = [bridge.submit(submission(f"r{i}")) for i in range(2)]
            await until(model.stepping.is_set)
            model.gate.set()
            await asyncio.gather(*map(read, streams))
            assert len(posted) <= model.num_steps
            assert len(posted[-2][0]) == 2

    run(test)
    llm.close()


def test_an_idle_engine_thread_burns_no_time() -> None:
    llm = load()

    async def test() -> None:
        async with running(llm) as bridge:
            await read(bridge.submit(submission()))
            before = time.process_time()
            await asyncio.sleep(0.5)
            assert time.process_time() - before < 0.1

    run(test)
    llm.close()


def test_run_idle_sees_the_engine_between_steps() -> None:
    llm = load()

    async def test() -> None:
        async with running(llm) as bridge:
            assert await bridge.run_idle(lambda engine: engine.has_unfinished) is False
            name = await bridge.run_idle(lambda engine: threading.current_thread().name)
            assert name == "sinterlm-engine"
            with pytest.raises(ZeroDivisionError):
                await bridge.run_idle(lambda engine: 1 // 0)
            assert (await read(bridge.submit(submission())))[-1].output
            assert bridge.stats().kv_pages_used == 0
            (op,) = bridge.stats().ops
            assert (op.name, op.calls, op.seconds) == ("all", 5, 5e-6)
        with pytest.raises(DrainingError):
            await bridge.run_idle(lambda engine: None)

    run(test)
    llm.close()


def test_ops_are_held_against_the_roof_once_it_is_measured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    llm, model = gated()

    async def test() -> None:
        async with running(llm) as bridge:
            model.fail_probe = ResourceError("no memory for the buffer")
            await bridge.measure_roof(0.1)
            assert "no fractions of the roof: no memory" in caplog.text
            model.fail_probe = None
            model.ns_per_step = 4 * 10**6  # and the roof is 1 ms: 1 MB at 1 GB/s
            await bridge.measure_roof(0.1)
            await read(bridge.submit(submission(params=LONG)))
            (op,) = bridge.stats().ops
            assert op.calls == 100 and op.roof_fraction == pytest.approx(0.25)

    run(test)
    llm.close()


# ---- refusals


def test_bad_requests_are_refused_at_once_and_leave_nothing() -> None:
    llm, model = gated()

    async def test() -> None:
        async with running(llm) as bridge:
            too_much = SamplingParams(max_tokens=None, n=1)
            for bad, error, match in [
                (submission(ids=()), PromptError, "empty"),
                (submission(ids=(10**6,)), PromptError, "out of range"),
                (submission(ids=(5,) * 500), PromptError, "max_model_len"),
                (submission(params=SamplingParams(logit_bias={9999: 1.0})), UsageError, "bias"),
                (submission(timeout_s=0.0), UsageError, "timeout_s=0.0"),
                (submission(timeout_s=math.nan), UsageError, "timeout_s=nan"),
                (submission(timeout_s=math.inf), UsageError, "timeout_s=inf"),
            ]:
                with pytest.raises(error, match=match):
                    bridge.submit(bad)
            if llm.plan.num_pages * 16 < llm.max_model_len:
                with pytest.raises(ResourceError, match="KV pages"):
                    bridge.submit(submission(params=too_much))
            model.gate.clear()
            first = bridge.submit(submission())
            with pytest.raises(UsageError, match="request_id='r' is already running"):
                bridge.submit(submission())
            model.gate.set()
            await read(first)
            assert len(await read(bridge.submit(submission()))) == 5  # the id is free again

    run(test)
    llm.close()


def test_a_full_queue_says_when_to_come_back() -> None:
    llm, model = gated()

    async def test() -> None:
        async with running(llm, max_waiting=1) as bridge:
            model.gate.clear()
            streams = [bridge.submit(submission(f"r{i}")) for i in range(3)]  # 2 seats and 1
            with pytest.raises(QueueFullError, match="1 requests wait already") as caught:
                bridge.submit(submission("late"))
            assert caught.value.retry_after_s >= 1
            model.gate.set()
            await asyncio.gather(*map(read, streams))
            assert len(await read(bridge.submit(submission("late")))) == 5

    run(test)
    llm.close()


def test_the_llm_refuses_others_while_it_is_served() -> None:
    llm = load()

    async def test() -> None:
        bridge = Bridge(llm, max_waiting=1)
        with pytest.raises(UsageError, match="has not been started"):
            bridge.submit(submission())
        assert not bridge.is_ready
        await bridge.stop(1)  # nothing to stop
        async with running(llm) as other:
            with pytest.raises(UsageError, match="being served"):
                llm.generate("a", GREEDY)
            with pytest.raises(UsageError, match="in use"):
                await Bridge(llm, max_waiting=1).start()
            with pytest.raises(UsageError, match="started already"):
                await other.start()
        assert llm.generate("a", GREEDY)[0].finished

    run(test)
    llm.close()
    with pytest.raises(UsageError, match="max_waiting=-1"):
        Bridge(llm, max_waiting=-1)


# ---- hygiene


def test_thousands_of_requests_leave_nothing_behind() -> None:
    llm, _ = load_on(QuickModel, 16)
    threads = threading.active_count()

    async def serve(bridge: Bridge, number: int) -> None:
        stream = bridge.submit(submission(f"r{number}", (3, 4, 5 + number % 50)))
        if number % 3 == 0:
            await stream.__anext__()
            stream.cancel()
            if number % 2:
                return  # a client that left reads no more
        await read(stream)

    async def test() -> None:
        async with running(llm, max_waiting=200) as bridge:
            objects = []
            for turn in range(20):
                await asyncio.gather(*(serve(bridge, 100 * turn + i) for i in range(100)))
                await until(lambda: bridge.stats().num_running == 0 and not bridge._streams)
                if turn % 5 == 4:
                    gc.collect()
                    objects.append(len(gc.get_objects()))
            assert max(objects[1:]) <= objects[1] + 200
            stats = bridge.stats()
            assert stats.kv_pages_used == stats.num_waiting == bridge._room.num_inside == 0
            assert not bridge._calls and threading.active_count() <= threads + 1

    run(test)
    assert threading.active_count() == threads
    llm.close()
