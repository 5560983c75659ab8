"""``sinterlm bench serve``: load any OpenAI-compatible server; flags as of `vllm bench serve`.

Prints a table or JSON with vLLM's keys, and keeps the raw timestamps where ``--save-raw`` says.
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinterlm.commands.bench.flags import parse_count
from sinterlm.commands.compile import MODEL_HELP
from sinterlm.errors import RuntimeFault, UsageError

if TYPE_CHECKING:
    from sinterlm.bench.client import Target
    from sinterlm.bench.workload import Load, Request
    from sinterlm.engine.tokenizer import Tokenizer

_DATASETS = ("random", "prefix_repetition", "sharegpt", "text", "multi_turn", "timed_trace")
_NEEDS_FILE = ("sharegpt", "text")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
             "repetition_penalty")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    _add_target(parser.add_argument_group("server"))
    _add_dataset(parser.add_argument_group("prompts"))
    _add_load(parser.add_argument_group("load"))
    _add_sampling(parser.add_argument_group("sampling (default: the server's)"))
    add_statistics_flags(parser)
    group = parser.add_argument_group("results")
    group.add_argument("--save-raw", type=Path, metavar="FILE", help="raw timestamps, as JSONL")
    group.add_argument("--save-result", action="store_true", help="a JSON file named as vLLM's")
    group.add_argument("--result-dir", type=Path, default=Path(), metavar="DIR", help="its folder")
    group.add_argument("--result-filename", metavar="NAME", help="its name")
    group.add_argument("--label", metavar="TEXT", help="first part of its name")


def _add_target(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--backend", choices=("openai", "openai-chat"), default="openai")
    group.add_argument("--base-url", metavar="URL", help="instead of --host and --port")
    group.add_argument("--host", default="127.0.0.1")
    group.add_argument("--port", type=parse_count, default=8000)
    group.add_argument("--endpoint", metavar="PATH", help="default: the backend's usual one")
    group.add_argument("--model", help="name in requests (default: the server's first)")
    group.add_argument("--served-model-name", metavar="NAME", help="name in requests, over --model")
    group.add_argument("--tokenizer", metavar="MODEL", help=f"{MODEL_HELP}; default: --model")
    group.add_argument("--header", action="append", default=[], metavar="KEY=VALUE")
    group.add_argument("--extra-body", type=_parse_object, default={}, metavar="JSON")
    group.add_argument("--insecure", action="store_true", help="do not verify TLS certificates")
    group.add_argument("--no-keep-alive", action="store_true",
                       help="a connection for each request, where a server drops kept ones"
                       )  # fmt: skip
    group.add_argument("--ready-check-timeout-sec", type=float, default=0.0, metavar="S",
                       help="wait so long for /v1/models (default: 0)")  # fmt: skip


def _add_dataset(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dataset-name", choices=_DATASETS, default="random")
    group.add_argument("--dataset-path", type=Path, metavar="FILE",
                       help="of sharegpt, text, multi_turn or timed_trace")  # fmt: skip
    group.add_argument("--num-prompts", type=parse_count, default=1000, metavar="N")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--disable-shuffle", action="store_true")
    group.add_argument("--request-id-prefix", default=None, metavar="TEXT")
    group.add_argument("--input-len", type=parse_count, metavar="N", help="tokens of each prompt")
    group.add_argument("--output-len", type=parse_count, metavar="N", help="tokens of each answer")
    group.add_argument("--random-input-len", type=parse_count, default=1024, metavar="N")
    group.add_argument("--random-output-len", type=parse_count, default=128, metavar="N")
    group.add_argument("--random-prefix-len", type=int, default=0, metavar="N")
    group.add_argument("--random-range-ratio", type=_parse_ratios, default=(0.0, 0.0),
                       metavar="X", help='share, or {"input": x, "output": y}')  # fmt: skip
    group.add_argument("--prefix-repetition-prefix-len", type=parse_count, default=256, metavar="N")
    group.add_argument("--prefix-repetition-suffix-len", type=parse_count, default=256, metavar="N")
    group.add_argument("--prefix-repetition-num-prefixes", type=parse_count, default=10,
                       metavar="N")  # fmt: skip
    group.add_argument("--multi-turn-num-turns", type=parse_count, default=3, metavar="N",
                       help="questions of a conversation")  # fmt: skip
    group.add_argument("--send-token-ids", action="store_true",
                       help="prompts as token ids, not as text")  # fmt: skip


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-concurrency", type=parse_count, metavar="N",
                       help="requests in flight (default: no limit)")  # fmt: skip
    group.add_argument("--request-rate", type=float, default=math.inf, metavar="RPS",
                       help="requests/s (default: inf, all at once)")  # fmt: skip
    group.add_argument("--burstiness", type=float, default=1.0, metavar="X",
                       help="shape of the gamma distribution of gaps; 1 = Poisson")  # fmt: skip
    group.add_argument("--ramp-up-strategy", choices=("linear", "exponential"))
    group.add_argument("--ramp-up-start-rps", type=float, metavar="RPS")
    group.add_argument("--ramp-up-end-rps", type=float, metavar="RPS")
    group.add_argument("--num-warmups", type=int, default=0, metavar="N",
                       help="requests before the run, not counted")  # fmt: skip
    group.add_argument("--self-timed", action=argparse.BooleanOptionalAction, default=None,
                       help="send requests of timed_trace at its times (default)")  # fmt: skip


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    for name in _SAMPLING:
        kind = int if name == "top_k" else float
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="X")
    group.add_argument("--ignore-eos", action="store_true", help="always so for random prompts")
    group.add_argument("--logprobs", type=int, metavar="N")


def add_statistics_flags(parser: argparse.ArgumentParser) -> None:
    """What is computed from the raw record, now or later."""
    group = parser.add_argument_group("statistics")
    group.add_argument("--percentile-metrics", type=_parse_metrics, default=("ttft", "tpot", "itl"),
                       metavar="LIST", help="of ttft,tpot,itl,e2el")  # fmt: skip
    group.add_argument("--metric-percentiles", type=_parse_percentiles, default=(99.0,),
                       metavar="LIST", help="default: 99")  # fmt: skip
    group.add_argument("--goodput", nargs="+", type=_parse_goal, default=[], metavar="NAME:MS",
                       help="requests/s that meet ttft:, tpot: and e2el: goals")  # fmt: skip
    group.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Send the load and print what it met. Raises UsageError, RuntimeFault, ResourceError."""
    from sinterlm.bench.load import run_load
    from sinterlm.bench.raw import write_raw
    from sinterlm.commands.bench.local import telling

    check(args)
    load = load_of(args)
    target, tokenizer = target_of(args)
    requests = requests_of(args, tokenizer)
    facts = {"command": shlex.join(["sinterlm", *sys.argv[1:]]), "model": target.model,
             "backend": target.backend, "url": target.url, "label": args.label,
             "num_prompts": args.num_prompts, "burstiness": args.burstiness,
             "tokenizer": args.tokenizer or target.model}  # fmt: skip
    with telling() as tell:
        raw = run_load(target, load, requests, tokenizer, facts,
                       lambda done, total: tell(f"{done}/{total} requests"))  # fmt: skip
    if args.save_raw:
        write_raw(args.save_raw, raw)
    return report(args, raw)


