"""Typed reads of untrusted JSON: every wrong key is an error that names the file, key and value.

Refuses non-finite numbers, nesting that exhausts the parser, integers of absurd length, files
beyond a size limit, and (where asked) duplicate keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinterlm.errors import CheckpointError

#: Largest JSON side file read (a 256k-token tokenizer.json is about 35 MB).
MAX_JSON_BYTES = 256 << 20

#: Largest integer any configuration key may hold; anything beyond is a damaged or hostile file.
MAX_INT = 2**31 - 1

#: Range of any positive real-valued key; wide enough for every formula it enters to stay finite.
MIN_NUMBER, MAX_NUMBER = 1e-15, 1e15


def parse_json(text: str | bytes, what: str, *, unique_keys: bool = False) -> dict[str, Any]:
    """Parse one JSON object; ``what`` names it in errors. Raises CheckpointError."""
    hook = (lambda pairs: _unique(pairs, what)) if unique_keys else None
    try:
        data = json.loads(text, object_pairs_hook=hook, parse_constant=_refuse_constant)
    except RecursionError:
        raise CheckpointError(f"{what}: nested too deeply to be a checkpoint file") from None
    except ValueError as exc:  # includes JSONDecodeError, UnicodeDecodeError, int digit limits
        raise CheckpointError(f"{what}: not valid JSON ({_short(exc)}); download it again") from exc
    if not isinstance(data, dict):
        raise CheckpointError(f"{what}: expected a JSON object, found {type(data).__name__}")
    return data


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """UTF-8 contents of a regular file of at most ``limit`` bytes. Raises CheckpointError."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file, or no regular one; download it again")
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes, more than the {limit} such a file may be")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as exc:
        raise CheckpointError(f"{path}: not UTF-8 text ({_short(exc)})") from exc
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{path}: cannot be read ({_short(exc)})") from exc


def read_json(path: Path) -> dict[str, Any]:
    """Read and parse a JSON object from a file. Raises CheckpointError."""
    return parse_json(read_text(path), str(path))


def show(value: object) -> str:
    """A value as it may appear in a message: its repr, at most 60 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int too long to print, a nest too deep to walk
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Fields:
    """A JSON object with typed reads. A key that is absent or null takes the default; without a
    default it is an error."""

    data: Mapping[str, Any]
    what: str  #: how errors call this object, e.g. "config.json"

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int) -> int:
        """An int in [low, high]. Raises CheckpointError."""
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_INT:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, value, "an integer")
        if not low <= value <= high:
            raise self.error(key, value, f"between {low} and {high}")
        return value

    def optional_integer(self, key: str, *, low: int = 1, high: int) -> int | None:
        """An int in [low, high], or None when the key is absent or null."""
        return None if self.absent(key) else self.integer(key, low=low, high=high)

    def number(self, key: str, default: float | None = None, *, low: float = MIN_NUMBER) -> float:
        """A float in [low, MAX_NUMBER] (an int is accepted). Raises CheckpointError."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, value, "a number")
        if not low <= value <= MAX_NUMBER:  # false for NaN, exact for an int of any size
            raise self.error(key, value, f"a number between {low:g} and {MAX_NUMBER:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """A positive float, or None when the key is absent or null."""
        return None if self.absent(key) else self.number(key)

    def boolean(self, key: str, default: bool) -> bool:
        """true or false. Raises CheckpointError."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Raises CheckpointError."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def absent(self, key: str) -> bool:
        """Whether the key is missing or null."""
        return self.data.get(key) is None

    def child(self, key: str) -> Fields | None:
        """The object under ``key``; None when absent, null or empty."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, value, "an object")
        return Fields(value, f"{self.what}: {key}") if value else None

    def error(self, key: str, value: object, expected: str) -> CheckpointError:
        """The error to raise for a value that is not what was expected."""
        return CheckpointError(f"{self.what}: {key!r} is {show(value)}, expected {expected}")

    def _get(self, key: str, default: object) -> object:
        value = self.data.get(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.what}: key {key!r} is missing")
            return default
        return value


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise CheckpointError(f"{what}: key {show(key)} appears twice")
            seen.add(key)
    return data


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _short(exc: Exception) -> str:
    text = str(exc)
    return text if len(text) <= 120 else text[:117] + "..."
