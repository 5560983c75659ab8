"""abi.h and its ctypes face agree; sl_open and sl_step refuse what is wrong, by name."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sinterlm.artifact.manifest import ABI_VERSION
from sinterlm.backends.cxx.toolchain import INCLUDE_DIRS, find_compiler
from sinterlm.errors import BundleError, ResourceError, RuntimeFault, UsageError
from sinterlm.runtime import device
from sinterlm.runtime import library as abi
from sinterlm.runtime.batch import RowSampling, StepBatch
from sinterlm.runtime.library import Library
from sinterlm.runtime.model import Model
from tests.native.conftest import Build, MakeTiny
from tests.native.tiny import MAX_LEN, Tiny, bundle_of, prefill, step_batch, write_weights

HEADER = "".join((INCLUDE_DIRS[1] / name).read_text() for name in ("abi.h", "abi_device.h"))
STRUCTS = {**abi.STRUCTS, **device.STRUCTS}


@pytest.fixture(scope="module")
def model_of(tiny: MakeTiny) -> Tiny:
    return tiny("gqa5-bias", "bf16")


class TestHeader:
    def test_structs_have_one_layout(self, tmp_path: Path) -> None:
        """Sizes and offsets as a C compiler sees them."""
        lines = []
        for name, struct in STRUCTS.items():
            lines.append(f'printf("%zu\\n", sizeof({name}));')
            fields = [field[0] for field in struct._fields_]
            lines += [f'printf("%zu\\n", offsetof({name}, {field}));' for field in fields]
        source = '#include "abi_device.h"\n#include <cstddef>\n#include <cstdio>\n'
        (tmp_path / "layout.cpp").write_text(f"{source}int main() {{ {' '.join(lines)} }}")
        command = [*find_compiler().command, f"-I{INCLUDE_DIRS[1]}", "layout.cpp", "-o", "layout"]
        subprocess.run(command, cwd=tmp_path, check=True)
        out = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True)
        ours = []
        for struct in STRUCTS.values():
            ours += [ctypes.sizeof(struct)]
            ours += [getattr(struct, field[0]).offset for field in struct._fields_]
        assert ours == [int(n) for n in out.stdout.split()]

    def test_every_field_is_there(self) -> None:
        """Names and order, from the header's text."""
        for name, struct in STRUCTS.items():
            match = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", HEADER, re.S)
            assert match is not None
            body = re.sub(r"/\*.*?\*/", "", match[1], flags=re.S)
            fields = re.findall(r"(\w+)\s*;", body)
            assert fields == [field[0] for field in struct._fields_]

    def test_versions_agree(self, model_of: Tiny) -> None:
        assert f"#define SL_ABI_VERSION {ABI_VERSION}u" in HEADER
        library = Library(model_of.bundle.library_path)
        assert '"layout_hash"' in library.describe(None)

    def test_is_c(self, tmp_path: Path) -> None:
        """The header promises C to hosts that are not written in C++."""
        (tmp_path / "c.c").write_text('#include "abi_device.h"\nint main(void) { return SL_OK; }\n')
        command = [*find_compiler().command, "-x", "c", "-std=c99", "-Wall", "-Werror", "-c"]
        subprocess.run([*command, f"-I{INCLUDE_DIRS[1]}", "c.c"], cwd=tmp_path, check=True)


class TestLibrary:
    def test_not_a_library(self, tmp_path: Path) -> None:
        (tmp_path / "model.so").write_bytes(b"not ELF")
        with pytest.raises(BundleError, match="cannot load"):
            Library(tmp_path / "model.so")

    def test_another_library(self, build: Build) -> None:
        from sinterlm.backends.cxx.isa import best_isa

        with pytest.raises(BundleError, match="sl_"):
            Library(build("samplelib.cpp", best_isa()))


