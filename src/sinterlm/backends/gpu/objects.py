"""Compiles the kernels of a launch table in parallel processes, checks every code object, and puts
table and objects into one file.

    <launch table>
    object KERNEL SYMBOL WARPS SHARED OFFSET BYTES SHA256 JSON    one line per kernel
    end
    <code objects, each at OFFSET behind the end line>

An object is kept in the cache under all that decides it: kernel sources, constants, options,
device, and Triton's version. Nothing of this needs a device, a driver or a vendor's toolkit.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinterlm.artifact.memo import Memo, digest_json
from sinterlm.backends.gpu.devices import DEVICES, Device
from sinterlm.backends.gpu.occupancy import below_step
from sinterlm.backends.gpu.signatures import SIGNATURES
from sinterlm.backends.gpu.table import Kernel, Table
from sinterlm.errors import CompileError

_PACKAGE = Path(__file__).parent
_SOURCES = ("kernels/*.py", "signatures.py", "worker.py")
#: Kernels that add to what they find.
IN_PLACE = ("residual_matmul", "residual_epilogue")
#: Two more pointers behind a kernel's own arguments: scratch memory, which ours do not use.
EXTRA_POINTERS = 2


@dataclass(frozen=True)
class Object:
    """A compiled kernel."""

    kernel: Kernel
    code: bytes
    facts: dict[str, Any]  #: what ``worker`` read from the object


def triton_version() -> str | None:
    """Version of the installed Triton; None where there is none. Nothing is imported."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.metadata.version("triton")


def sources_sha256() -> str:
    """Hex SHA-256 over everything that a kernel is compiled from."""
    total = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(_PACKAGE.glob(pattern)):
            content = path.read_bytes()
            total.update(f"{path.relative_to(_PACKAGE)}\0{len(content)}\0".encode())
            total.update(content)
    return total.hexdigest()


def compile_objects(
    kernels: Sequence[Kernel], device: Device, memo: Memo, processes: int | None = None
) -> list[Object]:
    """The checked code object of each kernel, from the cache where it has them.

    Raises CompileError where Triton is missing or fails, and where an object is not what a kernel
    must be (``faults``) or has not the occupancy that is intended (``below_step``).
    """
    objects = []
    for kernel, made in zip(
        kernels, compile_each(kernels, device, memo, processes), strict=True
    ):  # fmt: skip
        wrong = [made] if isinstance(made, str) else below_step(made, device)
        if isinstance(made, str) or wrong:
            raise CompileError(
                f"{kernel.name} for {device.name} is not usable: {'; '.join(wrong)}; its "
                f"tile is from {kernel.source!r}: give other --tiles, or report it if you gave none"
            )
        objects.append(made)
    return objects


def compile_each(
    kernels: Sequence[Kernel], device: Device, memo: Memo, processes: int | None = None
) -> list[Object | str]:
    """The checked code object of each kernel, from the cache where it has them, or what is wrong
    with it. Raises CompileError where Triton is missing."""
    if triton_version() is None:
        raise CompileError(
            f"compiling for {device.name} needs Triton; install it with `pip install "
            "'sinterlm[gpu]'` (Python 3.11 or later). It is not needed to run"
        )
    jobs = [_job(kernel, device) for kernel in kernels]
    salt = [sources_sha256(), triton_version()]
    keys = [digest_json(["kernel", job, salt]) for job in jobs]
    found: dict[str, dict[str, Any]] = {}
    for key in keys:
        fact = memo.recall("kernels", key)
        if fact is not None:
            found[key] = fact
    missing = {key: job for key, job in zip(keys, jobs, strict=True) if key not in found}
    for key, result in _run(missing, processes or len(os.sched_getaffinity(0))).items():
        if "error" not in result:
            memo.remember("kernels", key, result)
        found[key] = result
    made: list[Object | str] = []
    for kernel, key in zip(kernels, keys, strict=True):
        if "error" in found[key]:
            made.append(f"Triton could not compile it: {found[key]['error']}")
            continue
        one = Object(kernel, base64.b64decode(found[key]["object"]), found[key]["facts"])
        made.append("; ".join(faults(one, device)) or one)
    return made


def faults(made: Object, device: Device) -> list[str]:
    """What is wrong with an object; empty when nothing is."""
    facts, constants = made.facts, made.kernel.constants
    wrong = []
    if facts["spills"] or facts["private_bytes"]:
        wrong.append(f"{facts['spills']} spills, {facts['private_bytes']} bytes of stack")
    if any(facts["scratch_bytes"]):
        wrong.append(f"scratch memory of {facts['scratch_bytes']} bytes")
    if facts["shared_bytes"] > device.shared_bytes:
        wrong.append(f"{facts['shared_bytes']} bytes of shared memory, of {device.shared_bytes}")
    if facts["registers"] > device.max_registers:
        wrong.append(f"{facts['registers']} registers, of {device.max_registers}")
    waves = made.kernel.options.get("waves_per_eu", 0)
    if (facts.get("occupancy") or waves) < waves:
        wrong.append(f"{facts['occupancy']} waves per SIMD, of {waves} that were asked for")
    # Whoever holds the same number in two threads reads it again after one of them has stored it.
    threads = made.kernel.options["num_warps"] * device.warp
    if made.kernel.name in IN_PLACE and constants["BM"] * constants["BN"] < threads:
        wrong.append(f"{constants['BM'] * constants['BN']} numbers in place for {threads} threads")
    if not facts["is_ordered"]:
        wrong.append("its stores are not waited for before it counts them as done")
    if "BM" in constants:  # whatever streams weights, pages or sums
        if not facts["wide_loads"]:
            wrong.append("no load of 16 bytes")
        # Codes and fp8 are bytes, which Triton joins where it sees that it may; 16 columns (heads
        # of 32) have too few for 8 warps.
        reads_fp8 = bool(constants.get("KV_FP8")) and made.kernel.name == "attention"
        if facts["byte_loads"] and (constants.get("BN", 0) >= 32 or reads_fp8):
            wrong.append(f"{facts['byte_loads']} loads of single bytes")
        if constants.get("KV_FP8") and device.rounding == "cvt" and not facts["fp8_converts"]:
            wrong.append("no instruction that converts fp8")
    if "BK" in constants or "TILE" in constants:  # whatever multiplies
        is_native = constants.get("A_FP8") and constants["BM"] >= device.fp8_rows
        if is_native and not facts["fp8_matrix"]:
            wrong.append(f"no matrix instruction of fp8, but {facts['matrix']}")
        pattern = device.matrix[constants["BM"] >= 64]
        if not any(re.match(pattern, name) for name in facts["matrix"]):
            wrong.append(f"no {pattern}, but {facts['matrix']}")
    return wrong


