"""The smaller parts: weights writer, memos, environment variables, ISA levels, the ABI header."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sinterlm.artifact.isa as isa_module
from sinterlm.artifact import isa
from sinterlm.artifact.env import VARIABLES, check_environment, env_int, env_text, is_injected
from sinterlm.artifact.manifest import ABI_VERSION
from sinterlm.artifact.memo import FileStamp, Memo, digest_json
from sinterlm.artifact.storage import show_bytes
from sinterlm.artifact.weights import write_weights
from sinterlm.errors import BundleError, UsageError

HEADER = Path(isa_module.__file__).parent / "abi.h"


# ---------------------------------------------------------------- weights writer


@given(
    pieces=st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=200)), max_size=8),
    tail=st.integers(0, 300),
)
def test_chunks_land_at_their_offsets(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, bytes]], tail: int
) -> None:
    expected, chunks = b"", []
    for gap, data in pieces:
        expected += bytes(gap)
        chunks.append((len(expected), data))
        expected += data
    expected += bytes(tail)
    path = tmp_path_factory.mktemp("weights") / "weights-00000.bin"
    counted: list[int] = []
    ref = write_weights(path, chunks, len(expected), counted.append)
    assert path.read_bytes() == expected
    assert ref.sha256 == hashlib.sha256(expected).hexdigest()
    assert ref.nbytes == sum(counted) == len(expected)


@pytest.mark.parametrize("chunks", [[(64, b"x" * 64), (100, b"y")], [(120, b"x" * 10)]])
def test_overlap_and_overrun_are_bugs(tmp_path: Path, chunks: list[tuple[int, bytes]]) -> None:
    with pytest.raises(AssertionError, match="overlap or overrun"):
        write_weights(tmp_path / "w", chunks, 128, lambda n: None)


def test_typed_buffers_count_in_bytes(tmp_path: Path) -> None:
    words = memoryview(bytearray(range(16))).cast("I")
    assert write_weights(tmp_path / "w", [(0, words)], 16, lambda n: None).nbytes == 16
    assert (tmp_path / "w").read_bytes() == bytes(range(16))


# ---------------------------------------------------------------- memos


def test_memo_remembers_and_forgives(tmp_path: Path) -> None:
    memo = Memo(tmp_path / "memo")
    assert memo.recall("t", "k") is None
    memo.remember("t", "k", {"a": 1})
    assert memo.recall("t", "k") == {"a": 1}
    (tmp_path / "memo/t/k.json").write_text('{"a": ')
    assert memo.recall("t", "k") is None
    (tmp_path / "memo/t/k.json").write_text("[1]")
    assert memo.recall("t", "k") is None
    memo.forget("t", "k")
    assert list((tmp_path / "memo/t").iterdir()) == []
    (tmp_path / "file").write_text("")
    Memo(tmp_path / "file").remember("t", "k", {})
    Memo(None).remember("t", "k", {})


def test_stamps_tell_a_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"first")
    stamp = FileStamp.of(path)
    assert FileStamp.of(path) == stamp
    other = tmp_path / "other"
    other.write_bytes(b"other")
    os.utime(other, ns=(0, stamp.mtime_ns))
    os.replace(other, path)
    assert FileStamp.of(path) != stamp, "same size and time, another inode"


def test_canonical_json_ignores_the_order_of_keys() -> None:
    assert digest_json({"a": 1, "b": [2]}) == digest_json({"b": [2], "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": "1"})


# ---------------------------------------------------------------- environment


def test_unknown_variables_are_reported_with_a_guess() -> None:
    lines = check_environment(
        {"SINTERLM_CACHEDIR": "/x", "SINTERLM_ZEBRA": "1", "SINTERLM_CXX": "g++", "PATH": "/bin"}
    )
    assert len(lines) == 2
    assert "SINTERLM_CACHEDIR" in lines[0] and "did you mean SINTERLM_CACHE_DIR?" in lines[0]
    assert "SINTERLM_ZEBRA" in lines[1] and all(name in lines[1] for name in VARIABLES)


KUBERNETES = {
    "SINTERLM_SERVICE_HOST": "10.96.0.12",
    "SINTERLM_SERVICE_PORT": "8000",
    "SINTERLM_SERVICE_PORT_HTTP": "8000",
    "SINTERLM_PORT": "tcp://10.96.0.12:8000",
    "SINTERLM_PORT_8000_TCP": "tcp://10.96.0.12:8000",
    "SINTERLM_PORT_8000_TCP_PROTO": "tcp",
    "SINTERLM_PORT_8000_TCP_PORT": "8000",
    "SINTERLM_PORT_8000_TCP_ADDR": "10.96.0.12",
    "SINTERLM_CHAT_SERVICE_HOST": "10.96.0.13",
    "SINTERLM_CHAT_PORT_9000_UDP_ADDR": "10.96.0.13",
}


def test_what_kubernetes_injects_is_ignored() -> None:
    assert check_environment(KUBERNETES) == []
    assert not any(name in VARIABLES for name in KUBERNETES)
    assert not is_injected("SINTERLM_PORT", "8000"), "a person wrote this one"


def test_numbers_in_the_environment() -> None:
    name = "SINTERLM_NUM_THREADS"
    assert env_int(name, {}) is None
    assert env_int(name, {name: " "}) is None
    assert env_int(name, {name: "12"}) == 12
    for bad in ("0", "-1", "two", "1.5", "9" * 30, "²"):
        with pytest.raises(UsageError, match=f"{name}="):
            env_int(name, {name: bad})
    assert env_text("SINTERLM_ISA", {"SINTERLM_ISA": " avx2 "}) == "avx2"


# ---------------------------------------------------------------- ISA levels

AVX2 = "fpu sse2 avx avx2 fma f16c bmi2"
AVX512 = AVX2 + " avx512f avx512bw avx512vl avx512dq"


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        (AVX512 + " avx512_bf16 avx512_vnni amx_tile amx_bf16 amx_int8", "amx"),
        (AVX512 + " avx512_bf16 avx512_vnni amx_tile", "avx512bf16"),
        (AVX512 + " avx512_bf16 avx512_vnni", "avx512bf16"),
        (AVX512 + " avx512_bf16", "avx512"),
        (AVX512 + " avx512_vnni", "avx512"),
        (AVX512.replace("avx512vl", ""), "avx2"),
        (AVX512.replace("f16c", ""), "generic"),
        (AVX2, "avx2"),
        ("fpu sse2", "generic"),
        ("", "generic"),
    ],
)
def test_levels_from_cpuinfo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, best: str
) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "h", "6", "v", "x86_64")))
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nflags\t: x\n")
    assert isa.best_isa(tmp_path) == best
    assert isa.available_isas(tmp_path)[-1] == "generic"


def test_other_architectures_are_generic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "h", "6", "v", "aarch64")))
    assert isa.available_isas() == ("generic",)
    with pytest.raises(BundleError, match=r"avx2.*only generic"):
        isa.check_isa("avx2")


def test_unknown_level_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match=r"'avx1024'.*amx, avx512bf16, avx512, avx2, generic"):
        isa.parse_isa("avx1024")


# ---------------------------------------------------------------- abi.h


def test_abi_version_is_the_same_in_both_languages() -> None:
    match = re.search(r"#define SL_ABI_VERSION (\d+)u", HEADER.read_text())
    assert match is not None and int(match[1]) == ABI_VERSION


@pytest.mark.parametrize("language", [("gcc", "c", "c11"), ("g++", "c++", "c++17")])
def test_header_compiles_alone(language: tuple[str, str, str], tmp_path: Path) -> None:
    compiler, name, standard = language
    source = '#include "abi.h"\n#include "abi.h"\nint main(void) { return (int)sl_abi_version(); }'
    done = subprocess.run(
        [compiler, "-x", name, f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-pedantic",
         f"-I{HEADER.parent}", "-fsyntax-only", "-"],
        input=source, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_sizes_for_people() -> None:
    assert [show_bytes(n) for n in (0, 999, 1000, 269_060_000, 65_500_000_000)] == [
        "0 bytes", "999 bytes", "1.0 kB", "269.1 MB", "65.5 GB",
    ]  # fmt: skip
