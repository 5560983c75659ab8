"""Verifies a GPU target on its device: `make verify-gpu TARGET=gfx942 BUDGET=60`.

Every check is a process of its own with a time limit, so that one bad kernel does not end the hour:

    load        the driver takes every code object, those of an fp8 KV cache too
    op          each launch of a step alone, its inputs and outputs being the interpreter's
    model       greedy tokens of the trained model, eagerly and by graphs, against the CPU's
    reference   the CPU's answers and logits, of the small (trained) and the large model (--model)
    logits      the device's logits of the same tokens, eagerly or by graphs (gpu_logits.py)
    invariance  one request alone and among up to 127 others
    speed       decode steps of the real shape at batch sizes 1, 8, 64, 128
    tune        tiles of the two largest GEMMs and of attention at the real shape, as time allows
    vendor      each GEMM of a layer by hipBLASLt or cuBLASLt, against its twin and our own kernel
    vllm        where vLLM is installed: SinterLM inside it against stock (vllm_ab.py)

DIR gets report.md, results.json, clocks.log and each check's log; DIR.tar.gz all of it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gpu_logits
from gpu_device import MANY_SIZES, STEPS, Device
from sinterlm import LLM, SamplingParams, __version__
from sinterlm.artifact.bundle import Bundle
from sinterlm.artifact.progress import LogProgress
from sinterlm.backends.gpu.devices import DEVICES, Vendor
from sinterlm.backends.gpu.library import archive_of
from sinterlm.backends.gpu.objects import read_archive
from sinterlm.backends.gpu.vendor import LIBRARIES
from sinterlm.compile import compile_model
from sinterlm.frontend.named_configs import named_configs
from sinterlm.options import CompileOptions
from sinterlm.runtime.device_probe import Step, TimedLibrary, Train
from sinterlm.runtime.model import Model
from sinterlm.tune.catalogue import Sizes
from sinterlm.tune.session import TuneOptions, tune
from sinterlm.tune.tasks import WARMUP_US

ROOT = Path(__file__).resolve().parent.parent
TRAINED = ROOT / "tests/assets/tiny-llama"
FP8_KV = "tiny-fp8-kv"  #: the trained model with an fp8 KV cache
PAGED = ("norm_qkv_rope_kv", "attention")  #: slots of the launches that write and read pages
#: Rows at which the vendor's GEMM is timed.
VENDOR_ROWS = (256, 512, 1024)
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


#: Asks for driver, clocks, power and heat of the devices.
CLOCKS: dict[Vendor, tuple[str, ...]] = {
    "cuda": ("nvidia-smi", "--format=csv", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,"
             "clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"),
    "hip": ("rocm-smi", "--showproductname", "--showdriverversion", "--showclocks", "--showpower",
            "--showmaxpower", "--showtemp"),
}  # fmt: skip


@dataclass
class Result:
    """How one check ended."""

    check: str
    state: str  #: passed, failed, or not run
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    why: str = ""


# -- checks, each in a process of its own ----------------------------------------------------------


def llm(target: str, model: str, **options: Any) -> LLM:
    """The model on the device, or on this CPU."""
    given = {"max_model_len": 256, "kv_cache_memory_bytes": 1 << 28, "max_num_seqs": 128,
             "load_format": "auto" if Path(model).exists() else "dummy", **options}  # fmt: skip
    return LLM(model, target=target, **given)


def check_load(args: argparse.Namespace) -> dict[str, Any]:
    """The driver takes every code object."""
    for model in (str(TRAINED), FP8_KV):
        device = Device(bundle_of(args, model))
    return {"device": device.model.describe()["device"]}


def check_op(args: argparse.Namespace) -> dict[str, Any]:
    """One launch of one step."""
    model, step, launch = args.check.split(":")[1:]
    return Device(bundle_of(args, model)).run_one(int(launch), step)


def check_model(args: argparse.Namespace) -> dict[str, Any]:
    """Greedy tokens against the CPU's, first eagerly (a step is met once), then by graphs."""
    prompts = ["The old man looked at", "In the", "She said that"]
    found = {}
    for target in ("cpu", args.target):
        with llm(target, str(TRAINED)) as model:
            rounds = [[list(a.outputs[0].token_ids) for a in model.generate(prompts, GREEDY)]
                      for _ in range(2)]  # fmt: skip
            found[target] = rounds
            facts = model.model.describe()
    assert facts["graph_launches"] > 0, "no step was replayed"
    assert found[args.target] == found["cpu"], f"tokens differ: {found}"
    return {"tokens": sum(map(len, found["cpu"][0])), "graph_launches": facts["graph_launches"]}


