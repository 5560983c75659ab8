"""Finding a compiler, and compiling a translation unit whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinterlm.artifact.memo import Memo
from sinterlm.backends.cpu.backend import CpuBackend
from sinterlm.backends.cxx import toolchain
from sinterlm.backends.cxx.isa import MACHINE_FLAGS, available_isas
from sinterlm.backends.cxx.toolchain import Compiler, compile_library, find_compiler, flags_for
from sinterlm.errors import CompileError, UsageError
from sinterlm.options import ISA_LEVELS

ROOT = Path(__file__).resolve().parents[2]

SOURCE = """
#include "abi.h"
#include "sinterlm/args.h"
extern "C" SL_API int answer() { return ANSWER; }
extern "C" int hidden() { return 1; }
"""


def fake_compiler(folder: Path, name: str, version: str, machine: str = "x86_64-linux-gnu") -> Path:
    """A program that answers questions about itself and appends to ``asked``."""
    path = folder / name
    path.write_text(
        f'#!/bin/sh\necho "$1" >> {folder}/asked\n'
        f"case \"$1\" in -dumpmachine) echo {machine};; --version) echo '{version}';;"
        f" *) echo 'model.cpp:1: error: cannot'; exit 1;; esac\n"
    )
    path.chmod(0o755)
    return path


GCC = "g++ (Debian {0}) {0}\nCopyright (C) Free Software Foundation, Inc."
CLANG = "Debian clang version {0}\nTarget: x86_64-pc-linux-gnu"


def environ(folder: Path, **extra: str) -> dict[str, str]:
    """PATH leads to ``folder`` and to the shell that fakes need."""
    tools = folder / "tools"
    if not tools.exists():
        tools.mkdir()
        for name in ("sh", "cat"):
            (tools / name).symlink_to(str(shutil.which(name)))
    return {"PATH": f"{folder}:{tools}", **extra}


@pytest.mark.parametrize("isa", ISA_LEVELS)
def test_compiles_at_every_level(isa: str, tmp_path: Path) -> None:
    out = tmp_path / "model.so"
    compile_library(SOURCE, out, isa, defines={"ANSWER": "42"})
    assert [p.name for p in tmp_path.iterdir()] == ["model.so"]
    if isa in available_isas():
        library = ctypes.CDLL(str(out))
        assert library.answer() == 42
        assert not hasattr(library, "hidden"), "symbols are hidden unless SL_API says otherwise"


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.so", "b.so"):
        compile_library(SOURCE, tmp_path / name, "generic", defines={"ANSWER": "1"})
    assert (tmp_path / "a.so").read_bytes() == (tmp_path / "b.so").read_bytes()


def test_no_contraction_behind_our_back(tmp_path: Path) -> None:
    """a * b + c rounds twice at every level, also where the machine has fma."""
    source = (
        '#include "abi.h"\n'
        'extern "C" SL_API float f(float a, float b, float c) { return a * b + c; }\n'
    )
    a = 1 + 2.0**-12
    product = a * a  # exact in a double; one fma would keep its last bit
    for isa in available_isas():
        compile_library(source, tmp_path / f"{isa}.so", isa)
        f = ctypes.CDLL(str(tmp_path / f"{isa}.so")).f
        f.restype, f.argtypes = ctypes.c_float, [ctypes.c_float] * 3
        assert f(a, a, -1.0) == ctypes.c_float(product).value - 1.0


def test_flags_never_bend_arithmetic() -> None:
    for isa in ISA_LEVELS:
        flags = flags_for(isa)
        assert "-ffp-contract=off" in flags and f"-DSL_ISA_{isa.upper()}=1" in flags
        assert not any("fast" in f or "native" in f or "unsafe" in f for f in flags)
        assert set(MACHINE_FLAGS[isa]) <= set(flags)


def test_the_compilers_first_error_is_told(tmp_path: Path) -> None:
    source = "int f() { return missing_name; }\n" + "int g() { return another_one; }\n" * 50
    with pytest.raises(CompileError, match=r"(?s)missing_name.*sinterlm doctor") as caught:
        compile_library(source, tmp_path / "model.so", "generic")
    assert len(str(caught.value)) < 2500
    assert list(tmp_path.iterdir()) == []


def test_an_undefined_symbol_is_an_error_now_not_at_load(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="nowhere"):
        compile_library(
            "int nowhere(); int f() { return nowhere(); }", tmp_path / "m.so", "generic"
        )


def test_candidates_in_order(tmp_path: Path) -> None:
    env = environ(tmp_path)
    fake_compiler(tmp_path, "clang++", CLANG.format("15.0.6"))
    assert find_compiler(env).kind == "clang++"
    fake_compiler(tmp_path, "g++", GCC.format("12.2.0"))
    found = find_compiler(env)
    assert (found.kind, found.command) == ("g++", (str(tmp_path / "g++"),))
    assert "12.2.0" in found.identity and str(tmp_path) not in found.identity
    fake_compiler(tmp_path, "my-cxx", CLANG.format("18.1.0"))
    assert find_compiler(environ(tmp_path, CXX="my-cxx")).version.endswith("18.1.0")
    assert find_compiler(environ(tmp_path, CXX="my-cxx", SINTERLM_CXX="g++")).kind == "g++"


def test_too_old_is_skipped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    fake_compiler(tmp_path, "g++", GCC.format("10.2.1"))
    fake_compiler(tmp_path, "c++", "some other compiler 99")
    with pytest.raises(
        CompileError, match=r"g\+\+ 10, older than 11.*neither g\+\+ nor clang.*apt"
    ):
        find_compiler(environ(tmp_path))
    fake_compiler(tmp_path, "clang++", CLANG.format("13.0.0"))
    with pytest.raises(CompileError, match="13, older than 14"):
        find_compiler(environ(tmp_path))


def test_no_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompileError, match=r"apt install g\+\+.*pip install ziglang"):
        find_compiler({"PATH": str(tmp_path)})


def test_an_explicit_compiler_must_work(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"SINTERLM_CXX='/none/g\+\+'.*not on PATH"):
        find_compiler(environ(tmp_path, SINTERLM_CXX="/none/g++"))


def test_identity_is_remembered(tmp_path: Path) -> None:
    memo, env = Memo(tmp_path / "memo"), environ(tmp_path)
    program = fake_compiler(tmp_path, "g++", GCC.format("12.2.0"))
    first = find_compiler(env, memo)
    asked = (tmp_path / "asked").read_text()
    assert find_compiler(env, memo) == first
    assert (tmp_path / "asked").read_text() == asked, "not asked again"
    fake_compiler(tmp_path, "g++", GCC.format("13.1.0"))
    os.utime(program, ns=(1, 1))
    assert "13.1.0" in find_compiler(env, memo).identity


def test_x86_levels_need_an_x86_compiler() -> None:
    arm = Compiler(("aarch64-linux-gnu-g++",), "g++", "g++ 12", "aarch64-linux-gnu")
    assert "-mavx2" not in flags_for("generic", arm)
    with pytest.raises(CompileError, match=r"avx2 is x86-64.*aarch64.*--isa generic"):
        flags_for("avx2", arm)


def test_zig_gets_no_native_cpu() -> None:
    zig = Compiler(
        ("python", "-m", "ziglang", "c++"), "zig", "clang version 20", "x86_64-linux-gnu"
    )
    flags = flags_for("avx2", zig)
    assert "-mcpu=baseline" in flags and "-target" in flags


def test_a_slow_compiler_is_stopped(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    compiler = Compiler((str(slow),), "g++", "g++ 12", "x86_64-linux-gnu")
    (tmp_path / "out").mkdir()
    started = time.monotonic()
    with pytest.raises(CompileError, match="did not finish within 0 s"):
        compile_library("", tmp_path / "out/m.so", "generic", compiler, timeout_s=0.2)
    assert time.monotonic() - started < 30
    assert list((tmp_path / "out").iterdir()) == []


INTERRUPTED = """
import sys
from pathlib import Path
from sinterlm.backends.cxx.toolchain import Compiler, compile_library
compiler = Compiler((sys.argv[1],), "g++", "g++ 12", "x86_64-linux-gnu")
try:
    compile_library("", Path(sys.argv[2]) / "m.so", "generic", compiler)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_stops_the_compiler_and_cleans_up(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    slow.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(slow), str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "interrupted\n"
    assert list(out.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_backend_identity_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, memo = CpuBackend(), Memo(None)
    assert backend.toolchain("generic", memo).compiler is not None
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("SINTERLM_CXX", raising=False)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    tool = backend.toolchain("generic", memo)
    assert tool.compiler is None and "-O2" in tool.flags and len(tool.headers_sha256) == 64
    assert backend.resolve_isa(None) == available_isas()[0]
    with pytest.raises(UsageError, match="avx9"):
        backend.resolve_isa("avx9")


def test_headers_are_part_of_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = toolchain.headers_sha256()
    shutil.copytree(toolchain.INCLUDE_DIRS[0], tmp_path / "include")
    monkeypatch.setattr(
        toolchain, "INCLUDE_DIRS", (tmp_path / "include", toolchain.INCLUDE_DIRS[1])
    )
    assert toolchain.headers_sha256() == before
    with open(tmp_path / "include/sinterlm/args.h", "a", encoding="utf-8") as header:
        header.write("\n")
    assert toolchain.headers_sha256() != before


@pytest.mark.slow
def test_zig_compiles_every_level(tmp_path: Path) -> None:
    pytest.importorskip("ziglang", reason="needs `pip install ziglang`")
    zig = find_compiler({"PATH": str(tmp_path)})
    assert zig.kind == "zig"
    for isa in ISA_LEVELS:
        compile_library(SOURCE, tmp_path / f"{isa}.so", isa, zig, defines={"ANSWER": "42"})
    assert ctypes.CDLL(str(tmp_path / "generic.so")).answer() == 42
