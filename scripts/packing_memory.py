"""Memory and time of packing a bf16 checkpoint of a known shape, whose files are almost all holes.

    python scripts/packing_memory.py qwq-32b build/memory --quantization int4 --layers 2 4 8

Shards have real headers and as many bytes as the original's; the first rows of every tensor are
random, the rest reads as zeros and takes no disk. Memory does not depend on what the weights are;
times are not those of a real checkpoint, which has a disk to read. A bundle does take its room on
disk, and is removed when it was measured. Each count of layers is packed in a process of its own.
Linux: residence is read from /proc, while our code packs in this process.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sinterlm.compile import compile_model
from sinterlm.frontend.decoder import build_graph
from sinterlm.frontend.hf_config import read_config
from sinterlm.frontend.named_configs import named_configs
from sinterlm.options import CompileOptions, QuantizationName

SHARD_BYTES = 4_750_000_000
RANDOM_ROWS = 16
STATUS = re.compile(r"^(RssAnon|RssFile):\s+(\d+) kB", re.MULTILINE)


def main() -> None:
    """Make a checkpoint for every count of layers, pack it, print what that took, remove both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=sorted(named_configs()))
    parser.add_argument("folder", type=Path, help="where checkpoint and cache go")
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument(
        "--layers", type=int, nargs="+", help="counts of layers; the model's own unless given"
    )
    args = parser.parse_args()
    if args.layers and len(args.layers) > 1:
        at = sys.argv.index("--layers")
        for count in args.layers:  # what one run leaves in the allocator is not the next one's
            command = [*sys.argv[:at], *sys.argv[at + 1 + len(args.layers) :]]
            subprocess.run([sys.executable, *command, "--layers", str(count)], check=True)
        return
    contents = named_configs()[args.model]
    if args.layers:
        contents["num_hidden_layers"] = args.layers[0]
    checkpoint, cache = args.folder / args.model, args.folder / "cache"
    try:
        write_sparse(checkpoint, contents)
        measure(checkpoint, cache, args.quantization, contents["num_hidden_layers"])
    finally:
        for made in (checkpoint, cache):
            shutil.rmtree(made, ignore_errors=True)


def measure(
    checkpoint: Path, cache: Path, quantization: QuantizationName | None, num_layers: int
) -> None:
    """Pack ``checkpoint`` and print the time and the memory of each stage."""
    options = CompileOptions(model=str(checkpoint), quantization=quantization, cache_dir=cache)
    with Meter() as meter:
        bundle = compile_model(options, meter)
    source = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    packed = bundle.manifest.weights.nbytes if bundle.manifest.weights else 0
    print(f"{checkpoint.name}, {num_layers} layers, {quantization or 'bf16'}:", end=" ")
    print(f"{source / 1e9:.2f} GB -> {packed / 1e9:.2f} GB")
    print("stage                 seconds   anonymous, mapped and both at most, MB")
    for stage in meter.stages:
        anon, mapped, both = (peak / 1e6 for peak in stage.peaks)
        print(
            f"{stage.name:<20} {stage.seconds:8.1f}  {anon:8.0f} {mapped:8.0f} {both:8.0f}",
            flush=True,
        )


def write_sparse(folder: Path, contents: dict[str, Any]) -> None:
    """A checkpoint of the config ``contents`` in ``folder``, in the order of its layers."""
    folder.mkdir(parents=True)
    weights = build_graph(read_config(contents, None, what=folder.name), "bf16").weights
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    at = 0
    for name, weight in weights.items():
        size = 2 * int(np.prod(weight.shape))
        if shards[-1] and at + size > SHARD_BYTES:
            shards.append({})
            at = 0
        shards[-1][name] = weight.shape
        at += size
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(folder / file, shapes, rng)
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(contents))


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    """bf16 tensors of these ``shapes``: some random rows each, then a hole."""
    at = 0
    header: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for name, shape in shapes.items():
            rows = (min(shape[0], RANDOM_ROWS), *shape[1:])
            drawn = (0.02 * rng.standard_normal(rows)).astype(np.float32)
            file.seek(start + header[name]["data_offsets"][0])
            file.write((drawn.view(np.uint32) >> 16).astype("<u2").tobytes())
        file.truncate(start + at)


@dataclass
class Stage:
    """One stage of the compilation, and the most memory in it (anonymous, mapped, both; bytes)."""

    name: str
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    peaks: tuple[int, int, int] = (0, 0, 0)

    def see(self, anon: int, mapped: int) -> None:
        """Take one sample."""
        now = (anon, mapped, anon + mapped)
        self.peaks = tuple(map(max, self.peaks, now))  # type: ignore[assignment]


class Meter:
    """A ``Progress`` that samples this process's resident memory, 100 times a second."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Meter:
        self.stage("start")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        self._close()

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        """A stage begins."""
        self._close()
        self.stages.append(Stage(name))

    def advance(self, amount: int) -> None:
        """Amounts are not shown."""

    def notify(self, message: str) -> None:
        """Messages are printed."""
        print(message, flush=True)

    def _close(self) -> None:
        if self.stages:
            self.stages[-1].seconds = time.perf_counter() - self.stages[-1].began

    def _sample(self) -> None:
        while not self._ended.wait(0.01):
            self.stages[-1].see(*resident())


def resident() -> tuple[int, int]:
    """Anonymous and file-backed resident bytes of this process."""
    found = dict(STATUS.findall(Path("/proc/self/status").read_text()))
    return int(found["RssAnon"]) << 10, int(found["RssFile"]) << 10


if __name__ == "__main__":
    main()