def archive(text: str, objects: Sequence[Object]) -> bytes:
    """The file: ``text`` of the table, a line per object, the objects."""
    lines, body, offset = [], [], 0
    for made in objects:
        facts = made.facts
        words = [made.kernel.id, facts["symbol"], facts["num_warps"], facts["shared_bytes"], offset,
                 len(made.code), hashlib.sha256(made.code).hexdigest(),
                 json.dumps(facts, sort_keys=True)]  # fmt: skip
        lines.append("object " + " ".join(map(str, words)))
        padded = made.code + bytes(-len(made.code) % 64)
        body.append(padded)
        offset += len(padded)
    return (text + "\n".join([*lines, "end\n"])).encode() + b"".join(body)


def read_archive(data: bytes) -> tuple[Table, list[Object]]:
    """Inverse of ``archive``. Raises ValueError for a file that is none, or is damaged."""
    head, end, body = data.partition(b"\nend\n")
    if not end:
        raise ValueError("it is no launch table: there is no line `end`")
    text = head.decode()
    table = Table.from_text(text)
    objects = []
    for line in text.splitlines():
        noun, *words = line.split(" ", 8)
        if noun != "object":
            continue
        offset, nbytes = int(words[4]), int(words[5])
        code = body[offset : offset + nbytes]
        if hashlib.sha256(code).hexdigest() != words[6]:
            raise ValueError(f"the code object of kernel {words[0]} is damaged")
        objects.append(Object(table.kernels[int(words[0])], code, json.loads(words[7])))
    if len(objects) != len(table.own_kernels):
        raise ValueError(f"{len(table.own_kernels)} kernels and {len(objects)} code objects")
    return table, objects


def _job(kernel: Kernel, device: Device) -> dict[str, Any]:
    """What ``worker.compile_job`` takes."""
    signature = SIGNATURES[kernel.name]
    hints = []
    for arg in signature.args:
        held = [["tt.divisibility", 16]] if signature.is_aligned(arg) else []
        if device.vendor == "hip" and signature.is_below_2gb(arg):
            held.append(["tt.pointer_range", 32])
        hints.append(held)
    return {
        "kernel": kernel.name, "module": signature.module, "device": list(device.triple),
        "args": signature.types(kernel.constants), "hints": hints, "constants": kernel.constants,
        "options": {"enable_fp_fusion": True, **kernel.options},
    }  # fmt: skip


def _run(jobs: dict[str, dict[str, Any]], processes: int) -> dict[str, dict[str, Any]]:
    """Results by key, from as many processes as pay: a process starts in seconds."""
    if not jobs:
        return {}
    keys = list(jobs)
    processes = min(processes, -(-len(keys) // 2))
    shares = [keys[i::processes] for i in range(processes)]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "MLIR_", "LLVM_"))}
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="sinterlm-triton-") as scratch:
        running = []
        for number, share in enumerate(shares):
            work = Path(scratch) / str(number)
            work.mkdir()
            (work / "jobs").write_text("\n".join(json.dumps(jobs[key]) for key in share))
            with (work / "jobs").open() as given, (work / "log").open("w") as log:
                command = [sys.executable, "-m", "sinterlm.backends.gpu.worker"]
                running.append((share, work, subprocess.Popen(
                    command, stdin=given, stdout=subprocess.PIPE, stderr=log, text=True,
                    env={**env, "TRITON_CACHE_DIR": str(work / "cache"), "TRITON_HOME": str(work)},
                )))  # fmt: skip
        try:
            for share, work, process in running:
                said = process.communicate()[0]
                lines = said[: said.rfind("\n") + 1].splitlines()  # whole ones
                results |= dict(zip(share, map(json.loads, lines), strict=False))
                if len(lines) == len(share):
                    continue
                # The process ended in the middle: that kernel is to blame, the others are not.
                tail = (work / "log").read_text(errors="replace")[-1500:]
                code, (culprit, *rest) = process.returncode, share[len(lines) :]
                results[culprit] = {"error": f"the compiler ended with {code}:\n{tail}"}
                results |= _run({key: jobs[key] for key in rest}, 1)
        finally:
            for _, _, process in running:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    return results


def device_of(table: Table) -> Device:
    """The device that a table was made for. Raises ValueError for one that we do not know."""
    if table.device not in DEVICES:
        raise ValueError(f"device {table.device!r} is not known")
    return DEVICES[table.device]
