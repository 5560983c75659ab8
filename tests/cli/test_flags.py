"""Flags mirror the fields of options.py, and read sizes and lists as they are written."""

from __future__ import annotations

import argparse
import typing
from dataclasses import fields
from pathlib import Path

import pytest

from sinterlm.commands.flags import (
    HELP,
    NO_FLAG,
    add_option_flags,
    flag_of,
    options_from,
    parse_cpu_ids,
    parse_size,
)
from sinterlm.commands.session import SAMPLING_FLAGS
from sinterlm.engine.sampling import SamplingParams
from sinterlm.options import CompileOptions, EngineOptions, ServeOptions

ALL = (CompileOptions, EngineOptions, ServeOptions)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("model")
    add_option_flags(made, *ALL)
    return made


def test_every_field_has_help_and_every_help_a_field() -> None:
    names = {f.name for cls in ALL for f in fields(cls)} - set(NO_FLAG)
    assert set(HELP) == names


def test_nothing_given_is_every_default() -> None:
    args = parser().parse_args(["m"])
    assert options_from(args, CompileOptions) == CompileOptions("m")
    assert options_from(args, EngineOptions) == EngineOptions()
    assert options_from(args, ServeOptions) == ServeOptions()


def test_every_flag_reaches_its_field() -> None:
    words = {
        "dtype": ("float32", "fp32"), "quantization": ("int8", "int8"),
            "quant_group": ("64", 64), "act_dtype": ("bf16", "bf16"), "target": ("x", "x"),
        "kv_cache_dtype": ("int8", "int8"),
        "isa": ("avx2", "avx2"), "tiles": ("t", Path("t")), "vendor_gemm": (None, True),
        "load_format": ("dummy", "dummy"), "seed": ("7", 7),
        "max_model_len": ("9", 9), "revision": ("main", "main"), "cache_dir": ("c", Path("c")),
        "dump_dir": ("d", Path("d")), "bundle_sha256": ("ab", "ab"), "code_only": (None, True),
        "max_num_seqs": ("3", 3), "max_num_batched_tokens": ("4", 4),
        "kv_cache_memory_fraction": ("0.5", 0.5), "gpu_memory_utilization": ("0.6", 0.6),
        "kv_cache_memory_bytes": ("2K", 2048),
        "block_size": ("32", 32), "num_threads": ("2", 2),
        "cpu_ids": ("0-2,5", (0, 1, 2, 5)), "host": ("::", "::"), "port": ("0", 0),
        "root_path": ("/x", "/x"), "served_model_name": ("m", ("m",)), "api_key": ("k", ("k",)),
        "allow_unauthenticated_metrics": (None, True), "allow_unauthenticated_page": (None, True),
        "allowed_origins": ("*", ("*",)), "ssl_certfile": ("c", Path("c")),
        "ssl_keyfile": ("k", Path("k")), "ssl_ca_certs": ("a", Path("a")),
        "ssl_cert_reqs": ("2", 2), "max_waiting": ("5", 5), "stream_interval": ("7", 7),
        "max_body_bytes": ("1M", 1 << 20),
        "request_timeout": ("1.5", 1.5), "read_timeout": ("2", 2.0), "send_timeout": ("3", 3.0),
        "keep_alive_timeout": ("4", 4.0), "shutdown_timeout": ("5", 5.0),
        "unknown_fields": ("warn", "warn"), "chat_template": ("t", Path("t")),
        "trust_request_chat_template": (None, True),
        "tool_call_parser": ("hermes", "hermes"), "reasoning_parser": ("qwq", "qwq"),
        "enable_auto_tool_choice": (None, True), "dev_mode": (None, True),
        "measure_roof": (None, True),
        "log_format": ("json", "json"), "log_file": ("l", Path("l")),
        "log_level": ("debug", "debug"), "log_prompts": (None, True), "access_log": (None, True),
        "max_mixed_prefill_tokens": ("5", 5), "num_scheduler_steps": ("3", 3),
        "enable_prefix_caching": (None, True), "num_speculative_tokens": ("6", 6),
        "prompt_lookup_min": ("8", 8), "prompt_lookup_max": ("9", 9),
    }  # fmt: skip
    assert set(words) == set(HELP)
    line = ["m"]
    for name, (text, _) in words.items():
        line += [flag_of(name)] if text is None else [flag_of(name), text]
    args = parser().parse_args(line)
    for cls in ALL:
        made = options_from(args, cls)
        for field in fields(cls):
            if field.name not in NO_FLAG:
                assert getattr(made, field.name) == words[field.name][1], field.name


def test_a_flag_of_several_texts_may_come_again() -> None:
    args = parser().parse_args(["m", "--api-key", "a", "--api-key", "b"])
    assert options_from(args, ServeOptions).api_key == ("a", "b")


def test_what_is_on_by_default_can_be_turned_off() -> None:
    args = parser().parse_args(["m", "--no-enable-prefix-caching"])
    assert options_from(args, EngineOptions) == EngineOptions(enable_prefix_caching=False)


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("123", 123), ("1k", 1000), ("1K", 1024), ("1.5G", 3 << 29), ("2g", 2 * 10**9)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "G", "1.5", "abc", "1GB", "infG", "nanK"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1,,2", "0-99999999"])
def test_cpu_lists_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_cpu_ids(text)


def test_sampling_flags_are_fields_of_their_type() -> None:
    hints = typing.get_type_hints(SamplingParams)
    for name, (kind, _, _) in SAMPLING_FLAGS.items():
        assert name in hints
        assert kind is hints[name] or kind in typing.get_args(hints[name]), name
