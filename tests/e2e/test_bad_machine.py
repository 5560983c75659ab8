"""Machines that fail us: compilers that fail, full disks, tampered bundles, interruptions."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinterlm import cli
from tests.e2e.support import (
    MODELS,
    assert_refused,
    command,
    copy_model,
    environment,
    load_golden,
    run_cli,
)

MODEL = "qwen3-qknorm"  # compiled by other tests too: the shared cache has it
PROMPT = ("--prompt", "It is a truth", "--max-tokens", "4", "--temperature", "0", "--ignore-eos")

#: Answers as g++ does; what it does when asked to compile is the rest of the script.
FAKE_CXX = """#!/bin/sh
case "$1" in
  --version) echo "g++ (Fake) 12.2.0"; echo "Copyright (C) Free Software Foundation, Inc."; exit 0;;
  -dumpmachine) echo x86_64-linux-gnu; exit 0;;
esac
"""


def _fake_compiler(folder: Path, body: str) -> Path:
    path = folder / "fake-g++"
    path.write_text(FAKE_CXX + body)
    path.chmod(0o755)
    return path


def _bundle(cache_dir: Path, out: Path) -> Path:
    """A self-contained bundle whose files may be changed."""
    done = run_cli("compile", MODELS / MODEL, "-o", out, env=environment(cache_dir))
    assert done.returncode == 0, done.stderr
    for path in out.iterdir():
        data = path.read_bytes()
        path.unlink()  # it may be a hard link into the shared cache
        path.write_bytes(data)
    return out


def _copy_code(cache_dir: Path, to: Path) -> Path:
    """A cache of its own that holds the model's code, and no weights."""
    assert run_cli("compile", MODELS / MODEL, env=environment(cache_dir)).returncode == 0
    shutil.copytree(cache_dir / "code", to / "code")
    return to


def _no_remains(cache: Path) -> None:
    """Nothing half written is visible, and the cache says so itself."""
    done = run_cli("cache", "verify", "--cache-dir", cache, env=environment(cache))
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("code", "weights", "bundles"):
        for folder in (cache / kind).glob("*"):
            assert list(folder.glob("*.json")), f"{folder} is not whole"


# ------------------------------------------------------------------------------- the compiler


@pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is not None,
    reason="ziglang is a compiler that needs no PATH",
)
def test_no_compiler_says_what_to_install(tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    env = environment(tmp_path / "cache", PATH=str(empty), CXX=None)
    assert_refused(run_cli("run", MODELS / MODEL, *PROMPT, env=env), "compiler", "apt install g++")


def test_bundle_made_elsewhere_needs_no_compiler(cache_dir: Path, tmp_path: Path) -> None:
    bundle = _bundle(cache_dir, tmp_path / "bundle")
    empty = tmp_path / "bin"
    empty.mkdir()
    env = environment(tmp_path / "cache", PATH=str(empty), CXX=None)
    done = run_cli("run", bundle, *PROMPT, "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 4


def test_failing_compiler_is_quoted_shortly(tmp_path: Path) -> None:
    noise = 'for i in $(seq 500); do echo "model.cpp:$i: error: no such vector"; done; exit 1\n'
    env = environment(tmp_path / "cache", SINTERLM_CXX=str(_fake_compiler(tmp_path, noise)))
    done = run_cli("run", MODELS / MODEL, *PROMPT, env=env)
    assert_refused(done, "no such vector", "failed")
    assert len(done.stderr) < 4000
    _no_remains(tmp_path / "cache")


def test_compiler_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    env = environment(tmp_path / "cache", SINTERLM_CXX=str(_fake_compiler(tmp_path, "exit 0\n")))
    assert_refused(run_cli("run", MODELS / MODEL, *PROMPT, env=env), "failed")


def test_named_compiler_that_is_not_there(tmp_path: Path) -> None:
    env = environment(tmp_path / "cache", SINTERLM_CXX="/nowhere/g++")
    assert_refused(run_cli("run", MODELS / MODEL, *PROMPT, env=env), "/nowhere/g++", "SINTERLM_CXX")


# --------------------------------------------------------------------------- the disk


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    env = environment(tmp_path / "file" / "cache")
    assert_refused(run_cli("run", MODELS / MODEL, *PROMPT, env=env), "cache", "--cache-dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_cache_of_another_user(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    assert_refused(run_cli("run", MODELS / MODEL, *PROMPT, env=environment(cache)), "cache")


def test_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    code = cli.main(["compile", str(MODELS / MODEL), "--cache-dir", str(tmp_path / "cache")])
    told = capsys.readouterr().err
    assert code == 2 and "disk" in told and "free" in told, told


# ------------------------------------------------------------------------ tampered bundles


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("isa", "avx9000", ("avx9000",)),
        ("abi_version", 99, ("99", "sinterlm compile")),
        ("format_version", 99, ("99", "sinterlm compile")),
        ("target", "toaster", ("toaster",)),
        ("layout_hash", 1, ("layout",)),
        ("dtype", "fp8", ("fp8",)),
    ],
)
def test_bundle_for_something_else(
    field: str, value: object, words: tuple[str, ...], cache_dir: Path, tmp_path: Path
) -> None:
    bundle = _bundle(cache_dir, tmp_path / "bundle")
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest[field] != value
    manifest[field] = value
    path.write_text(json.dumps(manifest))
    assert_refused(run_cli("run", bundle, *PROMPT, env=environment(cache_dir)), *words)


@pytest.mark.parametrize("name", ["model.so", "text.json", "manifest.json"])
def test_damaged_bundle(name: str, cache_dir: Path, tmp_path: Path) -> None:
    bundle = _bundle(cache_dir, tmp_path / "bundle")
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 0x40
    (bundle / name).write_bytes(data)
    assert_refused(run_cli("run", bundle, *PROMPT, env=environment(cache_dir)), name)


def test_truncated_weights(cache_dir: Path, tmp_path: Path) -> None:
    bundle = _bundle(cache_dir, tmp_path / "bundle")
    weights = next(bundle.glob("weights-*.bin"))
    weights.write_bytes(weights.read_bytes()[:-64])
    assert_refused(run_cli("run", bundle, *PROMPT, env=environment(cache_dir)), weights.name)


def test_library_others_may_write_is_not_loaded(cache_dir: Path, tmp_path: Path) -> None:
    bundle = _bundle(cache_dir, tmp_path / "bundle")
    (bundle / "model.so").chmod(0o666)
    done = run_cli("run", bundle, *PROMPT, env=environment(cache_dir))
    assert_refused(done, "model.so", "chmod")


def test_damaged_cache_entry_is_rebuilt_with_a_word(cache_dir: Path, tmp_path: Path) -> None:
    cache = _copy_code(cache_dir, tmp_path / "cache")
    assert run_cli("compile", MODELS / MODEL, env=environment(cache)).returncode == 0
    for library in cache.glob("code/*/model.so"):
        library.chmod(library.stat().st_mode | stat.S_IWUSR)
        library.write_bytes(library.read_bytes()[:1000])
    done = run_cli("run", MODELS / MODEL, *PROMPT, "--json", env=environment(cache))
    assert done.returncode == 0, done.stderr
    assert "rebuilding" in done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 4


# ------------------------------------------------------------- processes at the same time


def test_two_processes_compile_one_model_once(tmp_path: Path) -> None:
    log = tmp_path / "compiled"
    body = f'echo run >> {log}\nexec g++ "$@"\n'
    env = environment(tmp_path / "cache", SINTERLM_CXX=str(_fake_compiler(tmp_path, body)))
    both = [
        subprocess.Popen(
            command("compile", MODELS / MODEL), env=env, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in both:
        _, told = process.communicate(timeout=240)
        assert process.returncode == 0, told
    assert log.read_text().count("run") == 1, "the second process waits for the first"
    assert len(list((tmp_path / "cache" / "code").iterdir())) == 1
    _no_remains(tmp_path / "cache")


def _wait_for(path: Path, process: subprocess.Popen[str]) -> str:
    """The content of a file that ``process`` will write. Fails after 60 s."""
    for _ in range(600):
        if path.exists() and (text := path.read_text()):
            return text
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_while_compiling(how: signal.Signals, tmp_path: Path) -> None:
    """130 for Ctrl-C, nothing half made either way, and the next run compiles and answers."""
    cache, marker = tmp_path / "cache", tmp_path / "compiling"
    slow = _fake_compiler(tmp_path, f"echo $$ > {marker}\nexec sleep 30\n")
    env = environment(cache, SINTERLM_CXX=str(slow))
    process = subprocess.Popen(
        command("run", MODELS / MODEL, *PROMPT), env=env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    compiler = int(_wait_for(marker, process))
    process.send_signal(how)
    _, told = process.communicate(timeout=20)
    if how == signal.SIGINT:
        assert process.returncode == 130, told
        assert "interrupted" in told and "Traceback" not in told
        assert not _is_running(compiler), "the compiler outlives us"
    else:
        os.kill(compiler, signal.SIGKILL)
    _no_remains(cache)
    if how == signal.SIGKILL:
        done = run_cli("run", MODELS / MODEL, *PROMPT, "--json", env=environment(cache))
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["token_ids"]) == 4
        assert run_cli("cache", "prune", env=environment(cache)).returncode == 0
        assert not list((cache / "tmp").iterdir()), "what the killed process left is swept away"


def test_killed_while_packing_weights(cache_dir: Path, tmp_path: Path) -> None:
    """A process killed between two chunks of the weights file leaves nothing that is believed."""
    cache = _copy_code(cache_dir, tmp_path / "cache")
    script = (
        "import os, signal, sys\n"
        "from sinterlm.artifact import weights\n"
        "def stop(count):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "gapless = weights._gapless\n"
        "def broken(chunks, nbytes):\n"
        "    for i, piece in enumerate(gapless(chunks, nbytes)):\n"
        "        if i == 3: stop(i)\n"
        "        yield piece\n"
        "weights._gapless = broken\n"
        "from sinterlm import cli\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    arguments = ["compile", str(MODELS / MODEL)]
    killed = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment(cache), timeout=240, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    _no_remains(cache)
    done = run_cli(*arguments, env=environment(cache))
    assert done.returncode == 0, done.stderr
    _no_remains(cache)


def test_interrupted_while_generating(cache_dir: Path, tmp_path: Path) -> None:
    folder = copy_model(MODEL, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 1 << 17
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ("--prompt", "a", "--max-tokens", "100000", "--temperature", "0", "--ignore-eos")
    process = subprocess.Popen(
        command("run", folder, *arguments), env=environment(cache_dir), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "interrupted" in told and "Traceback" not in told


def test_long_context_shares_the_code_of_the_short_one(cache_dir: Path, tmp_path: Path) -> None:
    """The context length is data: another one compiles nothing."""
    cache = _copy_code(cache_dir, tmp_path / "cache")
    folder = copy_model(MODEL, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    before = {p.name for p in (cache / "code").iterdir()}
    done = run_cli("compile", folder, env=environment(cache))
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (cache / "code").iterdir()} == before
    assert load_golden(MODEL).vocab_size == 259
