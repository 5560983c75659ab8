"""Where the time of a decode step inside vLLM goes; run with the Python of vLLM's environment.

    SINTERLM_VLLM=require ENV/bin/python scripts/vllm_step_budget.py MODEL [--batch-sizes 1 8 …]

A Markdown table: milliseconds of each part, and the step that they add up to. vLLM's engine runs in
this process (as served it has one for the engine core and one for the worker, and messages between
them), with OpenMP set as vLLM sets it for its worker: one thread per CPU, bound, spinning 5 ms.
Methods of vLLM's objects are wrapped with timers here; a part counts what no wrapped method below
it takes. Prompts are random token ids, answers have the length asked for, greedy, with text.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

#: Rows of the table.
SCHEDULER, INPUTS, RUNNER = "scheduler", "inputs, metadata", "model runner, the rest"
STEP, HEAD, OURS = "`sl_step`", "`sl_head`", "the plugin's Python"
MODEL, LOGITS = "model", "logits"
SAMPLER, BOOKING, UPDATE, TEXT = "sampler", "bookkeeping", "scheduler's update", "outputs and text"
REST = "rest of the step"


class Clock:
    """Exclusive seconds by part since ``reset``; calls nest."""

    def __init__(self) -> None:
        """Nothing measured yet."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # of each call that runs, the seconds of calls below it

    def reset(self) -> dict[str, float]:
        """What was measured; begin anew."""
        done, self.seconds = self.seconds, defaultdict(float)
        return done

    def wrap(self, owner: Any, name: str, part: str | Callable[..., str]) -> None:
        """Time ``owner.name``; ``part`` may depend on the arguments."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            row = part if isinstance(part, str) else part(*args)
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[row] += took - self._inner.pop()
                self._inner[-1] += took

        setattr(owner, name, timed)


def main() -> None:
    """Load, measure every batch size, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    args = parser.parse_args()
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        os.execve(sys.executable, [sys.executable, *sys.argv], environment())
    from vllm import LLM

    llm = LLM(
        args.model, dtype="bfloat16", max_num_seqs=max(args.batch_sizes),
        max_model_len=args.input_len + args.output_len + 64, enable_prefix_caching=False,
    )  # fmt: skip
    clock = Clock()
    watch(llm.llm_engine, clock)
    rng = np.random.default_rng(0)
    columns = {}
    for count in [args.batch_sizes[0], *args.batch_sizes]:  # the first one is not counted
        prompts = rng.integers(0, 40_000, (count, args.input_len)).tolist()
        columns[count] = measure(llm.llm_engine, clock, prompts, args.output_len)
    print(table(columns), flush=True)


def environment() -> dict[str, str]:
    """This process's, with one engine process and OpenMP as vLLM sets it for a worker."""
    cpus = sorted(os.sched_getaffinity(0))
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(len(cpus)),
    }  # fmt: skip
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.exists():
        bound = ",".join(map(str, cpus))
        variables |= {
            "LD_PRELOAD": str(openmp), "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0",
            "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{bound}]",
        }  # fmt: skip
    return {**variables, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def watch(engine: Any, clock: Clock) -> None:
    """Wrap what a step calls, in the order in which it does."""
    core = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    model = runner.model
    clock.wrap(core.scheduler, "schedule", SCHEDULER)
    clock.wrap(runner, "execute_model", RUNNER)
    for name in (
        "_update_states", "_prepare_inputs", "_determine_batch_execution_and_padding",
        "_get_slot_mappings", "_build_attention_metadata", "_preprocess",
    ):  # fmt: skip
        clock.wrap(runner, name, INPUTS)
    native = getattr(model, "_native", None)
    clock.wrap(model, "forward", MODEL if native is None else OURS)
    clock.wrap(model, "compute_logits", LOGITS if native is None else OURS)
    if native is not None:
        clock.wrap(native._model._library, "call", lambda name, *_: f"`{name}`")
    clock.wrap(runner, "sample_tokens", RUNNER)
    clock.wrap(runner.sampler, "forward", SAMPLER)
    clock.wrap(runner, "_bookkeeping_sync", BOOKING)
    clock.wrap(core.scheduler, "update_from_output", UPDATE)
    clock.wrap(engine.output_processor, "process_outputs", TEXT)


def measure(
    engine: Any, clock: Clock, prompts: list[list[int]], output_len: int
) -> dict[str, float]:
    """Part -> seconds of a decode step of all prompts, and the whole under "": the mean over that
    half of the steps whose time is nearest the median."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    for prompt in prompts:
        name = f"{time.perf_counter()}"
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    drawn: dict[str, int] = {}
    steps: list[dict[str, float]] = []
    while engine.has_unfinished_requests():
        was_decoding = len(drawn) == len(prompts)
        clock.reset()
        start = time.perf_counter()
        outputs = engine.step()
        whole = time.perf_counter() - start
        drawn |= {one.request_id: len(one.outputs[0].token_ids) for one in outputs}
        if was_decoding and len(outputs) == len(prompts) and not outputs[0].finished:
            parts = clock.reset()
            steps.append({**parts, REST: whole - sum(parts.values()), "": whole})
    middle = median(step[""] for step in steps)
    steps.sort(key=lambda step: abs(step[""] - middle))
    kept = steps[: (len(steps) + 1) // 2]
    return {part: sum(step[part] for step in kept) / len(kept) for part in kept[0]}


def table(columns: dict[int, dict[str, float]]) -> str:
    """Rows in the order of the step, then what they add up to."""
    order = (SCHEDULER, INPUTS, STEP, MODEL, HEAD, LOGITS, OURS, RUNNER, SAMPLER, BOOKING, UPDATE,
             TEXT, REST)  # fmt: skip
    parts = [part for part in order if any(part in column for column in columns.values())]
    lines = ["| part, ms | " + " | ".join(map(str, columns)) + " |"]
    lines += ["|---|" + "---|" * len(columns)]
    for part in parts:
        cells = (f"{1e3 * column.get(part, 0.0):.2f}" for column in columns.values())
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    whole = (f"{1e3 * column['']:.2f}" for column in columns.values())
    share = (
        f"{1 - (column.get(STEP, column.get(MODEL, 0)) + column.get(HEAD, 0)) / column['']:.0%}"
        for column in columns.values()
    )
    lines.append("| **step** | " + " | ".join(whole) + " |")
    lines.append("| all but the model and its head | " + " | ".join(share) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
