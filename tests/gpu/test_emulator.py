"""Machine code of gfx942, run: `make test-emu TINYGRAD_PATH=…` (tests/gpu/emulator.py says what it
needs). The kernels' own tests with the emulator in the interpreter's place, then a model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from sinterlm.artifact.memo import Memo
from sinterlm.backends.gpu import objects
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.interpreter import run_kernel
from sinterlm.backends.gpu.objects import Object, compile_objects
from sinterlm.backends.gpu.signatures import SIGNATURES
from sinterlm.backends.gpu.simulator import Part, Simulator
from sinterlm.backends.gpu.table import Axis, Kernel
from sinterlm.backends.gpu.tuning import read_tiles
from tests.gpu import (
    oplib,
    test_embed,
    test_fp8,
    test_fp8_kv,
    test_hidden,
    test_kernels,
    test_vendor,
)
from tests.gpu.emulator import load_emulator, run_object
from tests.gpu.emulator_table import Report, Row, error_of, shape_of, stored_as, table_path
from tests.gpu.host import PAGES, PROMPTS, Machine, batch
from tests.gpu.oplib import Tile
from tests.gpu.recording import Launched

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("triton", "emulator")]

DEVICE = DEVICES["gfx942"]
OPTIONS = {**read_tiles("gfx942").of("residual_matmul")[0].options}


@pytest.fixture(scope="module")
def emulator() -> None:
    """Skip where there is none."""
    try:
        load_emulator()
    except LookupError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="module")
def report() -> Iterator[Report]:
    """Rows of the table, which is written where it is wanted."""
    found = Report()
    yield found
    if (path := table_path()) is not None:
        found.write(path)


@pytest.fixture
def emulated(
    monkeypatch: pytest.MonkeyPatch, memo: Memo, report: Report, request: pytest.FixtureRequest
) -> list[str]:  # fmt: skip
    """The kernels' tests compile what they run and emulate it, and the interpreter does the same;
    names of what was run."""
    ran: list[str] = []
    case = request.node.callspec.params["case"]
    # Small tiles are no fault here: some have no row of 16 bytes.
    monkeypatch.setattr(objects, "faults", lambda *_: [])

    def run(name: str, grid: Any, args: Mapping[str, Any], constants: dict[str, Any],
            order: object = "forward") -> None:  # fmt: skip
        split = max(constants.get("SPLIT", 1), constants.get("SEGMENTS", 1)) > 1
        made_for = {**constants, "DRAIN": DEVICE.drain} if split else constants
        kernel = Kernel(0, name, (Axis("1"),) * 3, made_for, OPTIONS, "")
        (made,) = compile_objects([kernel], DEVICE, memo)
        values = [word_of(args[arg], kind) for arg, kind in SIGNATURES[name].args.items()]
        ran.append(name)
        before, want = ({n: a.copy() if isinstance(a, np.ndarray) else a for n, a in args.items()}
                        for _ in range(2))  # fmt: skip
        began = time.perf_counter()
        emulate(made, (*grid, *(1,) * (3 - len(grid))), [*values, 0, 0])
        seconds = time.perf_counter() - began
        run_kernel(name, grid, want, constants)
        error = error_of(name, constants, before, args, want)
        report.add(Row(case, name, stored_as(constants), shape_of(args, constants),
                       math.prod(grid), seconds, error))  # fmt: skip

    for module in (oplib, test_vendor):
        monkeypatch.setattr(module, "run_kernel", run)
    return ran


def word_of(value: Any, kind: str) -> int:
    """An argument as it lies in memory."""
    if isinstance(value, np.ndarray):
        return int(value.ctypes.data)
    return int(np.float32(value).view(np.int32)) if kind == "fp32" else int(value)


def emulate(made: Object, grid: tuple[int, ...], values: list[int]) -> None:
    facts = made.facts
    run_object(made.code, grid, facts["num_warps"] * DEVICE.warp, facts["shared_bytes"], values)


def in_rows(check: Callable[[], None]) -> None:
    """Of a matrix that a vendor's GEMM reads too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oplib, "PADDING", 64)
        check()


def too_large_for_pages() -> None:
    """Saturated, NaN kept; gfx942 has an instruction."""
    with pytest.MonkeyPatch.context() as patch:
        test_fp8_kv.test_what_is_too_large_becomes_the_largest("e4m3fnuz", "cvt", patch)


