"""compile_model(): read -> plan -> emit -> build -> pack -> bundle.

Refuses by name, before anything is read, what this version does not compile. What a step made
before, for the same inputs, is taken from the cache.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sinterlm import __version__
from sinterlm.artifact import strict, warm
from sinterlm.artifact.bundle import (
    Bundle,
    check_compiled_as,
    check_pin,
    is_bundle,
    open_bundle,
    parse_pin,
)
from sinterlm.artifact.cache import CODE, WEIGHTS, Cache, locate_cache
from sinterlm.artifact.env import env_text
from sinterlm.artifact.keys import CodeEntry, CodeIdentity, WeightsEntry, WeightsIdentity
from sinterlm.artifact.manifest import (
    ABI_VERSION,
    FORMAT_VERSION,
    Constants,
    FileRef,
    Manifest,
    ModelShape,
)
from sinterlm.artifact.memo import FileStamp, digest_json
from sinterlm.artifact.progress import LogProgress, Progress
from sinterlm.artifact.storage import require_space, show_bytes, write_file
from sinterlm.artifact.weights import write_weights
from sinterlm.backends.base import Backend, Toolchain
from sinterlm.errors import CheckpointError, UsageError
from sinterlm.options import CompileOptions, DTypeName

if TYPE_CHECKING:
    from sinterlm.frontend.checkpoint import Checkpoint
    from sinterlm.ir.graph import DecoderConfig
    from sinterlm.ir.plan import Plan

#: Room that a library and its source may take.
_CODE_BYTES = 16 << 20


@dataclass(frozen=True)
class Job:
    """One compilation, with every "auto" of its options resolved."""

    options: CompileOptions
    dtype: DTypeName
    isa: str
    backend: Backend
    toolchain: Toolchain
    cache: Cache
    progress: Progress


def compile_model(options: CompileOptions, progress: Progress | None = None) -> Bundle:
    """The bundle of ``options.model``: found in the cache, or compiled and packed into it.

    A folder that is a bundle already is opened as it is. With ``options.isa`` it may be one that
    only another machine can run. Raises UsageError, CheckpointError,
    CompileError, BundleError and ResourceError, as ``errors.py`` draws them.
    """
    folder = bundle_folder(options.model)
    if folder is not None:
        any_isa = options.isa is not None
        finished = open_bundle(folder, bundle_sha256=options.bundle_sha256, any_isa=any_isa)
        check_compiled_as(finished.manifest, options)
        return finished
    job = resolve(options, progress or LogProgress())
    bundle = recall(job)
    if bundle is None:
        with read(job) as checkpoint:
            seen = warm.stamps(checkpoint.path)
            plan = plan_model(job, checkpoint)
            source = emit(job, plan)
            bundle = build(job, checkpoint, plan, source)
            remember(job, checkpoint, bundle, seen)
    check_pin(bundle.manifest_sha256, options.bundle_sha256)
    return bundle


def bundle_folder(model: str) -> str | None:
    """The folder ``model`` names if it holds a bundle. A known model's name is never a folder."""
    folder = os.path.expanduser(model)
    if not is_bundle(folder):
        return None
    from sinterlm.frontend.named_configs import named_configs
    from sinterlm.frontend.source import SMOLLM2

    return None if model == SMOLLM2 or model in named_configs() else folder


