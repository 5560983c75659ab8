"""The plugin's GPU half on the steps of vLLM's runner (``vllm_steps.py``), without a device:
chunked prefill, mixed steps and decode, eagerly and by padded graphs, in vLLM's KV layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sinterlm import LLM, SamplingParams
from sinterlm.artifact.manifest import ModelShape
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.library import archive_of
from sinterlm.backends.gpu.objects import read_archive
from sinterlm.compile import compile_model
from sinterlm.options import CompileOptions
from sinterlm.plugin import gpu
from sinterlm.plugin.gpu import GpuModel, paged_tensors
from sinterlm.runtime.device import PagedTensors
from tests.conftest import ROOT
from tests.gpu.host import build_driver
from tests.gpu.recording import RecordingDriver
from tests.gpu.vllm_steps import (
    BLOCK,
    BLOCKS,
    MAX_TOKENS,
    FakeMemory,
    Runner,
    Sequence,
    Tensor,
    kv_tensors,
    vllm_config,
)

pytestmark = pytest.mark.usefixtures("triton")

TRAINED = ROOT / "tests/assets/tiny-llama"
PROMPTS = ["The old man looked at", "In the", "She said that"]
STEPS = 4


@pytest.fixture(scope="session")
def cpu_answers(test_environment: Path) -> list[tuple[list[int], list[int]]]:
    """Prompt and greedy answer of each, by the CPU's library."""
    greedy = SamplingParams(temperature=0, max_tokens=STEPS + 2, ignore_eos=True)
    options: dict[str, Any] = {"max_model_len": 64, "kv_cache_memory_bytes": 4 << 20}
    with LLM(str(TRAINED), num_threads=1, cache_dir=test_environment, **options) as llm:
        return [
            (list(answer.prompt_token_ids), list(answer.outputs[0].token_ids))
            for answer in llm.generate(PROMPTS, greedy)
        ]


