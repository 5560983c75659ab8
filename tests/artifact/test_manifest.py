"""manifest.json is read strictly: any other text is a BundleError that says where."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinterlm.artifact.manifest import ABI_VERSION, FORMAT_VERSION, FileRef, Manifest
from sinterlm.errors import BundleError
from tests.artifact.builders import make_manifest

SHA = "ab" * 32
GOOD = make_manifest(FileRef("model.so", 10, SHA), FileRef("weights-00000.bin", 20, SHA))


def test_round_trip() -> None:
    assert Manifest.from_json(GOOD.to_json()) == GOOD
    code_only = replace(GOOD, weights=None, weights_key="")
    assert Manifest.from_json(code_only.to_json().encode()) == code_only


def test_floats_survive_exactly() -> None:
    freq = (0.1 + 0.2, 1e-300)
    changed = replace(GOOD, constants=replace(GOOD.constants, inv_freq=freq))
    assert Manifest.from_json(changed.to_json()).constants.inv_freq == freq


def changed(path: str, value: Any) -> str:
    data = json.loads(GOOD.to_json())
    *folders, last = path.split(".")
    node = data
    for name in folders:
        node = node[name]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("isa", ..., "lacks 'isa'"),
        ("surprise", 1, "unknown field 'surprise'"),
        ("shape.head_dim", ..., "shape lacks 'head_dim'"),
        ("shape.head_dim", "4", "shape.head_dim is str, not int"),
        ("shape.head_dim", True, "shape.head_dim is bool, not int"),
        ("shape.num_layers", 0, "shape.num_layers is 0"),
        ("shape.vocab_size", 1 << 40, "shape.vocab_size"),
        ("constants.rms_eps", None, "constants.rms_eps is null"),
        ("constants.inv_freq", [1.0], "inv_freq"),
        ("constants.inv_freq", [1.0, "x"], r"inv_freq\[1\] is str"),
        ("constants.windows", [0, -1], "windows"),
        ("constants.attention_scale", 10**400, "finite"),
        ("layout_hash", 1 << 70, "layout_hash is out of range"),
        ("layout_hash", 1.5, "layout_hash is float"),
        ("ops", {}, "ops is dict, not a list"),
        ("dtype", "fp8", "dtype is 'fp8'"),
        ("kv_cache_dtype", "fp32", "kv_cache_dtype is 'fp32'"),
        ("activation_bytes_per_row", -1, "negative"),
        ("library", None, "library is null"),
        ("library.path", "/etc/passwd", "leads outside"),
        ("library.path", "../../../evil.so", "leads outside"),
        ("library.path", "../../code/xyz/model.so", "leads outside"),
        ("library.path", "../../tmp/" + SHA + "/model.so", "leads outside"),
        ("library.path", "..", "leads outside"),
        ("library.path", "model.so\n", "leads outside"),
        ("weights.sha256", "ab", "weights has no valid"),
        ("weights.nbytes", -1, "weights has no valid"),
        ("max_model_len", 0, "max_model_len is 0"),
    ],
)
def test_each_fault_is_named(path: str, value: Any, told: str) -> None:
    with pytest.raises(BundleError, match=told) as caught:
        Manifest.from_json(changed(path, value))
    assert "sinterlm compile" in str(caught.value)


@pytest.mark.parametrize("field", ["format_version", "abi_version"])
def test_other_versions_name_both_and_the_repair(field: str) -> None:
    ours = FORMAT_VERSION if field == "format_version" else ABI_VERSION
    text = json.dumps({field: 99, "sinterlm_version": "9.9", "of the future": []})
    with pytest.raises(BundleError, match=rf"99 \(made by SinterLM 9.9\).*reads {ours}"):
        Manifest.from_json(text)


def test_layers_of_paths_in_the_cache_are_accepted() -> None:
    ref = FileRef(f"../../code/{SHA}/model.so", 10, SHA)
    assert Manifest.from_json(replace(GOOD, library=ref).to_json()).library == ref


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{", '{"a": 1, "a": 2}', "NaN", "[" * 100_000, "1" * 10_000, b"\xff\xfe"],
)
def test_what_is_no_manifest_at_all(text: str | bytes) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(text)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3)
)


def positions(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in list(items):
        found.append((node, key))
        if isinstance(value, (dict, list)):
            found += positions(value)
    return found


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_json_never_raises_anything_else(data: st.DataObject) -> None:
    tree = json.loads(GOOD.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(positions(tree)))
        if data.draw(st.booleans()):
            container[key] = data.draw(VALUES)
        else:
            del container[key]
        if not positions(tree):
            break
    try:
        manifest = Manifest.from_json(json.dumps(tree))
    except BundleError:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(data: st.DataObject) -> None:
    raw = bytearray(GOOD.to_json().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    with contextlib.suppress(BundleError):
        Manifest.from_json(bytes(raw))