def check_reference(args: argparse.Namespace) -> dict[str, Any]:
    """The CPU's answers of the small or the large model, for ``check_logits``."""
    size = args.check.split(":")[1]
    wanted = gpu_logits.reference(checkpoint(args, size))
    wanted.save(reference_path(args, size))
    return {"model": Path(checkpoint(args, size)).name, **gpu_logits.facts_of(wanted)}


def check_logits(args: argparse.Namespace) -> dict[str, Any]:
    """The device's logits against the reference, by launches or, in a second round, by graphs."""
    size, way = args.check.split(":")[1:]
    wanted = gpu_logits.Reference.load(reference_path(args, size))
    options = CompileOptions(checkpoint(args, size), target=args.target, max_model_len=320)
    is_eager, steps = way == "eager", gpu_logits.ANSWER - 1
    with Model(compile_model(options), num_threads=1, eager=is_eager,
               **gpu_logits.sizes()) as model:  # fmt: skip
        found = gpu_logits.forced_logits(model, wanted, rounds=1 if is_eager else 2)
        replayed = model.describe()["graph_launches"]
    assert replayed == 0 if is_eager else replayed >= steps, f"{replayed} steps were replayed"
    return {"graph_launches": replayed, **gpu_logits.verdict(wanted, found)}


def checkpoint(args: argparse.Namespace, size: str) -> str:
    """The small or the large model."""
    return str(TRAINED if size == "small" else args.model)


def reference_path(args: argparse.Namespace, size: str) -> Path:
    """Where its reference lies, in a folder that is not sent."""
    folder: Path = args.output / "references"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{size}.npz"


def check_invariance(args: argparse.Namespace) -> dict[str, Any]:
    """One request's tokens, alone and among others."""
    text = "The old man looked at"
    with llm(args.target, str(TRAINED)) as model:
        alone = list(model.generate([text], GREEDY)[0].outputs[0].token_ids)
        differ = []
        for size in (2, 8, 32, 128):
            others = [f"{text} {i}" for i in range(size - 1)]
            answer = model.generate([text, *others], GREEDY)[0]
            if list(answer.outputs[0].token_ids) != alone:
                differ.append(size)
    # Kernels for more rows add in another order, so a near tie may fall the other way.
    return {"batch sizes whose tokens differ": differ}


def check_speed(args: argparse.Namespace) -> dict[str, Any]:
    """Decode steps a second."""
    facts: dict[str, Any] = {}
    with llm(args.target, args.config, kv_cache_memory_bytes=4 << 30) as model:
        weights = model.bundle.manifest.weights
        assert weights is not None
        for size in (1, 8, 64, 128):
            params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
            prompts: Any = [{"prompt_token_ids": [i % 100 + 1] * 16} for i in range(size)]
            model.generate(prompts, params)
            began = time.perf_counter()
            model.generate(prompts, params)
            step = (time.perf_counter() - began) / 64
            facts[f"batch {size}"] = {
                "tokens/s": round(size / step, 1),
                "GB/s of weights": round(weights.nbytes / step / 1e9),
            }
    return facts


