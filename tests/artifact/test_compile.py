"""compile_model over a fake frontend: two keys, the warm path, and what happens when files move."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from sinterlm import compile as compiler
from sinterlm.artifact import storage
from sinterlm.artifact.bundle import Bundle, export_bundle
from sinterlm.artifact.cache import Cache
from sinterlm.artifact.housekeeping import prune, verify
from sinterlm.backends.cxx import toolchain
from sinterlm.commands.inspect import look
from sinterlm.compile import compile_model
from sinterlm.engine.llm import _find_bundle
from sinterlm.errors import BundleError, CheckpointError, CompileError, ResourceError, UsageError
from sinterlm.ir.plan import Plan
from sinterlm.options import CompileOptions
from tests.artifact import fakes
from tests.artifact.builders import Recorder
from tests.artifact.fakes import FakeCheckpoint, write_checkpoint


class World:
    """A cache, checkpoints, and counts of the work that compile_model did."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = Cache.at(root / "cache")
        self.progress = Recorder()
        self.opened: list[FakeCheckpoint] = []
        self.builds = 0
        self.vocab_size = 32

    def options(self, model: Path | str, **changes: object) -> CompileOptions:
        plain = CompileOptions(str(model), isa="generic", cache_dir=self.cache.root)
        return replace(plain, **changes)

    def compile(self, model: Path | str, **changes: object) -> Bundle:
        self.progress = Recorder()
        return compile_model(self.options(model, **changes), self.progress)

    def work(self) -> tuple[int, int, int]:
        """Checkpoints opened, libraries built, weights packed, since the last call."""
        counts = len(self.opened), self.builds, sum(c.reads for c in self.opened)
        self.opened, self.builds = [], 0
        return counts


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)

    def read(job: compiler.Job) -> FakeCheckpoint:
        made.opened.append(FakeCheckpoint(Path(job.options.model), made.vocab_size))
        return made.opened[-1]

    real_build = toolchain.compile_library

    def build(*args: object, **kwargs: object) -> None:
        made.builds += 1
        real_build(*args, **kwargs)

    packing = types.ModuleType("sinterlm.passes.packing")
    packing.PACKER_VERSION = "1"
    packing.packed_chunks = lambda layout, *readers: made.opened[-1].chunks()
    cost = types.ModuleType("sinterlm.ir.cost")
    cost.plan_costs = lambda plan: fakes.costs()
    monkeypatch.setitem(sys.modules, "sinterlm.passes.packing", packing)
    monkeypatch.setitem(sys.modules, "sinterlm.ir.cost", cost)
    monkeypatch.setattr(compiler, "read", read)
    monkeypatch.setattr(compiler, "plan_model", fakes.plan)
    monkeypatch.setattr(compiler, "emit", fakes.emit)
    monkeypatch.setattr(FakeCheckpoint, "read", None, raising=False)
    monkeypatch.setattr(toolchain, "compile_library", build)
    return made


def test_cold_then_warm(world: World) -> None:
    model = write_checkpoint(world.root / "model", 1)
    bundle = world.compile(model)
    assert world.work() == (1, 1, 1)
    assert any("packing model needs 2.0 kB in" in m for m in world.progress.messages)
    assert world.progress.done == fakes.WEIGHT_BYTES
    assert ctypes.CDLL(str(bundle.library_path)).vocab_size() == 32
    assert bundle.weights_path is not None
    assert bundle.weights_path.read_bytes() == bytes([1]) * fakes.WEIGHT_BYTES
    assert bundle.manifest.model == "model" and bundle.manifest.max_model_len == 128
    assert bundle.text().chat_template == "{}"
    assert world.compile(model) == bundle
    assert world.work() == (0, 0, 0)
    assert world.progress.messages == []
    assert verify(world.cache) == []


