"""``sinterlm inspect``: what a model is made of and what it costs, before or after compiling.

A checkpoint is planned, not compiled, and its weights are not read; a bundle tells what its
manifest holds. Times appear only with a bandwidth and a peak, measured here or given.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from sinterlm.artifact.manifest import ModelShape, kv_token_bytes
from sinterlm.commands.compile import MODEL_HELP
from sinterlm.commands.flags import add_option_flags, options_from
from sinterlm.errors import UsageError
from sinterlm.options import CompileOptions

if TYPE_CHECKING:
    from sinterlm.artifact.bundle import Bundle
    from sinterlm.artifact.manifest import OpCost
    from sinterlm.backends.gpu.tuning import TileTable
    from sinterlm.ir.plan import Plan


@dataclass(frozen=True)
class Slopes:
    """The roofline of a machine: its memory slope and its compute ceiling."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Subject:
    """What is inspected. ``plan`` is None for a bundle, ``bundle`` None for a checkpoint."""

    model: str
    dtype: str
    quantization: str | None  #: format of most weights and where its codes come from
    kv_cache_dtype: str
    target: str
    isa: str
    max_model_len: int  #: tokens
    shape: dict[str, Any]
    windows: tuple[int, ...]  #: per layer, 0 = full attention
    ops: tuple[OpCost, ...]
    weights_bytes: int
    activation_bytes_per_token: int
    activation_bytes_per_row: int
    plan: Plan | None
    bundle: Bundle | None
    tiles: TileTable | None = None  #: of a checkpoint for a GPU

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache, over all layers."""
        return kv_token_bytes(ModelShape(**self.shape), self.kv_cache_dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("model", metavar="MODEL|BUNDLE", help=MODEL_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--all-layers", action="store_true", help="one row per layer and op")
    group = parser.add_argument_group("the step whose cost is shown")
    group.add_argument(
        "--tokens",
        type=int,
        default=1,
        metavar="N",
        help="tokens computed: 1 = one decode step (default), 512 = a prefill",
    )
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens in the cache after the step (default: 1024, or --tokens if more)",
    )
    group = parser.add_argument_group("roofline")
    group.add_argument(
        "--probe",
        action="store_true",
        help="measure bandwidth and peak here (compiles the model if needed)",
    )
    group.add_argument("--bandwidth-gbps", type=float, metavar="GB/s", help="read bandwidth")
    group.add_argument("--gflops", type=float, metavar="GFLOP/s", help="compute peak")
    add_option_flags(parser, CompileOptions)


def run(args: argparse.Namespace) -> int:
    """Look, measure if asked to, and print. Raises UsageError for a step that cannot be."""
    from sinterlm.commands.inspect_view import print_subject

    options = options_from(args, CompileOptions)
    given = _given_machine(args)
    subject = look(options)
    step = _step(args, subject.max_model_len)
    machine = given or (_probe(options) if args.probe else None)
    facts = gather(subject, step, machine)
    if args.json:
        print(json.dumps(facts))
    else:
        print_subject(subject, facts, all_layers=args.all_layers)
    return 0


def _step(args: argparse.Namespace, max_model_len: int) -> tuple[int, int]:
    """(tokens, context) of the step. Raises UsageError."""
    tokens = args.tokens
    context = max(tokens, min(1024, max_model_len)) if args.context is None else args.context
    if tokens < 1:
        raise UsageError(f"--tokens {tokens} must be at least 1")
    if context < tokens:
        raise UsageError(f"--context {context} must be at least --tokens {tokens}")
    if context > max_model_len:
        raise UsageError(f"a context of {context} exceeds the {max_model_len} tokens of this model")
    return tokens, context


def _given_machine(args: argparse.Namespace) -> Slopes | None:
    """The machine from the flags. Raises UsageError when half of it is missing or not positive."""
    pair = (args.bandwidth_gbps, args.gflops)
    if pair == (None, None):
        return None
    if None in pair:
        raise UsageError("give both --bandwidth-gbps and --gflops, or measure with --probe")
    if not all(0 < value < 1e9 for value in pair):
        raise UsageError(f"--bandwidth-gbps {pair[0]} and --gflops {pair[1]} must be positive")
    return Slopes(pair[0] * 1e9, pair[1] * 1e9)


def _probe(options: CompileOptions) -> Slopes:
    from sinterlm.commands.probe import probe_bundle
    from sinterlm.commands.ui import TerminalProgress
    from sinterlm.compile import compile_model

    with TerminalProgress() as progress:
        bundle = compile_model(options, progress)
        progress.stage("measure this machine")
        gflops, gbytes = probe_bundle(bundle)
    return Slopes(gbytes * 1e9, gflops * 1e9)


def look(options: CompileOptions) -> Subject:
    """Open a bundle, or plan a checkpoint without reading its weights."""
    from sinterlm.artifact.bundle import check_compiled_as, is_bundle, open_bundle

    if is_bundle(options.model):
        bundle = open_bundle(options.model, bundle_sha256=options.bundle_sha256, any_isa=True)
        check_compiled_as(bundle.manifest, _any_target(options, bundle))
        return _of_bundle(bundle)
    from sinterlm import compile as compiler
    from sinterlm.backends.gpu.backend import GpuBackend
    from sinterlm.commands.ui import TerminalProgress
    from sinterlm.ir.cost import plan_costs
    from sinterlm.passes.formats import main_format

    with TerminalProgress() as progress:
        job = compiler.resolve(options, progress)
        with compiler.read(job) as checkpoint:
            plan = compiler.plan_model(job, checkpoint)
            config = checkpoint.config
            return Subject(
                model=checkpoint.name,
                dtype=job.dtype,
                quantization=main_format(plan.graph, checkpoint.origin),
                kv_cache_dtype=plan.graph.kv_dtype,
                target=job.backend.target,
                isa=job.isa,
                max_model_len=compiler.model_len(options, config),
                shape=asdict(compiler.model_shape(config)),
                windows=compiler.model_constants(config).windows,
                ops=tuple(plan_costs(plan)),
                weights_bytes=plan.layout.nbytes,
                activation_bytes_per_token=plan.memory.bytes_per_token,
                activation_bytes_per_row=plan.memory.bytes_per_row,
                plan=plan,
                bundle=None,
                tiles=job.backend.tiles if isinstance(job.backend, GpuBackend) else None,
            )


def _any_target(options: CompileOptions, bundle: Bundle) -> CompileOptions:
    """What is looked at need not run here: no --target means any."""
    is_given = options.target != CompileOptions(options.model).target
    return options if is_given else replace(options, target=bundle.manifest.target)


def _of_bundle(bundle: Bundle) -> Subject:
    manifest = bundle.manifest
    return Subject(
        model=manifest.model,
        dtype=manifest.dtype,
        quantization=manifest.quantization,
        kv_cache_dtype=manifest.kv_cache_dtype,
        target=manifest.target,
        isa=manifest.isa,
        max_model_len=manifest.max_model_len,
        shape=asdict(manifest.shape),
        windows=manifest.constants.windows,
        ops=manifest.ops,
        weights_bytes=manifest.weights.nbytes if manifest.weights is not None else 0,
        activation_bytes_per_token=manifest.activation_bytes_per_token,
        activation_bytes_per_row=manifest.activation_bytes_per_row,
        plan=None,
        bundle=bundle,
    )


def gather(subject: Subject, step: tuple[int, int], machine: Slopes | None) -> dict[str, Any]:
    """Everything as one JSON-able object; seconds only where ``machine`` is known."""
    from sinterlm.runtime.roofline import Step, roof_seconds, step_loads, total_bytes

    loads = step_loads(subject.ops, subject.windows, Step(step[0], step[1]))
    rows: list[dict[str, Any]] = []
    for load, cost in zip(loads, subject.ops, strict=True):
        row: dict[str, Any] = {"name": load.name, "layer": load.layer, "bytes": load.nbytes,
                               "flops": load.flops, "weight_bytes": cost.weight_bytes}  # fmt: skip
        if machine is not None:
            pair = (machine.bytes_per_s, machine.flops_per_s)
            row["roof_s"] = load.seconds(*pair)
            row["bound"] = "memory" if load.is_memory_bound(*pair) else "compute"
        rows.append(row)
    facts: dict[str, Any] = {
        "model": subject.model, "dtype": subject.dtype, "target": subject.target,
        "isa": subject.isa,
        "quantization": subject.quantization,
        "kv_cache_dtype": subject.kv_cache_dtype,
        "max_model_len": subject.max_model_len, "shape": subject.shape,
        "step": {"num_tokens": step[0], "context_len": step[1], "num_rows": 1},
        "ops": rows,
        "total": {"bytes": total_bytes(loads), "flops": sum(load.flops for load in loads)},
        "memory": {
            "weights_bytes": subject.weights_bytes,
            "kv_bytes_per_token": subject.kv_bytes_per_token,
            "activation_bytes_per_token": subject.activation_bytes_per_token,
            "activation_bytes_per_row": subject.activation_bytes_per_row,
        },
    }  # fmt: skip
    if machine is not None:
        facts["machine"] = asdict(machine)
        facts["total"]["roof_s"] = roof_seconds(loads, machine.bytes_per_s, machine.flops_per_s)
    if subject.plan is not None:
        facts |= _plan_facts(subject.plan)
    if subject.bundle is not None:
        facts["bundle"] = {"path": str(subject.bundle.root),
                           "sha256": subject.bundle.manifest_sha256,
                           "library_bytes": subject.bundle.manifest.library.nbytes}  # fmt: skip
    if subject.target != "cpu":
        from sinterlm.commands.inspect_gpu import launch_facts

        facts["launches"] = launch_facts(subject)
    return facts


def _plan_facts(plan: Plan) -> dict[str, Any]:
    """Graph, packing and buffers, as a plan has them."""
    return {
        "graph": [
            {"op": op.kind, "layer": getattr(op, "layer", -1), "reads": op.reads,
             "writes": op.writes, "weights": op.weights}
            for op in plan.graph.ops
        ],
        "packing": [
            {"name": t.name, "kind": t.kind, "dtype": t.dtype, "n": t.n, "k": t.k,
             "format": t.format.name if t.format else None,
             "offset": t.offset, "bytes": t.nbytes, "from": [s.weight for s in t.segments]}
            for t in plan.layout.tensors
        ],
        "buffers": [asdict(buffer) for buffer in plan.memory.buffers],
    }  # fmt: skip
