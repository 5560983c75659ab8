"""SinterLM: compile a language model into one fused native library, and run it.

    from sinterlm import LLM, SamplingParams

The names below are imported when first used: ``import sinterlm`` alone loads nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sinterlm.engine.llm import LLM
    from sinterlm.engine.outputs import CompletionOutput, RequestOutput
    from sinterlm.engine.sampling import SamplingParams
    from sinterlm.engine.structured import StructuredOutputs

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "__version__",
]

_HOMES = {
    "LLM": "sinterlm.engine.llm",
    "SamplingParams": "sinterlm.engine.sampling",
    "StructuredOutputs": "sinterlm.engine.structured",
    "RequestOutput": "sinterlm.engine.outputs",
    "CompletionOutput": "sinterlm.engine.outputs",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sinterlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