class TestOpen:
    def test_layout_of_other_weights(self, model_of: Tiny) -> None:
        manifest = dataclasses.replace(model_of.bundle.manifest, layout_hash=1)
        bundle = dataclasses.replace(model_of.bundle, manifest=manifest)
        with pytest.raises(BundleError, match="layout_hash is 0000000000000001"):
            dataclasses.replace(model_of, bundle=bundle).open()

    def test_truncated_weights(self, model_of: Tiny, tmp_path: Path) -> None:
        for name in ("model.so", "weights.bin"):
            (tmp_path / name).write_bytes((model_of.bundle.root / name).read_bytes())
        os.truncate(tmp_path / "weights.bin", 4096)
        bundle = bundle_of(model_of.plan, model_of.bundle.manifest.isa, tmp_path)
        with pytest.raises(BundleError, match="weights_bytes is 4096"):
            dataclasses.replace(model_of, bundle=bundle).open()

    @pytest.mark.parametrize(
        "change,says",
        [
            ({"num_threads": 0}, "num_threads is 0"),
            ({"max_tokens": 0}, "max_tokens is 0"),
            ({"max_seqs": 65}, r"max_seqs is 65 and must be in \[1, 64\]"),
            ({"max_sample_rows": 65}, "max_sample_rows is 65"),
            ({"max_model_len": 0}, "max_model_len is 0"),
            ({"num_slots": -1}, "num_slots is -1"),
            ({"cpu_ids": (0, 1023)}, "cpu_ids names CPU 1023"),
            ({"page_tokens": 24}, "page_tokens is 24"),
        ],
    )
    def test_refuses(self, model_of: Tiny, change: dict[str, object], says: str) -> None:
        with pytest.raises(RuntimeFault, match=says):
            model_of.open(**change)

    def test_more_pages_than_addresses(self, model_of: Tiny) -> None:
        with model_of.open() as model, pytest.raises((ResourceError, RuntimeFault)):
            model.alloc_kv(2**31 - 1, 4096)

    def test_pinned(self, model_of: Tiny) -> None:
        """The caller's own affinity comes back."""
        before = os.sched_getaffinity(0)
        cpu = min(before)
        with model_of.open(num_threads=2, cpu_ids=(cpu, cpu)) as model:
            prefill(model, [1, 2, 3], [0], 3)
            assert os.sched_getaffinity(0) == before

    def test_two_models_in_one_process(self, model_of: Tiny) -> None:
        with model_of.open() as one, model_of.open(num_threads=1) as other:
            first = prefill(one, [5, 6, 7], [0], 3)
            assert prefill(other, [5, 6, 7], [1], 2).tobytes() == first.tobytes()

    def test_closed(self, model_of: Tiny) -> None:
        model = model_of.open()
        model.close()
        model.close()
        with pytest.raises(UsageError, match="closed"):
            model.step(step_batch(([0], 0, [1])))

    def test_after_fork(self, model_of: Tiny) -> None:
        """A child has no workers: it is told so instead of waiting for them."""
        code = (
            "import os, sys\n"
            "sys.path[:0] = sys.argv[1:2]\n"
            "import pickle\n"
            "from tests.native.tiny import prefill\n"
            "model = pickle.load(open(sys.argv[2], 'rb')).open()\n"
            "prefill(model, [1, 2], [0], 2)\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    try:\n"
            "        prefill(model, [1, 2], [0], 2)\n"
            "    except Exception as exc:\n"
            "        os._exit(7 if 'fork' in str(exc) else 8)\n"
            "    os._exit(9)\n"
            "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
            "prefill(model, [1, 2], [0], 2)\n"
        )
        import pickle

        path = model_of.bundle.root / "tiny.pickle"
        path.write_bytes(pickle.dumps(model_of))
        root = str(Path(__file__).resolve().parents[2])
        subprocess.run([sys.executable, "-c", code, root, str(path)], check=True, timeout=60)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def good() -> StepBatch:
    """Two sequences of 3 and 2 tokens, both sampled."""
    return step_batch(
        ([1, 2], 20, [4, 5, 6]),
        ([3], 0, [7, 8]),
        rows=[2, 4],
        sampling=(RowSampling(), RowSampling()),
        slots=[0, -1],
    )


BAD_STEPS = [
    ({"token_ids": ints(4, 5, 300, 7, 8)}, r"token_ids\[2\] is 300 and must be in \[0, 299\]"),
    ({"token_ids": ints(4, 5, -2, 7, 8)}, r"token_ids\[2\] is -2"),
    ({"token_ids": ints(-1, 5, 6, 7, 8)}, "slot 0 holds no token yet"),
    ({"token_ids": ints(4, 5, 6, -1, 8)}, r"token_ids\[3\] is -1"),
    ({"positions": ints(20, 22, 22, 0, 1)}, r"positions\[1\] is 22 and must be 21"),
    ({"query_start": ints(0, 0, 5)}, r"query_start\[1\] is 0"),
    ({"query_start": ints(0, 3, 4)}, r"query_start\[2\] is 4|context_lens\[1\]|positions\[3\]"),
    ({"query_start": ints(1, 3, 5)}, r"query_start\[0\] is 1"),
    ({"query_start": ints(0, 9, 5)}, r"query_start\[1\] is 9"),
    ({"context_lens": ints(2, 2)}, r"context_lens\[0\] is 2"),
    ({"context_lens": ints(MAX_LEN + 1, 2)}, r"context_lens\[0\] is 401 and must be in \[3, 400\]"),
    ({"page_table": np.array([[1, 64], [3, 0]], np.int32)}, r"page_table\[0\]\[1\] is 64"),
    ({"page_table": np.array([[-1, 2], [3, 0]], np.int32)}, r"page_table\[0\]\[0\] is -1"),
    ({"page_table": np.array([[1], [3]], np.int32)}, "page_table_stride is 1"),
    ({"sample_rows": ints(2, 2)}, r"sample_rows\[1\] is 2 and must be in \[3, 4\]"),
    ({"sample_rows": ints(2, 5)}, r"sample_rows\[1\] is 5"),
    ({"slots": ints(9, -1)}, r"slots\[0\] is 9"),
]

