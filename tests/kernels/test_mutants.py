"""Breaks each kernel on purpose, by one edit of its source, and requires the op tests to notice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sinterlm.artifact.isa import best_isa
from sinterlm.backends.cxx.toolchain import INCLUDE_DIRS, compile_library
from tests.kernels import coded as codedlib
from tests.kernels import oplib
from tests.kernels import test_attention as attention
from tests.kernels import test_coded as coded
from tests.kernels import test_cut as cut
from tests.kernels import test_kv_codes as kv_codes
from tests.kernels import test_matmul as matmul
from tests.kernels.coded import CodedLib
from tests.kernels.oplib import OpLib


@dataclass(frozen=True)
class Mutant:
    """One edit of one header, and the check that must fail on it."""

    name: str
    header: str
    old: str
    new: str
    check: Callable[[OpLib], None]
    codes: bool = False  #: of the library with KV in codes


def _residual(ops: OpLib) -> None:
    matmul.test_residual(ops, 13, 1100, 144, True)


def _gate_up(ops: OpLib) -> None:
    matmul.test_gate_up(ops, 5, 72, 100, True)


def _qkv(ops: OpLib) -> None:
    attention.test_qkv(ops, 7, 1, 64, True, 32, True)


def _attention(case: int) -> Callable[[OpLib], None]:
    return lambda ops: attention.test_attention(ops, attention.CASES[case], True)


def _odd_slot(ops: OpLib) -> None:
    attention.test_writing_an_even_token_clears_its_odd_neighbour(ops, 33, 1)


def _stored_codes(ops: OpLib) -> None:
    kv_codes.test_pages_hold_the_codes_of_the_twin(ops, True, 16)


def _damaged_value(ops: OpLib) -> None:
    kv_codes.test_damage_is_seen_by_those_who_see_its_token(ops, "V")


def _lm_head(ops: OpLib) -> None:
    matmul.test_lm_head_projects_the_asked_rows(ops, True)


MUTANTS = [
    Mutant("skipped K block", "matmul.h", "k < K; k += kDepthBlock",
           "k < std::min(K, kDepthBlock); k += kDepthBlock", _residual),
    Mutant("dropped bias", "matmul.h", "if (p.bias) v = add(v", "if (0) v = add(v", _residual),
    Mutant("residual left out", "matmul.h",
           "add(v, load(p.x + int64_t(t) * p.Hp + i))", "v", _residual),
    Mutant("finished before the last slice", "cut.h", "+ 1 < granule_ / slice_", "+ 1 < 2",
           lambda ops: cut.test_sharing_a_head_changes_no_bit(ops, True, 16)),
    Mutant("norm of the neighbour", "head.h", "rstd[r] = row_rstd(p.ssq, p.rows[r]",
           "rstd[r] = row_rstd(p.ssq, r", _lm_head),
    Mutant("gate and up swapped", "mlp.h", "mul(silu(g), u)", "mul(silu(u), g)", _gate_up),
    Mutant("rope pair swapped", "qkv.h", "v[i] * cos[i] - v[i + half]",
           "v[i + half] * cos[i] - v[i]", _qkv),
    Mutant("k not normed", "qkv.h", "is_k ? p.k_norm : p.q_norm", "is_k ? nullptr : p.q_norm",
           _qkv),
    Mutant("odd V slot not cleared", "qkv.h", "P == 2 && s.index % 2 == 0 && !next_too", "false",
           _odd_slot),
    Mutant("causal mask off by one", "attention.h", "pos + 1, p.scale", "pos + 2, p.scale",
           _attention(3)),
    Mutant("window off by one", "attention.h", "pos - p.window + 1 : 0", "pos - p.window : 0",
           _attention(4)),
    Mutant("chunks merged without rescaling", "attention.h", "mul(load(s.out[r] + i), old)",
           "load(s.out[r] + i)", _attention(1)),
    Mutant("parts merged in another order", "attention.h",
           "split.row(p.parts, item, chunk, r, D);\n        merge_row",
           "split.row(p.parts, item, chunks - 1 - chunk, r, D);\n        merge_row",
           lambda ops: attention.test_sharing_chunks_among_workers_changes_no_bit(ops, False, 0)),
    Mutant("second K chain at M = 1", "tile_wide.h", "#pragma once",
           "#pragma once\n#define SL_MUTATE_K_UNROLL 1",
           lambda ops: matmul.test_rows_do_not_see_each_other_nor_the_workers(ops, True)),
    Mutant("K scale of the neighbouring token", "attention.h", "load(key + j)",
           "load(key + j + (j ? -1 : 1))", _attention(1), codes=True),
    Mutant("V scale of the neighbouring token", "attention.h", "load(value + j)",
           "load(value + j + (j ? -1 : 1))", _attention(1), codes=True),
    Mutant("scale stored for the neighbouring token", "qkv.h", "[index] = group.scale",
           "[index ^ 1] = group.scale", _stored_codes, codes=True),
    Mutant("scale of a token that may not be seen", "attention.h",
           "keep_lanes(mul(p, load(value + j)), see_first, see_last, zero())",
           "mul(p, load(value + j))", _damaged_value, codes=True),
]  # fmt: skip

if best_isa() == "amx":
    MUTANTS += [
        Mutant("sums of earlier tiles lost", "tile_amx.h", "walk.accumulate = true;", "",
               lambda ops: matmul.test_residual(ops, 7, 200, 96, True)),
        Mutant("lower tile of the upper rows", "tile_amx.h", "a + kTileRows * w.lda, lda", "a, lda",
               lambda ops: matmul.test_residual(ops, 97, 136, 72, True)),
        Mutant("last rows of a tile left out", "tile_amx.h", "set({left, left,",
               "set({left - 1, left - 1,",
               lambda ops: matmul.test_residual(ops, 7, 200, 96, True)),
        Mutant("values in blocks that no page knows", "attention.h", ", tile, kLanes);",
               ", tile);",
               lambda ops: attention.test_pages_of_any_size_give_the_same_bits(ops, True)),
    ]  # fmt: skip


@dataclass(frozen=True)
class CodedMutant:
    """The same of the quantised kernels, with one format's number (``coded.FORMATS``)."""

    name: str
    header: str
    old: str
    new: str
    number: int
    check: Callable[[CodedLib, int], None]


