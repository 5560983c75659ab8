"""SafetensorsCheckpoint: a Hugging Face directory with one or many safetensors files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sinterlm.artifact.text import TextAssets
from sinterlm.errors import CheckpointError
from sinterlm.frontend.checkpoint import DIGEST_CHUNK, Checkpoint
from sinterlm.frontend.coded_tensors import CodedTensor, fold_coded
from sinterlm.frontend.decoder import EMBED, LM_HEAD
from sinterlm.frontend.fields import Fields, read_json
from sinterlm.frontend.hf_config import read_config, with_tensors
from sinterlm.frontend.hf_text import read_text_assets
from sinterlm.frontend.kv_scales import fold_kv_scales, read_kv_scales
from sinterlm.frontend.numeric import INTEGERS, STORAGE, Array, ReadDType, convert
from sinterlm.frontend.quantization_config import read_quantization
from sinterlm.frontend.weights import MappedFiles, StoredTensor, check_floats, find_shards
from sinterlm.ir.graph import DecoderConfig
from sinterlm.ir.quant import CodedMatrix, GemmFormat


def read_directory_config(
    directory: Path, max_model_len: int | None = None
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Config of a directory and the contents of its ``config.json``. Raises CheckpointError."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; a Hugging Face directory needs config.json beside the weights"
        )
    data = read_json(path)
    return read_config(data, max_model_len, what=str(path)), data


class SafetensorsCheckpoint(Checkpoint):
    """A directory of safetensors. Opening it checks headers and config, not the weights.

    Where the config ties the embeddings and the files hold an ``lm_head.weight`` too, the two are
    compared: equal values are tied, different values are not (as transformers does).
    """

    def __init__(
        self, directory: Path, *, name: str | None = None, max_model_len: int | None = None
    ) -> None:
        self.path = directory
        self.name = name or directory.resolve().name
        config, self._config_json = read_directory_config(directory, max_model_len)
        self._stored, self.files = find_shards(directory)
        self._coded: dict[str, CodedTensor] = {}
        self._quantization = read_quantization(Fields(self._config_json, "config.json"))
        if self._quantization is not None:
            self._stored, self._coded = fold_coded(self._stored, self._quantization)
        self._stored, self._kv_scales = fold_kv_scales(self._stored, config.num_layers)
        check_floats(self._stored)
        self.is_quantised = bool(self._coded)
        self._maps = MappedFiles()
        self.tensors = {name: held.info for name, held in (self._stored | self._coded).items()}
        config = with_tensors(config, self.tensors)
        if config.tie_word_embeddings and not self._can_tie():
            config = replace(config, tie_word_embeddings=False)
        self.config = config

    @cached_property
    def _assets(self) -> TextAssets:
        assert self.path is not None
        return read_text_assets(self.path, self._config_json)

    @property
    def text(self) -> TextAssets:
        """Tokenizer, chat template and defaults beside the weights."""
        return self._assets

    def read(self, name: str, dtype: ReadDType) -> Array:
        """See Checkpoint.read; bf16 read as bf16 is a view of the file, codes become floats."""
        info = self._info(name)
        if name in self._coded:
            floats = self._coded[name].read(name, self._elements).floats()
            return convert(floats, "fp32", dtype)
        return convert(self._elements(self._stored[name]), info.dtype, dtype)

    @cached_property
    def _formats(self) -> dict[str, GemmFormat]:
        found = {name: coded.format(self._elements) for name, coded in self._coded.items()}
        return {name: form for name, form in found.items() if form is not None}

    @property
    def stored_formats(self) -> dict[str, GemmFormat]:
        """See Checkpoint.stored_formats."""
        return dict(self._formats)

    def read_coded(self, name: str, form: GemmFormat) -> CodedMatrix | None:
        """See Checkpoint.read_coded."""
        if not self.keeps(name, form):
            return None
        found = self._coded[name].read(name, self._elements).coded(form.group)
        return found.written_as(form.code)

    def kv_scales(self) -> tuple[tuple[float, float], ...]:
        """See Checkpoint.kv_scales."""
        return read_kv_scales(self._kv_scales, self.config.num_layers, self._elements)

    def close(self) -> None:
        """Drop the file maps."""
        self._maps.close()

    def _raw(self, stored: StoredTensor) -> Array:
        return self._maps.bytes_at(stored.file, stored.offset, stored.info.nbytes)

    def _elements(self, stored: StoredTensor) -> Array:
        """A tensor's elements in its shape, as stored."""
        kind = (STORAGE | INTEGERS)[stored.info.dtype]
        return self._raw(stored).view(kind).reshape(stored.info.shape)

    def _stored_bytes(self, name: str) -> Iterator[memoryview]:
        coded = self._coded.get(name)
        for stored in coded.parts.values() if coded else (self._stored[name],):
            yield from self._maps.pieces(stored.file, stored.offset, stored.info.nbytes)

    def _digest_prefix(self) -> str:
        """What codes mean is told by quantization_config."""
        return f"tensors {self._quantization}" if self._coded else super()._digest_prefix()

    def _can_tie(self) -> bool:
        """Whether a head that is there as well equals the embedding, byte for byte."""
        if EMBED in self._coded or LM_HEAD in self._coded:
            return LM_HEAD not in self.tensors
        embed, head = self._stored.get(EMBED), self._stored.get(LM_HEAD)
        if embed is None or head is None:
            return True  # nothing to compare; a missing embedding is reported by check_tensors
        if embed.info != head.info:
            return False
        a, b = self._raw(embed), self._raw(head)
        return all(
            bool((a[i : i + DIGEST_CHUNK] == b[i : i + DIGEST_CHUNK]).all())
            for i in range(0, a.size, DIGEST_CHUNK)
        )
