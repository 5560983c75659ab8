"""torch's side of a GPU: what device this process has, its allocator, its stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sinterlm.plugin.gpu import ElementName
from sinterlm.plugin.support import Accelerator

_PIECE = 256 << 20  #: bytes of a file that are copied at once


def find_accelerator(config: Any) -> Accelerator | None:
    """The GPU that ``config``, a VllmConfig, is for, as this process has it; None where it is for
    another kind of device."""
    if config.device_config.device_type != "cuda":  # vLLM's word on AMD as well
        return None
    index = torch.cuda.current_device()
    facts = torch.cuda.get_device_properties(index)
    arch = f"sm_{facts.major}{facts.minor}"
    if torch.version.hip is not None:
        arch = facts.gcnArchName.partition(":")[0]
    return Accelerator(arch, facts.name, index)


class TorchMemory:
    """``DeviceMemory`` of torch: what it hands out counts as torch's own."""

    def __init__(self, device: str) -> None:
        """``device`` as torch names it."""
        self._device = torch.device(device)

    def empty(self, shape: tuple[int, ...], dtype: ElementName) -> Any:
        """A tensor of anything."""
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)

    def zeros(self, shape: tuple[int, ...], dtype: ElementName) -> Any:
        """A tensor of zeros."""
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self._device)

    def read_file(self, path: Path, to: Any) -> None:
        """Copy a file's bytes into a tensor of as many bytes."""
        count = len(to)
        mapped = torch.from_file(str(path), size=count, dtype=torch.uint8, device="cpu")
        for first in range(0, count, _PIECE):
            to[first : first + _PIECE].copy_(mapped[first : first + _PIECE])

    def stream(self) -> int:
        """The handle of torch's current stream; another one while a graph is captured."""
        return int(torch.cuda.current_stream(self._device).cuda_stream)
