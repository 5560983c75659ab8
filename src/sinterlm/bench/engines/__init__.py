"""Engines by the words of ``--engine``, and what installs them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

from sinterlm.bench.engines import llama, vllm
from sinterlm.bench.engines.base import Engine
from sinterlm.bench.engines.environment import Environment
from sinterlm.bench.engines.llama import LlamaServer
from sinterlm.bench.engines.other import Attached, Command, container
from sinterlm.bench.engines.sinterlm import PRECISIONS, SinterLM
from sinterlm.bench.engines.vllm import VLLM
from sinterlm.errors import UsageError

__all__ = ["Home", "engine_of", "install", "names"]

_GGUF = ("bf16", "q8_0", "q4_0")
#: What is added to vLLM, and precisions beside bf16.
_VLLM: dict[str, tuple[vllm.Addition, tuple[str, ...]]] = {
    "vllm": ("", ()),
    "vllm+zentorch": ("zentorch", ()),
    "vllm+sinterlm": ("sinterlm", ("int8", "int4")),
}


@dataclass(frozen=True)
class Home:
    """Where the environments of engines lie, and the CPUs they get."""

    root: Path  #: holds one environment for each engine
    cpu_ids: tuple[int, ...]
    environments: dict[str, Path] = field(default_factory=dict)  #: those that lie elsewhere

    def environment(self, name: str) -> Environment:
        """Of an engine: ``vllm``, ``vllm+zentorch``, ``llama.cpp``, ``ik_llama.cpp``. SinterLM
        inside vLLM lives in the environment of the vLLM that it is compared with."""
        if name == "vllm+sinterlm" and name not in self.environments:
            return self.environment("vllm")
        return Environment(self.environments.get(name, self.root / name))


def names() -> list[str]:
    """Every engine that is known by name."""
    known = [f"sinterlm:{precision}" for precision in PRECISIONS]
    known += ["vllm", "vllm+zentorch"]
    known += ["vllm+sinterlm" + end for end in ("", ":int8", ":int4")]
    return known + [f"{p}:{kind}" for p in ("llama.cpp", "ik_llama.cpp") for kind in _GGUF]


def engine_of(text: str, home: Home) -> Engine:
    """``sinterlm:bf16``, ``vllm``, ``llama.cpp:q8_0``, ``NAME=http://host:port``,
    ``NAME=cmd:COMMAND {port} {hf}`` or ``NAME=docker:IMAGE@sha256:... ARGUMENTS``.

    Raises UsageError for anything else.
    """
    label, equals, rest = text.partition("=")
    if equals:
        return _unknown_engine(label, rest)
    project, _, precision = text.partition(":")
    if project == "sinterlm" and (precision or "bf16") in PRECISIONS:
        return SinterLM(precision or "bf16")
    if project in _VLLM and (precision or "bf16") in ("bf16", *_VLLM[project][1]):
        addition = _VLLM[project][0]
        return VLLM(home.environment(project), home.cpu_ids, addition, precision or "bf16")
    if project in ("llama.cpp", "ik_llama.cpp") and (precision or "bf16") in _GGUF:
        environment = home.environment(project)
        return LlamaServer(project, environment, len(home.cpu_ids), precision or "bf16")
    near = difflib.get_close_matches(text, names(), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(
        f"--engine {text}: {hint}known are {', '.join(names())}, and NAME=http://host:port, "
        "NAME=cmd:..., NAME=docker:IMAGE@sha256:..."
    )


def _unknown_engine(label: str, rest: str) -> Engine:
    if not re.fullmatch(r"[\w.+:-]{1,40}", label):
        raise UsageError(f"--engine {label!r}: a name has letters, digits and . + : - _")
    if rest.startswith(("http://", "https://")):
        return Attached(label, rest.rstrip("/"))
    if rest.startswith("cmd:"):
        return Command(label, rest.removeprefix("cmd:"))
    if rest.startswith("docker:"):
        image, _, arguments = rest.removeprefix("docker:").partition(" ")
        return container(label, image, arguments)
    raise UsageError(f"--engine {label}={rest}: write {label}=http://host:port, cmd:... or docker:")


def install(name: str, home: Home) -> Path:
    """Install an engine into its own environment; where. Raises UsageError, RuntimeFault."""
    environment = home.environment(name)
    if name in _VLLM:
        vllm.install(environment, _VLLM[name][0])
    elif name == "llama.cpp":
        llama.install(environment)
    else:
        raise UsageError(
            f"{name!r} is not installed by us; known are {', '.join(_VLLM)} and llama.cpp"
        )
    return environment.root
