"""The environment variables SinterLM reads, and a word about those it does not know.

Kubernetes sets variables such as SINTERLM_SERVICE_HOST and SINTERLM_PORT_8000_TCP for a service of
that name; they are told by name and value, and ignored.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping

from sinterlm.errors import UsageError

PREFIX = "SINTERLM_"

#: Every variable there is, and what it does.
VARIABLES: dict[str, str] = {
    "SINTERLM_API_KEY": "one more key that clients of `sinterlm serve` may send",
    "SINTERLM_CACHE_DIR": "folder of compiled code and packed weights (default ~/.cache/sinterlm)",
    "SINTERLM_CXX": "C++ compiler to use, with arguments if any (default: the first one found)",
    "SINTERLM_DEBUG": "1 = the command line shows the traceback of an error",
    "SINTERLM_GPU_DRIVER": "driver library of a GPU (default: libamdhip64.so or libcuda.so.1)",
    "SINTERLM_ISA": "ISA level to build for (default: the widest this machine has)",
    "SINTERLM_NUM_THREADS": "threads of the model (default: the CPUs this process may use)",
    "SINTERLM_QUANTIZATION": "inside vLLM: int8 or int4, codes that weights are stored in",
    "SINTERLM_SERVER_DEV_MODE": "1 = serve what only development needs: /reset_prefix_cache",
    "SINTERLM_VENDOR_GEMM": "hipBLASLt's or cuBLASLt's library (default: the one that is found)",
    "SINTERLM_VLLM": "inside vLLM: off (default), on, or require = no fallback to its own models",
    "SINTERLM_VLLM_COUNTERS": "inside vLLM: set by the plugin for the processes that vLLM starts",
}

_SERVICE_NUMBER = re.compile(r"SINTERLM(_[A-Z0-9_]+)?_SERVICE_PORT(_[A-Z0-9_]+)?")
_SERVICE_HOST = re.compile(r"SINTERLM(_[A-Z0-9_]+)?_SERVICE_HOST")
_PORT_URL = re.compile(r"SINTERLM(_[A-Z0-9_]+)?_PORT(_\d+_(TCP|UDP|SCTP))?")
_PORT_PART = re.compile(r"SINTERLM(_[A-Z0-9_]+)?_PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)")


def is_injected(name: str, value: str) -> bool:
    """Whether Kubernetes sets such a variable for a service called ``sinterlm`` (or -something).

    ``SINTERLM_PORT=8000`` is not one: there the value is a URL such as ``tcp://10.0.0.1:8000``.
    """
    if _SERVICE_HOST.fullmatch(name) or _PORT_PART.fullmatch(name):
        return True
    if _SERVICE_NUMBER.fullmatch(name):
        return value.isdigit()
    url = re.match(r"(tcp|udp|sctp)://", value)
    return url is not None and _PORT_URL.fullmatch(name) is not None


def check_environment(environ: Mapping[str, str] | None = None) -> list[str]:
    """One line for each ``SINTERLM_*`` variable that nothing reads, by name; never an error."""
    env = os.environ if environ is None else environ
    known = {name.removeprefix(PREFIX): name for name in sorted(VARIABLES)}
    lines = []
    for name in sorted(env):
        if not name.startswith(PREFIX) or name in VARIABLES or is_injected(name, env[name]):
            continue
        close = difflib.get_close_matches(name.removeprefix(PREFIX), known, n=1)
        guess = f"did you mean {known[close[0]]}?" if close else ""
        hint = guess or f"known: {', '.join(known.values())}"
        lines.append(f"{name} is set, and SinterLM reads no such variable; {hint}")
    return lines


def env_int(name: str, environ: Mapping[str, str] | None = None, least: int = 1) -> int | None:
    """The variable as a whole number; None when unset or empty. Raises UsageError."""
    text = (os.environ if environ is None else environ).get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise UsageError(f"{name}={text!r} must be a whole number, {least} or more")
    return int(text)


def env_text(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """The variable stripped of blanks; None when unset or empty."""
    return (os.environ if environ is None else environ).get(name, "").strip() or None
