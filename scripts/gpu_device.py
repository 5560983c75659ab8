"""A bundle on the device, step for step beside Triton's interpreter, for verify_gpu.py."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from sinterlm.artifact.bundle import Bundle
from sinterlm.backends.gpu.library import archive_of
from sinterlm.backends.gpu.objects import device_of, read_archive
from sinterlm.backends.gpu.signatures import SIGNATURES
from sinterlm.backends.gpu.simulator import Part, Simulator
from sinterlm.backends.gpu.table import LEFT_OUT, Table
from sinterlm.ir.bf16 import from_bf16
from sinterlm.ir.fp8 import Fp8Name, from_fp8
from sinterlm.ir.graph import Rope
from sinterlm.runtime.batch import RowSampling, StepBatch
from sinterlm.runtime.model import Model

SIZES = {"max_tokens": 32, "max_seqs": 8, "max_sample_rows": 8, "max_model_len": 64}
PAGE_TOKENS, NUM_PAGES = 16, 24
#: A step is some sequences: pages, first position, tokens.
Runs = list[tuple[list[int], int, list[int]]]
STEPS: dict[str, Runs] = {
    "prefill": [([3, 9, 5], 0, [5, 17, 99, 3, 120, 8, 64]), ([0, 7, 2], 0, [1])],
    "many": [([3, 9, 5], 0, list(range(20, 37))), ([0, 7, 2], 0, [1, 2, 3])],
    "decode": [([3, 9, 5], 7, [11]), ([0, 7, 2], 1, [12])],
}
#: Enough rows for a vendor's GEMM, and the sizes that it takes.
MANY: dict[str, Runs] = {"long": [(list(range(17)), 0, [i % 90 + 5 for i in range(270)])]}
MANY_SIZES = {"max_tokens": 300, "max_model_len": 320}
#: What kernels leave for others; the rest is their own.
OUTPUTS = ("x", "xw", "ssq", "q", "y", "h", "sums", "hidden", "logits", "ids", "logprobs")


class Device:
    """A bundle on the device, step for step beside the interpreter."""

    def __init__(self, bundle: Bundle, **sizes: int) -> None:
        """``sizes`` in place of those in SIZES."""
        self.bundle = bundle
        self.table, _ = read_archive(archive_of(bundle.library_path.read_bytes()))
        most: dict[str, Any] = {**SIZES, **sizes}
        self.model = Model(bundle, num_threads=1, **most)
        self.model.alloc_kv(NUM_PAGES, PAGE_TOKENS)
        assert bundle.weights_path is not None
        weights = np.memmap(bundle.weights_path, np.uint8, "r")
        constants = bundle.manifest.constants
        rope = Rope(constants.inv_freq, constants.rope_attention_factor)
        self.simulator = Simulator(
            self.table, weights, rope, max_tokens=most["max_tokens"],
            max_rows=most["max_sample_rows"], max_seqs=most["max_seqs"],
            max_len=most["max_model_len"], num_pages=NUM_PAGES, page_tokens=PAGE_TOKENS,
        )  # fmt: skip
        self._dll = ctypes.CDLL(str(bundle.library_path))
        self._dll.sl_last_error.restype = ctypes.c_char_p
        self._call("sl_launch_range", 0, 1)
        self.model.step(_batch(STEPS["prefill"]))  # from now on it knows where pages lie

    def _call(self, name: str, *args: Any) -> None:
        handle = ctypes.c_void_p(self.model._handle)
        if getattr(self._dll, name)(handle, *args) != 0:
            raise RuntimeError(self._dll.sl_last_error().decode())

    def copy(self, way: str, name: str, array: np.ndarray) -> None:
        """``sl_peek`` or ``sl_poke`` of what the table calls ``name``."""
        self._call(way, name.encode(), ctypes.c_void_p(array.ctypes.data),
                   ctypes.c_int64(array.nbytes))  # fmt: skip

    def memory(self) -> Iterator[tuple[str, np.ndarray]]:
        """Everything that launches read and write, as the interpreter has it."""
        for buffer in self.table.buffers:
            yield f"buffer:{buffer.name}", self.simulator.buffer(buffer.name)
        for layer, pages in enumerate(self.simulator.kv):
            yield f"k:{layer}", pages

    def run_one(self, launch: int, step: str) -> dict[str, float]:
        """Launch one of the table on both, from the same memory; the largest error of each output,
        as a share of what bf16 allows there. Raises AssertionError beyond it."""
        runs, hidden = (STEPS | MANY)[step], self.table.launches[launch].slot == "final_norm"
        if step == "decode":  # what it attends to
            self.simulator.step(*_parts(STEPS["prefill"]))
        self.simulator.only = range(launch)
        self.simulator.step(*_parts(runs))
        for name, array in self.memory():
            self.copy("sl_poke", name, np.ascontiguousarray(array))
        self.simulator.only = range(launch, launch + 1)
        self.simulator.step(*_parts(runs), hidden=hidden)
        self._call("sl_launch_range", launch, launch + 1)
        self.launch(_batch(runs), hidden)
        kinds = buffer_kinds(self.table)
        errors = {}
        for name, want in self.memory():
            short = name.partition(":")[2]
            if name.startswith("buffer:") and short not in OUTPUTS:
                continue
            found = np.empty_like(want)
            self.copy("sl_peek", name, found)
            if name.startswith("k:") and self.table.facts["kv_bytes"] == 1:
                errors[name] = fp8_share(found, want, device_of(self.table).fp8)
                continue
            kind = "*bf16" if name.startswith("k:") else kinds[short]
            errors[name] = error_share(found, want, kind)
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] <= 1, f"{worst} is off by {errors[worst]:.3g} times its bound"
        return errors

    def launch(self, batch: StepBatch, hidden: bool) -> None:
        """A step, or one that gives hidden states out."""
        if not hidden:
            self.model.step(batch)
            return
        width = self.bundle.manifest.shape.hidden_size
        self.model.hidden(batch, np.empty((batch.num_tokens, width), np.float32))


def error_share(found: np.ndarray, want: np.ndarray, kind: str) -> float:
    """Largest |found - want| over its bound: two steps of bf16, and as much of the buffer's largest
    number; NaN must stay where it is, and whole numbers must be equal."""
    if kind == "*i32":
        return 0.0 if np.array_equal(found, want) else np.inf
    a, b = (
        from_bf16(np.ravel(x).view(np.uint16)) if kind == "*bf16" else np.ravel(x).view(np.float32)
        for x in (found, want)
    )
    unset = np.isnan(b)
    if not np.array_equal(unset, np.isnan(a)):
        return np.inf
    a, b = a[~unset].astype(np.float64), b[~unset].astype(np.float64)
    if b.size == 0:
        return 0.0
    bound = 2.0**-7 * np.abs(b) + 2.0**-9 * np.abs(b).max() + 1e-30
    return float((np.abs(a - b) / bound).max())


def fp8_share(found: np.ndarray, want: np.ndarray, name: Fp8Name) -> float:
    """Largest |found - want| over its bound: one step of fp8, an eighth of the larger number, or
    the least one there is; NaN must stay where it is."""
    a, b = (from_fp8(x, name).astype(np.float64) for x in (found, want))
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return np.inf
    least = float(from_fp8(np.ones(1, np.uint8), name)[0])
    bound = np.maximum(np.maximum(np.abs(a), np.abs(b)) / 8, least)
    return float(np.nanmax(np.abs(a - b) / bound, initial=0.0))


def buffer_kinds(table: Table) -> dict[str, str]:
    """The element type of each buffer, by what kernels take it as."""
    names = {choice.slot: table.kernels[choice.kernel].name
             for choice in table.choices if choice.kernel != LEFT_OUT}  # fmt: skip
    return {
        arg.partition(":")[2]: kind
        for launch in table.launches
        for arg, kind in zip(launch.args, SIGNATURES[names[launch.slot]].args.values(), strict=True)
        if arg.startswith("buffer:")
    }


def _parts(runs: Runs) -> list[Part]:
    return [Part(pages, first, tokens, slot=i) for i, (pages, first, tokens) in enumerate(runs)]


def _batch(runs: Runs) -> StepBatch:
    lengths = [len(tokens) for *_, tokens in runs]
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    ends = [first + n for (_, first, _), n in zip(runs, lengths, strict=True)]
    return StepBatch(
        token_ids=np.concatenate([t for *_, t in runs]).astype(np.int32),
        positions=np.concatenate([f + np.arange(len(t)) for _, f, t in runs]).astype(np.int32),
        query_start=starts,
        context_lens=np.array(ends, np.int32),
        page_table=np.array([pages for pages, *_ in runs], np.int32),
        sample_rows=starts[1:] - 1,
        sampling=tuple(RowSampling(position=end) for end in ends),
    )
