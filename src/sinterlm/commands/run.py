"""``sinterlm run``: complete a prompt, answer a question, or chat; the answer alone on stdout."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

from sinterlm.commands.compile import MODEL_HELP
from sinterlm.commands.flags import add_option_flags
from sinterlm.commands.session import (
    Session,
    add_sampling_flags,
    open_session,
    options_of,
    sampling_of,
    timing_of,
)
from sinterlm.errors import UsageError
from sinterlm.options import CompileOptions, EngineOptions

if TYPE_CHECKING:
    from sinterlm.engine.outputs import RequestOutput
    from sinterlm.engine.prompts import PromptInput
    from sinterlm.engine.sampling import SamplingParams

#: Tokens of an answer where neither a flag nor the model says how many.
DEFAULT_MAX_TOKENS = 512
_INTERACTIVE = object()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="complete TEXT as it is")
    what.add_argument(
        "--chat",
        nargs="?",
        const=_INTERACTIVE,
        metavar="TEXT",
        help="answer TEXT through the model's chat template; without TEXT, chat",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message for --chat")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    add_sampling_flags(parser)
    add_option_flags(parser, CompileOptions, EngineOptions)


def run(args: argparse.Namespace) -> int:
    """Compile, load, run. Raises UsageError for flags that exclude each other, and as ``LLM``."""
    interactive = args.chat is _INTERACTIVE
    if args.system is not None and args.chat is None:
        raise UsageError("--system needs --chat; put it into the text of --prompt instead")
    if args.code_only:
        raise UsageError("--code-only leaves nothing to run; it belongs to `sinterlm compile`")
    if interactive and args.json:
        raise UsageError("--json needs a question: --chat TEXT or --prompt TEXT")
    for name in ("prompt", "chat"):
        if getattr(args, name) == "":
            raise UsageError(f"--{name} is empty; give at least one character")
    with open_session(*options_of(args)) as session:
        params = sampling_of(args, session.llm, DEFAULT_MAX_TOKENS)
        if interactive:
            from sinterlm.commands.chat import chat

            return chat(session.llm, params, args.system)
        prompt = _prompt(args, session)
        if args.json:
            output = session.llm.generate(prompt, params)[0]
            print(json.dumps(result(session, output)))  # ASCII: safe in any locale
        else:
            output = stream_answer(session, prompt, params)
            print(summary(session, output), file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace, session: Session) -> PromptInput:
    if args.prompt is not None:
        return str(args.prompt)
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    return session.llm.chat_prompt([*messages, {"role": "user", "content": args.chat}])


def stream_answer(session: Session, prompt: PromptInput, params: SamplingParams) -> RequestOutput:
    """Write the answer to stdout as it appears, a newline after it; the finished request."""
    output: RequestOutput | None = None
    text = ""
    with closing(session.llm.stream(prompt, params)) as deltas:
        for delta in deltas:
            text = delta.text or text
            sys.stdout.write(delta.text)
            sys.stdout.flush()
            output = delta.output or output
    if not text.endswith("\n"):
        print(flush=True)
    assert output is not None
    return output


def result(session: Session, output: RequestOutput) -> dict[str, Any]:
    """What ``--json`` prints."""
    first = output.outputs[0]
    num_prompt, num_output = len(output.prompt_token_ids), len(first.token_ids)
    return {
        "text": first.text,
        "token_ids": list(first.token_ids),
        "prompt_token_ids": list(output.prompt_token_ids),
        "finish_reason": first.finish_reason,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        },
        "timing": timing_of(session, output),
    }


def summary(session: Session, output: RequestOutput) -> str:
    """One line about how it went."""
    timing = timing_of(session, output)
    count = len(output.outputs[0].token_ids)
    parts = [f"{len(output.prompt_token_ids)} prompt + {count} tokens"]
    if timing["ttft_s"] is not None:
        parts.append(f"first token {timing['ttft_s'] * 1e3:.0f} ms")
    if timing["decode_tokens_per_s"] is not None:
        parts.append(f"{timing['decode_tokens_per_s']:.1f} tokens/s")
    parts.append(f"ready in {session.compile_s + session.load_s:.2f} s")
    return "[" + ", ".join(parts) + f", {output.outputs[0].finish_reason}]"
