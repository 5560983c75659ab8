"""Runs GPU kernels with Triton's interpreter on NumPy arrays: no device, no torch.

Programs run one after the other, in an order that tests choose. Every load, store and atomic is
held against the arrays that were passed: one that leaves them is an IndexError. bf16 is rounded and
multiplied as a device does it; Triton's own interpreter (3.9) cuts it off, and multiplies its bits.
fp8 is rounded and read by ``ir.fp8``.
What this cannot show: races, missing barriers, and the order of a matrix instruction's sums.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sinterlm.backends.gpu.signatures import SIGNATURES
from sinterlm.ir.bf16 import from_bf16, to_bf16
from sinterlm.ir.fp8 import FP8_MAX, Fp8Name, from_fp8, to_fp8

Order = Literal["forward", "backward"] | int

#: NumPy's type of each pointer; bf16 travels as its bits.
ELEMENTS = {
    "*bf16": np.uint16, "*fp16": np.float16, "*fp32": np.float32, "*u8": np.uint8,
    "*i32": np.int32, "*u64": np.uint64,
}  # fmt: skip
_SCALARS: dict[str, Any] = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}
#: Triton's names of fp8.
_FP8: dict[str, Fp8Name] = {"fp8e4nv": "e4m3fn", "fp8e4b8": "e4m3fnuz"}


def run_kernel(
    name: str,
    grid: Sequence[int],
    args: Mapping[str, NDArray[Any] | float],
    constants: Mapping[str, Any],
    order: Order = "forward",
) -> None:
    """Run every program of ``grid`` of the kernel ``name``; arrays are changed in place.

    ``args`` are those of ``SIGNATURES`` by name: arrays of the right dtype, or numbers.
    ``order`` is that of the programs: forward, backward, or the seed of a shuffle.
    """
    interpreter = _load()
    from triton import language as tl

    signature = SIGNATURES[name]
    kernel = getattr(import_module(f"sinterlm.backends.gpu.kernels.{signature.module}"), name)
    given: dict[str, Any] = dict(constants)
    arrays = []
    for arg, kind in signature.types(constants).items():
        value = args[arg]
        if kind in _SCALARS:
            number = np.array([value], _SCALARS[kind])
        else:
            assert isinstance(value, np.ndarray), f"{name}: {arg} is no array"
            assert value.dtype == ELEMENTS[kind], f"{name}: {arg} is {value.dtype}, not {kind}"
            assert value.flags.c_contiguous, f"{name}: {arg} is not contiguous"
            arrays.append(value)
            number = np.array([value.ctypes.data], np.uint64)
        dtype = tl.str_to_ty(kind, None)
        given[arg] = tl.tensor(interpreter.TensorHandle(number, dtype), dtype)
    assert set(args) == set(signature.args), f"{name}: arguments {set(args) ^ set(signature.args)}"
    grid = (*grid, *(1,) * (3 - len(grid)))
    builder, patch = interpreter.interpreter_builder, interpreter._patch_lang
    scopes: dict[str, Any] = {}

    def patch_once(fn: Any) -> None:
        """Every call of a helper would patch its module's names again."""
        if fn.__module__ not in scopes:
            scopes[fn.__module__] = patch(fn)

    patch_once(kernel.fn)
    interpreter._patch_lang = patch_once
    try:
        body = kernel.rewrite()
        with _corrected(builder, name, arrays):
            builder.set_grid_dim(*grid)
            for place in _programs(grid, order):
                builder.set_grid_idx(*place)
                body(**given)
    except interpreter.InterpreterError as exc:
        raise _root(exc) from None
    finally:
        interpreter._patch_lang = patch
        for scope in reversed(scopes.values()):
            scope.restore()


