"""An LLM on a FakeModel: everything but the compiler, the files and the library is real."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sinterlm.artifact.manifest import ModelShape, OpCost, kv_token_bytes
from sinterlm.artifact.text import TextAssets
from sinterlm.engine.llm import LLM
from sinterlm.options import EngineOptions
from tests.engine.fakes import FakeModel
from tests.engine.texts import chat_assets, vocab_size

OPTIONS = EngineOptions(
    max_num_seqs=4, max_num_batched_tokens=32, kv_cache_memory_bytes=1 << 20, block_size=16
)


@dataclass(frozen=True)
class FakeBundle:
    """What LLM reads of a bundle."""

    assets: TextAssets
    max_model_len: int = 128
    has_weights: bool = True
    isa: str = "generic"

    @property
    def manifest(self) -> Any:
        shape = ModelShape("Llama", vocab_size(), 8, 1, 1, 1, 8, 16)
        return SimpleNamespace(
            shape=shape, dtype="fp32", max_model_len=self.max_model_len,
            target="cpu", isa=self.isa, kv_cache_dtype="fp32",
            kv_bytes_per_token=kv_token_bytes(shape, "fp32"),
            weights=SimpleNamespace(nbytes=1000) if self.has_weights else None,
            ops=(OpCost("all", -1, 10**6, 0, 0, 0, 0, 0, 0),),
            constants=SimpleNamespace(windows=()),
            activation_bytes_per_token=64, activation_bytes_per_row=64,
        )  # fmt: skip

    def text(self) -> TextAssets:
        return self.assets


def open_fake(bundle: FakeBundle, **sizes: Any) -> FakeModel:
    assert set(sizes) == {
        "num_threads", "cpu_ids", "max_tokens", "max_seqs", "max_sample_rows", "max_model_len",
    }  # fmt: skip
    return FakeModel(1, 16, bundle.manifest.shape.vocab_size)


def load(assets: TextAssets | None = None, options: EngineOptions = OPTIONS) -> LLM:
    bundle: Any = FakeBundle(assets or chat_assets(add_bos_token=True))
    return LLM.from_bundle(bundle, options, open_model=open_fake)  # type: ignore[arg-type]
