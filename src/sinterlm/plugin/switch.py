"""What the environment asks of the plugin: SINTERLM_VLLM and SINTERLM_QUANTIZATION."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast, get_args

from sinterlm.artifact.env import env_text
from sinterlm.errors import UsageError
from sinterlm.options import QuantizationName

Switch = Literal["off", "on", "require"]


#: What the plugin stores weights in, on every target.
CODES: tuple[QuantizationName, ...] = ("int8", "int4")


def read_switch() -> Switch:
    """``off`` (the default), ``on``, or ``require``: an error where vLLM's own class would be
    used. Raises UsageError."""
    given = env_text("SINTERLM_VLLM") or "off"
    if given not in get_args(Switch):
        raise UsageError(f"SINTERLM_VLLM={given!r} is none of {', '.join(get_args(Switch))}")
    return cast(Switch, given)


def read_quantization() -> QuantizationName | None:
    """Codes that the weights are stored in; None = the dtype of vLLM. Raises UsageError."""
    given = env_text("SINTERLM_QUANTIZATION")
    if given not in (None, *CODES):
        raise UsageError(f"SINTERLM_QUANTIZATION={given!r} is none of {', '.join(CODES)}")
    return given


def bound_cpus(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The CPUs that vLLM binds this worker's OpenMP threads to, from the variables it sets for the
    OpenMP that is loaded; None where it binds none. The affinity of the main thread says less: once
    OpenMP has begun, it is one CPU."""
    affinity = environment.get("KMP_AFFINITY", "")
    if "proclist=[" in affinity:
        return _numbers(affinity.partition("proclist=[")[2].partition("]")[0])
    if environment.get("GOMP_CPU_AFFINITY"):
        return _numbers(environment["GOMP_CPU_AFFINITY"])
    places = environment.get("OMP_PLACES", "")
    return _numbers(places.strip("{}")) if places.startswith("{") else None


def _numbers(text: str) -> tuple[int, ...] | None:
    words = text.replace(",", " ").split()
    return tuple(map(int, words)) if words and all(word.isdigit() for word in words) else None
