"""``sinterlm run`` on the real demo model: what goes to stdout, what to stderr, and exit codes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from sinterlm import LLM, SamplingParams
from sinterlm.commands import chat
from sinterlm.errors import UsageError
from tests.cli.conftest import QUESTION, sinterlm

GREEDY = ("--temperature", "0", "--max-tokens", "16")


@pytest.fixture(scope="module")
def answer(compiled: dict[str, Any]) -> dict[str, Any]:
    done = sinterlm("run", "smollm2", "--chat", QUESTION, "--json", *GREEDY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_json_has_these_keys(answer: dict[str, Any]) -> None:
    assert list(answer) == [
        "text", "token_ids", "prompt_token_ids", "finish_reason", "usage", "timing",
    ]  # fmt: skip
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(answer["token_ids"]) == 16
    assert usage["prompt_tokens"] == len(answer["prompt_token_ids"])
    assert usage["total_tokens"] == usage["prompt_tokens"] + 16
    assert answer["finish_reason"] == "length"
    timing = answer["timing"]
    assert set(timing) == {
        "compile_s", "load_s", "ttft_s", "decode_s", "decode_tokens_per_s", "total_s",
    }  # fmt: skip
    assert all(value > 0 for value in timing.values())


def test_json_is_the_reference_answer(answer: dict[str, Any]) -> None:
    start = "The planets in order from closest to the sun are:"
    assert answer["text"].startswith(start)


def test_streamed_text_is_the_same_and_alone_on_stdout(answer: dict[str, Any]) -> None:
    done = sinterlm("run", "smollm2", "--chat", QUESTION, *GREEDY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.removesuffix("\n") == answer["text"].removesuffix("\n")
    assert re.search(r"\[\d+ prompt \+ 16 tokens, first token \d+ ms, .*tokens/s.*\]", done.stderr)


def test_a_system_message_changes_the_prompt(answer: dict[str, Any]) -> None:
    done = sinterlm(
        "run", "smollm2", "--chat", QUESTION, "--system", "Talk like a pirate.", "--json",
        "--temperature", "0", "--max-tokens", "1",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["prompt_token_ids"] != answer["prompt_token_ids"]
    assert result["timing"]["decode_tokens_per_s"] is None


def test_stop_ends_before_the_text(compiled: dict[str, Any]) -> None:
    done = sinterlm("run", "smollm2", "--chat", QUESTION, "--json", "--stop", "order", *GREEDY)
    result = json.loads(done.stdout)
    assert result["finish_reason"] == "stop"
    assert result["text"] == "The planets in "


def test_seeds_repeat_and_differ(compiled: dict[str, Any]) -> None:
    def draw(seed: str) -> list[int]:
        line = ("--prompt", "Once upon", "--json", "--max-tokens", "12", "--temperature", "1.5")
        done = sinterlm("run", "smollm2", *line, "--seed", seed)
        assert done.returncode == 0, done.stderr
        ids: list[int] = json.loads(done.stdout)["token_ids"]
        return ids

    assert draw("1") == draw("1") != draw("2")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--temperature", "nan"), "temperature=nan"),
        (("--temperature", "-1"), "temperature=-1.0"),
        (("--top-p", "0"), "top_p=0.0"),
        (("--max-tokens", "0"), "max_tokens=0"),
        (("--max-model-len", "8"), "the prompt has"),
    ],
)
def test_bad_values_name_the_field(
    compiled: dict[str, Any], flags: tuple[str, str], words: str
) -> None:
    done = sinterlm("run", "smollm2", "--chat", QUESTION, *flags)
    assert done.returncode == 2
    assert done.stdout == ""
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_conversation_over_a_pipe(compiled: dict[str, Any]) -> None:
    talk = f"{QUESTION}\n/nonsense\n\n/reset\n{QUESTION}\n/exit\nnever read\n"
    done = sinterlm("run", "smollm2", "--chat", *GREEDY, stdin=talk)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    assert first.startswith("The planets")
    assert "unknown command /nonsense" in done.stderr


def test_the_second_turn_holds_the_first(compiled: dict[str, Any]) -> None:
    with LLM("smollm2") as llm:
        asked: list[int] = []
        stream = llm.stream

        def spy(prompt: Any, params: SamplingParams) -> Any:
            asked.append(len(list(prompt["prompt_token_ids"])))
            return stream(prompt, params)

        llm.stream = spy  # type: ignore[method-assign]
        params = SamplingParams(temperature=0.0, max_tokens=4)
        messages = chat._turn(llm, params, [], "My name is Ada.")
        messages = chat._turn(llm, params, messages, "What is my name?")
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert asked[1] > asked[0] + 4


def test_a_question_that_does_not_fit_is_dropped(compiled: dict[str, Any]) -> None:
    talk = f"{'long ' * 200}\nHi.\n"
    done = sinterlm("run", "smollm2", "--chat", "--max-model-len", "128", *GREEDY, stdin=talk)
    assert done.returncode == 0, done.stderr
    assert "the prompt has" in done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_ctrl_c_ends_with_130(compiled: dict[str, Any]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "sinterlm.cli", "run", "smollm2", "--prompt", "One, two,",
         "--ignore-eos", "--max-tokens", "4000", "--temperature", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(20)  # it is generating
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert time.monotonic() - start < 30


def test_threads_from_the_environment(
    compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SINTERLM_NUM_THREADS", "3")
    with LLM("smollm2") as llm:
        assert llm.model.describe()["num_threads"] == 3
    monkeypatch.setenv("SINTERLM_NUM_THREADS", "many")
    with pytest.raises(UsageError, match="SINTERLM_NUM_THREADS='many'"):
        LLM("smollm2")
