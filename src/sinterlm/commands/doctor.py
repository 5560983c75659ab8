"""``sinterlm doctor``: what works on this machine, and how to mend what does not.

Each check looks at one thing and never raises. The last one compiles, loads and runs a model of a
few kilobytes, and measures; only when nothing can run here is the exit code 1.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sinterlm.commands.flags import HELP
from sinterlm.errors import SinterError

Status = Literal["ok", "warn", "fail", "info"]

#: A decoder small enough to compile in seconds, with every kind of fused op in it.
_TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One finding. ``advice`` is the next command, when there is something to mend."""

    name: str
    status: Status
    finding: str
    advice: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help=HELP["cache_dir"])


def run(args: argparse.Namespace) -> int:
    """Run every check and print it as it is known; 1 when nothing can run."""
    checks: list[Check] = []
    for look in _checks(args.cache_dir):
        try:
            check = look()
        except (SinterError, OSError) as exc:
            check = Check(look.__name__.lstrip("_").replace("_", " "), "fail", str(exc))
        checks.append(check)
        if not args.json:
            _print(check)
    can_run = checks[-1].status == "ok"
    if args.json:
        print(json.dumps({"can_run": can_run, "checks": [asdict(check) for check in checks]}))
    elif can_run:
        print("\nSinterLM can run here: sinterlm run smollm2 --chat")
    else:
        print("\nNothing can run here yet: mend what is marked FAIL, from the top.")
    return 0 if can_run else 1


def _checks(cache_dir: Path | None) -> list[Callable[[], Check]]:
    """Every check in the order shown; the last is the one that decides."""

    def cache() -> Check:
        return check_cache(cache_dir)

    def self_test() -> Check:
        return check_self_test(cache_dir)

    return [
        check_python, check_isa, check_compiler, check_threads, check_memory, check_huge_pages,
        cache, check_demo_model, check_gpu, check_vendor_gemm, self_test,
    ]  # fmt: skip


def _print(check: Check) -> None:
    mark = {"ok": "ok", "warn": "WARN", "fail": "FAIL", "info": "info"}[check.status]
    print(f"{mark:<5} {check.name:<12} {check.finding}", flush=True)
    if check.advice:
        print(f"{'':<18} -> {check.advice}", flush=True)


def check_python() -> Check:
    """The interpreter, and the system it runs on."""
    version = platform.python_version()
    found = f"{version}, {sys.executable}"
    if sys.platform != "linux":
        return Check("python", "fail", f"{found} on {sys.platform}", "run on Linux (WSL works)")
    return Check("python", "ok", found, data={"version": version})


def check_isa() -> Check:
    """The ISA levels that this CPU runs."""
    from sinterlm.artifact.isa import available_isas

    levels = available_isas()
    machine = os.uname().machine
    if "avx512bf16" in levels:
        return Check("isa", "ok", f"{machine}: {', '.join(levels)}", data={"levels": levels})
    why = "no AVX-512 BF16 here: bf16 products go through fp32"
    status: Status = "warn" if levels[0] in ("generic", "avx2") else "ok"
    return Check("isa", status, f"{machine}: {', '.join(levels)}", why, {"levels": levels})


def check_compiler() -> Check:
    """The C++ compiler; its absence is no failure where the cache already has what is needed."""
    from sinterlm.backends.cxx.toolchain import find_compiler
    from sinterlm.errors import CompileError

    try:
        compiler = find_compiler()
    except CompileError as exc:
        return Check("compiler", "warn", "none usable; only bundles made elsewhere run", str(exc))
    return Check(
        "compiler",
        "ok",
        f"{compiler.identity} ({' '.join(compiler.command)})",
        data={"identity": compiler.identity},
    )


def check_threads() -> Check:
    """CPUs that this process may use, by affinity and cgroup."""
    from sinterlm.runtime.machine import read_machine

    machine = read_machine()
    host = os.cpu_count() or 1
    found = f"{machine.num_cpus} of {host} CPUs"
    if machine.cpu_quota is not None:
        found += f" (cgroup grants {machine.cpu_quota:g} CPUs of time)"
    advice = ""
    if machine.cpu_quota is not None and machine.cpu_quota < 1:
        advice = "less than one CPU: every step is throttled; raise the container's CPU limit"
    return Check(
        "threads",
        "warn" if advice else "ok",
        found,
        advice,
        {"num_cpus": machine.num_cpus, "cpu_quota": machine.cpu_quota},
    )


def check_memory() -> Check:
    """Memory left to this process, by cgroup."""
    from sinterlm.artifact.storage import show_bytes
    from sinterlm.runtime.machine import read_machine

    machine = read_machine()
    free, limit = machine.memory_available, machine.memory_limit
    found = f"{show_bytes(free)} free of {show_bytes(limit)}"
    low = free < 1 << 30
    advice = "less than 1 GB: close something, or raise the container's memory limit" if low else ""
    return Check(
        "memory",
        "warn" if low else "ok",
        found,
        advice,
        {"available_bytes": free, "limit_bytes": limit},
    )


