"""``sinterlm serve``: a model behind OpenAI's API, compiled on first use.

One line on stdout says where it listens once it does; the log goes to stderr or ``--log-file``.
Exit codes: 0 stopped as told, 70 the engine died, 128 + n a second signal n aborted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from sinterlm.commands.compile import MODEL_HELP
from sinterlm.commands.flags import add_option_flags, options_from
from sinterlm.commands.session import open_session, options_of
from sinterlm.errors import UsageError
from sinterlm.options import CompileOptions, EngineOptions, ServeOptions

if TYPE_CHECKING:
    from sinterlm.serve.http_server import Listener


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_option_flags(parser, ServeOptions, title="server")
    add_option_flags(parser, CompileOptions, EngineOptions, title="model and engine")


def run(args: argparse.Namespace) -> int:
    """Check everything, bind, compile, load, serve. Raises UsageError and as ``LLM``."""
    if args.code_only:
        raise UsageError("--code-only leaves nothing to serve; it belongs to `sinterlm compile`")
    from sinterlm.serve.http_server import Listener
    from sinterlm.serve.listening import bind_sockets, tls_context
    from sinterlm.serve.logs import logging_to
    from sinterlm.serve.server import Service, serve
    from sinterlm.serve.settings import check_options, read_template, with_environment

    options = with_environment(options_from(args, ServeOptions))
    check_options(options)
    template = read_template(options.chat_template)
    listener = Listener(bind_sockets(options.host, options.port), tls_context(options))
    _warn_of_strangers(listener, has_keys=bool(options.api_key))
    compile_options, engine = options_of(args)
    service = Service(args.model, engine, options, template)
    with logging_to(options), _stoppable(), open_session(compile_options, engine) as session:
        return serve(
            session.llm, service, listener, lambda: _announce(args.model, listener, options)
        )


def _announce(model: str, listener: Listener, options: ServeOptions) -> None:
    from sinterlm.serve.listening import url_of

    url = url_of(listener.sockets[0], host=options.host, is_tls=listener.tls is not None)
    with suppress(BrokenPipeError):  # nobody reads it: no reason not to serve
        print(f"SinterLM serves {model} at {url}{options.root_path} (API under /v1)", flush=True)


def _warn_of_strangers(listener: Listener, *, has_keys: bool) -> None:
    from sinterlm.serve.listening import is_loopback

    if not has_keys and not all(map(is_loopback, listener.sockets)):
        print(
            "sinterlm: warning: whoever reaches this machine can use the model: there is no "
            "--api-key",
            file=sys.stderr,
        )


@contextmanager
def _stoppable() -> Iterator[None]:
    """End with exit code 0 on SIGTERM while compiling or loading: nothing is being served yet.

    Process 1 of a container would not even notice the signal by itself.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