def report(args: argparse.Namespace, raw: Any) -> int:
    """Print (and save) the statistics of a raw record; 130 for a run that was interrupted."""
    from sinterlm.bench.serve_result import result_json, save_result
    from sinterlm.bench.serve_stats import serve_stats
    from sinterlm.commands.bench.serve_view import print_serve

    stats = serve_stats(raw, args.metric_percentiles, dict(args.goodput))
    if args.json:
        print(json.dumps(result_json(raw, stats)))
    else:
        print_serve(raw, stats, args.percentile_metrics)
    if getattr(args, "save_result", False):
        save_result(args.result_dir, args.result_filename, result_json(raw, stats))
    if not raw.run.is_complete:
        print("sinterlm: interrupted; the figures are of the requests that were answered",
              file=sys.stderr)  # fmt: skip
        return 130
    if stats.completed == 0:
        first = next((r.error for r in raw.requests if r.error), "no request was sent")
        raise RuntimeFault(f"all {stats.failed} requests failed; the first: {first}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that contradict each other."""
    name = args.dataset_name
    if name in _NEEDS_FILE and args.dataset_path is None:
        raise UsageError(f"--dataset-name {name} needs a --dataset-path")
    if name in ("random", "prefix_repetition") and args.dataset_path is not None:
        raise UsageError(f"--dataset-name {name} takes no --dataset-path")
    if args.self_timed and name != "timed_trace":
        raise UsageError("--self-timed belongs to --dataset-name timed_trace")
    given = (args.ramp_up_start_rps, args.ramp_up_end_rps)
    if (args.ramp_up_strategy is None) != (given == (None, None)) or None in given != (None, None):
        raise UsageError(
            "a ramp needs --ramp-up-strategy, --ramp-up-start-rps and --ramp-up-end-rps"
        )


def load_of(args: argparse.Namespace) -> Load:
    """How requests are sent."""
    from sinterlm.bench.workload import Load, Ramp

    ramp = None
    if args.ramp_up_strategy is not None:
        ramp = Ramp(args.ramp_up_strategy, args.ramp_up_start_rps, args.ramp_up_end_rps)
    timed = args.dataset_name == "timed_trace" and args.self_timed is not False
    return Load(args.request_rate, args.burstiness, args.max_concurrency, args.num_warmups, ramp,
                timed, args.seed)  # fmt: skip


def target_of(args: argparse.Namespace) -> tuple[Target, Tokenizer]:
    """The server, which may be asked for its model, and the tokenizer of the prompts."""
    from sinterlm.bench.client import Target
    from sinterlm.bench.ready import first_model, wait_ready
    from sinterlm.commands.bench.tokenizer import tokenizer_of

    base = args.base_url or f"http://{args.host}:{args.port}"
    extra = {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}
    headers = dict(_header(text) for text in args.header)
    random_prompts = args.dataset_name in ("random", "timed_trace")
    if args.ready_check_timeout_sec > 0:
        wait_ready(base, args.ready_check_timeout_sec)
    served, root = (args.model, args.model)
    if args.model is None:
        served, root = first_model(base, headers)
    target = Target(
        base, args.served_model_name or served, args.backend, args.endpoint, headers,
        {**extra, **args.extra_body}, args.ignore_eos or random_prompts, args.logprobs,
        args.send_token_ids or (args.dataset_name == "timed_trace" and args.backend == "openai"),
        not args.insecure, not args.no_keep_alive,
    )  # fmt: skip
    return target, tokenizer_of(args.tokenizer or root)


def requests_of(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Request]:
    """The prompts. Raises UsageError for a dataset that does not fit."""
    from sinterlm.bench import datasets

    prefix = args.request_id_prefix
    prefix = f"bench-{secrets.token_hex(4)}-" if prefix is None else prefix
    how = datasets.Sampling(
        args.num_prompts, args.seed, prefix, args.output_len, not args.disable_shuffle
    )
    shape = datasets.RandomShape(
        args.input_len or args.random_input_len, args.output_len or args.random_output_len,
        args.random_prefix_len, *args.random_range_ratio,
    )  # fmt: skip
    path = args.dataset_path
    if args.dataset_name == "random":
        return datasets.random_requests(tokenizer, shape, how)
    if args.dataset_name == "prefix_repetition":
        lens = (args.prefix_repetition_prefix_len, args.prefix_repetition_suffix_len)
        prefixes = datasets.PrefixShape(*lens, args.prefix_repetition_num_prefixes)
        return datasets.prefix_requests(tokenizer, prefixes, how)
    if args.dataset_name == "sharegpt":
        return datasets.sharegpt_requests(tokenizer, path, how)
    if args.dataset_name == "text":
        return datasets.text_requests(tokenizer, path, shape.input_len, how)
    if args.dataset_name == "multi_turn":
        turns = args.multi_turn_num_turns
        return datasets.multi_turn_requests(tokenizer, path, turns, shape, how)
    return datasets.trace_requests(tokenizer, path or datasets.FROZEN_TRACE, how)


# -- spelling of flags -----------------------------------------------------------------------------


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--header {text!r} is not KEY=VALUE")
    return name.strip(), value.strip()


def _parse_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _parse_ratios(text: str) -> tuple[float, float]:
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return float(value["input"]), float(value["output"])
        return float(value), float(value)
    except (ValueError, KeyError, TypeError):
        raise argparse.ArgumentTypeError(
            f'{text!r} is neither a share nor {{"input": x, "output": y}}'
        ) from None


def _parse_metrics(text: str) -> tuple[str, ...]:
    from sinterlm.bench.serve_stats import METRICS

    names = tuple(text.split(","))
    wrong = next((name for name in names if name not in METRICS), None)
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"{wrong!r} is none of {', '.join(METRICS)}")
    return names


def _parse_percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
        if all(0 <= value <= 100 for value in values):
            return values
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a list of percentiles, e.g. 50,99")


def _parse_goal(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    try:
        if name in ("ttft", "tpot", "e2el") and float(value) >= 0:
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not ttft:MS, tpot:MS or e2el:MS")