NAN = float("nan")
BAD_ROWS = [
    ({"temperature": -1.0}, r"sampling\[1\].temperature is -1"),
    ({"temperature": NAN}, r"sampling\[1\].temperature is nan"),
    ({"top_p": 0.0}, r"sampling\[1\].top_p is 0"),
    ({"top_p": 1.5}, r"sampling\[1\].top_p is 1.5"),
    ({"min_p": -0.1}, r"sampling\[1\].min_p is -0.1"),
    ({"top_k": -1}, r"sampling\[1\].top_k is -1"),
    ({"repetition_penalty": 0.0}, r"sampling\[1\].repetition_penalty is 0"),
    ({"presence_penalty": float("inf")}, r"sampling\[1\].presence_penalty is inf"),
    ({"num_logprobs": 1}, r"sampling\[1\].num_logprobs is 1 and max_logprobs 0"),
    (
        {"presence_penalty": 1.0, "output_tokens": ints(1, 300)},
        r"sampling\[1\].output_tokens\[1\] is 300",
    ),
    ({"bias_ids": ints(-1), "bias": np.ones(1, np.float32)}, r"bias_ids\[0\] is -1"),
    ({"bias_ids": ints(1), "bias": np.full(1, np.inf, np.float32)}, r"bias\[0\] is inf"),
    ({"allowed": np.zeros(10, np.uint32)}, r"sampling\[1\] allows no token"),
]


@pytest.fixture(scope="module")
def model(model_of: Tiny) -> Iterator[Model]:
    with model_of.open(num_slots=2) as model:
        prefill(model, list(range(20)), [1, 2], 20)
        yield model


class TestStep:
    def test_the_good_one_is_good(self, model: Model) -> None:
        assert (model.step(dataclasses.replace(good(), slots=None)).tokens >= 0).all()

    @pytest.mark.parametrize("change,says", BAD_STEPS, ids=[says for _, says in BAD_STEPS])
    def test_refuses(self, model: Model, change: dict[str, object], says: str) -> None:
        with pytest.raises(RuntimeFault, match=says):
            model.step(dataclasses.replace(good(), **change))

    @pytest.mark.parametrize("change,says", BAD_ROWS, ids=[says for _, says in BAD_ROWS])
    def test_refuses_sampling(self, model: Model, change: dict[str, object], says: str) -> None:
        rows = RowSampling(), RowSampling(**change)
        with pytest.raises(RuntimeFault, match=says):
            model.step(dataclasses.replace(good(), sampling=rows))

    @pytest.mark.parametrize(
        "change",
        [
            {"positions": ints(20, 21, 22, 0)},
            {"slots": ints(0)},
            {"sampling": (RowSampling(),)},
            {"token_ids": np.zeros(5, np.int64)},
            {"page_table": np.zeros((2, 4), np.int32)[:, ::2]},
            {"sampling": (RowSampling(), RowSampling(allowed=np.ones(9, np.uint32)))},
            {"sampling": (RowSampling(), RowSampling(bias_ids=ints(3)))},
        ],
    )
    def test_arrays_too_short_or_of_another_type(
        self, model: Model, change: dict[str, object]
    ) -> None:
        with pytest.raises(UsageError):
            model.step(dataclasses.replace(good(), **change))

    def test_too_many(self, model: Model) -> None:
        with pytest.raises(RuntimeFault, match="num_tokens is 65"):
            model.step(step_batch(([0] * 5, 0, [1] * 65), rows=[0]))
        with pytest.raises(RuntimeFault, match="num_seqs is 9"):
            model.step(step_batch(*[([i], 0, [1]) for i in range(9)]))

    def test_before_alloc_kv(self, model_of: Tiny) -> None:
        sizes = {"num_threads": 1, "max_tokens": 8, "max_seqs": 1, "max_sample_rows": 8}
        model = Model(model_of.bundle, max_model_len=64, **sizes)
        with model, pytest.raises(UsageError, match="alloc_kv"):
            model.step(step_batch(([0], 0, [1])))

    def test_weights_that_overflow(self, model_of: Tiny, tmp_path: Path) -> None:
        """NaN in the weights is an error, not a token."""
        weights = dict(model_of.weights)
        weights["final_norm.weight"] = np.full_like(weights["final_norm.weight"], np.nan)
        (tmp_path / "model.so").write_bytes(model_of.bundle.library_path.read_bytes())
        write_weights(model_of.plan, weights, tmp_path / "weights.bin")
        bundle = bundle_of(model_of.plan, model_of.bundle.manifest.isa, tmp_path)
        with dataclasses.replace(model_of, bundle=bundle).open() as model:
            batch = step_batch(([1], 0, [1, 2, 3]), rows=[2], sampling=(RowSampling(),))
            with pytest.raises(RuntimeFault, match=r"sample_rows\[0\] \(token 2\) hold NaN"):
                model.step(batch)