@pytest.fixture
def memory(
    request: pytest.FixtureRequest, tmp_path: Path, test_environment: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> FakeMemory:  # fmt: skip
    """Of a device on which the trained model's library for ``request.param`` finds its kernels."""
    target = request.param
    bundle = compile_model(CompileOptions(str(TRAINED), target=target, max_model_len=64,
                                          cache_dir=test_environment))  # fmt: skip
    table, objects = read_archive(archive_of(bundle.library_path.read_bytes()))
    driver = RecordingDriver(DEVICES[target], table, [(o.kernel, o.code) for o in objects])
    path = build_driver(tmp_path, DEVICES[target].vendor)
    driver.attach(path)
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(path))
    made = FakeMemory(driver)
    made.bundle = bundle
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "layout"),
    [("gfx942", "LBHNC"), ("gfx942", "LBNHC"), ("gfx942", "BLNHC"), ("sm_90", "LHBNC"),
     ("sm_90", "B2NHD"), ("sm_90", "2BNHD")],
    indirect=["memory"],
)  # fmt: skip
def test_the_cpus_tokens(
    memory: FakeMemory, layout: str, cpu_answers: list[tuple[list[int], list[int]]]
) -> None:
    driver = memory.driver
    model = GpuModel(memory.bundle, vllm_config(), memory)
    runner = Runner(model, memory, layout)
    blocks = iter([3, 7, 5, 1, 9, 2])
    a, b, c = (Sequence(list(prompt), [next(blocks), next(blocks)]) for prompt, _ in cpu_answers)
    assert not model.blank(5).any() and model.blank(5).shape == (5, model.shape.hidden_size)
    runner.step((a, 2))  # the beginning of a prompt
    runner.step((a, len(a.tokens) - 2), (b, len(b.tokens)))  # its end, beside another's whole
    runner.step((a, 1), (c, len(c.tokens)), (b, 1))  # decode beside a prompt, in another order
    runner.step((c, 1), (a, 1))  # decode, eagerly
    before = len(driver.calls)
    for _ in range(STEPS - 1):
        runner.step((b, 1), (a, 1), (c, 1), rows=4)
    runner.step((b, 1), rows=2)
    forbidden = {"allocate", "release", "host_allocate", "stream_wait", "to_device", "to_host"}
    assert not forbidden & set(driver.calls[before:])
    for seq, (prompt, answer) in zip((a, b, c), cpu_answers, strict=True):
        found = seq.tokens[len(prompt) :]
        assert len(found) >= STEPS
        assert found == answer[: len(found)]
    model.close()
    assert driver.faults == []


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["gfx942"], indirect=True)
@pytest.mark.parametrize("fault", ["values in place of keys", "tokens as far apart as heads"])
def test_pages_that_are_walked_wrongly_are_noticed(
    memory: FakeMemory, fault: str, cpu_answers: list[tuple[list[int], list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The plugin broken on purpose: other tokens, or a store where nothing of vLLM's lies."""

    def broken(pages: list[Tensor], shape: ModelShape) -> PagedTensors:
        good = paged_tensors(pages, shape)
        if fault == "values in place of keys":
            return replace(good, v=good.k)
        return replace(good, token_stride=good.head_stride)

    monkeypatch.setattr(gpu, "paged_tensors", broken)
    model = GpuModel(memory.bundle, vllm_config(), memory)
    runner = Runner(model, memory, "LBHNC")
    drawn = []
    for (prompt, answer), blocks in zip(cpu_answers, ([3, 7], [5, 1], [9, 2]), strict=True):
        seq = Sequence(list(prompt), blocks)
        drawn.append(runner.step((seq, len(prompt))) + runner.step((seq, 1)) == answer[:2])
    assert not all(drawn) or memory.driver.faults
    model.close()


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["gfx942"], indirect=True)
def test_rows_beyond_a_step_are_zeros_and_tensors_may_move(
    memory: FakeMemory, cpu_answers: list[tuple[list[int], list[int]]]
) -> None:
    """Padding outside a graph; KV tensors made anew after profiling; more rows than one call of the
    head takes."""
    model = GpuModel(memory.bundle, vllm_config(), memory)
    prompt, answer = cpu_answers[0]
    for layout in ("LBHNC", "LBNHC"):
        runner = Runner(model, memory, layout)
        runner._fill(((Sequence(prompt, [4, 6]), len(prompt)),), None)
        metadata = SimpleNamespace(
            num_actual_tokens=len(prompt), max_query_len=len(prompt), slot_mapping=runner.slots,
            query_start_loc=runner.starts[:2], seq_lens=runner.lens[:1],
            block_table=runner.table[:1],
        )  # fmt: skip
        hidden = model.hidden(runner.ids, runner.positions, metadata, runner.pages)
        assert hidden.shape == (MAX_TOKENS, model.shape.hidden_size)
        assert not hidden[len(prompt) :].any() and hidden[: len(prompt)].any()
        logits = model.logits(hidden[: len(prompt)])
        assert logits.shape == (len(prompt), model.shape.vocab_size)
        assert int(logits[-1].argmax()) == answer[0]
        alone = model.logits(hidden[len(prompt) - 1 : len(prompt)].contiguous())
        assert np.array_equal(alone[0], logits[-1])
    assert model.logits(hidden[:0]).shape == (0, model.shape.vocab_size)
    with pytest.raises(RuntimeError, match=r"hidden states have shape \(1, 8\)"):
        model.logits(hidden[:1, :8])
    for name, shape in {"seq_lens": (1,), "block_table": (1, 4), "query_start_loc": (2,)}.items():
        wide = memory.zeros(shape, "int64")
        changed = SimpleNamespace(**{**vars(metadata), name: wide})
        with pytest.raises(RuntimeError, match=rf"vLLM's {name} has shape .* int64"):
            model.hidden(runner.ids, runner.positions, changed, runner.pages)
    with pytest.raises(RuntimeError, match="slots has 2 entries, of"):
        short = SimpleNamespace(**{**vars(metadata), "slot_mapping": runner.slots[:2]})
        model.hidden(runner.ids, runner.positions, short, runner.pages)
    model.close()
    assert memory.driver.faults == []


# -- KV tensors ------------------------------------------------------------------------------------

SHAPE = ModelShape("LlamaForCausalLM", 131, 64, 3, 4, 2, 32, 96)


class HostMemory:
    """Plain arrays."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return np.zeros(shape, np.uint16).view(Tensor)


@pytest.mark.parametrize(
    "layout", ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC", "B2NHD", "2BNHD"]
)
def test_every_number_is_where_the_strides_say(layout: str) -> None:
    pages = kv_tensors(HostMemory(), layout, SHAPE)
    found = paged_tensors(pages, SHAPE)
    assert found.page_tokens == BLOCK
    layer, page, head, token, d = 2, 7, 1, 13, 29
    offset = page * found.page_stride + token * found.token_stride + head * found.head_stride + d
    for which, base in enumerate((found.k, found.v)):
        if layout == "B2NHD":
            number = pages[layer][page, which, token, head, d:]
        elif layout == "2BNHD":
            number = pages[layer][which, page, token, head, d:]
        else:
            number = pages[layer][page, head, token, which * 32 + d :]
        assert base[layer] + 2 * offset == number.ctypes.data


@pytest.mark.parametrize(
    ("shape", "change"),
    [
        ((BLOCKS, 3, BLOCK, 64), {}),
        ((BLOCKS, 2, BLOCK, 96), {}),
        ((BLOCKS, 2, BLOCK, 64), {"dtype": np.float32}),
        ((2, 2, BLOCK, 2, 32), {}),
        ((BLOCKS, 3, BLOCK, 2, 32), {}),
        ((BLOCKS, 64), {}),
    ],
)
def test_other_kv_tensors_are_refused(shape: tuple[int, ...], change: dict[str, Any]) -> None:
    pages = [np.zeros(shape, **{"dtype": np.uint16, **change}).view(Tensor)] * 3
    with pytest.raises(RuntimeError, match=r"which SinterLM does not know; set SINTERLM_VLLM=off"):
        paged_tensors(pages, SHAPE)


def test_layers_of_different_tensors_and_offsets_beyond_32_bits_are_refused() -> None:
    pages = kv_tensors(HostMemory(), "LBHNC", SHAPE)
    with pytest.raises(RuntimeError, match="does not know"):
        paged_tensors([*pages[:2], pages[2][:4]], SHAPE)
    heads = replace(SHAPE, num_kv_heads=4)
    far = np.lib.stride_tricks.as_strided(
        pages[0], (1, 4, BLOCK, 64), (0, 2 << 30, 128, 2)
    ).view(Tensor)  # fmt: skip
    with pytest.raises(RuntimeError, match="too large for 32-bit offsets"):
        paged_tensors([far] * 3, heads)