def check_huge_pages() -> Check:
    """Transparent huge pages, which weights are copied into when they are small enough."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        text = path.read_text(encoding="ascii")
        mode = text[text.index("[") + 1 : text.index("]")]
    except (OSError, ValueError):
        return Check("huge pages", "info", "unknown (no transparent_hugepage here)")
    if mode == "never":
        return Check(
            "huge pages",
            "warn",
            "never: reading weights costs more TLB misses",
            f"echo madvise | sudo tee {path}",
            {"mode": mode},
        )
    return Check("huge pages", "ok", mode, data={"mode": mode})


def check_cache(cache_dir: Path | None) -> Check:
    """The cache folder: may we write there, what it takes, what is free."""
    from sinterlm.artifact.cache import locate_cache
    from sinterlm.artifact.storage import folder_bytes, show_bytes

    root = locate_cache(cache_dir)
    parent = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    used = folder_bytes(root)
    found = f"{root}: {show_bytes(used)} used, {show_bytes(free)} free"
    data = {"path": str(root), "used_bytes": used, "free_bytes": free}
    if not os.access(parent, os.W_OK):
        advice = "not writable: only what it holds runs; set SINTERLM_CACHE_DIR or --cache-dir"
        return Check("cache", "warn", found, advice, data)
    if free < 1 << 30:
        return Check("cache", "warn", found, "run `sinterlm cache prune --max-bytes 1G`", data)
    return Check("cache", "ok", found, data=data)


def check_demo_model() -> Check:
    """Whether the model called ``smollm2`` is installed."""
    from sinterlm.errors import CheckpointError
    from sinterlm.frontend.source import find_smollm2

    try:
        return Check("demo model", "ok", str(find_smollm2()))
    except CheckpointError as exc:
        return Check("demo model", "info", "smollm2 is not installed", str(exc))


def check_gpu() -> Check:
    """GPU drivers that can be opened, and the devices that they see: what ``--target`` of a GPU
    needs to run."""
    from sinterlm.runtime.gpu_devices import DriverError, devices_of

    named = os.environ.get("SINTERLM_GPU_DRIVER")
    files = (named,) if named else ("libcuda.so.1", "libamdhip64.so")
    found, said, devices = [file for file in files if _opens([file])], [], []
    for file in found:
        try:
            seen = devices_of(file)
        except DriverError as exc:
            said.append(f"{file} cannot be asked for devices ({exc})")
            continue
        devices += [vars(device) for device in seen]
        said.append(f"{file} sees {'; '.join(map(str, seen)) or 'no device'}")
    if named and not found:
        said = [f"SINTERLM_GPU_DRIVER names {named}, which cannot be opened"]
    elif not found:
        said = ["no CUDA or HIP driver: models can be compiled for a GPU here, and not run on one"]
    else:
        said.append("used with --target of a GPU alone, which no device has confirmed")
    return Check("gpu", "info", "; ".join(said), data={"drivers": found, "devices": devices})


def check_vendor_gemm() -> Check:
    """GEMM libraries that can be opened: what bundles made with ``--vendor-gemm`` need to run."""
    from sinterlm.backends.gpu.vendor import LIBRARIES

    found = [f"{library.name} ({file})" for library in LIBRARIES.values()
             if (file := _opens(library.files))]  # fmt: skip
    missing = "; ".join(f"{library.name} is of {library.package}" for library in LIBRARIES.values())
    text = (
        ", ".join(found) or f"neither hipBLASLt nor cuBLASLt, for --vendor-gemm alone ({missing})"
    )
    return Check("vendor gemm", "info", text, data={"libraries": found})


def _opens(files: Sequence[str]) -> str | None:
    """The first of ``files`` that the loader finds."""
    for file in files:
        try:
            ctypes.CDLL(file)
        except OSError:
            continue
        return file
    return None


def check_self_test(cache_dir: Path | None) -> Check:
    """Compile, load and run a tiny model, then measure with its library."""
    from sinterlm.artifact.cache import Cache, locate_cache
    from sinterlm.commands.probe import self_test

    root = locate_cache(cache_dir)
    with tempfile.TemporaryDirectory(prefix="sinterlm-doctor-") as scratch:
        config = Path(scratch) / "doctor" / "config.json"
        config.parent.mkdir()
        config.write_text(json.dumps(_TINY_CONFIG), encoding="utf-8")
        cache = Path(scratch) / "cache" if Cache.at(root).is_read_only else root
        try:
            measured = self_test(str(config.parent), cache)
        except (SinterError, OSError) as exc:
            return Check("self-test", "fail", str(exc), "see the checks above")
    if measured is None:
        return Check("self-test", "ok", "compiled, loaded and ran; too little memory to measure")
    gflops, gbytes = measured
    finding = f"compiled, loaded and ran; reads {gbytes:.1f} GB/s, computes {gflops:.0f} GFLOP/s"
    return Check("self-test", "ok", finding, data={"gbytes_per_s": gbytes, "gflops": gflops})