class Raw:
    """The step by hand: flags and sizes that Model never gives."""

    def __init__(self, model: Model, batch: StepBatch) -> None:
        self.model, self.batch = model, batch
        self.args = abi.StepArgs(
            size=ctypes.sizeof(abi.StepArgs),
            num_seqs=batch.num_seqs,
            num_tokens=batch.num_tokens,
            kv=ctypes.pointer(model._kv),
            page_table_stride=batch.page_table.shape[1],
            num_sample_rows=0,
            num_steps=1,
        )
        names = "token_ids", "positions", "query_start", "context_lens", "page_table", "sample_rows"
        for name in names:
            setattr(self.args, name, getattr(batch, name).ctypes.data)

    def run(self) -> None:
        self.model._library.call("sl_step", self.model._handle, ctypes.byref(self.args))


class TestRawStep:
    def test_hidden_states_and_head(self, model_of: Tiny) -> None:
        """sl_head of the hidden states gives the logits, more rows than one step holds."""
        with model_of.open(max_sample_rows=7) as model:
            batch = step_batch(([1, 2], 0, list(range(30))), rows=[29])
            raw = Raw(model, batch)
            hidden = np.zeros((30, 80), np.float32)
            raw.args.flags, raw.args.out_hidden = abi.STEP_HIDDEN, hidden.ctypes.data
            raw.run()
            logits = model.head(hidden)
            last = model.step(batch).logits
        assert logits.shape == (30, 300) and last is not None
        assert np.abs(logits[29] - last[0]).max() < 0.02 * last.std()

    @pytest.mark.parametrize(
        "change,error,says",
        [
            (lambda a: setattr(a, "size", 8), BundleError, "struct has 8 bytes"),
            (lambda a: setattr(a, "flags", 0), RuntimeFault, "flags is 0"),
            (lambda a: setattr(a, "flags", 64), RuntimeFault, "flags is 64"),
            (lambda a: setattr(a, "flags", 4), RuntimeFault, "out_hidden is null"),
            (lambda a: setattr(a, "token_ids", None), RuntimeFault, "token_ids is null"),
            (lambda a: setattr(a.kv[0], "page_tokens", 8), RuntimeFault, "kv.page_tokens is 8"),
            (lambda a: setattr(a.kv[0], "num_layers", 1), RuntimeFault, "kv.num_layers is 1"),
            (lambda a: setattr(a.kv[0], "head_stride", 1), RuntimeFault, "kv.head_stride is 1"),
            (lambda a: setattr(a.kv[0], "kv_base", None), RuntimeFault, "kv.kv_base is null"),
        ],
    )
    def test_refuses(
        self,
        model_of: Tiny,
        change: Callable[[abi.StepArgs], None],
        error: type[Exception],
        says: str,
    ) -> None:
        with model_of.open() as model:
            raw = Raw(model, step_batch(([1], 0, [1, 2])))
            raw.args.flags = abi.STEP_LOGITS
            change(raw.args)
            with pytest.raises(error, match=says):
                raw.run()

    def test_longer_structs_of_a_newer_caller(self, model_of: Tiny) -> None:
        """Sampling rows are read by their own size."""

        class Longer(ctypes.Structure):
            _fields_ = (*abi.Sampling._fields_, ("more", ctypes.c_int64))

        rows = (Longer * 2)()
        for row in rows:
            row.size, row.top_p, row.repetition_penalty = ctypes.sizeof(Longer), 1, 1
            row.num_logprobs = -1
        with model_of.open() as model:
            batch = step_batch(([1], 0, [1, 2, 3]), rows=[0, 2])
            raw, tokens = Raw(model, batch), np.zeros(2, np.int32)
            raw.args.flags, raw.args.num_sample_rows = abi.STEP_SAMPLE, 2
            raw.args.sampling = ctypes.cast(rows, ctypes.POINTER(abi.Sampling))
            raw.args.out_tokens = tokens.ctypes.data
            raw.run()
            logits = model.step(batch).logits
        assert logits is not None and tokens.tolist() == logits.argmax(1).tolist()
