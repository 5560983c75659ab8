"""Breaks each GPU kernel on purpose, by one edit of its source, and requires its test to notice."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sinterlm.backends.gpu import interpreter
from tests.gpu import oplib
from tests.gpu import test_embed as embedding
from tests.gpu import test_fp8 as activations
from tests.gpu import test_fp8_kv as fp8_kv
from tests.gpu import test_hidden as hidden
from tests.gpu import test_kernels as kernels
from tests.gpu import test_vendor as vendor
from tests.gpu.oplib import Tile

KERNELS = Path(interpreter.__file__).with_name("kernels")
PACKAGE = "sinterlm.backends.gpu.kernels"


@dataclass(frozen=True)
class Mutant:
    """One edit of one file, and the check that must fail on it."""

    name: str
    file: str
    old: str
    new: str
    check: Callable[[], None]


def _residual() -> None:
    kernels.test_residual(3, 320, 64, Tile(BN=16, SPLIT=4), True)


def _rows() -> None:
    """Of a matrix that a vendor's GEMM reads too."""
    oplib.PADDING = 64
    try:
        _residual()
    finally:
        oplib.PADDING = None


def _order() -> None:
    kernels.test_the_order_of_programs_never_shows()


def _gate_up() -> None:
    kernels.test_gate_up(5, 192, 100, Tile(BN=64, SPLIT=3), None, True)


def _qkv() -> None:
    kernels.test_qkv(4, 1, 64, True, 32, Tile(BN=32, SPLIT=2), None)


def _bias_of_qkv() -> None:
    kernels.test_qkv(7, 1, 64, False, 48, Tile(BM=32, BN=16, SPLIT=2), None)


def _prompts() -> None:
    kernels.test_attention_of_prompts(kernels.ATTENTION[3])


def _decode() -> None:
    kernels.test_attention_of_decoding_rows(5, 4, 0)


def _head() -> None:
    kernels.test_head_and_draw(Tile(BN=64), None)


def _embed() -> None:
    embedding.test_embed(True, 64)


def _normed_head() -> None:
    hidden.test_a_head_of_normed_rows()


def _final_norm() -> None:
    hidden.test_final_norm(5, 192, 208, 64)


def _codes(form: str) -> Callable[[], None]:
    tile = Tile(BN=16, SPLIT=4)
    return lambda: kernels.test_residual_of_codes(kernels.FORMS[form], 3, 320, 64, tile)


def _embed_codes(form: str = "w4g32") -> None:
    embedding.test_embed_of_codes(kernels.FORMS[form])


def _numbers(form: str) -> Callable[[], None]:
    tile = Tile(BM=32, BN=64, NUM_XCD=3)
    return lambda: kernels.test_residual_of_codes(kernels.FORMS[form], 37, 256, 128, tile)


def _rounded(form: str) -> Callable[[], None]:
    tile = Tile(BM=32, BN=64, NUM_XCD=3)
    return lambda: activations.test_residual(activations.FORMS[form], 37, 256, 128, tile)


def _stored_in_fp8() -> None:
    fp8_kv.test_what_is_stored(4, 1, 64, True, 32, Tile(BN=32, SPLIT=2), "e4m3fn")


def _saturated() -> None:
    with pytest.MonkeyPatch.context() as patch:
        fp8_kv.test_what_is_too_large_becomes_the_largest("e4m3fnuz", "cvt", patch)


def _read_in_fp8() -> None:
    fp8_kv.test_attention_of_decoding_rows(5, 4, "e4m3fnuz")


