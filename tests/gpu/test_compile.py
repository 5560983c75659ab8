"""Code objects for devices that are not here: `sinterlm compile --target`, the gates that every
object passes, the cache, and the errors.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sinterlm.artifact.bundle import open_bundle
from sinterlm.artifact.memo import Memo
from sinterlm.backends.gpu import objects
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.library import archive_of
from sinterlm.backends.gpu.objects import archive, compile_objects, faults, read_archive
from sinterlm.backends.gpu.table import Kernel, Table
from sinterlm.backends.gpu.worker import _amd_counts_after_stores
from sinterlm.cli import main
from sinterlm.errors import BundleError, CompileError
from sinterlm.passes.formats import Scheme
from sinterlm.runtime.model import Model
from tests.gpu.models import fp8, tiny

INT4 = Scheme(4, act="graph")


def kernels_of(device: str, scheme: Scheme | None = None, kv_fp8: bool = False) -> list[Kernel]:
    """Of each kernel of a tiny model's table the one for few rows, and attention of prompts, both
    with a window too."""
    table = tiny("qwen2-window", device, scheme, kv_fp8=kv_fp8).table
    first: dict[object, Kernel] = {}
    for kernel in table.kernels:
        of = kernel.constants
        first.setdefault((kernel.name, of.get("DECODE"), of.get("WINDOW")), kernel)
    return list(first.values())


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("device", ["gfx942", "sm_90"])
def test_objects_pass_the_gates(device: str, test_environment: Path) -> None:
    """No spills, no stack, the matrix instruction, 16-byte loads, stores waited for; some of the
    kernels here, and all in the slow test below."""
    memo = Memo(test_environment / "memo")
    kernels = [k for k in kernels_of(device) if k.name in ("attention", "residual_matmul")][1:]
    kernels += [k for k in kernels_of(device, INT4) if k.name == "residual_matmul"]
    assert kernels[-1].constants["BITS"] == 4
    table = tiny("qwen2-window", device, fp8(device, act="fp8")).table
    rounding = [k for k in table.kernels if k.constants.get("A_FP8")]
    kernels.append(next(k for k in rounding if k.constants["BM"] == 64))
    kernels += [k for k in kernels_of(device, kv_fp8=True) if k.constants.get("DECODE")]
    assert kernels[-1].constants["KV_FP8"] and kernels[-1].constants["WINDOW"]
    made = compile_objects(kernels, DEVICES[device], memo)
    assert [o.kernel for o in made] == kernels
    magic = b"\x7fELF"
    for one in made:
        assert one.code.startswith(magic)
        assert not faults(one, DEVICES[device])
        assert one.facts["symbol"] == one.kernel.name
    again = compile_objects(kernels, DEVICES[device], memo)
    assert [o.code for o in again] == [o.code for o in made]
    (anew,) = compile_objects(kernels[:1], DEVICES[device], Memo(None))
    assert anew.code == made[0].code, "the same bytes without the cache"


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "scheme",
    [None, INT4, Scheme(4, 128, "graph"), Scheme(8, 0, "graph"), "graph", "fp8", "kv"],
    ids=["bf16", "int4", "int4-128", "int8-0", "fp8", "fp8-a8", "fp8-kv"],
)
def test_every_kernel_of_every_device(scheme: Any, device: str) -> None:
    """Compiled twice without a cache: the same bytes."""
    kv_fp8 = scheme == "kv"
    if isinstance(scheme, str):
        scheme = None if kv_fp8 else fp8(device, act=scheme)
    kernels = kernels_of(device, scheme, kv_fp8)
    if kv_fp8:
        kernels = [k for k in kernels if k.constants.get("KV_FP8")]
    if scheme is not None:
        kernels = [k for k in kernels if k.constants.get("BITS", 16) != 16]
    first, second = (compile_objects(kernels, DEVICES[device], Memo(None)) for _ in range(2))
    assert [o.code for o in first] == [o.code for o in second]


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["llama-tied", "qwen3", "qwen2-window"])
def test_every_kernel_beside_a_vendors_gemm(
    model: str, device: str, test_environment: Path
) -> None:
    """Matrices in rows, and epilogues: 16-byte loads, too."""
    table = tiny(model, device, order="pitched").table
    kernels = [k for k in table.own_kernels if k.constants.get("W_PITCH") or "epilogue" in k.name]
    made = compile_objects(kernels, DEVICES[device], Memo(test_environment / "memo"))
    assert {o.kernel.name for o in made} == {k.name for k in kernels} and len(made) >= 12


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("heads", [(14, 2), (9, 3)], ids=["qwen2.5-0.5b", "smollm2-135m"])
def test_narrow_heads_with_fp8_pages_compile_for_sm_100(
    heads: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Heads of 64, whose kernel for prompts ptxas keeps on a stack where it has two stages."""
    shape = {"head_dim": 64, "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
             "hidden_size": 64 * heads[0]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**TINY, **shape}))
    given = ["--target", "sm_100", "--code-only", "--kv-cache-dtype", "fp8", "--json"]
    assert main(["compile", str(tmp_path), *given, "-o", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["kv_cache_dtype"] == "fp8"


GOOD = {
    "spills": 0, "private_bytes": 0, "scratch_bytes": [0, 0], "shared_bytes": 1024,
    "registers": 64, "wide_loads": 3, "byte_loads": 0, "is_ordered": True,
    "matrix": ["v_mfma_f32_16x16x16_bf16"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"spills": 3}, "3 spills"),
        ({"private_bytes": 8}, "8 bytes of stack"),
        ({"scratch_bytes": [0, 64]}, "scratch memory"),
        ({"shared_bytes": 70000}, "70000 bytes of shared memory, of 65536"),
        ({"registers": 600}, "600 registers, of 512"),
        ({"wide_loads": 0}, "no load of 16 bytes"),
        ({"byte_loads": 2}, "2 loads of single bytes"),
        ({"is_ordered": False}, "not waited for"),
        ({"matrix": ["v_dot2_f32_f16"]}, "no v_mfma"),
    ],
)
def test_each_gate_closes(wrong: dict, named: str) -> None:
    kernel = next(k for k in tiny("llama-tied", "gfx942").table.kernels if k.name == "lm_head")
    made = objects.Object(kernel, b"", {**GOOD, **wrong})
    found = faults(made, DEVICES["gfx942"])
    assert len(found) == 1 and named in found[0]
    assert not faults(replace(made, facts=GOOD), DEVICES["gfx942"])