def check_tune(args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of the largest GEMMs at few rows and of attention, as shipped and by the best
    tile so far. The table and its journal go into the archive; `sinterlm tune --output` goes on
    from there."""
    wanted = TuneOptions(
        ops=("norm_gate_up_act", "down_residual", "attention"), sizes=Sizes(batch=(1, 16)),
        time_limit_s=0.8 * args.limit, output=args.output / f"tiles-{args.target}.json",
    )  # fmt: skip
    options = CompileOptions(args.config, target=args.target, load_format="dummy")
    outcome = tune(options, wanted, LogProgress())
    rows = [{"kernel": row["task"], "start us": row["start_us"], "best us": row["us"],
             "tile": row["cut"]} for row in outcome.rows]  # fmt: skip
    return {**outcome.counts, "is_complete": outcome.is_complete, "found": rows}


def check_vendor(args: argparse.Namespace) -> dict[str, Any]:
    """The vendor's GEMMs and their epilogues against the interpreter, and what they take."""
    errors: dict[str, Any] = {}
    bundles = [bundle_of(args, model, vendor_gemm=True) for model in (str(TRAINED), args.config)]
    for bundle in bundles:
        device = Device(bundle, **MANY_SIZES)
        for launch, wanted in enumerate(device.table.launches):
            if wanted.layer == 0 and wanted.slot.endswith((".product", ".epilogue")):
                found = device.run_one(launch, "long")
                errors[f"{bundle.manifest.model} {wanted.slot}"] = round(max(found.values()), 3)
        device.model.close()
    return {"error / bound": errors, "us": vendor_times(bundle_of(args, args.config), bundles[-1])}


def vendor_times(ours: Bundle, vendor: Bundle) -> dict[str, dict[str, list[float]]]:
    """Microseconds by GEMM and rows: our kernel, the vendor's GEMM, its epilogue."""
    found: dict[str, dict[str, list[float]]] = {}
    for bundle in (ours, vendor):
        table, _ = read_archive(archive_of(bundle.library_path.read_bytes()))
        with TimedLibrary(bundle.library_path, [Step(max(VENDOR_ROWS))]) as library:
            for launch, wanted in enumerate(table.launches):
                slot, _, part = wanted.slot.partition(".")
                if wanted.layer != 0 or slot == "attention" or (bundle is vendor) != bool(part):
                    continue
                for rows in VENDOR_ROWS:
                    samples = library.time(launch, Step(rows, 1), Train(1, 0, 16, 9, WARMUP_US))
                    times = found.setdefault(slot, {}).setdefault(str(rows), [])
                    times.append(round(statistics.median(samples), 2))
    return found


def check_vllm(args: argparse.Namespace) -> dict[str, Any]:
    """Stock vLLM and SinterLM inside it: scripts/vllm_ab.py."""
    folder = args.output / args.config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(named_configs()[args.config]))
    command = [sys.executable, ROOT / "scripts/vllm_ab.py", TRAINED, folder]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    (line,) = (text for text in done.stdout.splitlines() if text.startswith("result: "))
    facts: dict[str, Any] = json.loads(line.removeprefix("result: "))
    return facts


CHECKS = {"load": check_load, "op": check_op, "model": check_model,
          "reference": check_reference, "logits": check_logits,
          "invariance": check_invariance, "speed": check_speed, "tune": check_tune,
          "vendor": check_vendor, "vllm": check_vllm}  # fmt: skip


