"""``sinterlm demo``: one question answered by the demo model, measured, and one proof.

Every figure is of this run. The proof: the same request alone and among 15 others gives the same
tokens and, bit for bit, the same logprobs.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import sys
from typing import TYPE_CHECKING

from sinterlm.commands.flags import add_option_flags
from sinterlm.commands.probe import measure
from sinterlm.commands.session import Session, open_session, options_of, timing_of
from sinterlm.errors import RuntimeFault
from sinterlm.options import CompileOptions, EngineOptions

if TYPE_CHECKING:
    from sinterlm.engine.llm import LLM
    from sinterlm.engine.outputs import RequestOutput
    from sinterlm.engine.prompts import PromptInput
    from sinterlm.engine.sampling import SamplingParams

QUESTION = "Name the planets of the solar system in order."
MAX_TOKENS = 160
#: What runs beside the question in the proof: other lengths, other subjects.
OTHERS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain how rain forms, step by step, to a child of six.",
    "List three prime numbers.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Give me a short recipe for pancakes, with quantities.",
    "What does a compiler do?",
    "Count from one to ten.",
    "Who wrote Romeo and Juliet?",
    "Describe a bicycle to someone who has never seen a wheel, in as much detail as you can.",
    "What is 17 plus 25?",
    "Suggest a name for a grey cat.",
    "Summarise the water cycle.",
    "Hello!",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("model", nargs="?", default="smollm2", metavar="MODEL")
    add_option_flags(parser, CompileOptions, EngineOptions)


def run(args: argparse.Namespace) -> int:
    """Answer, measure, prove. Raises RuntimeFault if the proof fails, and as ``LLM`` does."""
    from sinterlm.commands.run import stream_answer
    from sinterlm.engine.sampling import SamplingParams

    with open_session(*options_of(args)) as session:
        llm = session.llm
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, logprobs=0)
        prompt = llm.chat_prompt([{"role": "user", "content": QUESTION}])
        print(f"\n> {QUESTION}\n", flush=True)
        answer = stream_answer(session, prompt, params)
        bandwidths = [_bandwidth(llm)]
        among = _among_others(llm, prompt, params)
        bandwidths.append(_bandwidth(llm))
        print()
        for line in _figures(session, answer, max(bandwidths)):
            print(line)
        print()
        return _prove(answer, among)


def _bandwidth(llm: LLM) -> float:
    """Read bandwidth of this machine now, GB/s."""
    from sinterlm.commands.ui import TerminalProgress

    with TerminalProgress() as progress:
        progress.stage("measure this machine")
        return measure(llm)[1]


def _figures(session: Session, answer: RequestOutput, gbytes: float) -> list[str]:
    """The summary, one measured figure per line."""
    from sinterlm.artifact.storage import show_bytes

    manifest = session.llm.bundle.manifest
    timing = timing_of(session, answer)
    moved = bytes_per_token(session.llm, answer)
    found = ", found in the cache" if session.cached else "; cached, the next start is quick"
    lines = [
        f"compile    {session.compile_s:8.2f} s       {manifest.isa}, {manifest.dtypes}, library "
        f"{show_bytes(manifest.library.nbytes)}{found}",
        f"load       {session.load_s:8.2f} s",
        f"TTFT       {(timing['ttft_s'] or 0.0) * 1e3:8.1f} ms      "
        f"{len(answer.prompt_token_ids)} prompt tokens",
    ]
    rate = timing["decode_tokens_per_s"]
    if rate is None:
        return [*lines, "decode     no data: the answer has one token"]
    achieved = rate * moved / 1e9
    share = f"{achieved / gbytes:.0%} of the {gbytes:.1f} GB/s that this machine reads"
    if achieved > 1.02 * gbytes:  # not possible from memory: a cache holds the weights
        share = f"more than the {gbytes:.1f} GB/s this machine reads from memory: no share given"
    return [
        *lines,
        f"decode     {rate:8.1f} tok/s   {len(answer.outputs[0].token_ids)} tokens",
        f"streamed   {moved / 1e6:8.1f} MB      per token: weights and KV cache",
        f"bandwidth  {achieved:8.1f} GB/s    {share}",
    ]


def bytes_per_token(llm: LLM, answer: RequestOutput) -> int:
    """Bytes that one decode step moves, at the mean context of the answer."""
    from sinterlm.runtime.roofline import Step, step_loads, total_bytes

    manifest = llm.bundle.manifest
    context = len(answer.prompt_token_ids) + len(answer.outputs[0].token_ids) // 2
    return total_bytes(step_loads(manifest.ops, manifest.constants.windows, Step(1, context)))


def digest(output: RequestOutput) -> str:
    """Hex SHA-256 over a request's token ids (int32) and their logprobs' bytes (float32)."""
    first = output.outputs[0]
    ids, rows = first.token_ids, first.logprobs or []
    logprobs = [row[token].logprob for row, token in zip(rows, ids, strict=True)]
    data = struct.pack(f"<{len(ids)}i{len(ids)}f", *ids, *logprobs)
    return hashlib.sha256(data).hexdigest()


def _among_others(llm: LLM, prompt: PromptInput, params: SamplingParams) -> RequestOutput:
    """The same request again, in the middle of the others."""
    others = [llm.chat_prompt([{"role": "user", "content": text}]) for text in OTHERS]
    half = len(others) // 2
    return llm.generate([*others[:half], prompt, *others[half:]], params)[half]


def _prove(alone: RequestOutput, among: RequestOutput) -> int:
    """Compare, print, return 0. Raises RuntimeFault on a difference."""
    first, second = digest(alone), digest(among)
    print("the same request, SHA-256 over its tokens and the bytes of their logprobs:")
    print(f"  alone            {first}")
    print(f"  among {len(OTHERS)} others  {second}")
    if first != second:
        raise RuntimeFault(
            "the answer depends on what else is in the batch, which must not happen; please report "
            "it with the output of `sinterlm doctor --json`"
        )
    print("  equal: an answer does not depend on what else runs", flush=True)
    print("\nnow try: sinterlm run smollm2 --chat", file=sys.stderr)
    return 0