MUTANTS = [
    Mutant("pages' scale left out", "attention.py", "saturated(a * inverse,", "saturated(a,",
           _stored_in_fp8),
    Mutant("v's scale of k", "attention.py", "k_inverse if part == GROUP else v_inverse",
           "k_inverse", _stored_in_fp8),
    Mutant("pages beyond other devices' largest", "fp8.py", "LARGEST_FN / 2 if FP8",
           "LARGEST_FNUZ if FP8", _saturated),
    Mutant("NaN becomes a number", "fp8.py", "tl.where(x > largest, largest, tl.where",
           "tl.where(x != x, largest, tl.where", _saturated),
    Mutant("scores without k's scale", "attention.py", "scale *= k_scale", "scale *= 1.0",
           _read_in_fp8),
    Mutant("output without v's scale", "attention.py", "result *= v_scale", "result *= 1.0",
           _read_in_fp8),
    Mutant("pages of other devices", "attention.py",
           'tl.float8e4b8 if KV_FP8 == "e4m3fnuz" else tl.float8e4nv', "tl.float8e4nv",
           _read_in_fp8),
    Mutant("last block of depth left out", "matmul.py", "(split + 1) * blocks // SPLIT * BK",
           "((split + 1) * blocks // SPLIT - 1) * BK", _residual),
    Mutant("bias left out", "matmul.py", "acc += tl.load(bias + n)", "acc += 0 * tl.load(bias + n)",
           _residual),
    Mutant("residual left out", "matmul.py", "old + acc, m", "acc, m", _residual),
    Mutant("a split joined twice", "matmul.py",
           "parts, tile, split, SPLIT, BM, BN)\n        acc +=",
           "parts, tile, 0, SPLIT, BM, BN)\n        acc +=", _residual),
    Mutant("counter left behind", "matmul.py", "tl.store(counter, 0)", "tl.store(counter, 1)",
           _residual),
    Mutant("first to arrive finishes", "matmul.py", "== count - 1", "== 0", _order),
    Mutant("a tile of rows twice", "matmul.py", "first + within % rows,", "first,",
           lambda: kernels.test_residual(37, 192, 192, kernels.GEMMS[4][3], False)),
    Mutant("norm's weight left out", "norm.py", "scaled = x * tl.load", "scaled = x + 0 * tl.load",
           _residual),
    Mutant("eps left out", "norm.py", "total / H + EPS", "total / H",
           lambda: kernels.test_a_norm_of_next_to_nothing()),
    Mutant("gate and up swapped", "mlp.py", "g / (1.0 + tl.exp(-g)) * u",
           "u / (1.0 + tl.exp(-u)) * g", _gate_up),
    Mutant("up's bias of gate", "mlp.py", "bias + gate + 64", "bias + gate", _gate_up),
    Mutant("rope turned back", "attention.py", "a * c - b * s, b * c + a * s",
           "a * c + b * s, b * c - a * s", _qkv),
    Mutant("k's norm is q's", "attention.py", "q_norm if part < GROUP else k_norm", "q_norm", _qkv),
    Mutant("second half's bias", "attention.py", "tl.load(bias + n + D // 2)", "tl.load(bias + n)",
           _bias_of_qkv),
    Mutant("v stored as k", "attention.py", "k_base if part == GROUP else v_base", "k_base",
           _qkv),
    Mutant("sees the next token", "attention.py", "<= position[:, None]",
           "<= position[:, None] + 1", _prompts),
    Mutant("window too long", "attention.py", "position[:, None] - WINDOW",
           "position[:, None] - WINDOW - 1", _prompts),
    Mutant("last range left out", "attention.py", "for i in range(count):",
           "for i in range(count - 1):", _decode),
    Mutant("maximum not carried", "attention.py", "acc = acc * old_share[:, None] +",
           "acc = acc +", _decode),
    Mutant("greedy rows are drawn", "sample.py", "tl.where(warm, noisy, logit)", "noisy", _head),
    Mutant("mass not rescaled", "sample.py", "mass * tl.exp(top - highest)", "mass", _head),
    Mutant("padding may win", "sample.py", "real = (n < V)[None, :]",
           "real = (n < VP)[None, :]", _head),
    Mutant("normed rows normed again", "sample.py", "is_normed != 0, 1.0, scale",
           "is_normed > 9, 1.0, scale", _normed_head),
    Mutant("last norm's weight left out", "norm.py", "scale * tl.load(norm + n)",
           "scale + 0 * tl.load(norm + n)", _final_norm),
    Mutant("rows of hidden states packed", "norm.py", "m[:, None] * hidden_stride",
           "m[:, None] * H", _final_norm),
    Mutant("noise of the neighbour", "sample.py", "gumbel(seed, draw, n)",
           "gumbel(seed, draw, n + 1)", _head),
    Mutant("drawn token ignored", "norm.py", "tl.load(drawn + tl.load(slots + row))",
           "tl.load(drawn)", _embed),
    Mutant("nibble cut", "codes.py", "code = code & 15", "code = code & 7", _codes("w4g32")),
    Mutant("scale of the neighbour group", "codes.py", "tl.load(at + 64).to", "tl.load(at).to",
           _codes("w4g32")),
    Mutant("offset of the neighbour group", "codes.py", "tl.load(at + 64)[None", "tl.load(at)[None",
           _codes("w4g32z")),
    Mutant("group of 64 for 128", "codes.py", "start // W_GROUP * 64\n        acc += tl.dot",
           "start // 64 * 64\n        acc += tl.dot", _codes("w8g128")),
    Mutant("half of the sums", "codes.py", "total += sum0 + sum1", "total += sum0", _codes("w4z")),
    Mutant("halves of k swapped", "codes.py", "a_at + start + 32, mask", "a_at + start, mask",
           _codes("w4g64")),
    Mutant("row's nibbles swapped", "codes.py", "n % 64 // 32 * 4", "4 - n % 64 // 32 * 4",
           _embed_codes),
    Mutant("scale of the first group", "fp8.py", "start // W_GROUP * step", "0 * step",
           _numbers("e4m3fn-b128")),
    Mutant("scale of the panel's first column", "fp8.py", "W_SHARED else at + n % 64",
           "W_SHARED else at", _numbers("e4m3fng128")),
    Mutant("next panel's numbers left out", "fp8.py", "(k // 64) * 4096", "0 * 4096",
           _numbers("e4m3fn")),
    Mutant("numbers of other devices", "fp8.py",
           'tl.float8e4b8 if FP8 == "e4m3fnuz" else tl.float8e4nv', "tl.float8e4nv",
           _numbers("e4m3fnuz")),
    Mutant("up's scale of gate", "fp8.py", "y, scale1, start", "y, scale0, start",
           lambda: activations.test_gate_up()),
    Mutant("columns' scale left out", "fp8.py", "acc *= tl.load(scale)[None, :]", "acc *= 1.0",
           _numbers("e4m3fn")),
    Mutant("activations' scale left out", "fp8.py", "+= tl.dot(x, w) * step[:, None]",
           "+= tl.dot(x, w)", _rounded("e4m3fn-a8g64")),
    Mutant("activations larger than fp8 is", "fp8.py",
           'LARGEST_FNUZ if FP8 == "e4m3fnuz" else LARGEST_FN', "LARGEST_FN",
           _rounded("e4m3fnuz-a8g128")),
    Mutant("next to nothing is rounded", "fp8.py", "top < SMALLEST", "top < 0.0",
           lambda: activations.test_rows_of_any_size(activations.FORMS["e4m3fn-a8g64"])),
    Mutant("row's scale of the neighbour group", "fp8.py", "n // W_GROUP * step",
           "n // 64 * step", lambda: _embed_codes("e4m3fng128")),
    Mutant("rows of weights packed", "matmul.py", "column = n * W_PITCH", "column = n * K", _rows),
    Mutant("tiles' step in rows", "matmul.py", "64 if W_PITCH == 0 else 1", "64", _rows),
    Mutant("up's sums of gate", "epilogues.py", "load_sums(sums, m, gate + 64",
           "load_sums(sums, m, gate", lambda: vendor.test_gate_up_epilogue(9, 192, 200, 128, True)),
    Mutant("one row more", "epilogues.py", "live = m < num_tokens", "live = m <= num_tokens",
           lambda: vendor.test_residual_epilogue(9, 192, 32, True)),
    Mutant("first columns for all", "epilogues.py", "first + tl.arange(0, BN), live, N",
           "tl.arange(0, BN), live, N", lambda: vendor.test_residual_epilogue(9, 192, 32, False)),
    Mutant("a head's first half twice", "epilogues.py", "head * D + D // 2 + d", "head * D + d",
           lambda: vendor.test_qkv_epilogue(5, 2, 32, True)),
    Mutant("rows of sums apart as heads are", "epilogues.py", "d, live, N)", "d, live, heads * D)",
           lambda: vendor.test_qkv_epilogue(1, 3, 32, False)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_every_mutant_is_noticed(
    mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    mutant.check()  # the kernel as it is
    package = "mutants_of_" + mutant.file.removesuffix(".py") + str(abs(hash(mutant.name)))
    folder = tmp_path / package
    folder.mkdir()
    for path in KERNELS.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == mutant.file:
            assert text.count(mutant.old) >= 1, "the edit fits nowhere"
            text = text.replace(mutant.old, mutant.new)
        (folder / path.name).write_text(text.replace(PACKAGE, package), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(name: str) -> object:
        return importlib.import_module(name.replace(PACKAGE, package))

    monkeypatch.setattr(interpreter, "import_module", load)
    try:
        with pytest.raises((AssertionError, IndexError, ArithmeticError)):
            mutant.check()
    finally:
        for name in [n for n in sys.modules if n.startswith(package)]:
            del sys.modules[name]