def test_numbers_in_place_belong_to_one_thread_each() -> None:
    """Found by the emulator: two waves held the same numbers, and the second one read the sum that
    the first had stored."""
    kernel = next(k for k in tiny("llama-tied", "gfx942").table.kernels
                  if k.name == "residual_matmul")  # fmt: skip
    made = objects.Object(kernel, b"", GOOD)
    assert not faults(made, DEVICES["gfx942"])
    narrow = replace(kernel, constants={**kernel.constants, "BM": 16, "BN": 16},
                     options={**kernel.options, "num_warps": 8})  # fmt: skip
    found = faults(replace(made, kernel=narrow), DEVICES["gfx942"])
    assert found == ["256 numbers in place for 512 threads"]


def test_the_waves_that_were_asked_for_fit() -> None:
    kernel = next(k for k in tiny("llama-tied", "gfx942").table.kernels
                  if k.options.get("waves_per_eu") == 2)  # fmt: skip
    made = objects.Object(kernel, b"", {**GOOD, "occupancy": 1})
    assert "1 waves per SIMD, of 2" in faults(made, DEVICES["gfx942"])[0]
    assert not faults(replace(made, facts={**GOOD, "occupancy": 2}), DEVICES["gfx942"])


def test_products_of_fp8_must_be_native() -> None:
    table = tiny("llama-tied", "sm_90", fp8("sm_90", act="fp8")).table
    few, many = (
        next(k for k in table.kernels if k.constants.get("A_FP8") and k.constants["BM"] == rows)
        for rows in (16, 128)
    )
    facts = {**GOOD, "matrix": ["mma.sync", "wgmma.mma_async"], "fp8_matrix": []}
    assert "no matrix instruction of fp8" in faults(objects.Object(many, b"", facts),
                                                    DEVICES["sm_90"])[0]  # fmt: skip
    assert not faults(objects.Object(few, b"", facts), DEVICES["sm_90"])
    facts["fp8_matrix"] = ["wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3"]
    assert not faults(objects.Object(many, b"", facts), DEVICES["sm_90"])


def test_pages_of_fp8_must_be_converted_and_loaded_natively() -> None:
    device = DEVICES["sm_90"]
    kernels = tiny("llama-tied", "sm_90", kv_fp8=True).table.kernels
    facts = {**GOOD, "matrix": ["mma.sync", "wgmma.mma_async"], "fp8_converts": []}
    for name in ("attention", "norm_qkv_rope_kv"):
        kernel = next(k for k in kernels if k.name == name)
        found = faults(objects.Object(kernel, b"", facts), device)
        assert found == ["no instruction that converts fp8"]
        good = {**facts, "fp8_converts": ["cvt.rn.f16x2.e4m3x2"]}
        assert not faults(objects.Object(kernel, b"", good), device)
    attention = next(k for k in kernels if k.name == "attention")
    found = faults(objects.Object(attention, b"", {**good, "byte_loads": 2}), device)
    assert found == ["2 loads of single bytes"]


STORE, WAIT, JOIN, COUNT = (
    "buffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen", "s_waitcnt vmcnt(0)", "s_barrier",
    "global_atomic_add v3, v3, v4, s[2:3] sc0",
)  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "is_ordered"),
    [
        ((STORE, WAIT, JOIN, COUNT), True),
        ((STORE, JOIN, WAIT, COUNT), False),
        ((STORE, "s_waitcnt vmcnt(1)", JOIN, COUNT), False),
        ((STORE, WAIT, STORE, JOIN, COUNT), False),
        ((STORE, WAIT, COUNT), False),
        ((COUNT,), True),
    ],
)
def test_stores_must_be_waited_for_by_every_wave(lines: tuple, is_ordered: bool) -> None:
    assert _amd_counts_after_stores("\n".join(lines), 4) == is_ordered