def test_fine_tunes_share_code_and_never_weights(world: World) -> None:
    first = write_checkpoint(world.root / "first", 1)
    second = write_checkpoint(world.root / "second", 2)
    one, two = world.compile(first), world.compile(second)
    assert world.work() == (2, 1, 2)
    assert one.manifest.code_key == two.manifest.code_key
    assert one.manifest.weights_key != two.manifest.weights_key
    # Swap the two in place, times kept: the most treacherous way of replacing a checkpoint.
    stat = (first / "weights.safetensors").stat()
    (first / "weights.safetensors").rename(world.root / "aside")
    (second / "weights.safetensors").rename(first / "weights.safetensors")
    (world.root / "aside").rename(second / "weights.safetensors")
    for folder in (first, second):
        os.utime(folder / "weights.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    one_now, two_now = world.compile(first), world.compile(second)
    assert world.work() == (2, 0, 0), "nothing new to build or pack"
    for bundle, fill in ((one_now, 2), (two_now, 1)):
        assert bundle.weights_path is not None
        assert set(bundle.weights_path.read_bytes()) == {fill}


def test_another_shape_has_other_code(world: World) -> None:
    model = write_checkpoint(world.root / "model", 1)
    first = world.compile(model)
    world.vocab_size = 48
    (model / "config.json").write_text('{"vocab_size": 48}')
    second = world.compile(model)
    assert world.work() == (2, 2, 1), "same tensors in the same layout are packed once"
    assert first.manifest.code_key != second.manifest.code_key
    assert ctypes.CDLL(str(second.library_path)).vocab_size() == 48


@pytest.mark.parametrize("change", ["edit", "add"])
def test_a_changed_tokenizer_is_noticed(world: World, change: str) -> None:
    model = write_checkpoint(world.root / "model", 1)
    first = world.compile(model)
    if change == "edit":
        (model / "config.json").write_text('{"new": 1}')
    else:
        (model / "chat_template.jinja").write_text("{{ x }}")
    second = world.compile(model)
    assert world.work() == (2, 1, 1)
    assert (second.manifest_sha256 != first.manifest_sha256) == (change == "edit")


def test_options_are_part_of_the_request(world: World) -> None:
    model = write_checkpoint(world.root / "model", 1)
    bundles = [world.compile(model, **c) for c in ({}, {"dtype": "fp32"}, {"max_model_len": 64})]
    assert [b.manifest.max_model_len for b in bundles] == [128, 128, 64]
    assert [b.manifest.dtype for b in bundles] == ["bf16", "fp32", "bf16"]
    assert len({b.manifest_sha256 for b in bundles}) == 3
    assert world.work()[0] == 3
    assert world.compile(model, max_model_len=64) == bundles[2]
    assert world.work()[0] == 0


def test_digest_is_remembered_across_requests(world: World) -> None:
    model = write_checkpoint(world.root / "model", 1)
    world.compile(model)
    world.compile(model, max_model_len=64)
    assert [c.digests for c in world.opened] == [1, 0]


def test_another_layout_is_packed_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_checkpoint(world.root / "model", 1)
    first = world.compile(model)

    def plan(job: compiler.Job, checkpoint: FakeCheckpoint) -> Plan:
        plain = fakes.plan(job, checkpoint)
        return replace(plain, layout=replace(plain.layout, layout_hash=8))

    monkeypatch.setattr(compiler, "plan_model", plan)
    shutil.rmtree(world.cache.root / "memo")
    second = world.compile(model)
    assert second.manifest.layout_hash == 8
    assert first.manifest.weights_key != second.manifest.weights_key


def test_damage_is_mended_on_the_warm_path(world: World) -> None:
    model = write_checkpoint(world.root / "model", 1)
    bundle = world.compile(model)
    world.work()
    bundle.library_path.unlink()
    again = world.compile(model)
    assert world.work() == (1, 1, 0)
    assert again == bundle, "the compiler is deterministic, so even the pin stays valid"
    assert any("rebuilding" in m for m in world.progress.messages)
    (bundle.root / "manifest.json").unlink()
    assert world.compile(model) == bundle
    prune(world.cache, everything=True)
    assert world.compile(model) == bundle
    assert world.progress.messages[0].startswith("packing"), "an empty cache is no damage"


def hide_compilers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("SINTERLM_CXX", raising=False)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("remembered", [True, False])
def test_a_cache_made_elsewhere_serves_without_a_compiler(
    world: World, monkeypatch: pytest.MonkeyPatch, remembered: bool
) -> None:
    model = write_checkpoint(world.root / "model", 1)
    bundle = world.compile(model)
    world.work()
    shutil.copytree(world.cache.root, world.root / "image")
    if not remembered:
        shutil.rmtree(world.root / "image/memo")
    world.cache = Cache.at(world.root / "image")
    monkeypatch.setattr(Cache, "is_read_only", True)
    hide_compilers(monkeypatch, world.root)
    served = world.compile(model)
    assert served.manifest == bundle.manifest
    assert served.library_path.is_relative_to(world.root / "image")
    assert world.work() == ((0 if remembered else 1), 0, 0)


def test_without_a_compiler_a_new_model_says_what_to_install(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_compilers(monkeypatch, world.root)
    with pytest.raises(CompileError, match=r"apt install g\+\+"):
        world.compile(write_checkpoint(world.root / "model", 1))
    assert storage.list_folders(world.cache.root / "tmp") == []


def test_a_checkpoint_that_changes_while_read_is_not_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_checkpoint(world.root / "model", 1)
    whole = FakeCheckpoint.chunks

    def chunks(self: FakeCheckpoint) -> object:
        for chunk in whole(self):
            yield chunk
            write_checkpoint(model, 9)

    monkeypatch.setattr(FakeCheckpoint, "chunks", chunks)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        world.compile(model)
    assert storage.list_folders(world.cache.root / "weights") == []


def test_disk_full_while_packing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def chunks(self: FakeCheckpoint) -> object:
        yield 0, b"x"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FakeCheckpoint, "chunks", chunks)
    with pytest.raises(ResourceError, match="is full"):
        world.compile(write_checkpoint(world.root / "model", 1))
    assert storage.list_folders(world.cache.root / "weights") == []


def test_code_only(world: World) -> None:
    bundle = world.compile(write_checkpoint(world.root / "model", 1), code_only=True)
    assert bundle.weights_path is None and bundle.manifest.weights_key == ""
    assert world.work() == (1, 1, 0)
    assert world.compile(world.root / "model", code_only=True) == bundle


def test_a_bundle_is_a_model(world: World) -> None:
    model = write_checkpoint(world.root / "model", 1)
    copy = export_bundle(world.compile(model), world.root / "out")
    world.work()
    assert world.compile(copy.root) == copy
    assert world.work() == (0, 0, 0)
    with pytest.raises(BundleError, match="asks for"):
        world.compile(copy.root, bundle_sha256="0" * 64)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": "fp32"}, "dtype='fp32'.*compiled with dtype=bf16"),
        ({"isa": "avx512"}, "isa='avx512'"),
        ({"target": "cuda"}, "compiled for cpu and --target is cuda"),
        ({"quantization": "int8"}, "quantization='int8'"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype='int8'.*with kv_cache_dtype=bf16"),
        ({"quant_group": 32}, "quant_group.*a bundle"),
        ({"act_dtype": "int8"}, "act_dtype.*a bundle"),
        ({"load_format": "dummy"}, "load_format.*a bundle"),
        ({"revision": "main"}, "revision.*a bundle"),
        ({"dump_dir": Path("dumps")}, "dump_dir.*a bundle"),
        ({"code_only": True}, "code_only.*a bundle"),
        ({"vendor_gemm": True}, "vendor_gemm.*a bundle"),
    ],
)
def test_a_bundle_stays_what_it_is(world: World, changes: dict[str, object], told: str) -> None:
    bundle = world.compile(write_checkpoint(world.root / "model", 1))
    same = CompileOptions(str(bundle.root), dtype="bf16", isa=bundle.manifest.isa)  # type: ignore[arg-type]
    assert compile_model(same) == bundle
    asked = replace(CompileOptions(str(bundle.root)), **changes)  # type: ignore[arg-type]
    for open_it in (compile_model, _find_bundle, look):
        with pytest.raises(UsageError, match=told):
            open_it(asked)


