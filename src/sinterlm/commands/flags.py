"""Command-line flags derived from the fields of ``options.py``, with one table of help texts.

A flag's name, type, choices and default are the field's; a flag that was not given leaves the
field at its default. Values are judged by whoever owns them, here only their spelling is.
"""

from __future__ import annotations

import argparse
import types
import typing
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from sinterlm.options import (
    DTYPE_SPELLINGS,
    KV_CACHE_DTYPE_SPELLINGS,
    CompileOptions,
    EngineOptions,
    ServeOptions,
)

Options = TypeVar("Options", CompileOptions, EngineOptions, ServeOptions)
OptionsClass = type[CompileOptions] | type[EngineOptions] | type[ServeOptions]

#: Fields without a flag. The host of several ranks compiles each one's part, and no command of ours
#: is such a host.
NO_FLAG = ("model", "tensor_parallel_size", "tensor_parallel_rank")

#: Field name -> help. The unit is in the text; the default is appended.
HELP: dict[str, str] = {
    "dtype": "precision of weights and KV cache; sums and the residual stream are always fp32",
    "quantization": "store matrices as 8 or 4 bit integers, or on a GPU as fp8 (default: in dtype)",
    "quant_group": "weights that share a scale: 0 (an output channel), 32, 64 or 128 (default: "
    "128 for int8, 32 for int4; fp8 has 0)",
    "act_dtype": "GEMM operands beside quantized weights; bf16 = weight-only, fp8 goes with fp8 "
    "weights on a GPU (default: int8, on a GPU bf16)",
    "kv_cache_dtype": "what the KV cache holds, in about half of bf16's memory: int8 = codes with "
    "a scale per token and KV head (CPU), fp8 = e4m3 with scales per layer (GPU); auto = as dtype",
    "target": "what to compile for",
    "isa": "instruction-set level (default: the widest this machine has)",
    "tiles": "tile table of a GPU target, as `sinterlm tune` writes it (default: what it left in "
    "the cache, or the shipped one)",
    "vendor_gemm": "on a GPU hipBLASLt or cuBLASLt multiplies bf16 matrices in steps of 256 tokens "
    "and more; packs them another way, and bits depend on the batch (default: off)",
    "load_format": "dummy = seeded random weights, nothing is read or downloaded",
    "seed": "base of every random draw that has no seed of its own, and of dummy weights",
    "max_model_len": "longest context, tokens (default: the model's own)",
    "revision": "branch, tag or commit of a Hub model",
    "cache_dir": "folder of compiled bundles (default: $SINTERLM_CACHE_DIR or ~/.cache/sinterlm)",
    "code_only": "compile the library alone, without packing weights",
    "dump_dir": "write the graph after each pass and the generated source into this folder",
    "bundle_sha256": "refuse a bundle whose manifest has another SHA-256",
    "max_num_seqs": "most sequences in one step",
    "max_num_batched_tokens": "most tokens in one step; longer prompts are cut into chunks",
    "max_mixed_prefill_tokens": "most prompt tokens in a step that also decodes: fewer keep the "
    "gaps between tokens shorter, more the wait for the first (default: 256, or 512 with AMX)",
    "num_scheduler_steps": "most decode steps in one native call, offline and when nothing waits",
    "enable_prefix_caching": "compute a beginning that prompts share only once (default: on)",
    "num_speculative_tokens": "tokens guessed per step from the text so far, and checked: never "
    "changes the output",
    "prompt_lookup_min": "shortest run of tokens looked up for a guess",
    "prompt_lookup_max": "longest run of tokens looked up for a guess",
    "kv_cache_memory_bytes": "memory for the KV cache, bytes or 512M, 4G (default: what is free)",
    "kv_cache_memory_fraction": "the same as a share of the memory that weights leave, 0 to 1 "
    "(default: 0.9)",
    "gpu_memory_utilization": "share of a GPU's memory for weights, working buffers and KV cache "
    "together, 0 to 1 (default: 0.9)",
    "block_size": "tokens per KV page, a multiple of 16",
    "num_threads": "worker threads (default: the CPUs this process may use)",
    "cpu_ids": "pin worker i to the i-th of these CPUs, e.g. 0-3,8",
    "host": "address to listen on; 0.0.0.0 or :: = every interface",
    "port": "port to listen on; 0 = a free one",
    "root_path": "prefix that a reverse proxy strips, such as /llm",
    "served_model_name": "name the model answers to, instead of MODEL; may be given several times",
    "api_key": "key that clients must send; may be given several times (also: $SINTERLM_API_KEY)",
    "allow_unauthenticated_metrics": "/metrics needs no key",
    "allow_unauthenticated_page": "the files of the page need no key; its figures still do",
    "allowed_origins": "web origin that may call from a browser, or *; may be given several times",
    "ssl_certfile": "PEM certificate with its chain; serves HTTPS",
    "ssl_keyfile": "PEM key of the certificate (default: it is in the same file)",
    "ssl_ca_certs": "PEM certificates of authorities that clients' certificates must come from",
    "ssl_cert_reqs": "client certificates: 0 not asked for, 1 optional, 2 required",
    "max_waiting": "requests that may wait for the engine; one more gets a 429",
    "stream_interval": "tokens that a stream gets together while nothing waits: more leave less "
    "work between steps, and larger gaps between what a reader sees (default: as many as take "
    "33 ms, at most num-scheduler-steps)",
    "max_body_bytes": "longest request body, bytes or 16M",
    "request_timeout": "seconds until a request is ended (default: never)",
    "read_timeout": "seconds a client may take to send its headers, and then its body",
    "send_timeout": "seconds a client may leave its answer unread before it is dropped",
    "keep_alive_timeout": "seconds an idle connection stays open",
    "shutdown_timeout": "seconds that running requests get after SIGTERM or Ctrl-C",
    "unknown_fields": "a field that the API does not know: refuse the request, or log it",
    "chat_template": "jinja file to use instead of the model's own chat template",
    "trust_request_chat_template": "a request may bring a chat template of its own",
    "tool_call_parser": "hermes, llama3_json, none, or auto = by the chat template",
    "reasoning_parser": "deepseek_r1, qwq, qwen3, none, or auto = by the chat template",
    "enable_auto_tool_choice": "refuse to start without a tool parser; with one, tool_choice auto "
    "always works",
    "measure_roof": "measure the machine's peaks at start, some seconds, so that /metrics and "
    "the page show each op's share of them",
    "dev_mode": "also serve /reset_prefix_cache",
    "log_format": "key=value pairs, or one JSON object per line",
    "log_file": "append the log to this file (default: stderr)",
    "log_level": "least important kind of line to log",
    "log_prompts": "log the text of every prompt",
    "access_log": "log every HTTP response, those of /health and /metrics too",
}

