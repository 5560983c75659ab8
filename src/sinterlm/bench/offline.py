"""Offline against offline: no HTTP, each engine's own bulk runner, the same shapes.

Ours is ``sinterlm bench throughput``, vLLM's ``vllm bench throughput``, llama.cpp's
``llama-batched-bench``. Each is one process for each point; only throughput is compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sinterlm.bench.engines.base import Engine, Seats, Variant, Weights
from sinterlm.bench.engines.llama import LlamaServer
from sinterlm.bench.engines.process import tail
from sinterlm.bench.engines.sinterlm import PRECISIONS, SinterLM
from sinterlm.bench.engines.vllm import VLLM
from sinterlm.bench.sweep_plan import SweepPlan
from sinterlm.errors import RuntimeFault, UsageError

_TIMEOUT_S = 1800.0


def measure_offline(
    engine: Engine, weights: Weights, variant: Variant, batch_size: int, plan: SweepPlan, log: Path
) -> dict[str, float]:
    """``total_token_throughput`` and ``output_throughput`` (tokens/s) of ``batch_size`` equal
    requests at once. Raises RuntimeFault with the end of the log, UsageError for an engine that has
    no offline runner."""
    with tempfile.TemporaryDirectory(prefix="sinterlm-offline-") as scratch:
        result = Path(scratch) / "result.json"
        command, env = offline_command(engine, weights, variant, batch_size, plan, result)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as output:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, **env}, timeout=_TIMEOUT_S, check=False,
            ).returncode  # fmt: skip
        if code != 0:
            raise RuntimeFault(f"{' '.join(command[:6])} ... ended with {code}\n{tail(log)}")
        text = result.read_text() if result.exists() else log.read_text(errors="replace")
    try:
        return _parse(engine, text, plan)
    except (ValueError, KeyError, IndexError, TypeError, StopIteration) as exc:
        raise RuntimeFault(f"the result of {engine.name} cannot be read ({exc!r})\n{tail(log)}"
                           ) from exc  # fmt: skip


def offline_command(
    engine: Engine, weights: Weights, variant: Variant, batch_size: int, plan: SweepPlan,
    result: Path,
) -> tuple[list[str], dict[str, str]]:  # fmt: skip
    """Command line and variables. Raises UsageError for an engine without an offline runner."""
    lens = (str(plan.input_len), str(plan.output_len))
    if isinstance(engine, SinterLM):
        command = [
            sys.executable, "-m", "sinterlm", "bench", "throughput", str(weights.hf), "--json",
            "--rounds", "1", "--batch-sizes", str(batch_size), "--input-len", lens[0],
            "--output-len", lens[1], *PRECISIONS[engine.precision],
        ]  # fmt: skip
        return command, {}
    if isinstance(engine, VLLM):
        seats = Seats(batch_size, plan.input_len + plan.output_len)
        launch = engine.launch(weights, variant, 1, seats)
        command = [
            str(engine.environment.python), "-m", "vllm.entrypoints.cli.main", "bench",
            "throughput", "--model", str(weights.hf), "--dtype", "bfloat16", "--dataset-name",
            "random", "--random-input-len", lens[0], "--random-output-len", lens[1],
            "--num-prompts", str(batch_size), "--max-num-seqs", str(batch_size),
            "--max-model-len", str(seats.padded_context), "--output-json", str(result),
            *variant.flags,
        ]  # fmt: skip
        return command, dict(launch.env)
    if isinstance(engine, LlamaServer):
        program = engine.program("llama-batched-bench")
        if program is None:
            raise UsageError(f"{engine.name} has no llama-batched-bench beside llama-server")
        context = batch_size * (plan.input_len + plan.output_len)
        command = [
            str(program), "-m", str(weights.gguf(engine.precision)), "-c", str(context + 256),
            "-npp", lens[0], "-ntg", lens[1], "-npl", str(batch_size), "-t",
            str(engine.num_threads), "--output-format", "jsonl", *variant.flags,
        ]  # fmt: skip
        return command, engine.env(program)
    raise UsageError(f"{engine.name} has no offline runner; leave it out of --mode offline")


def _parse(engine: Engine, text: str, plan: SweepPlan) -> dict[str, float]:
    """Two rates from what the runner wrote."""
    if isinstance(engine, SinterLM):
        line = next(one for one in text.splitlines() if one.startswith("{"))
        case = json.loads(line)["cases"][0]
        total, output = case["total_tokens_per_s"], case["output_tokens_per_s"]
    elif isinstance(engine, VLLM):
        total = json.loads(text)["tokens_per_second"]
        output = total * plan.output_len / (plan.input_len + plan.output_len)
    else:
        line = next(one for one in text.splitlines() if one.startswith("{") and '"speed"' in one)
        total = json.loads(line)["speed"]
        output = total * plan.output_len / (plan.input_len + plan.output_len)
    return {"total_token_throughput": float(total), "output_throughput": float(output)}
