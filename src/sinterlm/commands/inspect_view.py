"""The tables of ``sinterlm inspect``; layers that cost the same share a row."""

from __future__ import annotations

import re
from typing import Any

from sinterlm.artifact.manifest import show_dtypes
from sinterlm.artifact.storage import show_bytes
from sinterlm.commands.inspect import Subject
from sinterlm.commands.inspect_gpu import print_launches
from sinterlm.commands.ui import print_table, show_count


def print_subject(subject: Subject, facts: dict[str, Any], all_layers: bool) -> None:
    """Every table that ``facts`` (of ``inspect.gather``) has the numbers for, on stdout."""
    _print_head(subject, facts)
    _print_ops(facts, all_layers)
    if "launches" in facts:
        print_launches(facts["launches"])
    if "graph" in facts:
        _print_graph(facts["graph"], all_layers)
        _print_packing(facts["packing"], all_layers)
        _print_buffers(facts["buffers"])
    _print_memory(facts["memory"])


def _print_head(subject: Subject, facts: dict[str, Any]) -> None:
    shape = subject.shape
    dtypes = show_dtypes(subject.dtype, subject.quantization, subject.kv_cache_dtype)
    print(f"{subject.model}: {shape['architecture']}, {dtypes}, {subject.isa}")
    print(
        f"{shape['num_layers']} layers, hidden {shape['hidden_size']}, "
        f"{shape['num_heads']} heads on {shape['num_kv_heads']} KV heads of {shape['head_dim']}, "
        f"MLP {shape['intermediate_size']}, vocabulary {shape['vocab_size']}, "
        f"context {subject.max_model_len}"
    )
    if "bundle" in facts:
        print(f"bundle {facts['bundle']['path']}\nsha256 {facts['bundle']['sha256']}")


def _print_ops(facts: dict[str, Any], all_layers: bool) -> None:
    step, total = facts["step"], facts["total"]
    timed = "machine" in facts
    columns = ["op", "layers", "count", "weights", "bytes", "flops", "flops/byte"]
    columns += ["roof", "bound by"] if timed else []
    rows = []
    for row, layers in _grouped(facts["ops"], all_layers):
        count = len(layers)
        cells = [row["name"], _layer_range(layers), count, show_bytes(row["weight_bytes"] * count),
                 show_bytes(row["bytes"] * count), show_count(row["flops"] * count),
                 _ratio(row["flops"], row["bytes"])]  # fmt: skip
        cells += [f"{row['roof_s'] * count * 1e6:.1f} µs", row["bound"]] if timed else []
        rows.append(cells)
    cells = ["total", "", len(facts["ops"]), "", show_bytes(total["bytes"]),
             show_count(total["flops"]), _ratio(total["flops"], total["bytes"])]  # fmt: skip
    rows.append([*cells, f"{total['roof_s'] * 1e6:.1f} µs", ""] if timed else cells)
    title = f"Cost of a step of {step['num_tokens']} token(s) at context {step['context_len']}"
    print_table(title, columns, rows, right=range(2, 8))
    if timed:
        machine = facts["machine"]
        print(
            f"roof = max(bytes / {machine['bytes_per_s'] / 1e9:.1f} GB/s, flops / "
            f"{machine['flops_per_s'] / 1e9:.0f} GFLOP/s) per op; "
            f"{step['num_tokens'] / total['roof_s']:.1f} tokens/s at the roof"
        )
    else:
        print("add --probe, or --bandwidth-gbps and --gflops, for the roofline of each op")


def _ratio(flops: int, nbytes: int) -> str:
    return f"{flops / nbytes:.2f}" if nbytes else "no bytes"


def _grouped(ops: list[dict[str, Any]], all_layers: bool) -> list[tuple[dict[str, Any], list[int]]]:
    """Ops that differ in nothing but their layer, together, in order of first appearance."""
    groups: dict[object, tuple[dict[str, Any], list[int]]] = {}
    for index, row in enumerate(ops):
        same = index if all_layers else tuple(v for k, v in row.items() if k != "layer")
        groups.setdefault(same, (row, []))[1].append(row["layer"])
    return list(groups.values())


def _layer_range(layers: list[int]) -> str:
    """``0-29`` for consecutive layers, ``—`` outside layers."""
    if layers == [-1]:
        return "—"
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
    return ",".join(map(str, layers))


def _print_graph(ops: list[dict[str, Any]], all_layers: bool) -> None:
    """The fused ops; of the layers only the first, unless all are asked for."""
    rows = [
        (op["op"], ", ".join(op["reads"]), ", ".join(op["writes"]), _short(op["weights"]))
        for op in ops
        if all_layers or op["layer"] <= 0
    ]
    title = f"Graph: {len(ops)} fused ops" + ("" if all_layers else " (layer 0 stands for all)")
    print_table(title, ["op", "reads", "writes", "weights"], rows)


def _short(names: list[str]) -> str:
    """``model.layers.0.self_attn.q_proj.weight`` -> ``q_proj``; a bias keeps its name."""
    return ", ".join(
        re.sub(r"^.*\.(?=[^.]+(\.bias)?$)", "", n.removesuffix(".weight")) for n in names
    )


def _print_packing(tensors: list[dict[str, Any]], all_layers: bool) -> None:
    """Of the layers only the first, and what is stored otherwise than there."""
    first = {t["name"].removeprefix("layers.0."): t["format"] for t in tensors}
    rows = [
        (t["name"], t["kind"], t["format"] or t["dtype"], t["n"], t["k"], t["offset"],
         show_bytes(t["bytes"]))
        for t in tensors
        if all_layers
        or not re.match(r"layers\.[1-9]", t["name"])
        or t["format"] != first.get(t["name"].split(".", 2)[2])
    ]  # fmt: skip
    columns = ["tensor", "layout", "format", "n", "k", "offset", "size"]
    print_table(f"Packing: {len(tensors)} tensors", columns, rows, right=range(3, 7))


def _print_buffers(buffers: list[dict[str, Any]]) -> None:
    rows = [(b["name"], b["unit"], b["offset"], b["nbytes"]) for b in buffers]
    columns = ["buffer", "per", "offset", "bytes"]
    print_table("Activations (T = token, R = sampled row)", columns, rows, right=(2, 3))


def _print_memory(memory: dict[str, Any]) -> None:
    print(
        f"memory: weights {show_bytes(memory['weights_bytes'])}, KV cache "
        f"{show_bytes(memory['kv_bytes_per_token'])} per token, activations "
        f"{show_bytes(memory['activation_bytes_per_token'])} per token of a step and "
        f"{show_bytes(memory['activation_bytes_per_row'])} per sampled row"
    )
