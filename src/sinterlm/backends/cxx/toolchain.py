"""Finds a C++ compiler and turns one translation unit into a shared library.

Accepts g++ >= 11, clang++ >= 14 and, where neither is installed, the ``ziglang`` package. Flags
never include ``-ffast-math`` or ``-march=native``: results must not depend on the compiler's mood.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sinterlm.artifact.memo import FileStamp, Memo, digest_json
from sinterlm.backends.cxx.isa import MACHINE_FLAGS, isa_macro
from sinterlm.errors import CompileError
from sinterlm.options import IsaName

Kind = Literal["g++", "clang++", "zig"]

#: Oldest major version of each kind that knows every flag we pass; zig carries a recent clang.
MIN_MAJOR: dict[Kind, int] = {"g++": 11, "clang++": 14, "zig": 14}

BASE_FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden",
    "-ffp-contract=off",  # an fma the source does not spell would differ between instances
    "-fno-math-errno",  # lets sqrt be one instruction; changes no value
    "-Wl,-z,defs",  # a missing symbol is our error here, not the user's at load
)  # fmt: skip

_PACKAGE = Path(__file__).resolve().parents[2]
INCLUDE_DIRS = (_PACKAGE / "backends/cpu/include", _PACKAGE / "artifact")

_HELP = "install one with `apt install g++` (or `pip install ziglang`), or set SINTERLM_CXX"
#: Wrappers whose own file says nothing about the compiler behind them.
_WRAPPERS = frozenset({"ccache", "sccache", "distcc", "icecc"})


@dataclass(frozen=True)
class Compiler:
    """A usable compiler. ``identity`` goes into the code key: no paths, so that two machines with
    one compiler agree."""

    command: tuple[str, ...]
    kind: Kind
    version: str
    machine: str  #: target triple, e.g. "x86_64-linux-gnu"

    @property
    def identity(self) -> str:
        """Kind, first line of ``--version``, and machine."""
        return f"{self.kind}: {self.version}, {self.machine}"

    @property
    def is_x86(self) -> bool:
        """Whether it produces x86-64 code."""
        return self.machine.startswith(("x86_64", "amd64"))


def find_compiler(environ: Mapping[str, str] | None = None, memo: Memo | None = None) -> Compiler:
    """The first usable of $SINTERLM_CXX, $CXX, g++, clang++, c++ on PATH, ziglang.

    An explicit $SINTERLM_CXX must work; anything after it is skipped when too old. Raises
    CompileError saying what to install, and why each candidate was refused.
    """
    env = os.environ if environ is None else environ
    memo = memo or Memo(None)
    explicit = env.get("SINTERLM_CXX", "").strip()
    if explicit:
        found = _probe(tuple(shlex.split(explicit)), env, memo)
        if isinstance(found, Compiler):
            return found
        raise CompileError(f"SINTERLM_CXX={explicit!r} cannot be used: {found}; {_HELP}")
    refused = []
    for command in _candidates(env):
        found = _probe(command, env, memo)
        if isinstance(found, Compiler):
            return found
        refused.append(found)
    why = f" ({'; '.join(refused)})" if refused else ""
    raise CompileError(f"no C++ compiler found{why}: {_HELP}")


def _candidates(env: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Commands to try in order."""
    named = env.get("CXX", "").strip()
    commands = [tuple(shlex.split(named))] if named else []
    commands += [(name,) for name in ("g++", "clang++", "c++")]
    commands = [c for c in commands if shutil.which(c[0], path=env.get("PATH", os.defpath))]
    if importlib.util.find_spec("ziglang") is not None:
        commands.append((sys.executable, "-m", "ziglang", "c++"))
    return commands


def _probe(command: tuple[str, ...], env: Mapping[str, str], memo: Memo) -> Compiler | str:
    """The compiler behind ``command``, or why it cannot be used."""
    program = shutil.which(command[0], path=env.get("PATH", os.defpath))
    if program is None:
        return f"{command[0]} is not on PATH"
    command = (program, *command[1:])
    stamp, key = FileStamp.of(program), digest_json(command)
    single = len(command) == 1 and Path(stamp.path).name not in _WRAPPERS
    fact = memo.recall("compilers", key) if single else None
    if fact is not None and fact.get("stamp") == stamp.as_list():
        text, machine = fact.get("text"), fact.get("machine")
    else:
        text, machine = _ask(command, "--version"), _ask(command, "-dumpmachine")
        if single and text and machine:
            known = {"stamp": stamp.as_list(), "text": text, "machine": machine}
            memo.remember("compilers", key, known)
    if not (isinstance(text, str) and text and isinstance(machine, str) and machine):
        return f"{shlex.join(command)} does not answer --version"
    return _identify(command, text, machine)


