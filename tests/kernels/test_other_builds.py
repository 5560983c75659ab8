"""Kernels under sanitizers, on aarch64 through emulation, and a look at their machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sinterlm.artifact.isa import available_isas
from sinterlm.backends.cxx.toolchain import INCLUDE_DIRS, find_compiler, flags_for
from sinterlm.options import IsaName
from tests.kernels.oplib import KV_CODES

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow
PAGES = pytest.mark.parametrize("pages", [(), KV_CODES], ids=["kv-wide", "kv-codes"])


def build(command: list[str], isa: IsaName, out: Path, extra: tuple[str, ...] = ()) -> Path:
    """selfcheck.cpp as a program of one ISA level."""
    flags = [f for f in flags_for(isa) if f not in ("-shared", "-fPIC")]
    includes = [f"-I{p}" for p in (*INCLUDE_DIRS, HERE)]
    source = str(HERE / "selfcheck.cpp")
    subprocess.run([*command, *flags, *includes, *extra, source, "-o", str(out)], check=True)
    return out


def run(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    return done.stdout


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
@PAGES
def test_sanitizers_find_nothing(
    isa: IsaName, kind: str, pages: tuple[str, ...], tmp_path: Path
) -> None:
    compiler = list(find_compiler().command)
    flags = (f"-fsanitize={kind}", "-fno-sanitize-recover=all", "-g", "-O1", *pages)
    checked = build(compiler, isa, tmp_path / "checked", flags)
    plain = build(compiler, isa, tmp_path / "plain", pages)
    setarch = [shutil.which("setarch") or "", "-R"] if kind == "thread" else []
    if setarch and not setarch[0]:
        pytest.skip("the thread sanitizer needs `setarch -R` (Debian package util-linux)")
    assert run([*setarch, str(checked)]) == run([str(plain)])


@PAGES
def test_aarch64_gives_the_same_bytes_as_x86(pages: tuple[str, ...], tmp_path: Path) -> None:
    cross, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not cross or not emulator:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user")
    here = build(list(find_compiler().command), "generic", tmp_path / "here", pages)
    there = build([cross], "generic", tmp_path / "there", ("-static", *pages))
    output = run([str(here)])
    assert len(output) > 100_000
    assert run([emulator, str(there)]) == output


def test_no_kernel_spills_its_sums(tmp_path: Path) -> None:
    """The register tile of AVX512_BF16 holds its 24 sums: no vector goes to the stack."""
    if "avx512bf16" not in available_isas() or not shutil.which("objdump"):
        pytest.skip("needs an AVX512_BF16 machine and objdump (Debian package binutils)")
    program = build(list(find_compiler().command), "avx512bf16", tmp_path / "plain")
    text = run(["objdump", "-d", "--no-show-raw-insn", str(program)]).decode()
    bodies = [b for b in text.split("\n\n") if "tile" in b.split("\n", 1)[0]]
    hot = [b for b in bodies if b.count("vdpbf16ps") == 24]
    assert hot, "no 6 x 4 tile in the program"
    for body in hot:
        vector_stack = [ln for ln in body.splitlines() if "zmm" in ln and "rsp" in ln]
        assert not vector_stack, vector_stack


def test_no_loop_of_integer_dots_spills(tmp_path: Path) -> None:
    """12 sums and 12 outputs stay in registers while codes are multiplied."""
    if "avx512bf16" not in available_isas():
        pytest.skip("needs an AVX512_BF16 machine")
    source = str(Path(__file__).with_name("optest_coded.cpp"))
    listing = tmp_path / "coded.s"
    flags = [f for f in flags_for("avx512bf16") if f != "-shared"]
    flags += [*(f"-I{p}" for p in INCLUDE_DIRS), "-DONLY_FORMAT=2", "-S"]  # int4, groups of 32
    run([*find_compiler().command, *flags, source, "-o", str(listing)])
    blocks = re.split(r"^\.L\w+:$", listing.read_text(), flags=re.MULTILINE)
    hot = [b for b in blocks if b.count("vpdpbusd") == 24]
    assert hot, "no loop of 6 x 2 sums and two halves of a byte"
    for block in hot:
        loop = block[: block.rindex("vpdpbusd")]
        stack = [ln for ln in loop.splitlines() if "zmm" in ln and "rsp" in ln]
        assert not stack, stack