def resolve(options: CompileOptions, progress: Progress) -> Job:
    """Settle every "auto" and refuse what cannot be compiled. Raises UsageError, BundleError."""
    from sinterlm.backends.targets import find_backend

    backend = find_backend(options)
    if options.dtype not in ("auto", "bf16", "fp32"):
        raise UsageError(f"--dtype {options.dtype!r} is not supported; supported: auto, bf16, fp32")
    if options.kv_cache_dtype not in ("auto", "bf16", "int8", "fp8"):
        raise UsageError(
            f"--kv-cache-dtype {options.kv_cache_dtype!r} is not supported; supported: auto, bf16, "
            "int8, fp8"
        )
    if options.kv_cache_dtype == "bf16" and options.dtype == "fp32":
        raise UsageError("--kv-cache-dtype bf16 goes with --dtype bf16; give auto or int8")
    if options.load_format not in ("auto", "dummy"):
        raise UsageError(f"--load-format {options.load_format!r}: choose auto or dummy")
    if options.max_model_len is not None and options.max_model_len < 1:
        raise UsageError(f"--max-model-len {options.max_model_len} must be at least 1")
    parse_pin(options.bundle_sha256)
    if options.dump_dir is not None:
        try:
            options.dump_dir.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise UsageError(f"--dump-dir {options.dump_dir}: {exc.strerror}") from exc
    from sinterlm.passes.formats import scheme_of

    scheme_of(options, backend.act_dtype, backend.fp8)  # refuses one that there is not
    cache = Cache.at(locate_cache(options.cache_dir))
    named = env_text("SINTERLM_ISA") if options.target == "cpu" else None
    isa = backend.resolve_isa(options.isa or named)
    toolchain = backend.toolchain(isa, cache.memo)
    dtype: DTypeName = "fp32" if options.dtype == "fp32" else "bf16"
    return Job(options, dtype, isa, backend, toolchain, cache, progress)


def recall(job: Job) -> Bundle | None:
    """The bundle that the same request gave before, if nothing it was made of has changed."""
    compiler = None if job.cache.is_read_only else job.toolchain.compiler
    inputs = job.backend.inputs_sha256
    return warm.recall(job.options, job.isa, inputs, compiler, job.cache, job.progress)


def remember(job: Job, checkpoint: Checkpoint, bundle: Bundle, seen: warm.Stamps) -> None:
    """Let the next start find ``bundle`` without this work, if it can see what would change it:
    files that are as they were ``seen`` when opened, or a configuration of our own."""
    from sinterlm.frontend.named_configs import named_configs

    path = checkpoint.path
    if path is None and job.options.model not in named_configs():
        path = Path(job.options.model).expanduser()
        if not path.exists():
            return
        seen = warm.stamps(path)
    if warm.stamps(path) == seen:
        compiler, inputs = job.toolchain.compiler, job.backend.inputs_sha256
        warm.remember(job.options, job.isa, inputs, compiler, job.cache, path, seen, bundle)


def read(job: Job) -> Checkpoint:
    """Open the checkpoint: config and tensor table; no weights yet. Raises CheckpointError.

    Code alone needs no weights, so there they are made up, and a config is enough.
    """
    from sinterlm.frontend.parts import Part, part_of
    from sinterlm.frontend.source import resolve_model

    options = job.options
    job.progress.stage("read checkpoint")
    whole = resolve_model(
        options.model,
        options.revision,
        load_format="dummy" if options.code_only else options.load_format,
        seed=options.seed,
        dtype=job.dtype,
        max_model_len=options.max_model_len,
        progress=job.progress,
    )
    return part_of(whole, Part(options.tensor_parallel_rank, options.tensor_parallel_size))


def plan_model(job: Job, checkpoint: Checkpoint) -> Plan:
    """Build the graph, check the checkpoint's tensors against it, fuse, lay out and plan."""
    from sinterlm.frontend.decoder import build_graph, check_tensors
    from sinterlm.passes.formats import scheme_of
    from sinterlm.passes.pipeline import plan
    from sinterlm.passes.sensitivity import measured

    job.progress.stage("build graph")
    model_len(job.options, checkpoint.config)
    in_codes = job.options.kv_cache_dtype == "int8"
    graph = build_graph(checkpoint.config, job.dtype, in_codes, job.options.tensor_parallel_size)
    if job.options.kv_cache_dtype == "fp8":
        graph = replace(graph, kv_scales=checkpoint.kv_scales())
    check_tensors(graph, checkpoint)
    job.progress.stage("run passes")
    scheme = scheme_of(job.options, job.backend.act_dtype, job.backend.fp8)
    stored = checkpoint.codes_for(job.dtype, are_asked=scheme.bits is not None)
    # What is made up is as even as weights can be, and slow to draw twice.
    error_of = measured(checkpoint.read_exact) if checkpoint.files else None
    order = job.backend.weight_order
    made = plan(graph, job.options.dump_dir, scheme, stored, error_of, order)
    act, formats = job.options.act_dtype, made.graph.formats.values()
    if act is not None and not any(form.is_fp8 or act != "fp8" for form in formats):
        raise UsageError(
            f"--act-dtype {act} says what stands beside quantised weights, and there are none; "
            f"give --quantization {'fp8' if act == 'fp8' else 'int8 or int4'}"
        )
    if job.options.vendor_gemm and all(t.kind != "pitched" for t in made.layout.tensors):
        raise UsageError(
            "--vendor-gemm multiplies matrices in bf16, and all of the layers' are in codes, "
            "which our own kernels read: leave it out"
        )
    return made