_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
             "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes from ``123``, ``1.5G`` (binary) or ``1.5g`` (decimal), as vLLM reads them."""
    scale = _SUFFIXES.get(text[-1:], 1)
    number = text[:-1] if scale > 1 else text
    try:
        return int(number) if scale == 1 else int(float(number) * scale)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write bytes, or a number with K, M or G"
        ) from None


def parse_folder(text: str) -> Path:
    """A folder; not the empty text, which would mean the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder must not be empty")
    return Path(text)


def parse_file(text: str) -> Path:
    """A file; not the empty text."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a file must not be empty")
    return Path(text)


def parse_cpu_ids(text: str) -> tuple[int, ...]:
    """CPU numbers from ``0-3,8``."""
    ids: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            stop = int(last) if dash else int(first)
            if not 0 <= int(first) <= stop < 4096:
                raise ValueError
            ids.extend(range(int(first), stop + 1))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of CPUs; write e.g. 0-3,8"
        ) from None
    return tuple(ids)


def parse_dtype(text: str) -> str:
    """``auto``, ``bf16`` or ``fp32`` from any accepted spelling."""
    if text not in DTYPE_SPELLINGS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DTYPE_SPELLINGS)}")
    return DTYPE_SPELLINGS[text]


def parse_kv_cache_dtype(text: str) -> str:
    """``auto``, ``bf16``, ``int8`` or ``fp8`` from any accepted spelling."""
    if text not in KV_CACHE_DTYPE_SPELLINGS:
        known = ", ".join(KV_CACHE_DTYPE_SPELLINGS)
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}")
    return KV_CACHE_DTYPE_SPELLINGS[text]


