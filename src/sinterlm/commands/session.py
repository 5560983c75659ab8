"""From parsed flags to a loaded LLM: compile with progress, load, and know how long each took."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sinterlm.commands.flags import options_from
from sinterlm.options import CompileOptions, EngineOptions

if TYPE_CHECKING:
    from sinterlm.engine.llm import LLM
    from sinterlm.engine.outputs import RequestOutput
    from sinterlm.engine.sampling import SamplingParams


@dataclass(frozen=True)
class Session:
    """A loaded model and the seconds it took to get there."""

    llm: LLM
    compile_s: float  #: from the request to its bundle, whether compiled or found in the cache
    load_s: float  #: from the bundle to a model that can step
    cached: bool  #: whether the bundle was found as it is


@contextmanager
def open_session(compile_options: CompileOptions, engine: EngineOptions) -> Iterator[Session]:
    """Compile (or find) and load a model; freed at the end. Raises as ``LLM`` does.

    The engine's options are checked before anything is compiled.
    """
    from sinterlm.commands.ui import TerminalProgress
    from sinterlm.compile import compile_model
    from sinterlm.engine.llm import LLM
    from sinterlm.engine.memory import check_options

    check_options(engine)
    with TerminalProgress() as progress:
        start = time.perf_counter()
        bundle = compile_model(compile_options, progress)
        compiled, cached = time.perf_counter(), progress.num_stages == 0
        progress.stage("load")
        llm = LLM.from_bundle(bundle, engine)
    with llm:
        yield Session(llm, compiled - start, time.perf_counter() - compiled, cached)


def options_of(args: argparse.Namespace) -> tuple[CompileOptions, EngineOptions]:
    """The two sets of options that ``run`` takes."""
    return options_from(args, CompileOptions), options_from(args, EngineOptions)


def sampling_of(args: argparse.Namespace, llm: LLM, max_tokens: int) -> SamplingParams:
    """The model's own defaults overlaid with the flags that were given. Raises UsageError.

    ``max_tokens`` holds where neither a flag nor generation_config.json says otherwise.
    """
    from dataclasses import replace

    given: dict[str, Any] = {
        name: value for name in SAMPLING_FLAGS if (value := getattr(args, name, None)) is not None
    }
    if "max_new_tokens" not in llm.tokenizer.assets.generation:
        given.setdefault("max_tokens", max_tokens)
    return replace(llm.get_default_sampling_params(), **given)


#: Fields of SamplingParams that are flags: name -> (type, metavar, help); bool = a switch.
SAMPLING_FLAGS: dict[str, tuple[type, str, str]] = {
    "max_tokens": (int, "N", "most tokens to generate"),
    "min_tokens": (int, "N", "no end before this many tokens"),
    "temperature": (float, "X", "0 = greedy (default: the model's, else 1)"),
    "top_k": (int, "N", "draw from the N most likely; 0 = all"),
    "top_p": (float, "X", "draw from the smallest set of this probability"),
    "min_p": (float, "X", "drop tokens below this share of the most likely one's probability"),
    "repetition_penalty": (float, "X", "above 1 discourages tokens already in prompt or answer"),
    "presence_penalty": (float, "X", "subtracted from the logit of tokens already in the answer"),
    "frequency_penalty": (float, "X", "the same, times how often they occur"),
    "stop": (str, "TEXT", "end before this text (may be given several times)"),
    "ignore_eos": (bool, "", "go on after the end-of-sequence token"),
}


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per entry of ``SAMPLING_FLAGS``; what is not given is the model's default."""
    group = parser.add_argument_group("sampling (defaults: generation_config.json of the model)")
    for name, (kind, metavar, text) in SAMPLING_FLAGS.items():
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action="store_true", default=None, help=text)
        else:
            action = "append" if name == "stop" else "store"
            group.add_argument(flag, type=kind, action=action, metavar=metavar, help=text)


def timing_of(session: Session, output: RequestOutput) -> dict[str, float | None]:
    """Seconds and rates of one finished request; a rate without a sample is None, never 0."""
    metrics = output.metrics
    count = len(output.outputs[0].token_ids)
    first, done = metrics.first_token_time, metrics.finished_time
    decode_s = done - first if first is not None and count > 1 else None
    return {
        "compile_s": round(session.compile_s, 4),
        "load_s": round(session.load_s, 4),
        "ttft_s": None if metrics.ttft is None else round(metrics.ttft, 4),
        "decode_s": None if decode_s is None else round(decode_s, 4),
        "decode_tokens_per_s": round((count - 1) / decode_s, 2) if decode_s else None,
        "total_s": round(done - metrics.arrival_time, 4),
    }
