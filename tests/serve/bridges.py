"""A bridge on a fake model whose steps a test can hold, and how its streams are read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np

from sinterlm.engine.llm import LLM
from sinterlm.engine.outputs import Delta
from sinterlm.engine.sampling import SamplingParams
from sinterlm.options import EngineOptions
from sinterlm.runtime.batch import StepBatch, StepResult
from sinterlm.serve.bridge import Bridge, Submission
from sinterlm.serve.stream import Stream
from tests.engine.fake_bundle import FakeBundle
from tests.engine.fakes import FakeModel
from tests.engine.texts import chat_assets

M = TypeVar("M", bound=FakeModel)

GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)


class GatedModel(FakeModel):
    """Steps only while its gate is open, so that a test decides what happens during a step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate = threading.Event()
        self.gate.set()
        self.stepping = threading.Event()

    def step(self, batch: StepBatch) -> StepResult:
        self.stepping.set()
        assert self.gate.wait(30)
        return super().step(batch)


class QuickModel(FakeModel):
    """Draws the same token always, for tests that look at everything but the tokens."""

    def step(self, batch: StepBatch) -> StepResult:
        rows = len(batch.sample_rows)
        none = np.empty((rows, 0))
        return StepResult(
            np.full(rows, 5, np.int32), np.zeros(rows, np.float32), np.ones(rows, np.int32),
            none.astype(np.int32), none.astype(np.float32),
        )  # fmt: skip


def load_on(model: type[M], max_num_seqs: int) -> tuple[LLM, M]:
    models: list[M] = []

    def open_model(bundle: FakeBundle, **sizes: Any) -> M:
        models.append(model(1, 16, bundle.manifest.shape.vocab_size))
        return models[0]

    bundle: Any = FakeBundle(chat_assets())
    options = EngineOptions(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max(32, max_num_seqs),
        kv_cache_memory_bytes=1 << 13 + max_num_seqs // 2, block_size=16,
    )  # fmt: skip
    llm = LLM.from_bundle(bundle, options, open_model=open_model)  # type: ignore[arg-type]
    return llm, models[0]


def gated() -> tuple[LLM, GatedModel]:
    return load_on(GatedModel, 2)


@asynccontextmanager
async def running(
    llm: LLM, max_waiting: int = 100, stream_interval: int = 1
) -> AsyncIterator[Bridge]:
    bridge = Bridge(llm, max_waiting=max_waiting, stream_interval=stream_interval)
    await bridge.start()
    try:
        yield bridge
    finally:
        await bridge.stop(10)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def submission(name: str = "r", ids: tuple[int, ...] = (5, 6, 7), **fields: Any) -> Submission:
    return Submission(name, ids, **{"params": GREEDY, **fields})


async def read(stream: Stream) -> list[Delta]:
    return [delta async for delta in stream]


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), 20)