_PARSERS: dict[str, Any] = {
    "dtype": parse_dtype,
    "kv_cache_dtype": parse_kv_cache_dtype,
    "kv_cache_memory_bytes": parse_size,
    "cpu_ids": parse_cpu_ids,
    "cache_dir": parse_folder,
    "dump_dir": parse_folder,
    "tiles": parse_file,
    "ssl_certfile": parse_file,
    "ssl_keyfile": parse_file,
    "ssl_ca_certs": parse_file,
    "chat_template": parse_file,
    "log_file": parse_file,
    "max_body_bytes": parse_size,
}
_METAVARS: dict[str, str] = {
    "dtype": "{auto,bf16,fp32}", "kv_cache_dtype": "{auto,bf16,int8,fp8}",
    "kv_cache_memory_bytes": "BYTES", "cpu_ids": "LIST",
    "max_model_len": "TOKENS", "max_num_batched_tokens": "TOKENS", "block_size": "TOKENS",
    "max_mixed_prefill_tokens": "TOKENS", "kv_cache_memory_fraction": "SHARE",
    "gpu_memory_utilization": "SHARE",
    "cache_dir": "DIR", "dump_dir": "DIR", "bundle_sha256": "HEX", "host": "ADDRESS",
    "root_path": "PATH", "api_key": "KEY", "allowed_origins": "ORIGIN", "max_body_bytes": "BYTES",
}  # fmt: skip


def add_option_flags(
    parser: argparse.ArgumentParser, *classes: OptionsClass, title: str = "options"
) -> None:
    """One flag per field of ``classes``, a name that two classes share once; not ``model``.

    The flag of a field that holds several texts may be given several times, one text each.
    """
    group = parser.add_argument_group(title)
    seen = set(NO_FLAG)
    for cls in classes:
        hints = typing.get_type_hints(cls)
        for field in fields(cls):
            if field.name not in seen:
                seen.add(field.name)
                _add_flag(group, field, hints[field.name])


def _add_flag(group: argparse._ArgumentGroup, field: Field[Any], hint: Any) -> None:
    kind, choices = _kind_of(hint)
    help_text = HELP[field.name]
    if kind is bool:
        action = argparse.BooleanOptionalAction if field.default is True else "store_true"
        group.add_argument(flag_of(field.name), action=action, default=None, help=help_text)
        return
    if field.default not in (None, (), "", MISSING):
        help_text += f" (default: {field.default})"
    parse = _PARSERS.get(field.name)
    metavar = {int: "N", float: "SECONDS", Path: "FILE"}.get(kind, "NAME")
    group.add_argument(
        flag_of(field.name),
        action="append" if kind is tuple else "store",
        type=parse or (str if kind is tuple else kind),
        choices=None if parse else choices,
        metavar=_METAVARS.get(field.name) or (None if choices else metavar),
        help=help_text.replace("%", "%%"),
    )


def flag_of(name: str) -> str:
    """``max_model_len`` -> ``--max-model-len``."""
    return "--" + name.replace("_", "-")


def _kind_of(hint: Any) -> tuple[type, tuple[str, ...] | None]:
    """Type and choices of an annotation such as ``int | None`` or ``Literal["a", "b"]``."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not type(None))
    if get_origin(hint) is Literal:
        return str, tuple(str(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple and get_args(hint)[0] is str:
        return tuple, None
    return (hint if hint in (bool, int, float, str, Path) else str), None


def options_from(args: argparse.Namespace, cls: type[Options]) -> Options:
    """``cls`` from the flags that were given; every other field keeps its default."""
    names = (field.name for field in fields(cls))
    given: dict[str, Any] = {n: v for n in names if (v := getattr(args, n, None)) is not None}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return cls(**given)
