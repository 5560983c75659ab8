"""Machine code of gfx942, run: `make test-emu TINYGRAD_PATH=…` (tests/gpu/emulator.py says what it
needs). The kernels' own tests with the emulator in the interpreter's place, then a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sinterlm.artifact.memo import Memo
from sinterlm.backends.gpu import objects
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.objects import Object, compile_objects
from sinterlm.backends.gpu.signatures import SIGNATURES
from sinterlm.backends.gpu.simulator import Part, Simulator
from sinterlm.backends.gpu.table import Axis, Kernel
from sinterlm.backends.gpu.tuning import read_tiles
from tests.gpu import oplib, test_embed, test_fp8, test_hidden, test_kernels
from tests.gpu.emulator import load_emulator, run_object
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


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, memo: Memo) -> list[str]:
    """The kernels' tests compile what they run and emulate it; names of what was run."""
    ran: list[str] = []
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
        emulate(made, (*grid, *(1,) * (3 - len(grid))), [*values, 0, 0])

    monkeypatch.setattr(oplib, "run_kernel", run)
    return ran


def word_of(value: Any, kind: str) -> int:
    """An argument as it lies in memory."""
    if isinstance(value, np.ndarray):
        return int(value.ctypes.data)
    return int(np.float32(value).view(np.int32)) if kind == "fp32" else int(value)


def emulate(made: Object, grid: tuple[int, ...], values: list[int]) -> None:
    facts = made.facts
    run_object(made.code, grid, facts["num_warps"] * DEVICE.warp, facts["shared_bytes"], values)


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


@pytest.mark.parametrize("machine", ["gfx942"], indirect=True)
def test_a_step_of_a_model_as_machine_code(machine: Machine, tmp_path: Path) -> None:
    """The host launches, the emulator runs: a prompt of two sequences, then a decode step of both.
    Logits within bf16's error of the interpreter's, and its greedy tokens."""
    driver = machine.driver
    codes = {kernel.id: code for kernel, code in driver.kernels}
    warps = {k.id: k.options["num_warps"] for k in machine.table.kernels}
    shared: dict[int, int] = machine.shared_bytes

    def run(launched: Launched) -> None:
        number = launched.kernel.id
        grid = (*launched.grid, *(1,) * (3 - len(launched.grid)))
        run_object(codes[number], grid, warps[number] * DEVICE.warp, shared[number],
                   list(launched.args))  # fmt: skip

    driver.run = run
    simulator = Simulator(machine.table, machine.tiny.packed, machine.tiny.graph.config.rope)
    with machine.open() as model:
        model.alloc_kv(16, 16)
        for at, prompts in enumerate(((PROMPTS[0], PROMPTS[1]), ([-1], [-1]))):
            firsts = (0, 0) if at == 0 else (len(PROMPTS[0]), len(PROMPTS[1]))
            runs = list(zip((0, 1), firsts, prompts, strict=True))
            found = model.step(batch(*runs))
            want = simulator.step(*(Part(PAGES[s], f, t, slot=s) for s, f, t in runs))
            assert found.logits is not None
            assert np.abs(found.logits - want.logits).max() <= 2e-2 * np.abs(want.logits).max()
            assert found.tokens.tolist() == want.ids.tolist()
    assert driver.faults == []
    assert {launched.kernel.name for launched in driver.trace} == set(SIGNATURES)
