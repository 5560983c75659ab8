"""A tiny model of each architecture from config.json on: the launch table, run by the simulator,
against the CPU's library with the same weights, through prefill and 32 decode steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sinterlm import compile as compiler
from sinterlm.artifact.progress import LogProgress
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.launch import launch_table
from sinterlm.backends.gpu.simulator import Part, Simulator
from sinterlm.options import CompileOptions
from sinterlm.passes.packing import packed_chunks
from sinterlm.runtime.model import Model
from tests.gpu.host import PAGES, PROMPTS, batch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("triton")]

BASE = {
    "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "vocab_size": 150, "rope_theta": 10000.0, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


def heads(query: int, kv: int, dim: int) -> dict[str, int]:
    return {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": dim}


MODELS: dict[str, dict[str, object]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **heads(4, 1, 32),
              "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 32}},
    "llama-tied": {"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                   **heads(2, 2, 64), "tie_word_embeddings": True, "mlp_bias": True},
    "mistral-window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral",
                       **heads(8, 1, 32), "sliding_window": 12},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **heads(5, 1, 64)},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **heads(7, 1, 64)},
}  # fmt: skip
#: Of the largest logit: what rounding to bf16 at other places leaves, of random weights.
BOUND = 2e-2


@pytest.mark.parametrize(
    ("name", "target"), [(name, ("gfx942", "sm_90")[i % 2]) for i, name in enumerate(MODELS)]
)
def test_the_cpus_logits(name: str, target: str, tmp_path: Path, test_environment: Path) -> None:
    """Three sequences, drawn greedily by the CPU; greedy tokens equal wherever margins allow."""
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **MODELS[name]}))
    options = {"model": str(tmp_path), "load_format": "dummy", "dtype": "bf16",
               "max_model_len": 64, "cache_dir": test_environment}  # fmt: skip
    simulator = open_simulator(CompileOptions(target=target, **options), target)
    bundle = compiler.compile_model(CompileOptions(**options))
    given = {"max_tokens": 16, "max_seqs": 4, "max_sample_rows": 4, "max_model_len": 64}
    texts = {seq: list(tokens) for seq, tokens in PROMPTS.items()}
    parts = [(seq, 0, tokens) for seq, tokens in texts.items()]
    with Model(bundle, num_threads=1, num_slots=4, **given) as model:
        model.alloc_kv(16, 16)
        for _ in range(1 + 32):
            want = model.step(batch(*parts))
            found = simulator.step(*(Part(PAGES[s], at, t, slot=s) for s, at, t in parts))
            assert want.logits is not None
            bound = BOUND * np.abs(want.logits).max()
            assert np.abs(found.logits - want.logits).max() <= bound
            best = np.sort(want.logits)[:, -2:]
            assert np.all((found.ids == want.tokens) | (best[:, 1] - best[:, 0] <= bound))
            for seq, token in zip(texts, want.tokens.tolist(), strict=True):
                texts[seq].append(token)
            parts = [(seq, len(text) - 1, text[-1:]) for seq, text in texts.items()]
    assert len({tuple(text[-32:]) for text in texts.values()}) == 3


def open_simulator(options: CompileOptions, target: str) -> Simulator:
    """Of the launch table and the weights that compiling would write."""
    job = compiler.resolve(options, LogProgress())
    with compiler.read(job) as checkpoint:
        plan = compiler.plan_model(job, checkpoint)
        packed = np.zeros(plan.layout.nbytes, np.uint8)
        readers = checkpoint.read, checkpoint.read_exact, checkpoint.read_coded
        for offset, chunk in packed_chunks(plan.layout, *readers):
            packed[offset : offset + chunk.nbytes] = np.frombuffer(chunk, np.uint8)
    table = launch_table(plan, DEVICES[target])
    return Simulator(table, packed, plan.graph.config.rope)
