"""Small facts that are dear to find out again, kept as one JSON file each.

A memo is never needed: whatever cannot be read, or does not parse, counts as not known, and
whatever cannot be written is left unwritten. Nothing is trusted because a memo says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_BYTES = 16 << 20


def digest_json(value: object) -> str:
    """Hex SHA-256 of ``value`` as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class FileStamp:
    """What tells that a file is still the one we saw, without reading it."""

    path: str  #: real path
    size: int  #: bytes
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: str | Path) -> FileStamp:
        """Stamp of an existing file or folder. Raises OSError."""
        real = os.path.realpath(path)
        st = os.stat(real)
        return cls(real, st.st_size, st.st_mtime_ns, st.st_ino)

    def as_list(self) -> list[str | int]:
        """JSON form."""
        return [self.path, self.size, self.mtime_ns, self.inode]


@dataclass(frozen=True)
class Memo:
    """A folder of facts by topic and key. ``root`` None remembers nothing."""

    root: Path | None

    def recall(self, topic: str, key: str) -> dict[str, Any] | None:
        """The fact stored under (topic, key), or None."""
        if self.root is None:
            return None
        try:
            with open(self.root / topic / f"{key}.json", "rb") as file:
                fact = json.loads(file.read(_MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        return fact if isinstance(fact, dict) else None

    def remember(self, topic: str, key: str, fact: dict[str, Any]) -> None:
        """Store a fact; silently does nothing where that is impossible."""
        if self.root is None:
            return
        folder = self.root / topic
        temporary = folder / f"{key}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                json.dump(fact, file)
            os.replace(temporary, folder / f"{key}.json")
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def forget(self, topic: str, key: str) -> None:
        """Drop a fact, if it is there and can be dropped."""
        if self.root is not None:
            with contextlib.suppress(OSError):
                (self.root / topic / f"{key}.json").unlink()