def test_a_wave_alone_waits_for_itself() -> None:
    assert _amd_counts_after_stores("\n".join((STORE, WAIT, COUNT)), 1)
    assert not _amd_counts_after_stores("\n".join((STORE, COUNT)), 1)
    assert not _amd_counts_after_stores("\n".join((STORE, WAIT, STORE, COUNT)), 1)


def test_an_archive_holds_table_and_objects() -> None:
    table = tiny("llama-tied", "gfx942").table
    made = [
        objects.Object(k, bytes([k.id]) * (70 + k.id), {"symbol": k.name, "num_warps": 4,
                                                        "shared_bytes": 0})
        for k in table.kernels
    ]  # fmt: skip
    data = archive(table.to_text(), made)
    assert read_archive(data) == (table, made)
    with pytest.raises(ValueError, match="damaged"):
        read_archive(data[:-1] + b"\xff" if data[-1] else data.replace(bytes([3]) * 73, b"x" * 73))
    with pytest.raises(ValueError, match="no launch table"):
        read_archive(data[:100])


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "triton_version", lambda: None)
    with pytest.raises(CompileError, match=r"pip install 'sinterlm\[gpu\]'"):
        compile_objects(kernels_of("gfx942"), DEVICES["gfx942"], Memo(None))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--target", "gfx90"], "supported: cpu, gfx942"),
        (["--target", "gfx942", "--dtype", "fp32"], "--dtype fp32 is not supported"),
        (["--target", "sm_90", "--act-dtype", "int8"], "--act-dtype int8 is not supported"),
        (["--target", "sm_90", "--kv-cache-dtype", "int8"], "give --kv-cache-dtype fp8 or bf16"),
        (["--kv-cache-dtype", "fp8"], "int8, which a CPU has"),
        (["--target", "gfx942", "--isa", "avx2"], "--isa avx2 is of a CPU"),
        (["--quantization", "fp8"], "--quantization fp8 is not supported with --target cpu"),
        (["--target", "sm_90", "--act-dtype", "fp8"], "there are none; give --quantization fp8"),
        (["--target", "sm_90", "--quantization", "int4", "--act-dtype", "fp8"], "goes with fp8"),
        (["--target", "sm_90", "--quantization", "fp8", "--quant-group", "64"], "leave it out"),
    ],
)
def test_bad_requests_are_refused(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "qwq-32b", "--code-only", *flags]) == 2
    assert named in capsys.readouterr().err


TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rope_theta": 10000.0,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("flags", "quantization", "kv"),
    [
        pytest.param(["--quantization", "int4"], "int4 w4g32", "bf16", marks=pytest.mark.slow),
        pytest.param(["--kv-cache-dtype", "fp8_e4m3"], None, "fp8", marks=pytest.mark.slow),
        ([], None, "bf16"),
    ],
    ids=["int4", "fp8-kv", "bf16"],
)
def test_compile_inspect_and_refuse_to_run(
    flags: list[str], quantization: str | None, kv: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The whole way on the command line: weights packed, table shown, and no run."""
    folder, out = tmp_path / "tiny", tmp_path / "bundle"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    given = ["--target", "gfx942", "--load-format", "dummy", *flags]
    assert main(["compile", str(folder), *given, "-o", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["target"], facts["isa"]) == ("gfx942", "gfx942")
    assert facts["weights_bytes"] > 0

    bundle = open_bundle(out, any_isa=True)
    assert (bundle.manifest.quantization, bundle.manifest.kv_cache_dtype) == (quantization, kv)
    table, made = read_archive(archive_of(bundle.library_path.read_bytes()))
    assert isinstance(table, Table) and table.per_step == 13
    assert all(not faults(one, DEVICES["gfx942"]) for one in made)

    assert main(["inspect", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["launches"]
    assert (shown["per_step"], shown["per_layer"]) == (13, 5)
    assert all(kernel["object"]["spills"] == 0 for kernel in shown["kernels"])
    assert main(["inspect", str(out)]) == 0
    assert "13 per step, 5 per layer; tiles untuned: no device" in capsys.readouterr().out
    assert main(["inspect", str(folder), *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["launches"]["per_step"] == 13

    run = ["run", str(out), "--prompt", "x"]
    assert main([*run, "--target", "gfx942", "--tiles", "t.json"]) == 2
    assert "tiles has a meaning for checkpoints only" in capsys.readouterr().err
    assert main(run) == 2
    assert "compiled for gfx942 and --target is cpu" in capsys.readouterr().err
    monkeypatch.setenv("SINTERLM_GPU_DRIVER", str(tmp_path / "libnone.so"))
    assert main([*run, "--target", "gfx942"]) == 2
    assert "no HIP driver" in capsys.readouterr().err
    with pytest.raises(BundleError, match=r"no HIP driver: .*libnone.so"):
        Model(bundle, num_threads=1, max_tokens=1, max_seqs=1, max_sample_rows=1, max_model_len=16)
