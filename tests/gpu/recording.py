"""A GPU that is not there: what fake_driver.cpp hands over is kept, checked, and run.

Memory of the device is memory of this process, NaN before its first use. A launch is checked
against the code object's own metadata and the launch table, then every program runs in Triton's
interpreter. Whatever a real driver would refuse, or would not notice and be corrupted by, is a
fault: it is remembered in ``faults`` and the call fails.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sinterlm.backends.gpu.devices import Device
from sinterlm.backends.gpu.interpreter import ELEMENTS, run_kernel
from sinterlm.backends.gpu.signatures import SIGNATURES
from sinterlm.backends.gpu.table import LEFT_OUT, Kernel, Table
from tests.gpu.code_objects import CodeObject, image_bytes, read_code_object

ROOT = Path(__file__).resolve().parents[2]
CALL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64), ctypes.c_int
)
SIZES = {"i32": 4, "i64": 8, "fp32": 4}
OUT_OF_MEMORY, NO_BINARY, NOT_ALLOWED_IN_CAPTURE, ILLEGAL_ADDRESS = 2, 209, 900, 700
MAX_THREADS = 1024


@dataclass
class Launched:
    """One launch as the driver got it."""

    kernel: Kernel
    grid: tuple[int, ...]
    args: tuple[int, ...]


@dataclass
class Fault(Exception):
    """A call that is refused, with the driver's code."""

    code: int
    why: str


