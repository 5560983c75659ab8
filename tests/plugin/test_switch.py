"""The plugin's switch, and what vLLM's worker tells by its environment."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from sinterlm import plugin
from sinterlm.errors import UsageError
from sinterlm.plugin.switch import bound_cpus, read_quantization, read_switch


def test_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SINTERLM_VLLM", raising=False)
    assert read_switch() == "off"
    for word in ("off", "on", "require"):
        monkeypatch.setenv("SINTERLM_VLLM", word)
        assert read_switch() == word
    monkeypatch.setenv("SINTERLM_VLLM", "yes")
    with pytest.raises(UsageError, match="SINTERLM_VLLM='yes' is none of off, on, require"):
        read_switch()


def test_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SINTERLM_QUANTIZATION", raising=False)
    assert read_quantization() is None
    monkeypatch.setenv("SINTERLM_QUANTIZATION", "int8")
    assert read_quantization() == "int8"
    monkeypatch.setenv("SINTERLM_QUANTIZATION", "fp8")
    with pytest.raises(UsageError, match="fp8"):
        read_quantization()


@pytest.mark.parametrize(
    ("variables", "cpus"),
    [
        ({"KMP_AFFINITY": "granularity=fine,explicit,proclist=[4,5,7]"}, (4, 5, 7)),
        ({"GOMP_CPU_AFFINITY": "0 1"}, (0, 1)),
        ({"OMP_PLACES": "{2,3}", "OMP_PROC_BIND": "true"}, (2, 3)),
        ({"OMP_PLACES": "cores"}, None),
        ({"KMP_AFFINITY": "compact"}, None),
        ({}, None),
    ],
)
def test_bound_cpus(variables: dict[str, str], cpus: tuple[int, ...] | None) -> None:
    assert bound_cpus(variables) == cpus


def test_off_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sinterlm.plugin import register; register(); "
        "print([m for m in ('torch', 'vllm', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a vLLM that is none was told."""
    found: dict[str, str] = {}
    fake = ModuleType("vllm")
    registry = type("Registry", (), {"register_model": staticmethod(found.__setitem__)})
    fake.ModelRegistry = registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr("sinterlm.plugin.counters.share_counters", lambda: None)
    return found


def test_on_names_our_classes(monkeypatch: pytest.MonkeyPatch, registered: dict[str, str]) -> None:
    monkeypatch.setattr(plugin, "vllm_version", lambda: "0.32.0+cpu")
    monkeypatch.setenv("SINTERLM_VLLM", "on")
    plugin.register()
    assert registered["LlamaForCausalLM"] == "sinterlm.plugin.choice:SinterLlamaForCausalLM"
    assert set(registered) == set(plugin.ARCHITECTURES)


def test_an_unknown_vllm_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, registered: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plugin, "vllm_version", lambda: "0.99.1")
    monkeypatch.setenv("SINTERLM_VLLM", "on")
    plugin.register()
    assert not registered and "0.99.1 is not known" in caplog.text
    monkeypatch.setenv("SINTERLM_VLLM", "require")
    with pytest.raises(UsageError, match=r"0\.99\.1"):
        plugin.register()