CASES: dict[str, tuple[str, Callable[[], None]]] = {
    "residual": ("residual_matmul", lambda: test_kernels.test_residual(
        3, 320, 64, Tile(BN=16, SPLIT=4), True)),
    "residual, rows over two tiles, swizzled": ("residual_matmul", lambda: (
        test_kernels.test_residual(17, 128, 128, Tile(BK=128, NUM_XCD=8), False))),
    "residual of 4-bit codes": ("residual_matmul", lambda: test_kernels.test_residual_of_codes(
        test_kernels.FORMS["w4g32"], 3, 320, 64, Tile(BN=16, SPLIT=4))),
    "residual of fp8": ("residual_matmul", lambda: test_kernels.test_residual_of_codes(
        test_kernels.FORMS["e4m3fnuz"], 3, 320, 64, Tile(BN=16, SPLIT=4))),
    "residual of blocks in fp8": ("residual_matmul", lambda: test_kernels.test_residual_of_codes(
        test_kernels.FORMS["e4m3fnuz-b128"], 3, 320, 64, Tile(BN=16, SPLIT=4))),
    "residual of fp8 by fp8": ("residual_matmul", lambda: test_fp8.test_residual(
        test_fp8.FORMS["e4m3fnuz-a8g128"], 3, 384, 64, Tile(BN=16, SPLIT=3))),
    "rows of any size in fp8": ("residual_matmul", lambda: test_fp8.test_rows_of_any_size(
        test_fp8.FORMS["e4m3fnuz-a8g128"])),
    "gate_up of fp8 by fp8": ("norm_gate_up_act", lambda: test_fp8.test_gate_up()),
    "gate_up": ("norm_gate_up_act", lambda: test_kernels.test_gate_up(
        5, 192, 100, Tile(BN=64, SPLIT=3), None, True)),
    "qkv, norms of heads": ("norm_qkv_rope_kv", lambda: test_kernels.test_qkv(
        4, 1, 64, True, 32, Tile(BN=32, SPLIT=2), None)),
    "qkv, biases": ("norm_qkv_rope_kv", lambda: test_kernels.test_qkv(
        7, 1, 64, False, 48, Tile(BM=32, BN=16, SPLIT=2), None)),
    "residual of 8-bit codes": ("residual_matmul", lambda: test_kernels.test_residual_of_codes(
        test_kernels.FORMS["w8"], 3, 320, 64, Tile(BN=16, SPLIT=4))),
    "residual of codes with offsets": ("residual_matmul", lambda: (
        test_kernels.test_residual_of_codes(test_kernels.FORMS["w4g128z"], 3, 320, 64,
                                            Tile(BN=16, SPLIT=4)))),
    "residual of rows": ("residual_matmul", lambda: in_rows(
        lambda: test_kernels.test_residual(3, 320, 64, Tile(BN=16, SPLIT=4), True))),
    "gate_up of codes": ("norm_gate_up_act", lambda: test_kernels.test_gate_up(
        5, 192, 100, Tile(BN=64, SPLIT=3), test_kernels.FORMS["w4g32"], True)),
    "gate_up of fp8": ("norm_gate_up_act", lambda: test_kernels.test_gate_up(
        5, 192, 100, Tile(BN=64, SPLIT=3), test_kernels.FORMS["e4m3fnuz"], True)),
    "qkv of codes": ("norm_qkv_rope_kv", lambda: test_kernels.test_qkv(
        4, 1, 64, True, 32, Tile(BN=32, SPLIT=2), test_kernels.FORMS["w4g32"])),
    "qkv of fp8": ("norm_qkv_rope_kv", lambda: test_kernels.test_qkv(
        4, 1, 64, True, 32, Tile(BN=32, SPLIT=2), test_kernels.FORMS["e4m3fnuz"])),
    "qkv of fp8 by fp8": ("norm_qkv_rope_kv", lambda: test_fp8.test_qkv(
        4, test_fp8.FORMS["e4m3fnuz-a8g128"])),
    "qkv to fp8 pages": ("norm_qkv_rope_kv", lambda: test_fp8_kv.test_what_is_stored(
        4, 1, 64, True, 32, Tile(BN=32, SPLIT=2), "e4m3fnuz")),
    "too large for fp8 pages": ("norm_qkv_rope_kv", too_large_for_pages),
    "prompt, fp8 pages": ("attention", lambda: test_fp8_kv.test_attention_of_prompts(
        (4, 1, 64, 128, [9, 2], [150, 2], 100, 32, 32), "e4m3fnuz")),
    "decoding rows, fp8 pages": ("attention", lambda: (
        test_fp8_kv.test_attention_of_decoding_rows(5, 4, "e4m3fnuz"))),
    "head of 8-bit codes": ("lm_head", lambda: test_kernels.test_head_and_draw(
        Tile(BN=64), test_kernels.FORMS["w8"])),
    "embedding of 8-bit codes": ("embed_norm", lambda: test_embed.test_embed_of_codes(
        test_kernels.FORMS["w8"])),
    "embedding in rows": ("embed_norm", lambda: test_embed.test_embed(False, 64)),
    "residual behind a vendor's GEMM": ("residual_epilogue", lambda: (
        test_vendor.test_residual_epilogue(9, 192, 64, True))),
    "gate_up behind it": ("gate_up_epilogue", lambda: (
        test_vendor.test_gate_up_epilogue(9, 192, 200, 128, True))),
    "qkv behind it": ("qkv_epilogue", lambda: test_vendor.test_qkv_epilogue(5, 2, 32, True)),
    "qkv behind it, to fp8 pages": ("qkv_epilogue", lambda: (
        test_vendor.test_qkv_epilogue_into_fp8_pages("e4m3fnuz"))),
    "attention of a prompt, window": ("attention", lambda: test_kernels.test_attention_of_prompts(
        (4, 1, 64, 128, [9, 2], [150, 2], 100, 32, 32))),
    "attention of decoding rows": ("attention", lambda: (
        test_kernels.test_attention_of_decoding_rows(5, 4, 0))),
    "head, draw and merge": ("lm_head", lambda: test_kernels.test_head_and_draw(Tile(BN=64), None)),
    "head of normed rows": ("lm_head", lambda: test_hidden.test_a_head_of_normed_rows()),
    "hidden states": ("final_norm", lambda: test_hidden.test_final_norm(5, 192, 208, 64)),
    "embedding": ("embed_norm", lambda: test_embed.test_embed(True, 64)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_as_machine_code(case: str, emulated: list[str]) -> None:
    kernel, run = CASES[case]
    run()
    assert kernel in emulated


@pytest.mark.parametrize("machine", ["gfx942", "gfx942:fp8", "gfx942:fp8-kv"], indirect=True)
def test_a_step_of_a_model_as_machine_code(
    machine: Machine, report: Report, request: pytest.FixtureRequest
) -> None:
    """The host launches, the emulator runs: a prompt of two sequences, then a decode step of both.
    Logits within bf16's error of the interpreter's, and its greedy tokens."""
    driver = machine.driver
    stored = {"": "bf16", "fp8": "e4m3fnuz × fp8", "fp8-kv": "bf16, e4m3fnuz pages"}[
        request.node.callspec.params["machine"].partition(":")[2]]  # fmt: skip
    codes = {kernel.id: code for kernel, code in driver.kernels}
    warps = {k.id: k.options["num_warps"] for k in machine.table.kernels}
    shared: dict[int, int] = machine.shared_bytes

    def run(launched: Launched) -> None:
        row.programs += math.prod(launched.grid)
        number = launched.kernel.id
        grid = (*launched.grid, *(1,) * (3 - len(launched.grid)))
        run_object(codes[number], grid, warps[number] * DEVICE.warp, shared[number],
                   list(launched.args))  # fmt: skip

    row, driver.run = Row("", "", "", ""), run
    simulator = Simulator(machine.table, machine.tiny.packed, machine.tiny.graph.config.rope)
    with machine.open() as model:
        model.alloc_kv(16, 16)
        for at, prompts in enumerate(((PROMPTS[0], PROMPTS[1]), ([-1], [-1]))):
            firsts = (0, 0) if at == 0 else (len(PROMPTS[0]), len(PROMPTS[1]))
            runs = list(zip((0, 1), firsts, prompts, strict=True))
            case = ("a prompt of two sequences", "a decode step of both")[at]
            row = Row(case, "a model's step", stored, f"{sum(map(len, prompts))} tokens")
            began = time.perf_counter()
            found = model.step(batch(*runs))
            row.seconds = time.perf_counter() - began
            want = simulator.step(*(Part(PAGES[s], f, t, slot=s) for s, f, t in runs))
            assert found.logits is not None
            row.error = float(np.abs(found.logits - want.logits).max() / np.abs(want.logits).max())
            report.add(row)
            assert row.error <= 2e-2
            assert found.tokens.tolist() == want.ids.tolist()
    assert driver.faults == []
    wanted = machine.table.launches_of({"T": 2, "R": 2, "S": 2, "N": 0}, True)
    assert {launched.kernel.name for launched in driver.trace} == {k.name for _, k in wanted}


def test_every_kernel_is_among_the_cases() -> None:
    covered = {kernel for kernel, _ in CASES.values()} | {"merge_rows"}
    assert covered == {name for name, signature in SIGNATURES.items() if signature.module}