def _root(exc: BaseException) -> BaseException:
    """What went wrong in the innermost function."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return exc


def _load() -> Any:
    """Triton's interpreter. What ``triton.jit`` makes is decided when Triton is imported."""
    if "triton" not in sys.modules:
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            import_module("sinterlm.backends.gpu.kernels.sample")
            for module in {signature.module for signature in SIGNATURES.values()} - {""}:
                import_module(f"sinterlm.backends.gpu.kernels.{module}")
        finally:
            del os.environ["TRITON_INTERPRET"]
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before
    from sinterlm.backends.gpu.kernels.matmul import place

    if type(place).__name__ != "InterpretedFunction":
        raise RuntimeError(
            "triton was imported to compile; interpret in a process of its own, or with "
            "TRITON_INTERPRET=1"
        )
    return import_module("triton.runtime.interpreter")


def _programs(grid: Sequence[int], order: Order) -> Iterator[tuple[int, ...]]:
    places = list(itertools.product(*map(range, grid)))
    if order == "backward":
        places.reverse()
    elif order != "forward":
        random.Random(order).shuffle(places)
    return iter(places)


@contextmanager
def _corrected(builder: Any, name: str, arrays: Sequence[NDArray[Any]]) -> Iterator[None]:
    """Let ``builder`` reach nothing but ``arrays``, and know bf16."""
    spans = sorted({(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays})
    starts = np.array([start for start, _ in spans], np.uint64)
    ends = np.maximum.accumulate(np.array([end for _, end in spans], np.uint64))

    def check(pointers: Any, mask: Any) -> None:
        live = np.broadcast_to(mask.data, pointers.data.shape)
        at = pointers.data[live]
        if at.size == 0:
            return
        size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.searchsorted(starts, at, side="right")
        if (inside == 0).any() or (at + size > ends[inside - 1]).any():
            raise IndexError(f"{name} leaves its buffers")

    def load(ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        check(ptrs, mask)
        return kept["create_masked_load"](ptrs, mask, other, *rest, **named)

    def store(ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(ptrs, mask)
        return kept["create_masked_store"](ptrs, value, mask, *rest, **named)

    def atomic(op: Any, ptr: Any, val: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(ptr, mask)
        return kept["create_atomic_rmw"](op, ptr, val, mask, *rest, **named)

    def cast(src: Any, to: Any) -> Any:
        if src.dtype.scalar.is_fp32() and to.scalar.is_bf16():
            return type(src)(to_bf16(src.data), to.scalar)
        return kept["cast_impl"](src, to)

    def between_floats(src: Any, to: Any, rounding: Any) -> Any:
        """To and from fp8; NaN that a device would make of what is too large is refused."""
        source, target = _FP8.get(src.dtype.scalar.name), _FP8.get(to.scalar.name)
        if source is not None:
            wide = from_fp8(src.data, source)
            return type(src)(to_bf16(wide) if to.scalar.is_bf16() else wide, to.scalar)
        if target is not None:
            if (np.abs(src.data) > FP8_MAX[target] * (1 + 2**-20)).any():
                raise ArithmeticError(f"{name} rounds what no fp8 number is near")
            return type(src)(to_fp8(src.data, target), to.scalar)
        return kept["create_fp_to_fp"](src, to, rounding)

    def dot(a: Any, b: Any, *rest: Any, **named: Any) -> Any:
        return kept["create_dot"](_widen(a), _widen(b), *rest, **named)

    def inline_asm(asm: str, constraints: str, values: Any, *rest: Any) -> Any:
        """Ours waits, and moves a register."""
        return SimpleNamespace(get_result=lambda i: values[i])

    changed = {
        "create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": atomic,
        "cast_impl": cast, "create_dot": dot, "create_inline_asm": inline_asm,
        "create_fp_to_fp": between_floats,
    }  # fmt: skip
    kept = {which: getattr(builder, which) for which in changed}
    for which, checked in changed.items():
        setattr(builder, which, checked)
    options = builder.options
    # Every sum of integers would be done again in 64 bits, for half of the time.
    builder.options = replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.options = options
        for which in changed:
            delattr(builder, which)


def _widen(operand: Any) -> Any:
    """A matrix of bf16 or fp8 as fp32."""
    kind = operand.dtype.scalar
    if not kind.is_bf16() and kind.name not in _FP8:
        return operand
    from triton import language as tl

    wide = from_bf16(operand.data) if kind.is_bf16() else from_fp8(operand.data, _FP8[kind.name])
    return type(operand)(wide, tl.float32)