def test_pin_of_a_compiled_model(world: World) -> None:
    model = write_checkpoint(world.root / "model", 1)
    pin = world.compile(model).manifest_sha256
    assert world.compile(model, bundle_sha256=pin).manifest_sha256 == pin
    (model / "weights.safetensors").write_bytes(b"\2" * fakes.WEIGHT_BYTES)
    with pytest.raises(BundleError, match="--bundle-sha256"):
        world.compile(model, bundle_sha256=pin)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantization": "int3"}, "'int3' is not supported; supported: int8, int4"),
        ({"quantization": "int8", "quant_group": 48}, "--quant-group 48.*0, 32, 64, 128"),
        ({"quantization": "int8", "act_dtype": "fp4"}, "--act-dtype 'fp4'.*int8, bf16 or fp8"),
        ({"quantization": "fp8"}, "--quantization fp8 is not.*--target cpu.*give int8"),
        ({"act_dtype": "fp8"}, "--act-dtype fp8 goes with fp8 weights"),
        ({"quant_group": 32}, "--quant-group says how.*--quantization"),
        ({"quantization": "int4", "act_dtype": "bf16", "dtype": "fp32"}, "--act-dtype bf16.*fp32"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 is for a GPU.*int8"),
        ({"kv_cache_dtype": "fp4"}, "--kv-cache-dtype 'fp4' is not.*auto, bf16, int8, fp8"),
        ({"kv_cache_dtype": "bf16", "dtype": "fp32"}, "--kv-cache-dtype bf16.*auto or int8"),
        ({"target": "tpu"}, "'tpu' is not supported; supported: cpu, gfx942"),
        ({"vendor_gemm": True}, "--vendor-gemm is for a GPU; give its --target"),
        ({"dtype": "fp16"}, "'fp16' is not supported; supported: auto, bf16, fp32"),
        ({"load_format": "pickle"}, "auto or dummy"),
        ({"isa": "sse9"}, "sse9.*avx512bf16"),
        ({"max_model_len": 0}, "--max-model-len 0"),
        ({"bundle_sha256": "abc"}, "64 hexadecimal"),
        ({"dump_dir": Path("/dev/null/x")}, "--dump-dir"),
    ],
)
def test_bad_options_are_refused_by_name(
    world: World, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        world.compile(write_checkpoint(world.root / "model", 1), **changes)


def test_max_model_len_beyond_the_checkpoint() -> None:
    options = CompileOptions("m", max_model_len=129)
    with pytest.raises(UsageError, match=r"--max-model-len 129 .* 128 positions of m"):
        compiler.model_len(options, fakes.config())
