"""SinterLM inside stock vLLM: an entry point of ``vllm.general_plugins``.

vLLM calls ``register()`` in every process it starts. Unless ``SINTERLM_VLLM`` says otherwise,
nothing happens. Switched on, our classes stand in for vLLM's own of the architectures that we
compile; they are named as text, so that nothing heavy is imported before vLLM needs it.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from sinterlm.errors import UsageError
from sinterlm.plugin.switch import read_switch

#: Minor versions of vLLM whose model, attention and KV interfaces are known.
KNOWN_VERSIONS = ("0.30", "0.31", "0.32")

#: Architecture -> our class.
ARCHITECTURES = {
    "LlamaForCausalLM": "SinterLlamaForCausalLM",
    "MistralForCausalLM": "SinterMistralForCausalLM",
    "Qwen2ForCausalLM": "SinterQwen2ForCausalLM",
    "Qwen3ForCausalLM": "SinterQwen3ForCausalLM",
}

logger = logging.getLogger("vllm.plugins.sinterlm")


def register() -> None:
    """Stand in for vLLM's classes, if switched on. Raises UsageError for a switch or, with
    ``require``, a version of vLLM that is not known."""
    switch = read_switch()
    if switch == "off":
        return
    found = vllm_version()
    if ".".join(found.split(".")[:2]) not in KNOWN_VERSIONS:
        text = f"vLLM {found} is not known to SinterLM (known: {', '.join(KNOWN_VERSIONS)}.x)"
        if switch == "require":
            raise UsageError(f"{text}, and SINTERLM_VLLM=require")
        logger.warning("%s; its own models are used", text)
        return
    from vllm import ModelRegistry

    from sinterlm.plugin.counters import share_counters

    for architecture, name in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"sinterlm.plugin.choice:{name}")
    share_counters()


def vllm_version() -> str:
    """The version of the vLLM that is installed; "none" without one."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return "none"