def _ask(command: tuple[str, ...], question: str) -> str:
    """First words of the answer to a question such as ``--version``; empty when it fails."""
    try:
        done = subprocess.run(
            [*command, question], capture_output=True, text=True, errors="replace", timeout=60,
            stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()[:2000] if done.returncode == 0 else ""


def _identify(command: tuple[str, ...], text: str, machine: str) -> Compiler | str:
    """Kind and version from the text of ``--version``, or why it cannot be used."""
    kind: Kind
    first = text.splitlines()[0]
    if "clang" in text.lower():
        kind = "zig" if "ziglang" in command or Path(command[0]).stem == "zig" else "clang++"
        match = re.search(r"clang version (\d+)(\.\d+)*\S*", text)
    elif "Free Software Foundation" in text:
        kind, match = "g++", re.search(r"\) (\d+)(\.\d+)*", first)
    else:
        return f"{shlex.join(command)} is neither g++ nor clang++ (it says {first!r})"
    if match is None:
        return f"{shlex.join(command)} has no version in {first!r}"
    if int(match[1]) < MIN_MAJOR[kind]:
        return f"{shlex.join(command)} is {kind} {match[1]}, older than {MIN_MAJOR[kind]}"
    return Compiler(command, kind, first, _zig_target() if kind == "zig" else machine)


def flags_for(isa: IsaName, compiler: Compiler | None = None) -> tuple[str, ...]:
    """Every flag but paths, in order. Raises CompileError where the compiler cannot target ``isa``.

    Without a compiler: the flags g++ would get.
    """
    if compiler is not None and isa != "generic" and not compiler.is_x86:
        raise CompileError(
            f"ISA level {isa} is x86-64 and {compiler.command[0]} builds for {compiler.machine}; "
            "use `--isa generic`, or another compiler through SINTERLM_CXX"
        )
    flags = (*BASE_FLAGS, *MACHINE_FLAGS[isa], f"-D{isa_macro(isa)}=1")
    if compiler is None or compiler.kind != "zig":
        return flags
    # zig targets the very machine it runs on, and adds UBSan traps, unless told otherwise.
    return ("-target", compiler.machine, "-mcpu=baseline", *flags, "-fno-sanitize=undefined")


def _zig_target() -> str:
    """zig's name of this machine with the C library that this Python runs on."""
    glibc = "CS_GNU_LIBC_VERSION" in os.confstr_names and os.confstr("CS_GNU_LIBC_VERSION")
    return f"{os.uname().machine}-linux-{'gnu.2.28' if glibc else 'musl'}"


def headers_sha256() -> str:
    """Hex SHA-256 over the names and contents of all kernel headers and ``abi.h``."""
    total = hashlib.sha256()
    for base in INCLUDE_DIRS:
        for path in sorted(base.rglob("*.h")):
            content = path.read_bytes()
            total.update(f"{path.relative_to(base).as_posix()}\0{len(content)}\0".encode())
            total.update(content)
    return total.hexdigest()


def compile_library(
    source: str,
    out: Path,
    isa: IsaName,
    compiler: Compiler | None = None,
    defines: Mapping[str, str] | None = None,
    extra_flags: Sequence[str] = (),
    timeout_s: float = 300.0,
) -> None:
    """Compile C++ ``source`` into the shared library ``out``, whole or not at all.

    Works in a folder of its own beside ``out``, removed however this ends (Ctrl-C included).
    ``defines`` and ``extra_flags`` come last, so that tests can build mutants and sanitized
    libraries. Raises CompileError with the compiler's first errors.
    """
    compiler = compiler or find_compiler()
    with tempfile.TemporaryDirectory(prefix="build-", dir=out.parent) as folder:
        work = Path(folder)
        (work / "model.cpp").write_text(source, encoding="utf-8")
        command = [*compiler.command, *flags_for(isa, compiler)]
        command += [f"-I{path}" for path in INCLUDE_DIRS]
        command += [f"-D{name}={value}" for name, value in (defines or {}).items()]
        command += [*extra_flags, "model.cpp", "-o", "model.so"]
        _run(command, work, timeout_s)
        os.replace(work / "model.so", out)


def _run(command: list[str], work: Path, timeout_s: float) -> None:
    """Run the compiler in ``work`` in a process group that dies with us."""
    env = {**os.environ, "LC_ALL": "C", "TMPDIR": str(work), "ZIG_LOCAL_CACHE_DIR": str(work)}
    try:
        process = subprocess.Popen(
            command, cwd=work, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as exc:
        raise CompileError(f"cannot start {command[0]}: {exc.strerror}; {_HELP}") from exc
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise CompileError(
            f"{Path(command[0]).name} did not finish within {timeout_s:.0f} s; "
            "free the machine or set SINTERLM_CXX to another compiler, and try again"
        ) from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0 or not (work / "model.so").is_file():
        raise CompileError(
            f"{Path(command[0]).name} failed (exit {process.returncode}):\n"
            f"{shorten(output)}\nrun `sinterlm doctor` to check the compiler"
        )


def shorten(output: str, max_errors: int = 3, max_chars: int = 1500) -> str:
    """The first errors of a compiler's output, without the notes and warnings around them."""
    lines = [line for line in output.splitlines() if line.strip()]
    tell = re.compile(r"\berror:|undefined reference|undefined symbol|Killed|cannot find|No space")
    errors = [line for line in lines if tell.search(line)] or lines
    text = "\n".join(errors[:max_errors])
    left = len(errors) - max_errors
    if left > 0:
        text += f"\n… and {left} more"
    return text if len(text) <= max_chars else text[:max_chars] + " …"
