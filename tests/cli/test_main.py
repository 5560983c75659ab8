"""The command line around the subcommands: exit codes, one-line errors, what gets imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sinterlm import __version__, cli
from sinterlm.commands import cache
from sinterlm.errors import CompileError, UsageError


def run_cli(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sinterlm.cli", *words],
        capture_output=True, text=True, env={**os.environ, **env}, timeout=120,
    )  # fmt: skip


def raising(error: BaseException) -> object:
    def run(_: object) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("--top-p 2 is wrong"), 2, "sinterlm: error: --top-p 2 is wrong"),
        (CompileError("no compiler"), 2, "sinterlm: error: no compiler"),
        (FileNotFoundError(2, "No such file", "x"), 2, "No such file"),
        (MemoryError(), 2, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("bug"), 70, "internal error: ZeroDivisionError: bug"),
    ],
)
def test_errors_become_one_line_and_a_code(
    error: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cache, "run", raising(error))
    assert cli.main(["cache", "ls"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache, "run", raising(UsageError("wrong")))
    monkeypatch.setenv("SINTERLM_DEBUG", "1")
    assert cli.main(["cache", "ls"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["rnu", "x"], "did you mean 'run'?"),
        (["run", "m", "--prompt", "x", "--max-token=3"], "did you mean --max-tokens?"),
        (["run", "m", "--prompt", "x", "--temp", "0"], "unrecognized arguments: --temp"),
        (["run", "m"], "one of the arguments --prompt --chat is required"),
        (["run", "m", "--prompt", "x", "--chat", "y"], "not allowed with"),
        (["run", "m", "--prompt", "x", "--dtype", "int8"], "'int8' is none of auto"),
        (["run", "m", "--prompt", "x", "--max-tokens", "many"], "invalid int value"),
        ([], "COMMAND"),
    ],
)
def test_usage_errors(line: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(line)
    assert exit_info.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["run", "m", "--prompt", ""], "--prompt is empty"),
        (["run", "m", "--chat", ""], "--chat is empty"),
        (["run", "m", "--prompt", "x", "--system", "y"], "--system needs --chat"),
        (["run", "m", "--chat", "--json"], "--json needs a question"),
        (["run", "m", "--prompt", "x", "--code-only"], "--code-only leaves nothing to run"),
        (["run", "m", "--prompt", "x", "--num-threads", "0"], "num_threads=0"),
        (["run", "no-such-model", "--prompt", "x"], "no-such-model"),
        (["run", "smollm2", "--prompt", "x", "--target", "tpu"], "tpu"),
        (["run", "smollm2", "--prompt", "x", "--quant-group", "48"], "--quant-group 48"),
        (["inspect", "smollm2", "--tokens", "0"], "--tokens 0"),
        (["inspect", "smollm2", "--tokens", "9", "--context", "8"], "--context 8"),
        (["inspect", "smollm2", "--gflops", "8"], "--bandwidth-gbps"),
        (["cache", "ls", "--all"], "belong to `cache prune`"),
        (["inspect", "smollm2", "--context", "8193"], "8193 exceeds the 8192"),
        (["cache", "prune", "--older-than-days", "nan"], "--older-than-days nan"),
        (["cache", "prune", "--max-bytes", "-1"], "--max-bytes -1"),
    ],
)
def test_values_that_cannot_be(
    line: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("sinterlm: error: ")


def test_version_and_help_import_no_layer() -> None:
    program = (
        "import sys\n"
        "from sinterlm import cli\n"
        "try:\n    cli.main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'numpy', 'rich', 'tokenizers', 'jinja2', 'gguf', 'huggingface_hub', 'ctypes',\n"
        "         'sinterlm.compile', 'sinterlm.engine', 'sinterlm.runtime', 'sinterlm.frontend'}\n"
        "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
    )
    for flags in (["--version"], ["--help"], ["run", "--help"], ["inspect", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *flags], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_version() -> None:
    done = run_cli("--version")
    assert (done.returncode, done.stdout) == (0, f"sinterlm {__version__}\n")


def test_unknown_variables_are_told_and_injected_ones_are_not(tmp_path: Path) -> None:
    done = run_cli(
        "cache", "ls", "--cache-dir", str(tmp_path),
        SINTERLM_CACHEDIR="x", SINTERLM_SERVICE_HOST="10.0.0.1", SINTERLM_PORT="tcp://10.0.0.1:80",
    )  # fmt: skip
    assert done.returncode == 0
    assert "SINTERLM_CACHE_DIR?" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["--cache-dir", "--dump-dir", "-o"])
def test_an_empty_folder_is_not_the_working_one(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compile", "smollm2", flag, ""])
    assert "must not be empty" in capsys.readouterr().err


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_is_no_error(closed: str, tmp_path: Path) -> None:
    line = f'"{sys.executable}" -m sinterlm.cli cache verify --cache-dir "{tmp_path}" {closed}'
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_streams_take_what_their_encoding_lacks() -> None:
    program = (
        "import sys; from sinterlm import cli; from sinterlm.commands import cache\n"
        "def run(args):\n    print(ascii(sys.stdin.readline()), '\u00fc')\n    return 0\n"
        "cache.run = run\nsys.exit(cli.main(['cache', 'ls']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, input=b"\xff\n",
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, b"'\\udcff\\n' ?\n"), done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c",
         "import sys; from sinterlm import cli; from sinterlm.commands import cache\n"
         "def run(args):\n    while True: print('x' * 9999)\n"
         "cache.run = run\nsys.exit(cli.main(['cache', 'ls']))"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 141
    assert err == ""
