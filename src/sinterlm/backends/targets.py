"""Every value of ``--target``, and what each refuses of the options."""

from __future__ import annotations

from sinterlm.backends.base import Backend
from sinterlm.errors import UsageError
from sinterlm.ir.plan import MatrixOrder
from sinterlm.options import CompileOptions


def find_backend(options: CompileOptions) -> Backend:
    """The target that the options name. Raises UsageError for one that there is not, and for
    options that it does not have."""
    if options.target == "cpu":
        if options.tiles is not None:
            raise UsageError(f"--tiles {options.tiles} is for a GPU; give its --target too")
        if options.kv_cache_dtype == "fp8":
            raise UsageError(
                "--kv-cache-dtype fp8 is for a GPU: give its --target too, or --kv-cache-dtype "
                "int8, which a CPU has"
            )
        if options.vendor_gemm:
            raise UsageError("--vendor-gemm is for a GPU; give its --target too, or leave it out")
        from sinterlm.backends.cpu.backend import CpuBackend

        return CpuBackend()
    from sinterlm.backends.gpu.devices import DEVICES

    if options.target not in DEVICES:
        raise UsageError(
            f"--target {options.target!r} is not supported; supported: cpu, {', '.join(DEVICES)}"
        )
    from sinterlm.artifact.cache import locate_cache
    from sinterlm.backends.gpu.backend import GpuBackend
    from sinterlm.backends.gpu.tuning import find_tiles

    asked = {
        "--dtype fp32": options.dtype == "fp32",
        "--act-dtype int8": options.act_dtype == "int8",
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
        raise UsageError(f"{name} is not supported with --target {options.target}: only bf16 is")
    if options.kv_cache_dtype == "int8":
        raise UsageError(
            f"--kv-cache-dtype int8 is not supported with --target {options.target}: give "
            "--kv-cache-dtype fp8 or bf16"
        )
    if options.tensor_parallel_size > 1:
        raise UsageError(
            f"tensor_parallel_size={options.tensor_parallel_size} is not supported with --target "
            f"{options.target}: give 1, or --target cpu"
        )
    tiles = find_tiles(options.target, options.tiles, locate_cache(options.cache_dir))
    order: MatrixOrder = "pitched" if options.vendor_gemm else "tiles"
    return GpuBackend(DEVICES[options.target], tiles, weight_order=order)
