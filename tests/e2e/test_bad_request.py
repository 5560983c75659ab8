"""A request that cannot be honoured is refused by name, and the model answers the next one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sinterlm import LLM, SamplingParams, cli
from sinterlm.errors import PromptError, UsageError
from tests.e2e.support import MODELS, load_golden

WITH_TOKENIZER = "qwen3-qknorm"
WITHOUT_TOKENIZER = "llama-llama3-gqa4"
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(cache_dir: Path) -> LLM:
    return LLM(
        str(MODELS / WITH_TOKENIZER), cache_dir=cache_dir, num_threads=1,
        kv_cache_memory_bytes=8 << 20,
    )  # fmt: skip


def _still_answers(llm: LLM) -> None:
    golden = load_golden(WITH_TOKENIZER)
    out = llm.generate({"prompt_token_ids": golden.prompts[1].tolist()}, GREEDY)
    assert list(out[0].outputs[0].token_ids) == golden.greedy[1][:4].tolist()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [1, 259]}, "259"),
        ({"prompt_token_ids": [-1]}, "-1"),
        ({"prompt_token_ids": [2**40]}, str(2**40)),
        ({"prompt_token_ids": [1] * 256}, "256"),
        ({"prompt_token_ids": [1] * 100_000}, "100000"),
    ],
)
def test_prompt_is_refused(llm: LLM, prompt: object, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        llm.generate(prompt, GREEDY)  # type: ignore[arg-type]
    _still_answers(llm)


@pytest.mark.parametrize("prompt", [{"prompt_ids": [1]}, {"prompt_token_ids": [1.5]}, 7, None])
def test_prompt_of_another_kind_is_refused(llm: LLM, prompt: object) -> None:
    with pytest.raises(UsageError):
        llm.generate(prompt, GREEDY)  # type: ignore[arg-type]
    _still_answers(llm)


def test_one_bad_prompt_refuses_the_call_before_any_runs(llm: LLM) -> None:
    with pytest.raises(PromptError, match="259"):
        llm.generate([{"prompt_token_ids": [1]}, {"prompt_token_ids": [259]}], GREEDY)
    _still_answers(llm)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("top_p", 0.0), ("top_p", 1.5), ("top_p", math.nan), ("min_p", -1.0), ("min_p", math.nan),
        ("top_k", -2), ("repetition_penalty", 0.0), ("repetition_penalty", math.nan),
        ("presence_penalty", 3.0), ("frequency_penalty", math.nan), ("max_tokens", 0),
        ("max_tokens", -5), ("n", 0), ("seed", "one"), ("logprobs", -3), ("stop", 7),
        ("logit_bias", {1: math.nan}),
    ],
)  # fmt: skip
def test_sampling_value_is_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_token_ids_in_parameters_are_checked(llm: LLM) -> None:
    for params in (
        SamplingParams(temperature=0.0, logit_bias={259: 1.0}),
        SamplingParams(temperature=0.0, stop_token_ids=[9999]),
    ):
        with pytest.raises(UsageError, match="out of range"):
            llm.generate({"prompt_token_ids": [1]}, params)
    _still_answers(llm)


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (WITH_TOKENIZER, ["--prompt", ""], "empty"),
        (WITH_TOKENIZER, ["--prompt", "x" * 4000], "256"),
        (WITH_TOKENIZER, ["--prompt", "hi", "--temperature", "nan"], "temperature"),
        (WITH_TOKENIZER, ["--prompt", "hi", "--temperature", "-1"], "temperature"),
        (WITH_TOKENIZER, ["--prompt", "hi", "--top-p", "0"], "top_p"),
        (WITH_TOKENIZER, ["--prompt", "hi", "--max-tokens", "0"], "max_tokens"),
        (WITH_TOKENIZER, ["--prompt", "hi", "--max-model-len", "0"], "max_model_len"),
        (WITH_TOKENIZER, ["--prompt", "hi", "--max-model-len", "100000"], "100000"),
        (WITH_TOKENIZER, ["--prompt", "hi", "--num-threads", "0"], "num_threads"),
        (WITH_TOKENIZER, ["--prompt", "hi", "--block-size", "24"], "block_size"),
        (WITH_TOKENIZER, ["--prompt", "hi", "--kv-cache-memory-bytes", "10"], "kv"),
        (WITH_TOKENIZER, ["--prompt", "hi", "--quantization", "int3"], "int3"),
        (WITHOUT_TOKENIZER, ["--prompt", "hi"], "tokenizer"),
        (WITHOUT_TOKENIZER, ["--chat", "hi"], "template"),
    ],
)
def test_command_line_is_refused(
    model: str,
    arguments: list[str],
    words: str,
    cache_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        code = cli.main(["run", str(MODELS / model), "--cache-dir", str(cache_dir), *arguments])
    except SystemExit as exc:  # argparse's way out
        code = int(exc.code or 0)
    told = capsys.readouterr()
    assert code == 2, told
    assert words.replace("_", "-") in told.err.lower().replace("_", "-"), told.err
    assert "Traceback" not in told.err and "internal error" not in told.err
    assert told.out == ""


def test_tokenizer_without_template_refuses_chat(tmp_path: Path, cache_dir: Path) -> None:
    from tests.e2e.support import assert_refused, copy_model, environment, run_cli

    folder = copy_model(WITH_TOKENIZER, tmp_path)
    (folder / "chat_template.jinja").unlink()
    done = run_cli("run", folder, "--chat", "hi", env=environment(cache_dir))
    assert_refused(done, "chat template")
