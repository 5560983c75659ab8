"""The command ``sinterlm``: parses, imports the layer a subcommand needs, turns errors into words.

Exit codes: 0 done, 1 ``doctor`` or ``cache verify`` found something, 2 the user can mend it (one
message on stderr, no traceback unless SINTERLM_DEBUG=1), 130 Ctrl-C, 141 the reader of our output
went away. Nothing here reads models or computes.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from sinterlm import __version__
from sinterlm.artifact.env import VARIABLES, check_environment
from sinterlm.errors import SinterError

#: Subcommand -> what it does; its module in ``sinterlm.commands`` has the same name.
_COMMANDS: dict[str, str] = {
    "run": "run a model: complete a prompt, answer a question, or chat in the terminal",
    "serve": "serve a model over HTTP: OpenAI's API, metrics, and a page to use and watch it",
    "vllm": "run an installed vLLM with SinterLM inside: `sinterlm vllm serve MODEL ...`",
    "compile": "compile a model into a bundle: one native library, packed weights, a manifest",
    "tune": "measure on a GPU which tile each kernel of a model should have",
    "inspect": "show a bundle or checkpoint: graph, cost per op, packing, memory plan, roofline",
    "doctor": "say what works on this machine and how to mend what does not",
    "cache": "list, shrink or check the cache of compiled code and packed weights",
    "eval": "perplexity of each dtype on a text, and how far it lies from fp32",
    "bench": "measure throughput, kernels or start-up against what this machine can do",
    "demo": "answer one question with the demo model, measure it, and prove batch invariance",
}


def _closest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like ``name``, if any is close."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that say what was probably meant."""

    def flags(self) -> list[str]:
        """Every long flag this parser takes."""
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """One message on stderr, exit 2."""
        wrong = re.search(
            r"argument COMMAND: invalid choice: '([^']*)' \(choose from (.*)\)", message
        )
        if wrong:
            match = _closest(wrong[1], re.findall(r"[\w-]+", wrong[2]))
            message = f"unknown command {wrong[1]!r}"
            message += f"; did you mean {match!r}?" if match else f" (choose from {wrong[2]})"
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")

    def unknown_flags(self, extra: Sequence[str]) -> NoReturn:
        """Refuse arguments that nothing takes. Exit 2."""
        words = []
        for word in extra:
            name = word.split("=", 1)[0]
            match = _closest(name, self.flags()) if name.startswith("-") else None
            words.append(f"{word} (did you mean {match}?)" if match else word)
        self.error(f"unrecognized arguments: {' '.join(words)}")


def build_parser(chosen: str | None) -> Parser:
    """The parser, with the arguments of subcommand ``chosen``; no other one is imported."""
    rows = "\n".join(f"  {name:<22}{text}" for name, text in VARIABLES.items())
    parser = Parser(
        prog="sinterlm",
        description="Compile a language model into one fused native library, and run it.",
        epilog=f"environment variables:\n{rows}\n\nstart with: sinterlm run smollm2 --chat",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sinterlm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name, text in _COMMANDS.items():
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == chosen:
            module = importlib.import_module(f"sinterlm.commands.{name}")
            module.add_arguments(added)
            added.set_defaults(run=module.run, parser=added)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code. Usage errors exit with 2 as argparse does."""
    _prepare_streams()
    words = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser(next((word for word in words if not word.startswith("-")), None))
    args, extra = parser.parse_known_args(words)
    if extra:
        args.parser.unknown_flags(extra)
    for line in check_environment():
        print(f"sinterlm: warning: {line}", file=sys.stderr)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("sinterlm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The interpreter flushes stdout once more on its way out: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (SinterError, OSError, MemoryError) as exc:
        return _report(exc, 2)
    except Exception as exc:
        return _report(exc, 70)


def _prepare_streams() -> None:
    """Let no stream end a command: one that the caller closed leads nowhere, a character that the
    terminal's encoding lacks is shown as ``?``, and a byte that is no text reaches the check of
    the prompt, which names it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8"))
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors == "strict":
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def _report(exc: Exception, code: int) -> int:
    """One message for ``exc`` on stderr; the traceback only with SINTERLM_DEBUG=1."""
    if os.environ.get("SINTERLM_DEBUG", "") not in ("", "0"):
        import traceback

        traceback.print_exception(exc)
    elif isinstance(exc, SinterError):
        print(f"sinterlm: error: {exc}", file=sys.stderr)
    elif isinstance(exc, MemoryError):
        print(
            "sinterlm: error: out of memory; use a smaller --max-model-len, --max-num-seqs or "
            "--kv-cache-memory-bytes",
            file=sys.stderr,
        )
    elif isinstance(exc, OSError):
        print(f"sinterlm: error: {exc}", file=sys.stderr)
    else:
        print(
            f"sinterlm: internal error: {type(exc).__name__}: {exc}; set SINTERLM_DEBUG=1 for the "
            "traceback, and please report it",
            file=sys.stderr,
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
