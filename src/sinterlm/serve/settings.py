"""ServeOptions judged: what cannot be served is refused by name, before a model is loaded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from sinterlm.artifact.env import env_text
from sinterlm.engine.tokenizer.chat_template import ChatTemplate
from sinterlm.errors import UsageError
from sinterlm.options import ServeOptions
from sinterlm.serve.parsers import choose_reasoning_parser, choose_tool_parser

MAX_TEMPLATE_BYTES = 1 << 20
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")
_KEY = re.compile(r"[\x21-\x7e]+")
_NAME = re.compile(r"[^\x00-\x20\x7f]+")


def check_options(options: ServeOptions) -> None:
    """Raise UsageError naming the first option that makes no sense by itself."""
    integers: list[tuple[str, int | None, int, int]] = [
        ("port", options.port, 0, 65535),
        ("ssl_cert_reqs", options.ssl_cert_reqs, 0, 2),
        ("max_waiting", options.max_waiting, 0, 1 << 20),
        ("stream_interval", options.stream_interval, 1, 1024),
        ("max_body_bytes", options.max_body_bytes, 1 << 10, 1 << 30),
    ]
    for name, value, low, high in integers:
        if value is not None and not low <= value <= high:
            raise UsageError(f"{name}={value!r} must be an integer between {low} and {high}")
    seconds: list[tuple[str, float | None, float]] = [
        ("request_timeout", options.request_timeout, 0.001),
        ("read_timeout", options.read_timeout, 0.1),
        ("send_timeout", options.send_timeout, 0.1),
        ("keep_alive_timeout", options.keep_alive_timeout, 0),
        ("shutdown_timeout", options.shutdown_timeout, 0),
    ]
    for name, duration, least in seconds:
        if duration is not None and not least <= duration <= 1e6:  # false for NaN
            raise UsageError(f"{name}={duration!r} must be {least:g} to 1000000 seconds")
    _check_texts(options)
    choose_tool_parser(options.tool_call_parser, None)
    choose_reasoning_parser(options.reasoning_parser, None)


def _check_texts(options: ServeOptions) -> None:
    if not options.host:
        raise UsageError("host is empty; write 0.0.0.0 for every interface")
    if options.root_path and not re.fullmatch(r"(/[\w.~-]+)+", options.root_path):
        raise UsageError(f"root_path={options.root_path!r} must be a path such as /llm")
    for name in options.served_model_name:
        if _NAME.fullmatch(name) is None:
            raise UsageError(f"served_model_name={name!r} must not be empty or hold blanks")
    for key in options.api_key:
        if _KEY.fullmatch(key) is None:  # the key itself is nobody's business
            raise UsageError("api_key must be printable ASCII characters without blanks")
    for origin in options.allowed_origins:
        if _ORIGIN.fullmatch(origin) is None:
            raise UsageError(
                f"allowed_origins={origin!r} must be * or an origin such as https://example.org"
            )
    given = [n for n in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs") if getattr(options, n)]
    if given and options.ssl_certfile is None:
        raise UsageError(f"{given[0]} needs ssl_certfile, the server's own certificate")
    if options.ssl_cert_reqs and options.ssl_ca_certs is None:
        raise UsageError("ssl_cert_reqs needs ssl_ca_certs, to check certificates against")


def with_environment(options: ServeOptions) -> ServeOptions:
    """``options`` with what SINTERLM_API_KEY and SINTERLM_SERVER_DEV_MODE add.

    Raises UsageError for a key that is none.
    """
    key = env_text("SINTERLM_API_KEY")
    if key is not None and _KEY.fullmatch(key) is None:
        raise UsageError("SINTERLM_API_KEY must be printable ASCII characters without blanks")
    return replace(
        options,
        api_key=options.api_key + ((key,) if key else ()),
        dev_mode=options.dev_mode or env_text("SINTERLM_SERVER_DEV_MODE") not in (None, "0"),
    )


def read_template(path: Path | None) -> str | None:
    """The text of ``chat_template``. Raises UsageError for a file that is none."""
    if path is None:
        return None
    what = f"chat_template={str(path)!r}"
    try:
        with path.open("rb") as file:
            source = file.read(MAX_TEMPLATE_BYTES + 1)
        if len(source) > MAX_TEMPLATE_BYTES:
            raise UsageError(f"longer than {MAX_TEMPLATE_BYTES} bytes")
        text = source.decode("utf-8")
        ChatTemplate(text)
    except OSError as exc:
        raise UsageError(f"{what} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"{what} is no UTF-8 text: {exc.reason}") from exc
    except UsageError as exc:
        raise UsageError(f"{what}: {exc}") from exc
    return text
