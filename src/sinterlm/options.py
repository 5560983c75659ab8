"""Every knob, as frozen dataclasses. CLI flags and ``LLM`` keywords derive from these fields.

Names and meanings follow vLLM where the meaning is the same. ``None`` and ``"auto"`` mean "chosen
by SinterLM"; resolving one yields a new object through ``dataclasses.replace``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DTypeName = Literal["bf16", "fp32"]
IsaName = Literal["avx512bf16", "avx512", "avx2", "generic"]

#: ISA levels from widest to narrowest; the first one the machine has is the default.
ISA_LEVELS: tuple[IsaName, ...] = ("avx512bf16", "avx512", "avx2", "generic")

#: Accepted spellings of ``--dtype``; the values are what the rest of the code sees.
DTYPE_SPELLINGS: dict[str, Literal["auto", "bf16", "fp32"]] = {
    "auto": "auto",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
}


@dataclass(frozen=True)
class CompileOptions:
    """What decides the bytes of a bundle."""

    model: str  #: HF directory, ``.gguf`` file, Hub id, ``smollm2``, or a named config (dummy only)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  #: auto = bf16
    quantization: str | None = None  #: None; int8 and int4 are not built yet and are refused
    target: str = "cpu"
    isa: IsaName | None = None  #: None = the widest level this machine has
    load_format: Literal["auto", "dummy"] = "auto"  #: dummy = seeded random weights
    seed: int = 0  #: seed of the dummy weights
    max_model_len: int | None = None  #: tokens; None = the checkpoint's own maximum
    revision: str | None = None  #: Hub revision
    cache_dir: Path | None = None  #: None = $SINTERLM_CACHE_DIR or ~/.cache/sinterlm
    dump_dir: Path | None = None  #: write the graph after each pass and the generated source here
    code_only: bool = False  #: no weights: a library and its manifest, from a config alone
    bundle_sha256: str | None = None  #: refuse any bundle whose manifest has another digest


@dataclass(frozen=True)
class EngineOptions:
    """What decides how a bundle is run."""

    max_model_len: int | None = None  #: tokens; None = the bundle's
    max_num_seqs: int = 64  #: sequences per step
    max_num_batched_tokens: int = 512  #: token budget of one step (chunked prefill)
    kv_cache_memory_bytes: int | None = None  #: None = from what the cgroup leaves free
    block_size: int = 64  #: tokens per KV page, a multiple of 16
    num_threads: int | None = None  #: None = the CPUs this process may use
    #: Pin worker i to cpu_ids[i]; None = pinned when there is one worker for every CPU.
    cpu_ids: tuple[int, ...] | None = field(default=None)
    seed: int = 0  #: base seed for requests that give none