def bundle_of(args: argparse.Namespace, model: str, vendor_gemm: bool = False) -> Bundle:
    """Compiled for the target; a named config with one layer and random weights."""
    if model == FP8_KV or Path(model).exists():
        return compile_model(
            CompileOptions(
                str(TRAINED) if model == FP8_KV else model, target=args.target, max_model_len=320,
                kv_cache_dtype="fp8" if model == FP8_KV else "auto", vendor_gemm=vendor_gemm,
            )
        )  # fmt: skip
    folder = args.output / f"{model}-1-layer"
    folder.mkdir(parents=True, exist_ok=True)
    config = {**named_configs()[model], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    options = CompileOptions(str(folder), target=args.target, load_format="dummy",
                             max_model_len=320, vendor_gemm=vendor_gemm)  # fmt: skip
    return compile_model(options)


# -- the hour --------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Checks in the order of what they tell, with the seconds each may take."""
    yield "load", 600
    for model in (str(TRAINED), args.config, FP8_KV):
        table, _ = read_archive(archive_of(bundle_of(args, model).library_path.read_bytes()))
        head = len(table.launches) - 3
        launches = [*range(6), head, head + 1, head + 2][: args.stop_after_op or None]
        if model == FP8_KV:
            launches = [i for i in launches if table.launches[i].slot.startswith(PAGED)]
        for step in STEPS:
            yield from ((f"op:{model}:{step}:{launch}", 300) for launch in launches)
    yield "model", 600
    for size, limit in (("small", 600), ("large", 1800)):
        yield f"reference:{size}", limit
        yield from ((f"logits:{size}:{way}", limit) for way in ("eager", "graphs"))
    yield from (("invariance", 600), ("speed", 1800), ("tune", 900))
    if has_vendor_gemm(DEVICES[args.target].vendor):
        yield "vendor", 1800
    if importlib.util.find_spec("vllm") is not None:
        yield "vllm", 3600


def has_vendor_gemm(vendor: Vendor) -> bool:
    """Whether the GEMM library of HIP or CUDA is installed."""
    for file in filter(None, (os.environ.get("SINTERLM_VENDOR_GEMM"), *LIBRARIES[vendor].files)):
        with contextlib.suppress(OSError):
            ctypes.CDLL(file)
            return True
    return False


def run(args: argparse.Namespace, check: str, limit: float) -> Result:
    """One check in a process of its own."""
    log = args.output / f"{check.replace('/', '_').replace(':', '-')}.log"
    began = time.monotonic()
    command = [sys.executable, __file__, "--target", args.target, "--config", args.config,
               "--model", args.model, "--output", args.output, "--check", check,
               "--limit", str(limit)]  # fmt: skip
    with log.open("w") as out:
        try:
            code = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
            out.write(f"\nnot done within {limit:.0f} s")
    seconds = time.monotonic() - began
    last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    if code == 0:
        return Result(check, "passed", seconds, json.loads(last))
    return Result(check, "failed", seconds, why=last[:300])


def note_clocks(args: argparse.Namespace, after: str) -> None:
    """What the vendor's tool says of driver, clocks, power and heat, into clocks.log."""
    command = CLOCKS[DEVICES[args.target].vendor]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False
        )  # fmt: skip
        said = done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as exc:
        said = f"{command[0]}: {exc}\n"
    with (args.output / "clocks.log").open("a") as log:
        log.write(f"-- {time.strftime('%H:%M:%S')} after {after}\n{said}")


def report(args: argparse.Namespace, results: list[Result]) -> None:
    """report.md, results.json and the archive."""
    facts = {"sinterlm": __version__, "target": args.target, "triton": version("triton"),
             "python": platform.python_version(), "kernel": platform.release()}  # fmt: skip
    text = json.dumps({"machine": facts, "results": [asdict(r) for r in results]}, indent=1)
    (args.output / "results.json").write_text(text)
    lines = [f"# {args.target} on a device", "", str(facts), "", "| check | state | s | facts |",
             "|---|---|---|---|"]  # fmt: skip
    lines += [f"| {r.check} | {r.state} | {r.seconds:.0f} | {r.why or r.facts} |" for r in results]
    (args.output / "report.md").write_text("\n".join(lines) + "\n")
    with tarfile.open(f"{args.output}.tar.gz", "w:gz") as archive:
        for path in sorted(args.output.glob("*.*")):
            archive.add(path, f"{args.output.name}/{path.name}")


def main() -> int:
    """0 when every check passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, choices=sorted(DEVICES))
    parser.add_argument("--config", default="qwq-32b", choices=sorted(named_configs()),
                        help="named config of the real shapes")  # fmt: skip
    parser.add_argument("--model", default="smollm2", help="a checkpoint, the large model")
    parser.add_argument("--budget", type=float, default=60, help="minutes")
    parser.add_argument("--stop-after-op", type=int, default=0, metavar="N")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output = (args.output or Path(f"verify-{args.target}")).resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.check:
        print(json.dumps(CHECKS[args.check.split(":")[0]](args)))
        return 0
    deadline = time.monotonic() + 60 * args.budget
    results = []
    note_clocks(args, "nothing")
    for check, limit in plan(args):
        left = deadline - time.monotonic()
        done = run(args, check, min(limit, left)) if left > 0 else Result(check, "not run")
        results.append(done)
        note_clocks(args, check)
        print(f"{done.state:8} {check} {done.why}", flush=True)
        report(args, results)
    print(f"{args.output}.tar.gz")
    return 0 if all(result.state == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
