"""Reports, baselines and comparisons of sweeps whose figures are known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sinterlm import cli
from sinterlm.bench.baseline import baseline_of, changes, read_baseline, unpaired, write_baseline
from sinterlm.bench.published import published_rows
from sinterlm.bench.raw import RawRun, RequestRecord, RunRecord
from sinterlm.bench.report.data import Costs, load_data
from sinterlm.bench.report.figures import all_drawings
from sinterlm.bench.report.render import write_report
from sinterlm.bench.report.tables import all_tables
from sinterlm.bench.sweep_plan import AGAIN, COLD, TUNE, SweepPlan, save_or_check
from sinterlm.bench.sweep_store import LaunchFacts, Point, SweepStore
from sinterlm.errors import UsageError

ENGINES = ("sinterlm:bf16", "vllm", "llama.cpp:q8_0")
SPEEDS = {"sinterlm:bf16": 2.0, "vllm": 1.0, "llama.cpp:q8_0": 4.0, "sinterlm:bf16" + AGAIN: 2.0}


def make_sweep(folder: Path, rounds: int = 3, factor: float = 1.0, waves: int = 2) -> Path:
    """A sweep in which an engine's tokens come 10 ms / speed apart, a little else each round."""
    plan = SweepPlan("m", ENGINES, (1, 4), rounds, 8, 3, waves, 4, 0, False, True, ENGINES[0])
    store = SweepStore(folder)
    save_or_check(plan, folder)
    facts = {
        "machine": {"cpu": "CPU", "num_cpus": 2, "memory_bytes": 8e9, "system": "Linux"},
        "isa": ["avx2"],
        "engines": {
            name: {"precision": name.partition(":")[2] or "bf16", "versions": {"x": "1"},
                   "installed_bytes": 10**8} for name in ENGINES
        },
        "commands": ["sinterlm bench sweep x"], "dates": ["2026-11-25T18:00:00+00:00"],
    }  # fmt: skip
    (folder / "facts.json").write_text(json.dumps(facts))
    for name in ENGINES:
        store.add(launch(name, COLD, 9.0))
    for number in range(rounds):
        for arm in plan.arms():
            store.add(launch(arm, number, 2.0 + number))
            for size in plan.batch_sizes:
                gap = 0.01 / SPEEDS[arm] / factor * (1 + 0.01 * ((number + len(arm)) % 3))
                add_point(store, number, arm, size, gap, plan.num_requests(size))
    store.add(Point(0, "vllm", "other", 4, None, "it | died\nlog <b>"))
    return folder


def launch(arm: str, number: int, startup: float) -> LaunchFacts:
    return LaunchFacts(number, arm, "default", ("serve", arm), {"A": "1"}, startup, 10**9,
                       " Paris.", 30e9 + number, 200e9)  # fmt: skip


def add_point(store: SweepStore, number: int, arm: str, size: int, gap: float, count: int) -> None:
    events = (gap * 3, gap * 4, gap * 5)
    requests = tuple(
        RequestRecord(i, f"r{i}", 8, 3, 0.0, i // size * gap * 5, events, 3, status=200,
                      finish_reason="length", text=f"t{i}") for i in range(count)
    )  # fmt: skip
    duration = count / size * gap * 5
    run = RunRecord(duration, duration, 0.1 * duration, "2026-11-25T12:00:00+00:00", size, None)
    name = f"{number}-{arm.replace(' ', '_')}-{size}.jsonl"
    store.add_raw(name, RawRun(run, requests))
    store.add(Point(number, arm, "default", size, name))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "sweep"
    path.mkdir()
    return make_sweep(path)


def test_tables(folder: Path) -> None:
    data = load_data(folder, {}, price_per_hour=3.6)
    tables = {table.title: table for table in all_tables(data)}
    assert data.reference == "sinterlm:bf16"
    speed = {row[:2]: row for row in tables["Speed-up, output tokens/s"].rows}
    assert set(speed) == {("sinterlm:bf16 / vllm", "1"), ("sinterlm:bf16 / vllm", "4")}
    assert float(speed[("sinterlm:bf16 / vllm", "4")][2]) == pytest.approx(2.0, abs=0.03)
    assert speed[("sinterlm:bf16 / vllm", "4")][4] == "faster"
    unequal = next(t for title, t in tables.items() if title.startswith("NOT the same"))
    assert {row[0] for row in unequal.rows} == {"sinterlm:bf16 / llama.cpp:q8_0"}
    assert unequal.rows[0][4] == "slower"
    latency = tables["Latency: vllm (bf16)"].rows
    assert latency[0][1:4] == ("30.3", "30.3", "30.6 / 30.6")
    assert "Noise: sinterlm:bf16 against itself" in tables
    footprint = {row[0]: row for row in tables["Start-up and footprint"].rows}
    assert footprint["vllm"] == ("vllm", "9.00", "3.00", "1.0 GB", "100.0 MB")
    assert any("not measured" in row for row in tables["Accuracy of each precision "
                                                       "(`sinterlm eval`)"].rows)  # fmt: skip
    cost = tables["Cost of a million output tokens at 3.6 an hour"].rows
    got = data.estimate("vllm", 1, "output_throughput")
    assert got is not None
    assert float(cost[0][2]) == pytest.approx(0.001 / got.value * 1e6, rel=1e-3)
    assert tables["Failed points"].rows[0][4] == "it | died log <b>"
    row = tables["Throughput: vllm (bf16)"].rows[0]
    assert row[4:] == ("no fraction", "10%", "not measured", "not measured")