def emit(job: Job, plan: Plan) -> str:
    """Source text of the library; also written to ``dump_dir`` when one is given."""
    job.progress.stage("emit code")
    source = job.backend.emit(plan, job.isa)
    if job.options.dump_dir is not None:
        (job.options.dump_dir / job.backend.source_name).write_text(source, encoding="utf-8")
    return source


def build(job: Job, checkpoint: Checkpoint, plan: Plan, source: str) -> Bundle:
    """Library, packed weights and manifest, each from the cache where it has them."""
    with ExitStack() as held:
        code = held.enter_context(build_library(job, source, checkpoint.name))
        weights = None
        if not job.options.code_only:
            weights = held.enter_context(pack_weights(job, checkpoint, plan))
        return write_bundle(job, checkpoint, plan, code, weights)


@contextmanager
def build_library(job: Job, source: str, model: str) -> Iterator[CodeEntry]:
    """The code entry of ``source``: compiled unless the cache has it. Held while in use."""
    tool = job.toolchain
    identity = CodeIdentity(
        source_sha256=hashlib.sha256(source.encode()).hexdigest(),
        headers_sha256=tool.headers_sha256,
        compiler=tool.compiler or "",
        flags=tool.flags,
        target=job.backend.target,
        isa=job.isa,
        dtype=job.dtype,
        sinterlm_version=__version__,
        abi_version=ABI_VERSION,
    )
    if tool.compiler is None or job.cache.is_read_only:
        identity = job.cache.find_code(identity)

    def write(folder: Path) -> None:
        require_space(folder, _CODE_BYTES)
        names, built = job.backend, folder / "built"
        job.backend.build(source, job.isa, built, job.cache.memo)
        # Written again by us: the linker's file has the mode bits of its umask, not ours.
        library = write_file(folder / names.library_name, built.read_bytes())
        built.unlink()
        text = write_file(folder / names.source_name, source.encode())
        entry = CodeEntry(identity, library, text, model, time.time())
        write_file(folder / "code.json", strict.to_json(entry).encode())

    job.progress.stage("compile library")
    with job.cache.entry(CODE, identity.key, write, job.progress) as entry:
        yield entry


@contextmanager
def pack_weights(job: Job, checkpoint: Checkpoint, plan: Plan) -> Iterator[WeightsEntry]:
    """The weights entry of this checkpoint in this layout: packed unless the cache has it."""
    from sinterlm.passes.packing import PACKER_VERSION, packed_chunks

    layout, progress = plan.layout, job.progress
    seen = warm.stamps(checkpoint.path)
    digest = checkpoint_digest(job, checkpoint)
    identity = WeightsIdentity(digest, digest_json(asdict(layout)), PACKER_VERSION)

    def write(folder: Path) -> None:
        where = job.cache.folder("weights", identity.key)
        progress.notify(f"packing {checkpoint.name} needs {show_bytes(layout.nbytes)} in {where}")
        require_space(folder, layout.nbytes)
        progress.stage("pack weights", layout.nbytes, "B")
        path = folder / "weights-00000.bin"
        readers = checkpoint.read, checkpoint.read_exact, checkpoint.read_coded
        chunks = packed_chunks(layout, *readers)
        ref = write_weights(path, chunks, layout.nbytes, progress.advance)
        if warm.stamps(checkpoint.path) != seen:
            raise CheckpointError(
                f"{checkpoint.path} changed while it was being read; compile it again"
            )
        entry = WeightsEntry(identity, layout.layout_hash, ref, checkpoint.name, time.time())
        write_file(folder / "weights.json", strict.to_json(entry).encode())

    with job.cache.entry(WEIGHTS, identity.key, write, progress) as entry:
        yield entry


