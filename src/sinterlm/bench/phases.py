"""An engine that knows where its Python time goes: schedule, batch, commit, detokenise, the rest.

The same code as ``engine.engine``, with a clock around its parts; nothing else differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sinterlm.bench.results import Slice
from sinterlm.engine.admission import Limits
from sinterlm.engine.batching import BatchBuilder
from sinterlm.engine.engine import Engine, StepModel
from sinterlm.engine.llm import LLM
from sinterlm.engine.outputs import Delta
from sinterlm.engine.pages import PagePool
from sinterlm.engine.schedule import Drawn, Schedule, StepLimits
from sinterlm.engine.scheduler import Scheduler
from sinterlm.engine.stats import Counters
from sinterlm.engine.tokenizer import Tokenizer
from sinterlm.runtime.batch import StepBatch, StepResult

#: The parts of ``Engine.step`` that are timed, in order; "step" is ``Model.step``.
PARTS = ("schedule", "batch", "step", "commit", "detokenise")


@dataclass
class Phases:
    """Seconds by part, and of ``Engine.step`` as a whole, since ``clear``."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    engine_s: float = 0.0

    def clear(self) -> None:
        """Start again from zero."""
        self.parts.update(dict.fromkeys(PARTS, 0.0))
        self.engine_s = 0.0

    def book(self, name: str, start: float) -> None:
        """Add the time since ``start`` (of ``time.perf_counter``) to part ``name``."""
        self.parts[name] += time.perf_counter() - start

    def python_slices(self, wall_s: float, num_steps: int) -> list[Slice]:
        """Python's share of ``wall_s`` seconds, per step: with the part "step" it is the whole."""
        rest = self.engine_s - sum(self.parts.values())
        named = [(name, self.parts[name]) for name in PARTS if name != "step"]
        named += [("rest of Engine.step", rest), ("between steps", wall_s - self.engine_s)]
        return [Slice(f"python: {name}", seconds / num_steps) for name, seconds in named]


class PhasedEngine(Engine):
    """An engine of its own over the model of an idle LLM, booking its time in ``phases``.

    ``max_num_batched_tokens`` may exceed what the model was opened for while the model pretends.
    """

    def __init__(
        self,
        llm: LLM,
        model: StepModel,
        *,
        page_tokens: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self.phases = phases = Phases()
        limits = Limits(llm.max_model_len, llm.bundle.manifest.shape.vocab_size)
        super().__init__(
            _PhasedModel(model, phases),
            _PhasedTokenizer(llm, phases),
            limits,
            StepLimits(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_sample_rows=llm.plan.max_sample_rows,
                max_mixed_prefill_tokens=max_num_batched_tokens,
            ),
            num_pages=llm.plan.num_pages,
            page_tokens=page_tokens,
            prefix_caching=False,
        )
        max_pages = -(-limits.max_model_len // page_tokens)
        self._builder = _PhasedBuilder(self.step_limits, max_pages, phases)

    def step(
        self,
        *,
        max_steps: int = 1,
        prompts_first: bool = False,
        launching: Callable[[], None] | None = None,
    ) -> list[Delta]:
        """Run one step, as ``Engine.step`` does."""
        start = time.perf_counter()
        deltas = super().step(max_steps=max_steps, prompts_first=prompts_first, launching=launching)
        self.phases.engine_s += time.perf_counter() - start
        return deltas

    def _new_scheduler(self) -> Scheduler:
        pool = PagePool(self._num_pages, self._page_tokens)
        return _PhasedScheduler(pool, self.step_limits, self._counters, self.phases)


class _PhasedModel:
    def __init__(self, model: StepModel, phases: Phases) -> None:
        self._model, self._phases = model, phases

    def step(self, batch: StepBatch) -> StepResult:
        start = time.perf_counter()
        done = self._model.step(batch)
        self._phases.book("step", start)
        return done

    def decode(self, batch: StepBatch, num_steps: int) -> list[StepResult]:
        start = time.perf_counter()
        done = self._model.decode(batch, num_steps)
        self._phases.book("step", start)
        return done


class _PhasedBuilder(BatchBuilder):
    def __init__(self, limits: StepLimits, max_pages: int, phases: Phases) -> None:
        super().__init__(limits, max_pages)
        self._phases = phases

    def build(self, schedule: Schedule) -> StepBatch:
        start = time.perf_counter()
        done = super().build(schedule)
        self._phases.book("batch", start)
        return done


class _PhasedScheduler(Scheduler):
    def __init__(
        self, pool: PagePool, limits: StepLimits, counters: Counters, phases: Phases
    ) -> None:
        super().__init__(pool, limits, counters, prefix_caching=False)
        self._phases = phases

    def schedule(self, *, max_steps: int = 1, prompts_first: bool = False) -> Schedule:
        start = time.perf_counter()
        done = super().schedule(max_steps=max_steps, prompts_first=prompts_first)
        self._phases.book("schedule", start)
        return done

    def commit(self, schedule: Schedule, tokens: Sequence[int]) -> list[Drawn]:
        start = time.perf_counter()
        done = super().commit(schedule, tokens)
        self._phases.book("commit", start)
        return done


class _PhasedTokenizer(Tokenizer):
    def __init__(self, llm: LLM, phases: Phases) -> None:
        super().__init__(llm.bundle.text())
        self._phases = phases

    def decode_function(self, *, skip_special_tokens: bool) -> Callable[[Sequence[int]], str]:
        decode = super().decode_function(skip_special_tokens=skip_special_tokens)

        def timed(ids: Sequence[int]) -> str:
            start = time.perf_counter()
            text = decode(ids)
            self._phases.book("detokenise", start)
            return text

        return timed
