"""A vLLM that lacks what ours lean on keeps its own classes, and the log says what it lacks."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sinterlm import plugin
from sinterlm.errors import UsageError
from sinterlm.plugin import choice


@dataclass
class Context:
    attn_metadata: Any


@dataclass
class Metadata:
    num_actual_tokens: int
    query_start_loc: Any
    seq_lens: Any
    block_table: Any


@dataclass
class GpuMetadata:
    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Any
    seq_lens: Any
    block_table: Any
    slot_mapping: Any


class Attention:
    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int,
                 cache_config: Any = None, prefix: str = "", attn_backend: Any = None
                 ) -> None:  # fmt: skip
        """Takes what vLLM's takes."""


class Stock:
    pass


class Ours:
    pass


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """A vLLM with just what is needed, and our classes."""
    contents = {
        "vllm.logger": {"init_logger": print},
        "vllm.distributed.parallel_state": {"get_tp_group": print},
        "vllm.forward_context": {"get_forward_context": print, "ForwardContext": Context},
        "vllm.model_executor.layers.attention": {"Attention": Attention},
        "vllm.platforms": {"current_platform": SimpleNamespace(device_type="cpu")},
        "vllm.v1.attention.backends.cpu_attn": {"CPUAttentionMetadata": Metadata},
        "vllm.v1.attention.backends.triton_attn": {
            "TritonAttentionBackend": print,
            "TritonAttentionMetadata": GpuMetadata,
        },
        "vllm.model_executor.models.llama": {"LlamaForCausalLM": Stock},
        "sinterlm.plugin.models": {"SinterLlamaForCausalLM": Ours},
    }
    made = {}
    for name, attributes in contents.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(attributes)
        monkeypatch.setitem(sys.modules, name, made[name])
    monkeypatch.setenv("SINTERLM_VLLM", "on")
    return made


def chosen() -> Any:
    return choice.__getattr__("SinterLlamaForCausalLM")


def test_ours_where_all_is_there(fakes: dict[str, ModuleType]) -> None:
    assert choice.absent() is None
    assert chosen() is Ours


def test_vllms_where_a_function_is_gone(
    fakes: dict[str, ModuleType], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    del vars(fakes["vllm.forward_context"])["get_forward_context"]
    assert chosen() is Stock
    assert "lacks vllm.forward_context.get_forward_context" in caplog.text
    monkeypatch.setenv("SINTERLM_VLLM", "require")
    with pytest.raises(UsageError, match="get_forward_context"):
        chosen()


def test_vllms_where_a_field_a_parameter_or_a_module_is_gone(
    fakes: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    vars(fakes["vllm.v1.attention.backends.cpu_attn"])["CPUAttentionMetadata"] = Context
    assert "CPUAttentionMetadata, its field num_actual_tokens" in (choice.absent() or "")
    vars(fakes["vllm.model_executor.layers.attention"])["Attention"] = Stock
    assert "Attention, its parameter num_heads" in (choice.absent() or "")
    monkeypatch.setitem(sys.modules, "vllm.logger", None)  # Python's mark of no such module
    assert "vllm.logger (" in (choice.absent() or "")
    assert chosen() is Stock


def test_on_a_gpu_other_things_are_needed(
    fakes: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    vars(fakes["vllm.platforms"])["current_platform"] = SimpleNamespace(device_type="cuda")
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.cpu_attn", None)
    assert chosen() is Ours
    vars(fakes["vllm.v1.attention.backends.triton_attn"])["TritonAttentionMetadata"] = Metadata
    assert "TritonAttentionMetadata, its field max_query_len" in (choice.absent() or "")


def test_every_architecture_has_a_class_to_fall_back_to() -> None:
    assert set(plugin.ARCHITECTURES.values()) == set(choice._STOCK)
    for architecture, name in plugin.ARCHITECTURES.items():
        assert name == f"Sinter{architecture}"
    with pytest.raises(AttributeError):
        choice.__getattr__("Other")