@dataclass
class RecordingDriver:
    """The state of the driver and its device. ``kernels`` are those of ``table``, by id."""

    device: Device
    table: Table
    kernels: list[tuple[Kernel, bytes]]  #: with the code object of each
    capacity: int = 1 << 30
    name: str = "fake device"
    run: Callable[[Launched], None] | None = None  #: what a launch does; None = interpret it
    faults: list[str] = field(default_factory=list)
    trace: list[Launched] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    memory: dict[int, np.ndarray] = field(default_factory=dict)  #: by address; of the device
    pinned: dict[int, np.ndarray] = field(default_factory=dict)
    handles: dict[int, Any] = field(default_factory=dict)
    capturing: dict[int, list[Any]] = field(default_factory=dict)  #: by stream
    next_handle: int = 0x1000
    fails: dict[str, int] = field(default_factory=dict)  #: code to answer a call with
    freed: list[np.ndarray] = field(default_factory=list)  #: so that no address comes again
    bound: dict[str, int] = field(default_factory=dict)  #: where what the table names has been
    position: int = 0  #: in the table's launches
    lost: bool = False
    moves_weights: bool = False  #: whether launches may read copies of them
    #: Microseconds of a launch, as events tell; None = each takes one.
    takes: Callable[[Launched], float] | None = None
    clock: float = 0.0  #: microseconds
    poison: int = 0xFF  #: what memory holds before its first use; NaN by default

    def attach(self, path: Path) -> None:
        """Answer the calls of the fake driver at ``path``, in this process."""
        self._library = ctypes.CDLL(str(path))
        self._callback = CALL(self._answer)
        self._memory = os.open("/proc/self/mem", os.O_RDONLY)
        self._library.fake_driver_use(self._callback)

    def _answer(self, name: bytes, words: Any, count: int) -> int:
        call = name.decode()
        self.calls.append(call)
        if call in self.fails:
            return self.fails[call]
        try:
            method: Callable[..., None] = getattr(self, f"on_{call}")
            method(*words[:count])
        except Fault as fault:
            self.faults.append(f"{call}: {fault.why}")
            return fault.code
        except Exception as exc:  # a ctypes callback would print it and answer 0
            self.faults.append(f"{call}: {type(exc).__name__}: {exc}")
            return ILLEGAL_ADDRESS
        return 0

    # -- device and memory -------------------------------------------------------------------------

    def on_init(self, flags: int) -> None: ...

    def on_set_device(self, number: int) -> None: ...

    def on_set_context(self, context: int) -> None: ...

    def on_device_count(self, to: int) -> None:
        ctypes.c_int.from_address(to).value = 1

    def on_device_name(self, to: int, size: int, device: int) -> None:
        ctypes.memmove(to, self.name.encode() + b"\0", len(self.name) + 1)

    def on_driver_version(self, to: int) -> None:
        ctypes.c_int.from_address(to).value = 12040

    def on_context(self, to: int, device: int) -> None:
        ctypes.c_uint64.from_address(to).value = self._handle("context")

    def on_memory(self, free: int, total: int) -> None:
        used = sum(a.nbytes for a in self.memory.values())
        ctypes.c_size_t.from_address(free).value = self.capacity - used
        ctypes.c_size_t.from_address(total).value = self.capacity

    def on_allocate(self, to: int, size: int) -> None:
        self._not_in_capture()
        if sum(a.nbytes for a in self.memory.values()) + size > self.capacity:
            ctypes.c_uint64.from_address(to).value = 0
            raise Fault(OUT_OF_MEMORY, f"{size} bytes")
        ctypes.c_uint64.from_address(to).value = self._block(self.memory, size)

    def on_release(self, address: int) -> None:
        self._not_in_capture()
        if address not in self.memory:
            raise Fault(1, f"{address:#x} is no allocation")
        self.freed.append(self.memory.pop(address))

    def on_host_allocate(self, to: int, size: int, flags: int) -> None:
        ctypes.c_uint64.from_address(to).value = self._block(self.pinned, size)

    def on_host_release(self, address: int) -> None:
        if self.pinned.pop(address, None) is None:
            raise Fault(1, f"{address:#x} is no allocation of the host")

    def _block(self, blocks: dict[int, np.ndarray], size: int) -> int:
        """Memory that holds anything, aligned as devices align it."""
        raw = np.full(size + 256, self.poison, np.uint8)
        array = raw[-raw.ctypes.data % 256 :][:size]
        blocks[array.ctypes.data] = array
        return int(array.ctypes.data)

    def bytes_from(self, address: int, size: int = 0) -> np.ndarray:
        """The device's memory from ``address`` to the end of its allocation, ``size`` at least."""
        for base, array in self.memory.items():
            if base <= address < base + array.nbytes:
                found = array[address - base :]
                if found.nbytes >= size:
                    return found
                raise Fault(ILLEGAL_ADDRESS, f"{size} bytes at {address:#x} pass the end")
        raise Fault(ILLEGAL_ADDRESS, f"{address:#x} is no memory of the device")

    def on_to_device(self, to: int, source: int, size: int, stream: int) -> None:
        self._on_stream(stream)
        self._not_in_capture()
        self.bytes_from(to, size)[:size] = np.frombuffer(ctypes.string_at(source, size), np.uint8)

    def on_to_host(self, to: int, source: int, size: int, stream: int) -> None:
        self._on_stream(stream)
        self._not_in_capture()
        ctypes.memmove(to, self.bytes_from(source, size).ctypes.data, size)

    def on_fill(self, to: int, value: int, size: int, stream: int) -> None:
        self._on_stream(stream)
        self._not_in_capture()
        self.bytes_from(to, size)[:size] = value

    # -- streams and graphs ------------------------------------------------------------------------

    def _handle(self, what: Any) -> int:
        self.next_handle += 16
        self.handles[self.next_handle] = what
        return self.next_handle

    def stream(self) -> int:
        """A stream of the caller's."""
        return self._handle("stream")

    def _on_stream(self, stream: int) -> None:
        if self.handles.get(stream) != "stream":
            raise Fault(1, f"{stream:#x} is no stream")

    def _not_in_capture(self) -> None:
        if self.capturing:
            self.spoiled = True
            raise Fault(NOT_ALLOWED_IN_CAPTURE, "not allowed while a stream is being captured")

    def on_stream_create(self, to: int, flags: int) -> None:
        ctypes.c_uint64.from_address(to).value = self._handle("stream")

    def on_stream_destroy(self, stream: int) -> None:
        self._on_stream(stream)
        del self.handles[stream]

    def on_stream_wait(self, stream: int) -> None:
        self._on_stream(stream)
        self._not_in_capture()
        if self.lost:
            raise Fault(ILLEGAL_ADDRESS, "the device is lost")

    def on_is_capturing(self, stream: int, to: int) -> None:
        ctypes.c_int.from_address(to).value = stream in self.capturing

    def on_capture_begin(self, stream: int, mode: int) -> None:
        self._on_stream(stream)
        self.capturing[stream], self.spoiled = [], False

    def on_capture_end(self, stream: int, to: int) -> None:
        recorded = self.capturing.pop(stream)
        if self.spoiled:
            raise Fault(901, "the capture is invalid since a call that is not allowed in it")
        ctypes.c_uint64.from_address(to).value = self._handle(recorded)

    def on_graph_make(self, to: int, graph: int, flags: int) -> None:
        ctypes.c_uint64.from_address(to).value = self._handle(list(self.handles[graph]))

    def on_graph_launch(self, graph: int, stream: int) -> None:
        self._on_stream(stream)
        for work in self.handles[graph]:
            if isinstance(work, Launched):
                self._run(work)
            else:
                work()  # of whoever else captures

    def on_graph_release(self, graph: int) -> None:
        del self.handles[graph]

    on_captured_release = on_graph_release

    def on_event_create(self, to: int, flags: int) -> None:
        ctypes.c_uint64.from_address(to).value = self._handle({"at": None})

    def on_event_record(self, event: int, stream: int) -> None:
        self._on_stream(stream)
        self._not_in_capture()
        self.handles[event]["at"] = self.clock

    def on_event_elapsed(self, to: int, begin: int, end: int) -> None:
        times = [self.handles[event]["at"] for event in (begin, end)]
        if None in times:
            raise Fault(400, "an event that was not recorded")
        ctypes.c_float.from_address(to).value = (times[1] - times[0]) / 1000

    def on_event_release(self, event: int) -> None:
        del self.handles[event]

    # -- kernels -----------------------------------------------------------------------------------

    def on_module_load(self, to: int, image: int) -> None:
        self._not_in_capture()
        if image % 64:
            raise Fault(1, f"the code object at {image:#x} is not aligned")
        code = image_bytes(image)
        known = [k for k, made in self.kernels if code.startswith(made) or made.startswith(code)]
        if not known:
            raise Fault(200, "a code object that is none of the bundle's")
        read = read_code_object(code)
        if read.device != self.device.name:
            raise Fault(NO_BINARY, f"it is for {read.device}")
        ctypes.c_uint64.from_address(to).value = self._handle((read, known[0], {}))
        self.bound.clear()  # of a model that was opened before

    def on_module_unload(self, module: int) -> None:
        del self.handles[module]

    def on_function(self, to: int, module: int, name: int) -> None:
        read, *_ = self.handles[module]
        if ctypes.string_at(name).decode() != read.symbol:
            raise Fault(500, f"no {ctypes.string_at(name)!r} in a module of {read.symbol}")
        ctypes.c_uint64.from_address(to).value = module

    def on_set_attribute(self, function: int, attribute: int, value: int) -> None:
        self.handles[function][2][attribute] = value

    def on_error_text(self, code: int, to: int) -> None:
        self._text = ctypes.create_string_buffer(f"text of {code}".encode())
        ctypes.c_uint64.from_address(to).value = ctypes.addressof(self._text)

    def on_launch(self, function: int, *rest: int) -> None:
        *dims, shared, stream, params, extra = rest
        self._on_stream(stream)
        read, kernel, attributes = self.handles[function]
        grid, block = tuple(dims[:3]), tuple(dims[3:])
        if block != (read.threads, 1, 1) or read.threads > MAX_THREADS:
            raise Fault(1, f"{kernel.name}: blocks of {block}, and it has {read.threads} threads")
        if min(grid) < 1:
            raise Fault(1, f"{kernel.name}: a grid of {grid}")
        unasked = 48 << 10 if self.device.vendor == "cuda" else self.device.shared_bytes
        if shared > max(unasked, attributes.get(8, 0)):
            raise Fault(1, f"{kernel.name}: {shared} bytes of shared memory were not asked for")
        if extra:
            raise Fault(1, f"{kernel.name}: arguments twice")
        launched = Launched(kernel, grid, self._arguments(read, kernel, params))
        self._check(launched)
        self._check_order(launched)
        if stream in self.capturing:
            self.capturing[stream].append(launched)
        else:
            self._run(launched)

    def _arguments(self, read: CodeObject, kernel: Kernel, params: int) -> tuple[int, ...]:
        """What a driver would copy into the argument block, by the object's metadata."""
        types = [*SIGNATURES[kernel.name].args.values(), "*scratch", "*scratch"]
        if [p.size for p in read.params] != [SIZES.get(t, 8) for t in types]:
            raise Fault(1, f"{kernel.name}: the code object takes {read.params}")
        values = []
        for i, (param, kind) in enumerate(zip(read.params, types, strict=True)):
            try:
                (place,) = struct.unpack("<Q", os.pread(self._memory, 8, params + 8 * i))
                raw = os.pread(self._memory, param.size, place)
            except OSError:
                raise Fault(ILLEGAL_ADDRESS, f"{kernel.name}: no argument {i}") from None
            values.append(int.from_bytes(raw, "little", signed=not kind.startswith("*")))
        if any(values[-2:]):
            raise Fault(ILLEGAL_ADDRESS, f"{kernel.name}: scratch memory that it has no use for")
        return tuple(values)

    def _check(self, launched: Launched) -> None:
        """Pointers, and the grid that the sizes among the arguments ask for."""
        kernel = launched.kernel
        args = dict(zip(SIGNATURES[kernel.name].args, launched.args, strict=False))
        for name, kind in SIGNATURES[kernel.name].args.items():
            if kind.startswith("*") and args[name]:
                self.bytes_from(args[name], 1)
                if args[name] % 16:
                    raise Fault(1, f"{kernel.name}: {name} at {args[name]:#x} is not aligned")
        sizes = {"T": args.get("num_tokens"), "R": args.get("num_rows"), "S": args.get("num_seqs")}
        for axis, programs in zip(kernel.grid, launched.grid, strict=True):
            known = axis.symbol == "1" or sizes.get(axis.symbol) is not None
            if known and not axis.plus_seqs and axis.count({"S": 0, **sizes}) != programs:
                raise Fault(1, f"{kernel.name}: {programs} programs along {axis} at {sizes}")

    def _check_order(self, launched: Launched) -> None:
        """The launches come in the table's order, and what it names keeps its place: a buffer is
        where it was for the launch before, weights as far apart as their offsets."""
        name, launches = launched.kernel.name, self.table.launches
        for _ in launches:
            launch = launches[self.position % len(launches)]
            self.position += 1
            fits = {self.table.kernels[c.kernel].name for c in self.table.choices
                    if c.slot == launch.slot and c.kernel != LEFT_OUT}  # fmt: skip
            if name in fits:
                break
        if self.moves_weights:
            self.bound.pop("weights", None)
        for arg, value in zip(launch.args, launched.args, strict=False):
            where, _, what = arg.partition(":")
            if where == "weight":
                arg, value = "weights", value - int(what)
            if where not in ("weight", "buffer") or what in self.borrowed.get(name, ()):
                continue
            if self.bound.setdefault(arg, value) != value:
                raise Fault(1, f"{name}: {arg} is at {value:#x} and was at {self.bound[arg]:#x}")

    #: By kernel: buffers that a caller may replace.
    borrowed: ClassVar[dict[str, tuple[str, ...]]] = {
        "lm_head": ("xw", "logits"), "merge_rows": ("ids",), "final_norm": ("hidden",),
    }  # fmt: skip

    def _run(self, launched: Launched) -> None:
        self._check(launched)
        self.trace.append(launched)
        self.clock += 1.0 if self.takes is None else self.takes(launched)
        (self.run or self.interpret)(launched)

    def interpret(self, launched: Launched) -> None:
        """Every program, by Triton's interpreter, on the device's memory as it is now."""
        kernel = launched.kernel
        args: dict[str, Any] = {}
        types = SIGNATURES[kernel.name].types(kernel.constants)
        for (name, kind), value in zip(types.items(), launched.args, strict=False):
            if kind == "fp32":
                args[name] = struct.unpack("<f", struct.pack("<i", value))[0]
            elif kind in SIZES:
                args[name] = value
            elif value == 0:
                args[name] = np.zeros(0, ELEMENTS[kind])
            else:
                found = self.bytes_from(value)
                size = np.dtype(ELEMENTS[kind]).itemsize
                args[name] = found[: found.nbytes // size * size].view(ELEMENTS[kind])
        run_kernel(kernel.name, launched.grid, args, kernel.constants)
