"""``sinterlm run MODEL --chat``: a conversation in the terminal, or over a pipe, line by line.

/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer. An answer that was
stopped stays in the conversation as far as it got; a question that failed does not.
"""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

from sinterlm.errors import PromptError, UsageError

if TYPE_CHECKING:
    from sinterlm.engine.llm import LLM
    from sinterlm.engine.sampling import SamplingParams

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"

Message = dict[str, str]


def chat(llm: LLM, params: SamplingParams, system: str | None) -> int:
    """Talk until stdin ends or /exit. Returns 0. Raises UsageError without a chat template."""
    start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    # A model that cannot chat says so now, not after the first question.
    llm.chat_prompt([*start, {"role": "user", "content": "?"}])
    tty = sys.stdin.isatty()
    if tty:
        import readline  # noqa: F401 - editing and history for input()

        print(_HELP, file=sys.stderr)
    messages = list(start)
    while True:
        line = _read_line(tty)
        if line is None or line in ("/exit", "/quit"):
            return 0
        if line == "/reset":
            messages = list(start)
            print("(forgotten)", file=sys.stderr)
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}; {_HELP}", file=sys.stderr)
        elif line:
            messages = _turn(llm, params, messages, line)


def _read_line(tty: bool) -> str | None:
    """The next line, stripped; None at the end of input. Ctrl-C drops a line half typed."""
    try:
        if tty:
            return input("> ").strip()
        line = sys.stdin.readline()
        return line.strip() if line else None
    except EOFError:
        print(file=sys.stderr)
        return None
    except KeyboardInterrupt:
        if not tty:
            raise
        print(f"\n({_HELP})", file=sys.stderr)
        return ""


def _turn(
    llm: LLM, params: SamplingParams, messages: list[Message], question: str
) -> list[Message]:
    """Answer ``question``; the conversation after it."""
    asked = [*messages, {"role": "user", "content": question}]
    parts: list[str] = []
    try:
        with closing(llm.stream(llm.chat_prompt(asked), params)) as deltas:
            for delta in deltas:
                parts.append(delta.text)
                sys.stdout.write(delta.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)
    except (PromptError, UsageError) as exc:
        print(f"{exc}; /reset starts again", file=sys.stderr)
        return messages
    print(flush=True)
    return [*asked, {"role": "assistant", "content": "".join(parts)}]
