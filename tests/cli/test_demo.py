"""``sinterlm demo``: what ``make demo`` shows, and that its proof can fail."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from sinterlm import cli
from sinterlm.commands import demo
from sinterlm.engine.llm import LLM
from sinterlm.engine.outputs import RequestOutput


def test_demo(
    compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bandwidths = iter((900.0, 1000.0))  # GB/s; `doctor` measures for real
    monkeypatch.setattr(demo, "measure", lambda _: (1.0, next(bandwidths)))
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "The planets in order from closest to the sun are:" in out
    for word in ("compile", "load", "TTFT", "decode", "streamed", "bandwidth"):
        assert re.search(rf"^{word} +[\d.]+ ", out, re.MULTILINE), word
    share = re.search(r"^bandwidth +([\d.]+) GB/s +(\d+)% of the 1000.0 GB/s", out, re.MULTILINE)
    assert share is not None
    assert abs(float(share[1]) / 10 - int(share[2])) <= 0.6
    hashes = re.findall(r"^  (?:alone|among 15 others) +([0-9a-f]{64})$", out, re.MULTILINE)
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]


def test_the_proof_fails_on_one_bit(
    compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = LLM.generate

    def off_by_one_bit(self: LLM, *args: Any) -> list[RequestOutput]:
        outputs = generate(self, *args)
        for output in outputs:
            rows = output.outputs[0].logprobs
            assert rows is not None
            token = output.outputs[0].token_ids[-1]
            nudged = rows[-1][token].logprob * (1 + 2**-20)
            rows[-1][token] = replace(rows[-1][token], logprob=nudged)
        return outputs

    monkeypatch.setattr(LLM, "generate", off_by_one_bit)
    monkeypatch.setattr(demo, "MAX_TOKENS", 4)
    monkeypatch.setattr(demo, "measure", lambda _: (1.0, 1.0))
    assert cli.main(["demo"]) == 2
    assert "depends on what else is in the batch" in capsys.readouterr().err


def test_no_share_above_what_memory_gives(
    compiled: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MAX_TOKENS", 4)
    monkeypatch.setattr(demo, "measure", lambda _: (1.0, 0.001))
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "no share given" in out
    assert "% of the" not in out
