"""Every knob, as frozen dataclasses. CLI flags and ``LLM`` keywords derive from these fields.

Names and meanings follow vLLM where the meaning is the same. ``None`` and ``"auto"`` mean "chosen
by SinterLM"; resolving one yields a new object through ``dataclasses.replace``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DTypeName = Literal["bf16", "fp32"]
IsaName = Literal["amx", "avx512bf16", "avx512", "avx2", "generic"]
QuantizationName = Literal["int8", "int4", "fp8"]
ActDTypeName = Literal["int8", "bf16", "fp8"]
KvCacheDTypeName = Literal["auto", "bf16", "int8", "fp8"]

#: Weights along k that may share a scale; 0 = all of an output channel.
QUANT_GROUPS = (0, 32, 64, 128)
#: How many do where nothing is asked for, by the bits of a code.
DEFAULT_QUANT_GROUP = {8: 128, 4: 32}

#: ISA levels from widest to narrowest; the first one the machine has is the default.
ISA_LEVELS: tuple[IsaName, ...] = ("amx", "avx512bf16", "avx512", "avx2", "generic")

#: Accepted spellings of ``--dtype``; the values are what the rest of the code sees.
DTYPE_SPELLINGS: dict[str, Literal["auto", "bf16", "fp32"]] = {
    "auto": "auto",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp32": "fp32",
    "float32": "fp32",
    "float": "fp32",
}

#: Accepted spellings of ``--kv-cache-dtype``, vLLM's among them.
KV_CACHE_DTYPE_SPELLINGS: dict[str, KvCacheDTypeName] = {
    "auto": "auto",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "int8": "int8",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
}


@dataclass(frozen=True)
class CompileOptions:
    """What decides the bytes of a bundle."""

    model: str  #: HF directory, ``.gguf`` file, Hub id, ``smollm2``, or a named config (dummy only)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  #: auto = bf16
    quantization: QuantizationName | None = None  #: codes that matrices are stored in; None = dtype
    quant_group: int | None = None  #: one of QUANT_GROUPS; None = 128 for int8, 32 for int4
    #: GEMM operands beside coded weights; None = int8, on a GPU bf16.
    act_dtype: ActDTypeName | None = None
    #: What KV pages hold; auto = dtype, int8 = codes with a scale per token and KV head (CPU),
    #: fp8 = e4m3 with two scales per layer, the checkpoint's or 1 (GPU).
    kv_cache_dtype: KvCacheDTypeName = "auto"
    target: str = "cpu"
    isa: IsaName | None = None  #: None = the widest level this machine has
    #: Tile table of a GPU; None = the one that ``sinterlm tune`` left in the cache, or the shipped.
    tiles: Path | None = None
    #: A GPU's steps of 256 tokens and more multiply bf16 matrices by hipBLASLt or cuBLASLt, whose
    #: bits depend on the batch.
    vendor_gemm: bool = False
    load_format: Literal["auto", "dummy"] = "auto"  #: dummy = seeded random weights
    seed: int = 0  #: seed of the dummy weights
    max_model_len: int | None = None  #: tokens; None = the checkpoint's own maximum
    revision: str | None = None  #: Hub revision
    cache_dir: Path | None = None  #: None = $SINTERLM_CACHE_DIR or ~/.cache/sinterlm
    dump_dir: Path | None = None  #: write the graph after each pass and the generated source here
    code_only: bool = False  #: no weights: a library and its manifest, from a config alone
    bundle_sha256: str | None = None  #: refuse any bundle whose manifest has another digest
    #: Ranks that share heads and intermediate columns out, and which of them the bundle is for; a
    #: host that sums over the ranks, such as vLLM, runs it.
    tensor_parallel_size: int = 1
    tensor_parallel_rank: int = 0


@dataclass(frozen=True)
class EngineOptions:
    """What decides how a bundle is run."""

    max_model_len: int | None = None  #: tokens; None = the bundle's
    max_num_seqs: int = 64  #: sequences per step
    max_num_batched_tokens: int = 512  #: token budget of one step (chunked prefill)
    #: Prefill tokens of a step in which something decodes; None = 256, or 512 with AMX.
    max_mixed_prefill_tokens: int | None = None
    num_scheduler_steps: int = 8  #: decode steps in one native call, offline and when nothing waits
    enable_prefix_caching: bool = True  #: share the KV pages of equal beginnings
    num_speculative_tokens: int = 0  #: tokens guessed per sequence and step; 0 = no speculation
    prompt_lookup_min: int = 2  #: shortest run of tokens that is looked up for a guess
    prompt_lookup_max: int = 4  #: longest
    kv_cache_memory_bytes: int | None = None  #: None = from what the cgroup leaves free
    #: Instead of bytes: a share of the memory that weights and working buffers leave; None = 0.9.
    kv_cache_memory_fraction: float | None = None
    #: On a GPU, instead of bytes: the share of its memory that weights, working buffers and the KV
    #: cache have together; None = 0.9.
    gpu_memory_utilization: float | None = None
    block_size: int = 64  #: tokens per KV page, a multiple of 16
    num_threads: int | None = None  #: None = the CPUs this process may use
    #: Pin worker i to cpu_ids[i]; None = pinned when there is one worker for every CPU.
    cpu_ids: tuple[int, ...] | None = field(default=None)
    seed: int = 0  #: base seed for requests that give none


@dataclass(frozen=True)
class ServeOptions:
    """What decides how an engine is served over HTTP. ``serve.settings`` judges the values."""

    host: str = "127.0.0.1"  #: address to listen on; 0.0.0.0 or :: = every interface
    port: int = 8000  #: 0 = one the system picks
    root_path: str = ""  #: prefix a reverse proxy strips before a request reaches us
    #: Names the model answers to, the first one is told to clients; () = MODEL as it was given.
    served_model_name: tuple[str, ...] = ()

    #: A request needs one of these as bearer token or basic-auth password; () = anyone may ask.
    api_key: tuple[str, ...] = ()
    allow_unauthenticated_metrics: bool = False  #: /metrics needs no key
    allow_unauthenticated_page: bool = False  #: the page's files need no key; its figures do
    allowed_origins: tuple[str, ...] = ()  #: browser origins that may call; ("*",) = all
    ssl_certfile: Path | None = None  #: PEM, with its chain; given = HTTPS
    ssl_keyfile: Path | None = None  #: PEM; None = the key is in ssl_certfile
    ssl_ca_certs: Path | None = None  #: PEM of the authorities that client certificates come from
    ssl_cert_reqs: int = 0  #: client certificate: 0 not asked for, 1 optional, 2 required

    max_waiting: int = 512  #: requests that may wait for the engine; one more gets a 429
    #: Tokens that a stream gets together: decode steps in one native call when nothing waits.
    #: None = as many as take 33 ms, at most num_scheduler_steps.
    stream_interval: int | None = None
    max_body_bytes: int = 16 << 20  #: longest request body; a longer one gets a 413
    #: Seconds from a request's arrival to its end; then it is ended with a 408 (or an error event).
    request_timeout: float | None = None
    read_timeout: float = 30.0  #: seconds a client has for its head, and then again for its body
    send_timeout: float = 60.0  #: seconds a client may leave its answer unread; then it is dropped
    keep_alive_timeout: float = 5.0  #: seconds an idle connection is kept
    shutdown_timeout: float = 30.0  #: seconds that running requests get once told to stop

    unknown_fields: Literal["error", "warn"] = "error"  #: fields of a body that nothing reads
    chat_template: Path | None = None  #: jinja file used instead of the model's own template
    trust_request_chat_template: bool = False  #: a request may bring a template of its own
    #: A name of ``serve.parsers.TOOL_PARSERS``; auto = by the chat template; none = no parsing.
    tool_call_parser: str = "auto"
    #: A name of ``serve.parsers.REASONING_PARSERS``; auto = by the chat template; none = none.
    reasoning_parser: str = "auto"
    #: ``tool_choice: auto`` works wherever there is a tool parser; True = refuse to start without.
    enable_auto_tool_choice: bool = False
    measure_roof: bool = False  #: measure the machine's peaks at start, to hold ops against them
    dev_mode: bool = False  #: also serve what is unsafe in production: /reset_prefix_cache

    log_format: Literal["text", "json"] = "text"  #: of the log: key=value, or one object per line
    log_file: Path | None = None  #: append the log here; None = stderr
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_prompts: bool = False  #: a request's log line holds its prompt's text
    access_log: bool = False  #: also one line per HTTP response, /health and /metrics included
