"""How requests and bridges end: cancelled, late, unread, drained, or with a dead engine."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import (
    DrainingError,
    EngineDeadError,
    RuntimeFault,
)
from sinterlm.serve.bridge import Bridge
from tests.engine.fake_bundle import load
from tests.serve.bridges import (
    GREEDY,
    LONG,
    gated,
    read,
    run,
    running,
    submission,
    until,
)

# ---- ends that come early


def test_a_cancelled_request_frees_its_pages_and_ends_its_stream() -> None:
    llm, model = gated()

    async def test() -> None:
        async with running(llm) as bridge:
            stream = bridge.submit(submission(params=LONG))
            other = bridge.submit(submission("other", params=LONG))
            first = await stream.__anext__()
            assert first.finish_reason is None
            model.gate.clear()
            model.stepping.clear()
            await until(model.stepping.is_set)
            stream.cancel()
            stream.cancel()
            model.gate.set()
            rest = await read(stream)
            assert rest[-1].output and rest[-1].finish_reason == "abort"
            assert stream.abort_reason == "cancel"
            assert await bridge.run_idle(lambda e: e.scheduler.num_running) == 1
            stream.cancel()  # too late, and harmless
            other.cancel()
            await read(other)
            assert bridge.stats().kv_pages_used == 0

    run(test)
    llm.close()


def test_cancelling_a_request_that_waits() -> None:
    llm, model = gated()

    async def test() -> None:
        async with running(llm) as bridge:
            model.gate.clear()
            streams = [bridge.submit(submission(f"r{i}", params=LONG)) for i in range(4)]
            for stream in streams:
                stream.cancel()
            model.gate.set()
            for deltas in await asyncio.gather(*map(read, streams)):
                assert deltas[-1].finish_reason == "abort"
            assert bridge.stats().num_waiting == bridge.stats().kv_pages_used == 0

    run(test)
    llm.close()


def test_a_request_of_several_sequences_is_cancelled_whole() -> None:
    llm, _ = gated()

    async def test() -> None:
        params = SamplingParams(n=5, max_tokens=100, ignore_eos=True, temperature=0.0)
        async with running(llm, max_waiting=0) as bridge:
            stream = bridge.submit(submission(params=params))
            await stream.__anext__()
            stream.cancel()
            deltas = await read(stream)
            assert [d.finish_reason for d in deltas[-5:]] == ["abort"] * 5
            output = deltas[-1].output
            assert output is not None and len(output.outputs) == 5
            bridge.submit(submission("next"))  # all five places are free again

    run(test)
    llm.close()


def test_a_deadline_ends_a_request() -> None:
    llm, model = gated()

    async def test() -> None:
        async with running(llm) as bridge:
            model.gate.clear()
            stream = bridge.submit(submission(params=LONG, timeout_s=0.05))
            await asyncio.sleep(0.1)
            model.gate.set()
            deltas = await read(stream)
            assert deltas[-1].output and deltas[-1].finish_reason == "abort"
            assert stream.abort_reason == "timeout"
            assert len(await read(bridge.submit(submission(timeout_s=60.0)))) == 5

    run(test)
    llm.close()


def test_clocks_that_jump_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load()
    jumps = iter([0.0, 1e12, -1e12] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))

    async def test() -> None:
        async with running(llm) as bridge:
            stream = bridge.submit(submission(timeout_s=30.0))
            assert len(await read(stream)) == 5 and stream.abort_reason is None

    run(test)
    llm.close()


# ---- readers that do not read


def test_a_reader_that_never_comes_stalls_nobody_and_is_bounded() -> None:
    llm = load()

    async def test() -> None:
        async with running(llm) as bridge:
            unread = bridge.submit(submission("unread", params=LONG))
            await until(lambda: bridge.stats().num_running == 0 and "unread" not in bridge._streams)
            assert len(await read(bridge.submit(submission()))) == 5
            assert len(unread._deltas) == 100  # max_tokens
            assert len(await read(unread)) == 100

    run(test)
    llm.close()


def test_a_reader_that_is_cancelled_can_be_followed_by_another() -> None:
    llm, model = gated()

    async def test() -> None:
        async with running(llm) as bridge:
            model.gate.clear()
            stream = bridge.submit(submission())
            reader = asyncio.ensure_future(read(stream))
            await until(model.stepping.is_set)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            model.gate.set()
            assert len(await read(stream)) == 5

    run(test)
    llm.close()


# ---- the end of a bridge


def test_drain_finishes_what_runs_and_admits_nothing() -> None:
    llm, model = gated()

    async def test() -> None:
        bridge = Bridge(llm, max_waiting=10)
        await bridge.start()
        model.gate.clear()
        streams = [bridge.submit(submission(f"r{i}")) for i in range(4)]
        stopping = asyncio.ensure_future(bridge.stop(30))
        await asyncio.sleep(0)
        assert not bridge.is_ready
        with pytest.raises(DrainingError):
            bridge.submit(submission("late"))
        model.gate.set()
        for deltas in await asyncio.gather(*map(read, streams)):
            assert deltas[-1].finish_reason == "length"
        await stopping
        await bridge.stop(0)

    run(test)
    assert llm.generate("a", GREEDY)[0].finished  # the engine came back
    llm.close()


def test_drain_aborts_what_is_not_done_in_time() -> None:
    llm, model = gated()

    async def test() -> None:
        bridge = Bridge(llm, max_waiting=10)
        await bridge.start()
        model.gate.clear()
        streams = [bridge.submit(submission(f"r{i}", params=LONG)) for i in range(4)]
        patient = asyncio.ensure_future(bridge.stop(1000))
        await asyncio.sleep(0)
        hasty = asyncio.ensure_future(bridge.stop(0.05))
        await asyncio.sleep(0.1)
        model.gate.set()
        await asyncio.gather(patient, hasty)
        for stream in streams:
            assert (await read(stream))[-1].finish_reason == "abort"
            assert stream.abort_reason == "shutdown"
        assert bridge.stats().kv_pages_used == 0

    run(test)
    llm.close()


@pytest.mark.parametrize("error", [RuntimeFault("sl_step: broken"), MemoryError(), SystemExit(3)])
def test_a_dead_engine_fails_every_stream_with_an_id(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    llm, model = gated()
    model.fail_at = {3: error}

    async def test() -> None:
        bridge = Bridge(llm, max_waiting=10)
        await bridge.start()
        streams = [bridge.submit(submission(f"r{i}", params=LONG)) for i in range(4)]
        late_call = asyncio.ensure_future(bridge.run_idle(lambda e: time.sleep(0.01)))
        results = await asyncio.gather(*map(read, streams), return_exceptions=True)
        await asyncio.gather(late_call, return_exceptions=True)
        ids = set()
        for result in results:
            assert isinstance(result, EngineDeadError)
            assert "broken" not in str(result) and result.error_id in str(result)
            ids.add(result.error_id)
        assert len(ids) == 1 and not bridge.is_ready
        assert bridge.failure == f"{ids.pop()}: {type(error).__name__}"
        with pytest.raises(EngineDeadError):
            bridge.submit(submission("late"))
        with pytest.raises(EngineDeadError):
            await bridge.run_idle(lambda e: None)
        assert bridge.stats().num_running == 0
        await bridge.stop(10)

    with caplog.at_level(logging.CRITICAL):
        run(test)
    assert "engine thread ended by" in caplog.text
    llm.close()
    assert model.closed


def test_deltas_before_a_death_can_still_be_read() -> None:
    llm, model = gated()
    model.fail_at = {3: RuntimeFault("broken")}

    async def test() -> None:
        bridge = Bridge(llm, max_waiting=10, stream_interval=1)
        await bridge.start()
        stream = bridge.submit(submission(params=LONG))
        await until(lambda: bridge.failure is not None)
        read = []
        with pytest.raises(EngineDeadError):
            async for delta in stream:
                read.append(delta)
        assert len(read) == 2
        await bridge.stop(0)

    run(test)
    llm.close()