def _coded_residual(lib: CodedLib, number: int) -> None:
    coded.test_residual_bit_for_bit(lib, number, 7, 200, 96)


def _many_coded_rows(lib: CodedLib, number: int) -> None:
    coded.test_residual_bit_for_bit(lib, number, 97, 136, 72)


def _weight_only(lib: CodedLib, number: int) -> None:
    coded.test_weight_only_bit_for_bit(lib, number, 13, 1100, 144)


#: Where the tile over codes stands at this machine's level.
CODED_TILE = "tile_narrow.h" if best_isa() == "avx2" else "tile_coded.h"

CODED_MUTANTS = [
    CodedMutant("skipped K block of codes", CODED_TILE, "k < stop; k += F::kBlock",
                "k < stop; k += F::kBlock + (k == 2 * F::kBlock ? F::kBlock : 0)", 0,
                _coded_residual),
    CodedMutant("scale of the neighbouring group", "formats.h",
                "return codes + code_bytes(left);",
                "return codes + code_bytes(left) + code_bytes(Group) + kTailBytes;",
                2, _coded_residual),
    CodedMutant("scale of the neighbouring activations", "tile_coded.h", "[k / F::kUnit];",
                "[(k / F::kUnit + 1) % (p.K / F::kUnit)];", 0, _coded_residual),
    CodedMutant("the scale of all of k forgotten", CODED_TILE, "if (kOneScale && end == p.K)",
                "if (kOneScale && end > p.K)", 0, _coded_residual),
    CodedMutant("offset dropped", "tile_coded.h", "if constexpr (F::kOffsets) return fma",
                "if constexpr (false) return fma",
                3, _coded_residual),
    CodedMutant("codes not centred", CODED_TILE, "F::kOffsets ? 0 : -F::kCentre",
                "true ? 0 : 1", 2, _coded_residual),
    CodedMutant("saturated group", "formats.h", "127.0f / amax", "150.0f / amax", 0,
                coded.test_stored_activations),
    CodedMutant("NaN becomes zero", "formats.h", "__builtin_nanf(\"\")", "0.0f", 0,
                coded.test_stored_activations),
    CodedMutant("weight-only without its offset", "tile_weight_only.h",
                "v = fma(of_row, F::offsets", "fma(of_row, F::offsets", 5, _weight_only),
    CodedMutant("weight-only scale of the neighbouring group", "tile_weight_only.h",
                "? 0 : p.k + k;", "? 0 : (p.k + k + 64) % p.K;", 5, _weight_only),
]  # fmt: skip

if best_isa() == "amx":
    CODED_MUTANTS += [
        CodedMutant("bytes not centred in tiles", "tile_amx_coded.h", "F::kOffsets ? 0 : static",
                    "true ? 0 : static", 0, _many_coded_rows),
        CodedMutant("upper nibbles before lower", "tile_amx_coded.h", "sub_epi8(n.low, centre)",
                    "sub_epi8(n.high, centre)", 2, _many_coded_rows),
        CodedMutant("row of the neighbour in tiles", "tile_amx_coded.h", "act_scale(r + i, k)",
                    "act_scale(r, k)", 0, _many_coded_rows),
    ]  # fmt: skip


def _build(mutant: Mutant | CodedMutant, source: Path, folder: Path, *flags: str) -> Path:
    """The library of ``source`` on a copy of the headers with the edit."""
    headers = folder / "mutated"
    shutil.copytree(INCLUDE_DIRS[0], headers)
    path = headers / "sinterlm" / mutant.header
    text = path.read_text()
    assert text.count(mutant.old) == 1, "the edit no longer fits the source: mend the mutant"
    path.write_text(text.replace(mutant.old, mutant.new))
    library = folder / "mutant.so"
    flags = ("-iquote", str(headers), "-O0", *flags)
    compile_library(source.read_text(), library, best_isa(), extra_flags=flags)
    return library


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_broken_kernel_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    flags = oplib.KV_CODES if mutant.codes else ()
    ops = OpLib(best_isa(), _build(mutant, oplib.SOURCE, tmp_path, *flags), mutant.codes)
    with pytest.raises(AssertionError):
        mutant.check(ops)


@pytest.mark.parametrize("mutant", CODED_MUTANTS, ids=lambda m: m.name)
def test_a_broken_quantised_kernel_is_noticed(mutant: CodedMutant, tmp_path: Path) -> None:
    only = f"-DONLY_FORMAT={mutant.number}"
    lib = CodedLib(best_isa(), _build(mutant, codedlib.SOURCE, tmp_path, only))
    with pytest.raises(AssertionError):
        mutant.check(lib, mutant.number)
