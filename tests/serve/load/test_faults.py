"""What goes wrong under load: signals, kills, full memory, rude readers, clocks, a dead engine."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from tests.serve.load.client import Case, Outcome, alone, cases, read, stream
from tests.serve.load.process import ServerProcess, running

pytestmark = pytest.mark.slow

SMALL = ("--max-model-len", "1024", "--log-level", "warning")


@pytest.fixture(scope="module")
def known() -> list[Case]:
    return cases(8, max_tokens=(6, 10, 14, 18))


@pytest.fixture(scope="module")
def expected(known: list[Case]) -> Iterator[list[Outcome]]:
    with running(*SMALL) as server:
        yield alone(server, known)


async def all_at_once(port: int, known: list[Case]) -> list[Outcome]:
    return list(await asyncio.gather(*(stream(port, case) for case in known)))


def test_sigterm_finishes_what_was_admitted(known: list[Case], expected: list[Outcome]) -> None:
    async def under_load(server: ServerProcess) -> tuple[list[Outcome], int, int]:
        running_ones = [asyncio.create_task(stream(server.port, case)) for case in known]
        while server.engine()["num_running"] < 4:
            await asyncio.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        late, _ = await asyncio.to_thread(server.post, "/v1/chat/completions", known[0].body)
        ready, _ = await asyncio.to_thread(server.get, "/ready")
        return list(await asyncio.gather(*running_ones)), late, ready

    with running(*SMALL, "--shutdown-timeout", "300") as server:
        outcomes, late, ready = asyncio.run(under_load(server))
        assert [o.tokens for o in outcomes] == [o.tokens for o in expected]
        assert all(o.is_done for o in outcomes)
        assert (late, ready) == (503, 503)
        assert server.process.wait(60) == 0, server.log.read_text()


def test_a_second_signal_aborts(known: list[Case]) -> None:
    async def twice(server: ServerProcess) -> list[Outcome | BaseException]:
        running_ones = [asyncio.create_task(stream(server.port, case)) for case in known]
        while server.engine()["num_running"] < 4:
            await asyncio.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        return list(await asyncio.gather(*running_ones, return_exceptions=True))

    with running(*SMALL) as server:
        outcomes = asyncio.run(twice(server))
        assert server.process.wait(20) == 128 + signal.SIGTERM
        assert any(isinstance(o, BaseException) or not o.is_done or o.error for o in outcomes)


def test_sigkill_loses_nothing_but_what_ran(known: list[Case], expected: list[Outcome]) -> None:
    async def killed(server: ServerProcess) -> list[Outcome | BaseException]:
        running_ones = [asyncio.create_task(stream(server.port, case)) for case in known]
        while server.engine()["num_running"] < 4:
            await asyncio.sleep(0.05)
        server.process.kill()
        return list(await asyncio.gather(*running_ones, return_exceptions=True))

    with running(*SMALL) as server:
        port = server.port
        outcomes = asyncio.run(killed(server))
    for outcome, full in zip(outcomes, expected, strict=True):
        if isinstance(outcome, Outcome):  # cut off, and never wrong
            assert outcome.tokens == full.tokens[: len(outcome.tokens)]
    with running(*SMALL, port=port) as server:
        assert [o.tokens for o in alone(server, known[:3])] == [o.tokens for o in expected[:3]]


def test_kv_exhaustion_preempts_and_changes_nothing(
    known: list[Case], expected: list[Outcome]
) -> None:
    pages_of_one = 1024 // 16  # a whole context, which is the least an engine takes
    bytes_of_page = 16 * 30 * 2 * 3 * 64 * 2  # SmolLM2-135M: layers, K and V, heads, size, bf16
    memory = str(int(pages_of_one * bytes_of_page * 1.05))
    flags = (*SMALL, "--block-size", "16", "--kv-cache-memory-bytes", memory)
    with running(*flags, "--max-num-seqs", "32") as server:
        outcomes = asyncio.run(all_at_once(server.port, known * 3))
        assert [o.tokens for o in outcomes] == [o.tokens for o in expected] * 3
        engine = server.wait_until_idle()
        print(f"{engine['kv_pages_total']} pages, {engine['num_preemptions']} preemptions")
        assert engine["kv_pages_total"] < 80
        status, answer = server.post("/v1/completions", {"prompt": "word " * 2000, "max_tokens": 8})
        assert (status, answer["error"]["param"]) == (400, "prompt")


def test_a_slow_reader_gets_everything_and_hinders_nobody(
    known: list[Case], expected: list[Outcome]
) -> None:
    async def beside(server: ServerProcess) -> tuple[Outcome, list[Outcome], bool]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=4096)
        writer.write(known[3].encoded())
        slow = Outcome()
        reading = asyncio.create_task(read(reader, slow, pause_s=0.1))
        others = await all_at_once(server.port, known)
        was_reading = not reading.done()
        await reading
        writer.close()
        return slow, others, was_reading

    with running(*SMALL) as server:
        slow, others, was_reading = asyncio.run(beside(server))
        assert was_reading, "the slow one was not slow"
        assert slow.tokens == expected[3].tokens and slow.is_done
        assert [o.tokens for o in others] == [o.tokens for o in expected]


def test_one_who_never_reads_is_dropped(known: list[Case], expected: list[Outcome]) -> None:
    body = {"messages": [{"role": "user", "content": "Count."}], "max_completion_tokens": 900,
            "ignore_eos": True, "logprobs": True, "top_logprobs": 20}  # fmt: skip
    with running(*SMALL, "--send-timeout", "3") as server:
        mute = socket.socket()
        mute.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        mute.connect(("127.0.0.1", server.port))
        mute.sendall(Case(body).encoded())
        while server.engine()["num_running"] < 1:
            time.sleep(0.05)
        assert alone(server, known[:2])[1].tokens == expected[1].tokens
        engine = server.wait_until_idle(within_s=240)
        mute.close()
        assert engine["requests_finished"]["abort"] == 1, "it ended before anybody missed it"


def test_jumping_clocks_do_nothing(known: list[Case], expected: list[Outcome]) -> None:
    prelude = (
        "import itertools, time\n"
        "real, jumps = time.time, itertools.cycle((0, 86400, -86400, 1e9, -1e9))\n"
        "time.time = lambda: real() + next(jumps)\n"
    )
    flags = (*SMALL, "--request-timeout", "300", "--read-timeout", "60")
    with running(*flags, prelude=prelude) as server:
        outcomes = asyncio.run(all_at_once(server.port, known))
        assert [o.tokens for o in outcomes] == [o.tokens for o in expected]
        assert server.stop() == 0


def test_a_dying_engine_is_told_and_ends_the_process(known: list[Case]) -> None:
    prelude = (
        "from sinterlm.runtime.model import Model\n"
        "step, calls = Model.step, []\n"
        "def failing(self, *given, **named):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 12:\n"
        "        raise ZeroDivisionError('a fault of /a/secret/path')\n"
        "    return step(self, *given, **named)\n"
        "Model.step = failing\n"
    )

    async def dying(server: ServerProcess) -> tuple[list[Outcome], tuple[int, str]]:
        plain = asyncio.to_thread(
            server.post, "/v1/chat/completions", {**known[3].body, "max_completion_tokens": 200}
        )
        whole = asyncio.create_task(plain)
        outcomes = await all_at_once(server.port, known)
        status, answer = await whole
        return outcomes, (status, answer["error"]["message"])

    with running(*SMALL, prelude=prelude) as server:
        outcomes, (status, message) = asyncio.run(dying(server))
        assert server.get("/health")[0] == 503
        assert status == 500
        failed = [o.error for o in outcomes if o.error is not None]
        assert failed
        log_line = server.process.wait(30), server.log.read_text()
        assert log_line[0] == 70
        for told in (message, *failed):
            assert "secret" not in told and "Traceback" not in told
        assert "a fault of /a/secret/path" in log_line[1], "the log has the cause"