def test_tails_need_many_requests(tmp_path: Path) -> None:
    few = load_data(make_sweep(tmp_path / "few", 1), {})
    many = load_data(make_sweep(tmp_path / "many", 3, waves=25), {})
    assert few.tail("vllm", 4, "e2el") is not None
    assert getattr(few.tail("vllm", 4, "e2el"), "name", "") == "P90"
    assert getattr(many.tail("vllm", 4, "e2el"), "name", "") == "P99"
    assert few.estimate("vllm", 4, "mean_ttft_ms") is not None
    ratio = few.ratio("sinterlm:bf16", "vllm", 4, "output_throughput")
    assert ratio is not None and not ratio.has_interval
    assert few.band(4) is None


def test_roof_share(folder: Path) -> None:
    from sinterlm.commands.inspect import look
    from sinterlm.options import CompileOptions
    from tests.bench.conftest import TINY

    subject = look(CompileOptions(str(TINY)))
    data = load_data(folder, {"bf16": Costs(subject.ops, subject.windows)})
    share = data.roof_share("vllm", 4)
    assert share is not None and 0 < share < 1
    assert data.roof_share("llama.cpp:q8_0", 4) is None


def test_report_files(folder: Path, tmp_path: Path) -> None:
    data = load_data(folder, {})
    paths = write_report(tmp_path / "out", data, all_drawings(data))
    text, page = (path.read_text() for path in paths)
    names = ["requests", "ttft", "e2el", "small", "total", "p99", "published"]
    for name in names:
        assert f"figures/{name}.svg" in text
        svg = (tmp_path / "out/figures" / f"{name}.svg").read_text()
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert (tmp_path / "out/figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "PUBLISHED BY OTHERS" in page
    assert page.count("<svg") == len(names)
    assert not re.search(r'(src|href)="(https?:|figures)', page)  # stands alone
    assert "it \\| died" in text
    assert "log &lt;b&gt;" in page
    assert "3 rounds only" in text
    assert "A=1 serve vllm" in text
    assert " 0.00 " not in text


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = tmp_path / "eval.json"
    divergence = {"kl": 1.5e-4, "top1_agreement": 0.991}
    scores.write_text(json.dumps({"scores": [
        {"dtype": "bf16", "perplexity": 20.5, "divergence": divergence}]}))  # fmt: skip
    base = tmp_path / "base.json"
    words = ["bench", "report", str(folder), "--output", str(tmp_path / "r"), "--no-figures"]
    assert cli.main([*words, "--accuracy", str(scores), "--baseline", str(base)]) == 0
    text = (tmp_path / "r/report.md").read_text()
    assert "| bf16 | 20.5000 | 1.50e-04 | 99.10% |" in text
    assert re.search(r"\| 10% \| 1\.5e-04 \| 99\.1% \|", text)
    assert read_baseline(base) == baseline_of(folder)
    assert cli.main(["bench", "compare", str(base), str(folder)]) == 0
    slow = make_sweep(tmp_path / "slow", factor=0.8)
    capsys.readouterr()
    assert cli.main(["bench", "compare", str(base), str(slow)]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert cli.main(["bench", "compare", str(slow), str(base), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["changes"]
    assert all(c["ratio"]["value"] == pytest.approx(1.25, rel=0.02) for c in found)
    assert cli.main(["bench", "compare", str(base), str(slow), "--tolerance", "0.3"]) == 0
    assert cli.main(["bench", "report", str(tmp_path)]) == 2
    assert "holds no sweep" in capsys.readouterr().err
    assert cli.main(["bench", "compare", str(base), str(scores)]) == 2
    assert cli.main([*words, "--accuracy", str(base)]) == 2


def test_too_early_for_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_sweep(tmp_path / "sweep", rounds=0)
    assert cli.main(["bench", "report", str(folder)]) == 2, "nothing but a failure"
    add_point(SweepStore(folder), TUNE, "vllm", 4, 0.01, 4)
    assert cli.main(["bench", "report", str(folder)]) == 1
    assert "go on with the sweep" in capsys.readouterr().err
    assert not (folder / "report").exists()


def test_baselines_that_do_not_compare(folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    a = baseline_of(folder)
    with pytest.raises(UsageError, match="same model"):
        changes(a, replace(a, model="x"))
    with pytest.raises(UsageError, match="input_len"):
        changes(a, replace(a, plan={**a.plan, "input_len": 9}))
    with pytest.raises(UsageError, match="in common"):
        changes(a, replace(a, series={}))
    write_baseline(tmp_path / "a.json", a)
    assert read_baseline(tmp_path / "a.json") == a


def test_unpaired() -> None:
    ratio = unpaired((2.0, 2.2, 1.8), (1.0, 1.1, 0.9))
    assert ratio.value == pytest.approx(2.0)
    assert ratio.low is not None and ratio.high is not None
    assert 1.6 < ratio.low < 2 < ratio.high < 2.4
    assert unpaired((2.0,), (1.0, 1.0)).low is None


def test_published() -> None:
    rows = published_rows()
    assert len(rows) == 24
    assert rows[0].output_tokens_per_s == 48.02