def checkpoint_digest(job: Job, checkpoint: Checkpoint) -> str:
    """``checkpoint.digest()``, remembered for as long as its files have the same stamps; ranks
    share what is remembered."""
    if not checkpoint.files:
        return checkpoint.digest(job.progress)
    stamps = sorted(FileStamp.of(path).as_list() for path in checkpoint.files)
    key = digest_json([checkpoint.path and str(checkpoint.path), stamps, warm.package_stamp()])
    fact = job.cache.memo.recall("digests", key)
    if fact is not None and isinstance(fact.get("digest"), str):
        return checkpoint.digest_from(str(fact["digest"]))
    digest = checkpoint.whole.digest(job.progress)
    job.cache.memo.remember("digests", key, {"digest": digest})
    return checkpoint.digest_from(digest)


def write_bundle(
    job: Job, checkpoint: Checkpoint, plan: Plan, code: CodeEntry, weights: WeightsEntry | None
) -> Bundle:
    """Write manifest and text beside what they lead to, and open them as any user would."""
    from sinterlm.ir.cost import plan_costs
    from sinterlm.passes.formats import main_format

    job.progress.stage("write bundle")
    text = encode_text(checkpoint)
    code_key = code.identity.key
    weights_key = weights.identity.key if weights else ""
    library = replace(code.library, path=f"../../code/{code_key}/{code.library.path}")
    packed = None
    if weights is not None:
        path = f"../../weights/{weights_key}/{weights.weights.path}"
        packed = replace(weights.weights, path=path)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        abi_version=ABI_VERSION,
        sinterlm_version=__version__,
        target=job.backend.target,
        isa=job.isa,
        dtype=job.dtype,
        quantization=main_format(plan.graph, checkpoint.origin),
        kv_cache_dtype=plan.graph.kv_dtype,
        model=checkpoint.name,
        code_key=code_key,
        weights_key=weights_key,
        layout_hash=plan.layout.layout_hash,
        max_model_len=model_len(job.options, checkpoint.config),
        shape=model_shape(checkpoint.config),
        constants=model_constants(checkpoint.config),
        ops=tuple(plan_costs(plan)),
        activation_bytes_per_token=plan.memory.bytes_per_token,
        activation_bytes_per_row=plan.memory.bytes_per_row,
        library=library,
        weights=packed,
        text=FileRef("text.json", len(text), hashlib.sha256(text).hexdigest()),
    )
    return job.cache.publish(manifest, text, job.progress)


def encode_text(checkpoint: Checkpoint) -> bytes:
    """``text.json`` of a checkpoint. Raises CheckpointError for what UTF-8 cannot hold."""
    try:
        return checkpoint.text.to_json().encode()
    except UnicodeEncodeError as exc:
        raise CheckpointError(
            f"{checkpoint.name}: its tokenizer or template holds half of a surrogate pair "
            f"({exc.reason}), which is no text; download it again"
        ) from exc


def model_len(options: CompileOptions, config: DecoderConfig) -> int:
    """Positions of the bundle, in tokens. Raises UsageError beyond the checkpoint's own."""
    limit = config.max_position_embeddings
    wanted = options.max_model_len or limit
    if wanted > limit:
        raise UsageError(
            f"--max-model-len {wanted} is beyond the {limit} positions of {options.model} "
            f"(max_position_embeddings); give at most {limit}"
        )
    return wanted


def model_shape(config: DecoderConfig) -> ModelShape:
    """The shape as the manifest tells it."""
    return ModelShape(**{field.name: getattr(config, field.name) for field in fields(ModelShape)})


def model_constants(config: DecoderConfig) -> Constants:
    """The numbers that ``sl_open`` takes as data."""
    return Constants(
        rms_eps=config.rms_norm_eps,
        qk_eps=config.rms_norm_eps,
        attention_scale=config.attention_scale,
        rope_attention_factor=config.rope.attention_factor,
        inv_freq=config.rope.inv_freq,
        windows=config.sliding_windows or (0,) * config.num_layers,
    )
