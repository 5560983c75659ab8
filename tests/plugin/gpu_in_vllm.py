"""vLLM's engine, scheduler and KV cache on a CPU, with our model class believing that it has a GPU,
whose memory is torch's on the CPU, and whose kernels a driver of no device runs. Run with the
Python of a vLLM, by test_gpu_in_vllm.py.

    ENV/bin/python -m tests.plugin.gpu_in_vllm MODEL DRIVER < PROMPTS

PROMPTS is a JSON list of lists of token ids. The last line printed is JSON: the greedy tokens of
every answer, again from the prefix cache, the driver's faults, and the kernels that ran.
"""

from __future__ import annotations

import bisect
import ctypes
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams

from sinterlm.artifact.bundle import Bundle
from sinterlm.backends.gpu.devices import DEVICES
from sinterlm.backends.gpu.library import archive_of
from sinterlm.backends.gpu.objects import read_archive
from sinterlm.plugin import models
from sinterlm.plugin.support import Accelerator
from sinterlm.plugin.torch_device import TorchMemory
from tests.gpu.recording import RecordingDriver

TARGET = "gfx942"
MAX_TOKENS = 12


@dataclass
class InProcess(RecordingDriver):
    """Memory of the device is also all that this process has mapped, which is torch's."""

    mapped: list[tuple[int, int]] = field(default_factory=list)

    def bytes_from(self, address: int, size: int = 0) -> np.ndarray:
        for base, array in self.memory.items():
            if base <= address < base + array.nbytes:
                return super().bytes_from(address, size)
        start, end = self._mapping(address)
        assert start <= address < end, f"{address:#x} is not mapped"
        return np.frombuffer((ctypes.c_uint8 * (end - address)).from_address(address), np.uint8)

    def _mapping(self, address: int) -> tuple[int, int]:
        for _ in range(2):
            at = bisect.bisect_right(self.mapped, (address, sys.maxsize)) - 1
            if at >= 0 and address < self.mapped[at][1]:
                return self.mapped[at]
            self.mapped = []
            for line in Path("/proc/self/maps").read_text().splitlines():
                span, rights, *_ = line.split()
                if rights.startswith("rw"):
                    first, last = (int(n, 16) for n in span.split("-"))
                    self.mapped.append((first, last))
        return 0, 0


def main() -> None:
    """Answer every prompt twice."""
    model, path = sys.argv[1:]
    prompts: Any = [{"prompt_token_ids": ids} for ids in json.load(sys.stdin)]
    drivers: list[InProcess] = []

    class CpuMemory(TorchMemory):
        def __init__(self, device: str) -> None:
            super().__init__("cpu")

        def stream(self) -> int:
            return stream

    class KnownBundle(models.GpuModel):
        def __init__(self, bundle: Bundle, config: Any, memory: Any) -> None:
            nonlocal stream
            table, objects = read_archive(archive_of(bundle.library_path.read_bytes()))
            kernels = [(o.kernel, o.code) for o in objects]
            driver = InProcess(DEVICES[TARGET], table, kernels)
            driver.attach(Path(path))
            stream = driver.stream()
            drivers.append(driver)
            super().__init__(bundle, config, memory)

    stream = 0
    models.GpuModel, models.TorchMemory = KnownBundle, CpuMemory  # type: ignore[misc]
    models.find_accelerator = lambda config: Accelerator(TARGET, "no device", 0)
    models._triton_attention = dict  # the backend of vLLM's CPUs: same metadata, KV by strides
    llm = LLM(
        model, dtype="bfloat16", max_model_len=64, max_num_seqs=4, enforce_eager=True,
        max_num_batched_tokens=MAX_TOKENS, kv_cache_memory_bytes=16 << 20, block_size=32,
        skip_tokenizer_init=True,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    first, again = llm.generate(prompts, params), llm.generate(prompts, params)
    (driver,) = drivers
    tokens = [[list(a.outputs[0].token_ids) for a in answers] for answers in (first, again)]
    ran = Counter(launched.kernel.name for launched in driver.trace)
    facts = {"tokens": tokens[0], "again": tokens[1], "faults": driver.faults, "ran": ran}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
