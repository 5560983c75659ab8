"""LLM: the Python front. Compiles on first use, loads, and runs prompts; shaped like vLLM's.

The single place of the run side that reaches the compiler. Safe to use from several threads:
calls take turns, ``close`` waits for the one that runs.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from sinterlm.artifact.bundle import Bundle, check_compiled_as, is_bundle, open_bundle
from sinterlm.engine.admission import checked_tokens
from sinterlm.engine.engine import Engine
from sinterlm.engine.gate import Gate
from sinterlm.engine.loading import cpu_ids_from, folder_from, load_bundle
from sinterlm.engine.memory import KvPlan, check_options
from sinterlm.engine.outputs import Delta, RequestOutput
from sinterlm.engine.prompts import (
    Prompt,
    PromptInput,
    TokensPrompt,
    parse_params,
    parse_prompt,
    parse_prompts,
)
from sinterlm.engine.sampling import SamplingParams
from sinterlm.errors import PromptError, ResourceError, UsageError
from sinterlm.options import (
    DTYPE_SPELLINGS,
    KV_CACHE_DTYPE_SPELLINGS,
    ActDTypeName,
    CompileOptions,
    EngineOptions,
    IsaName,
    QuantizationName,
)
from sinterlm.runtime.batch import Float32
from sinterlm.runtime.model import Model

Message = Mapping[str, Any]

_CLOSED = "this LLM is closed; make a new one"


class LLM:
    """A loaded model with its engine.

    ``model`` is whatever ``sinterlm compile`` takes, or the folder of a compiled bundle. The other
    keywords are fields of ``CompileOptions`` and ``EngineOptions``, where each is explained.
    Raises UsageError, CheckpointError, CompileError, BundleError, and ResourceError when memory
    does not suffice, the last before any weight is read.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        quantization: QuantizationName | None = None,
        quant_group: int | None = None,
        act_dtype: ActDTypeName | None = None,
        kv_cache_dtype: str = "auto",
        target: str = "cpu",
        isa: IsaName | None = None,
        tiles: str | Path | None = None,
        vendor_gemm: bool = False,
        load_format: Literal["auto", "dummy"] = "auto",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        bundle_sha256: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = EngineOptions.max_num_seqs,
        max_num_batched_tokens: int = EngineOptions.max_num_batched_tokens,
        max_mixed_prefill_tokens: int | None = EngineOptions.max_mixed_prefill_tokens,
        num_scheduler_steps: int = EngineOptions.num_scheduler_steps,
        enable_prefix_caching: bool = EngineOptions.enable_prefix_caching,
        num_speculative_tokens: int = EngineOptions.num_speculative_tokens,
        prompt_lookup_min: int = EngineOptions.prompt_lookup_min,
        prompt_lookup_max: int = EngineOptions.prompt_lookup_max,
        kv_cache_memory_bytes: int | None = None,
        kv_cache_memory_fraction: float | None = None,
        gpu_memory_utilization: float | None = None,
        block_size: int = EngineOptions.block_size,
        num_threads: int | None = None,
        cpu_ids: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        if dtype not in DTYPE_SPELLINGS:
            raise UsageError(f"dtype={dtype!r} is none of {', '.join(DTYPE_SPELLINGS)}")
        if kv_cache_dtype not in KV_CACHE_DTYPE_SPELLINGS:
            known = ", ".join(KV_CACHE_DTYPE_SPELLINGS)
            raise UsageError(f"kv_cache_dtype={kv_cache_dtype!r} is none of {known}")
        engine_options = EngineOptions(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_mixed_prefill_tokens=max_mixed_prefill_tokens,
            num_scheduler_steps=num_scheduler_steps,
            enable_prefix_caching=enable_prefix_caching,
            num_speculative_tokens=num_speculative_tokens,
            prompt_lookup_min=prompt_lookup_min,
            prompt_lookup_max=prompt_lookup_max,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            kv_cache_memory_fraction=kv_cache_memory_fraction,
            gpu_memory_utilization=gpu_memory_utilization,
            block_size=block_size,
            num_threads=num_threads,
            cpu_ids=cpu_ids_from(cpu_ids),
            seed=seed,
        )
        check_options(engine_options)
        compile_options = CompileOptions(
            model=str(model),
            dtype=DTYPE_SPELLINGS[dtype],
            quantization=quantization,
            quant_group=quant_group,
            act_dtype=act_dtype,
            kv_cache_dtype=KV_CACHE_DTYPE_SPELLINGS[kv_cache_dtype],
            target=target,
            isa=isa,
            tiles=None if tiles is None else Path(tiles),
            vendor_gemm=vendor_gemm,
            load_format=load_format,
            seed=seed,
            max_model_len=max_model_len,
            revision=revision,
            cache_dir=None if cache_dir is None else folder_from("cache_dir", cache_dir),
            bundle_sha256=bundle_sha256,
        )
        self._load(_find_bundle(compile_options), engine_options, Model)

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        options: EngineOptions | None = None,
        *,
        open_model: Callable[..., Model] = Model,
    ) -> LLM:
        """Load an opened bundle. ``open_model`` is called as ``runtime.model.Model`` is."""
        llm = cls.__new__(cls)
        options = options or EngineOptions()
        check_options(options)
        llm._load(bundle, options, open_model)
        return llm

    def _load(
        self, bundle: Bundle, options: EngineOptions, open_model: Callable[..., Model]
    ) -> None:
        loaded = load_bundle(bundle, options, open_model)
        self.bundle = bundle
        self.plan: KvPlan = loaded.plan
        self.tokenizer = loaded.tokenizer
        self.model = loaded.model
        self._engine = loaded.engine
        self._defaults = loaded.defaults
        self._gate = Gate()
        self._request_numbers = itertools.count()
        self._closed = False

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self.plan.max_model_len

    def get_default_sampling_params(self) -> SamplingParams:
        """What ``sampling_params=None`` means: the checkpoint's generation_config.json."""
        return self._defaults

    # -- running ---------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts, all at once; one RequestOutput per prompt, in their order.

        A prompt is a text, ``{"prompt": text}`` or ``{"prompt_token_ids": [...]}``; parameters are
        shared, or one per prompt. ``use_tqdm`` counts on stderr. Raises PromptError, UsageError
        and ResourceError before anything runs. An exception while running, Ctrl-C included, ends
        all of these requests and leaves the LLM usable.
        """
        parsed = parse_prompts(prompts, self.tokenizer)
        return self._run(parsed, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several at once; as ``generate`` otherwise."""
        if isinstance(messages, Mapping):
            raise UsageError("messages must be a list of messages; put the one into a list")
        many = bool(messages) and isinstance(messages[0], list | tuple)
        conversations = messages if many else [messages]
        prompts = [
            self.chat_prompt(
                conversation,  # type: ignore[arg-type]  # told apart by ``many``
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> TokensPrompt:
        """A conversation as a prompt for ``generate`` or ``stream``. Raises UsageError."""
        text = self.tokenizer.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
        )
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    def stream(
        self, prompt: PromptInput, sampling_params: SamplingParams | None = None
    ) -> Generator[Delta, None, None]:
        """Complete one prompt, yielding what each step adds; the last delta has ``.output``.

        The LLM is taken from the first delta to the last: closing the iterator, or dropping it,
        ends the request. Raises as ``generate`` does, for a bad prompt at once.
        """
        parsed = parse_prompt(prompt, self.tokenizer)
        params = parse_params(sampling_params, 1, self._defaults)[0]
        # Checked here as well as at admission: a generator's body runs only when it is read.
        token_ids = checked_tokens(parsed.token_ids, self._engine.limits, room_for=1)
        params.check_vocabulary(self._engine.limits.vocab_size)
        return self._stream(Prompt(token_ids, parsed.text), params)

    def forward_logits(self, token_ids: Iterable[int]) -> Float32:
        """Raw logits [len, vocab] float32: row i is the model's opinion after token i.

        Raises PromptError for bad token ids, ResourceError when the array does not fit.
        """
        vocab_size = self._engine.limits.vocab_size
        ids = checked_tokens(token_ids, self._engine.limits, room_for=0)
        with self._exclusive() as engine:
            try:
                return engine.forward_logits(ids, vocab_size)
            except MemoryError as exc:
                gigabytes = len(ids) * vocab_size * 4 / 1e9
                raise ResourceError(
                    f"logits of {len(ids)} tokens take {gigabytes:.1f} GB; give fewer tokens"
                ) from exc

    def reset_prefix_cache(self) -> None:
        """Forget what the KV pages hold: the next prompts are computed from their beginning."""
        with self._exclusive() as engine:
            engine.reset_prefix_cache()

    # -- serving ---------------------------------------------------------------------------------

    def lend_engine(self) -> Engine:
        """Hand the engine to a server until ``return_engine``; at once, or UsageError if in use.

        Whoever has it may make requests on one thread and step on another. Meanwhile every call of
        this LLM that needs the engine, ``close`` too, raises UsageError instead of waiting.
        """
        self._gate.lend()
        if self._closed:
            self._gate.give_back()
            raise UsageError(_CLOSED)
        return self._engine

    def return_engine(self) -> None:
        """Take the engine back, emptied; for whoever called ``lend_engine``, from any thread."""
        self._engine.reset()
        self._gate.give_back()

    # -- lifetime --------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the model. Waits for a running call; may be called again, and from any thread."""
        if self._gate.is_mine:  # inside an unfinished stream of this thread: end it
            self._close()
        else:
            with self._gate.hold():
                self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._engine.close()
            self.model.close()

    # -- inside ----------------------------------------------------------------------------------

    @contextmanager
    def _exclusive(self) -> Iterator[Engine]:
        """The engine, for this thread alone; emptied if anything goes wrong."""
        with self._gate.hold():
            if self._closed:
                raise UsageError(_CLOSED)
            try:
                yield self._engine
            except BaseException:
                # An interruption can strike between any two lines: nothing half-booked survives.
                self._engine.reset()
                raise

    def _run(
        self,
        prompts: list[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = parse_params(sampling_params, len(prompts), self._defaults)
        finished: dict[str, RequestOutput] = {}
        with self._exclusive() as engine:
            ids = self._add_all(engine, prompts, params)
            most = engine.step_limits.num_scheduler_steps
            while engine.has_unfinished:
                for delta in engine.step(max_steps=most, prompts_first=True):
                    if delta.output is not None:
                        finished[delta.request_id] = delta.output
                        if use_tqdm:
                            _show_progress(len(finished), len(ids))
        return [finished[request_id] for request_id in ids]

    def _stream(self, prompt: Prompt, params: SamplingParams) -> Generator[Delta, None, None]:
        with self._exclusive() as engine:
            self._add(engine, prompt, params, stream=True)
            while engine.has_unfinished:
                for delta in engine.step():
                    yield delta
                    if self._closed:
                        raise UsageError("this LLM was closed while it was being streamed from")

    def _add_all(
        self, engine: Engine, prompts: list[Prompt], params: list[SamplingParams]
    ) -> list[str]:
        ids = []
        for i, (prompt, its_params) in enumerate(zip(prompts, params, strict=True)):
            try:
                ids.append(self._add(engine, prompt, its_params, stream=False))
            except (PromptError, ResourceError) as exc:
                raise type(exc)(f"prompts[{i}]: {exc}" if len(prompts) > 1 else str(exc)) from exc
        return ids

    def _add(self, engine: Engine, prompt: Prompt, params: SamplingParams, *, stream: bool) -> str:
        request_id = str(next(self._request_numbers))
        engine.add_request(request_id, prompt.token_ids, params, prompt=prompt.text, stream=stream)
        return request_id


def _find_bundle(options: CompileOptions) -> Bundle:
    """The bundle of ``options``: the given folder, or what the compiler makes or has made."""
    if is_bundle(options.model):
        bundle = open_bundle(options.model, bundle_sha256=options.bundle_sha256)
        check_compiled_as(bundle.manifest, options)
        return bundle
    from sinterlm.compile import compile_model  # the one crossing, and only when it is needed

    return compile_model(options)


def _show_progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r{done}/{total} prompts", end=end, file=sys.stderr, flush=True)
