"""The Python environment that an engine lives in: its programs, versions and size on disk."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sinterlm.errors import RuntimeFault, UsageError


@dataclass(frozen=True)
class Environment:
    """A virtual environment, there or yet to be made by ``create``."""

    root: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.root / "bin" / "python"

    @property
    def exists(self) -> bool:
        """Whether it was made."""
        return self.python.exists()

    def site_packages(self) -> Path | None:
        """Where its packages are."""
        found = sorted(self.root.glob("lib/python3.*/site-packages"))
        return found[-1] if found else None

    def distribution(self, name: str) -> importlib.metadata.Distribution | None:
        """An installed package of it."""
        return self._all().get(_canonical(name))

    def versions(self, names: Iterable[str]) -> dict[str, str]:
        """Of those that are installed."""
        found = self._all()
        return {
            name: found[_canonical(name)].version for name in names if _canonical(name) in found
        }

    def closure_bytes(self, name: str) -> int | None:
        """Bytes of a package and of everything it requires; None when it is not installed."""
        return closure_bytes(self._all(), name)

    def _all(self) -> dict[str, importlib.metadata.Distribution]:
        site = self.site_packages()
        return {} if site is None else installed([str(site)])

    def create(self, steps: Sequence[Sequence[str]], tell: bool = True) -> None:
        """Make it and run ``pip`` with each of ``steps``. Raises RuntimeFault where one fails."""
        commands = [[str(self.python), "-m", "pip", *step] for step in steps]
        if not self.exists:
            commands.insert(0, [sys.executable, "-m", "venv", str(self.root)])
        for command in commands:
            print("+", " ".join(command), file=sys.stderr, flush=True)
            code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
            if code != 0:
                raise RuntimeFault(f"`{' '.join(command)}` ended with {code}")


def installed(path: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """Packages found on ``path``, by canonical name."""
    found = importlib.metadata.distributions(path=path)
    return {_canonical(one.metadata["Name"] or ""): one for one in found}


def closure_bytes(found: dict[str, importlib.metadata.Distribution], name: str) -> int | None:
    """Bytes of ``name`` and, without extras, of all it requires that is installed."""
    if _canonical(name) not in found:
        return None
    todo, seen, total = [_canonical(name)], set[str](), 0
    while todo:
        current = todo.pop()
        if current in seen or current not in found:
            continue
        seen.add(current)
        distribution = found[current]
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if path.suffix != ".pyc" and path.is_file():
                total += path.stat().st_size
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                todo.append(_canonical(re.split(r"[\s;<>=!~\[(]", requirement, maxsplit=1)[0]))
    return total


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this processor, as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def require_cpus(cpu_ids: Sequence[int]) -> str:
    """``0-1`` or ``0,2`` as engines take lists of CPUs. Raises UsageError for none."""
    if not cpu_ids:
        raise UsageError("no CPU to run on")
    first, last = cpu_ids[0], cpu_ids[-1]
    if list(cpu_ids) == list(range(first, last + 1)):
        return f"{first}-{last}"
    return ",".join(map(str, cpu_ids))
