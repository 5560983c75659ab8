"""compile_model over the real frontend and passes; only the emitted source is a stand-in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sinterlm import compile as compiler
from sinterlm.artifact.bundle import Bundle
from sinterlm.compile import compile_model
from sinterlm.errors import UsageError
from sinterlm.frontend.decoder import build_graph
from sinterlm.frontend.source import resolve_model
from sinterlm.ir.plan import Plan
from sinterlm.options import CompileOptions
from sinterlm.passes.packing import pack
from sinterlm.passes.pipeline import plan
from tests.artifact.builders import Recorder

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 70,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def emit(job: compiler.Job, made: Plan) -> str:
    return f'#include "abi.h"\nextern "C" SL_API int ops() {{ return {len(made.graph.ops)}; }}\n'


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "emit", emit)


def write_checkpoint(folder: Path, seed: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "config.json").touch()
    with resolve_model(str(folder), load_format="dummy") as shapes:
        graph = build_graph(shapes.config, "fp32")
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.standard_normal(weight.shape).astype(np.float32)
        for name, weight in graph.weights.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def compile_it(model: object, cache: Path, **changes: object) -> Bundle:
    options = CompileOptions(str(model), isa="generic", cache_dir=cache)
    return compile_model(replace(options, **changes), Recorder())


def test_every_tensor_lands_where_the_layout_says(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", 1)
    bundle = compile_it(model, tmp_path / "cache", dtype="fp32")
    assert bundle.weights_path is not None
    data = bundle.weights_path.read_bytes()
    with resolve_model(str(model)) as checkpoint:
        made = plan(build_graph(checkpoint.config, "fp32"))
        for tensor in made.layout.tensors:
            expected = pack(tensor, checkpoint.read).tobytes()
            assert data[tensor.offset : tensor.offset + tensor.nbytes] == expected
    assert bundle.manifest.layout_hash == made.layout.layout_hash
    assert len(bundle.manifest.ops) == len(made.graph.ops)
    assert bundle.manifest.shape.vocab_size == 70
    assert bundle.manifest.constants.inv_freq == checkpoint.config.rope.inv_freq


def test_fine_tunes(tmp_path: Path) -> None:
    one = compile_it(write_checkpoint(tmp_path / "one", 1), tmp_path / "cache")
    two = compile_it(write_checkpoint(tmp_path / "two", 2), tmp_path / "cache")
    assert one.manifest.code_key == two.manifest.code_key
    assert one.manifest.weights_key != two.manifest.weights_key


def test_a_named_configuration_needs_no_weights(tmp_path: Path) -> None:
    bundle = compile_it("qwen2.5-0.5b", tmp_path / "cache", code_only=True)
    assert bundle.weights_path is None and bundle.manifest.shape.hidden_size == 896
    again = compile_it("qwen2.5-0.5b", tmp_path / "cache", code_only=True)
    assert again == bundle


def test_dummy_weights_depend_on_the_seed(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", 1)
    keys = {
        compile_it(model, tmp_path / "cache", load_format="dummy", seed=s).manifest.weights_key
        for s in (0, 0, 1)
    }
    assert len(keys) == 2


def test_a_changed_config_is_noticed_with_dummy_weights(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", 1)
    first = compile_it(model, tmp_path / "cache", load_format="dummy")
    (model / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 64}))
    second = compile_it(model, tmp_path / "cache", load_format="dummy")
    assert (first.manifest.max_model_len, second.manifest.max_model_len) == (256, 64)


def test_a_context_beyond_the_model(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", 1)
    with pytest.raises(UsageError, match=r"--max-model-len 300 .* 256 positions"):
        compile_it(model, tmp_path / "cache", max_model_len=300)


def test_dump_dir_receives_graph_and_bypasses_the_warm_path(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", 1)
    compile_it(model, tmp_path / "cache")
    compile_it(model, tmp_path / "cache", dump_dir=tmp_path / "dump")
    assert len(list((tmp_path / "dump").iterdir())) >= 3
