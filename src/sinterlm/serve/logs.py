"""The server's log: one line per record, ``key=value`` pairs or one JSON object.

A record's ``fields`` (``extra={"fields": {…}}``) become pairs. Control characters are escaped, so
that nothing a client sends can begin a line; only a traceback has several.
"""

from __future__ import annotations

import datetime
import json
import logging
import logging.handlers
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sinterlm.errors import UsageError
from sinterlm.options import ServeOptions

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN = re.compile(r"[^\s\"'=]+")


class TextFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.000Z INFO request id=… status=200``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback below it."""
        words = [_when(record), record.levelname, _escaped(record.getMessage())]
        words += [f"{key}={_shown(value)}" for key, value in _fields(record).items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """The same as one JSON object per line, the traceback inside it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": _when(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


@contextmanager
def logging_to(options: ServeOptions) -> Iterator[None]:
    """Send what SinterLM logs where ``options`` say. Raises UsageError for a file that cannot be
    written."""
    formatter = JsonFormatter() if options.log_format == "json" else TextFormatter()
    handler = _handler(options.log_file)
    handler.setFormatter(formatter)
    loggers = [logging.getLogger(name) for name in ("sinterlm", "uvicorn", "asyncio")]
    before = [(one.level, one.propagate) for one in loggers]
    for one in loggers:
        one.addHandler(handler)
        one.propagate = False
    loggers[0].setLevel(options.log_level.upper())
    loggers[1].setLevel("ERROR")  # its warnings are about clients, who are told themselves
    try:
        yield
    finally:
        for one, (level, propagate) in zip(loggers, before, strict=True):
            one.removeHandler(handler)
            one.setLevel(level)
            one.propagate = propagate
        handler.close()


def _handler(path: Path | None) -> logging.Handler:
    if path is None:
        return logging.StreamHandler(sys.stderr)
    try:
        return logging.handlers.WatchedFileHandler(path, encoding="utf-8")  # logrotate may move it
    except OSError as exc:
        raise UsageError(
            f"log_file={str(path)!r} cannot be written: {exc.strerror}; name another file"
        ) from exc


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = getattr(record, "fields", {})
    return {key: value for key, value in fields.items() if value is not None}


def _when(record: logging.LogRecord) -> str:
    when = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
    return when.strftime("%Y-%m-%dT%H:%M:%S.") + f"{int(record.msecs):03d}Z"


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _shown(value: object) -> str:
    """A value without blanks as it is, anything else quoted as JSON quotes it."""
    if isinstance(value, bool | int | float):
        return str(value).lower()
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if _PLAIN.fullmatch(text) and text == _escaped(text) else json.dumps(text)
