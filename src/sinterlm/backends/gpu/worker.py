"""Compiles kernels in a process of its own: jobs as JSON lines on stdin, results on stdout.

    python -m sinterlm.backends.gpu.worker < jobs > results

A job is what ``objects.Job.to_json`` writes; its result is {"object": base64, "facts": …} or
{"error": text}. Triton's cache goes to $TRITON_CACHE_DIR, which whoever starts us sets.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

#: Vendor's name, as Triton calls it, to the kind of its code objects.
OBJECT_KINDS = {"hip": "hsaco", "cuda": "cubin"}


def main() -> int:
    """Compile every job of stdin."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what Triton prints is no answer
    for line in sys.stdin:
        try:
            result = compile_job(json.loads(line))
        except Exception as exc:
            result = {"error": f"{type(exc).__name__}: {exc}"[:2000]}
        print(json.dumps(result), file=answers, flush=True)
    return 0


def compile_job(job: dict[str, Any]) -> dict[str, Any]:
    """The code object of one kernel and the facts about it. Raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = import_module(f"sinterlm.backends.gpu.kernels.{job['module']}")
    kernel = getattr(module, job["kernel"])
    vendor, arch, warp = job["device"]
    attrs = {
        (index,): [[name, value] for name, value in hints]
        for index, hints in enumerate(job["hints"])
        if hints
    }
    types = dict.fromkeys(job["constants"], "constexpr")
    source = ASTSource(
        fn=kernel, signature={**job["args"], **types}, constexprs=job["constants"], attrs=attrs
    )
    target = GPUTarget(vendor, arch if vendor == "hip" else int(arch), warp)
    made = triton.compile(source, target=target, options=job["options"])
    code = made.asm[OBJECT_KINDS[vendor]]
    facts = {
        "symbol": made.metadata.name,
        "num_warps": made.metadata.num_warps,
        "shared_bytes": made.metadata.shared,
        "scratch_bytes": [made.metadata.global_scratch_size, made.metadata.profile_scratch_size],
    }
    if vendor == "hip":
        facts |= _amd_facts(made.asm, made.metadata.num_warps)
    else:
        facts |= _nvidia_facts(made.asm, code)
    return {"object": base64.b64encode(code).decode(), "facts": facts}


def _amd_facts(asm: dict[str, Any], waves: int) -> dict[str, Any]:
    """Registers, spills and instructions, from the assembly."""
    text = asm["amdgcn"]

    def number(field: str) -> int:
        found = re.search(rf"\.{field}:\s*(\d+)", text)
        assert found is not None, f"no {field} in the assembly"
        return int(found[1])

    accumulators = number("agpr_count") if ".agpr_count" in text else 0  # RDNA has none

    occupancy = re.search(r"; Occupancy:\s*(\d+)", text)
    return {
        "registers": number("vgpr_count") + accumulators,
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "private_bytes": number("private_segment_fixed_size"),
        "kernarg_bytes": number("kernarg_segment_size"),
        "occupancy": int(occupancy[1]) if occupancy else None,
        "matrix": sorted(set(re.findall(r"v_s?mfma\w+|v_wmma\w+", text))),
        "fp8_matrix": sorted(set(re.findall(r"v_(?:mfma|wmma)\w+(?:fp8_fp8|f8f6f4)\w*", text))),
        "fp8_converts": sorted(set(re.findall(r"v_cvt_\w*fp8\w*", text))),
        "wide_loads": len(re.findall(r"(?:buffer|global)_load_(?:dwordx4|b128|lds_dwordx4)", text)),
        "byte_loads": len(
            re.findall(r"(?:buffer|global)_load_(?:d16_\w*)?(?:[us]byte|[ui]8)", text)
        ),
        "is_ordered": _amd_counts_after_stores(text, waves),
    }


def _amd_counts_after_stores(text: str, waves: int) -> bool:
    """Whether before every atomic addition each wave waits for its stores, then for the others:
    ``s_waitcnt`` on vmcnt (or storecnt) 0 with no store behind it, then ``s_barrier``, of which a
    wave that is alone has none."""
    pending, drained, joined = False, True, True
    for line in text.splitlines():
        word = line.split(";")[0].strip()
        if re.match(r"(buffer|global|flat)_store", word):
            pending, drained, joined = True, False, False
        elif re.match(r"s_waitcnt\b.*vmcnt\(0\)|s_wait_storecnt(_dscnt)? 0x0|s_waitcnt_vscnt.*0x0",
                      word):  # fmt: skip
            drained = True
            joined = joined or waves == 1
        elif word.startswith(("s_barrier", "s_barrier_wait")):
            joined = joined or drained
        elif re.match(r"(buffer|global|flat)_atomic_add", word) and pending and not joined:
            return False
    return True


def _nvidia_facts(asm: dict[str, Any], code: bytes) -> dict[str, Any]:
    """Registers and local memory from ``cuobjdump``, instructions from the PTX."""
    from triton.backends import nvidia

    folder = Path(nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.cubin"
        path.write_bytes(code)
        usage = subprocess.run(
            [folder / "cuobjdump", "--dump-resource-usage", path],
            capture_output=True, text=True, check=True, env={**os.environ, "PATH": str(folder)},
        ).stdout  # fmt: skip
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = asm["ptx"]
    return {
        "registers": numbers["REG"],
        "spills": numbers["LOCAL"],
        "private_bytes": numbers["STACK"],
        "matrix": sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx))),
        "fp8_matrix": sorted(
            set(
                re.findall(
                    r"(?:wgmma\.mma_async|mma\.sync)\S*e4m3\.e4m3\S*|tcgen05\.mma\S*f8f6f4", ptx
                )
            )
        ),
        "fp8_converts": sorted(set(re.findall(r"cvt\.\S*e4m3x2\S*", ptx))),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.\S+ .*0x10", ptx)),
        "byte_loads": len(re.findall(r"ld\.global\S*\.[bsu]8\b", ptx)),
        "is_ordered": True,
    }


if __name__ == "__main__":
    sys.exit(main())
