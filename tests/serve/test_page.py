"""The page's files and what its dashboard polls, in process; tests/serve/browser drives it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from starlette.testclient import TestClient

from sinterlm import __version__
from sinterlm.engine.stats import EngineStats, OpStats
from sinterlm.options import ServeOptions
from sinterlm.serve.app import build_app
from sinterlm.serve.bridge import Bridge
from sinterlm.serve.metrics import Metrics
from sinterlm.serve.served import ServedModel
from tests.conftest import ROOT

WEB = ROOT / "src/sinterlm/serve/web"
ASSETS = sorted(path.name for path in WEB.iterdir())
STATS = EngineStats(
    num_running=3, num_waiting=1, num_preemptions=0,
    kv_pages_total=100, kv_pages_used=10, kv_pages_cached=5,
    prefix_cache_queries=40, prefix_cache_hits=16,
    prompt_tokens_total=40, generation_tokens_total=7,
    spec_draft_tokens=0, spec_accepted_tokens=0,
    requests_finished={"stop": 2, "length": 1, "abort": 0, "error": 0},
    steps=9, step_seconds_total=0.5,
    ops=(OpStats("attention", 270, 0.25, 0.75), OpStats("norm_lm_head_sample", 9, 0.1, None)),
)  # fmt: skip


class StillBridge:
    """A bridge as the page sees one, at one moment."""

    is_ready = True
    failure: str | None = None
    snapshot = STATS

    def stats(self) -> EngineStats:
        return self.snapshot


@pytest.fixture
def bridge() -> StillBridge:
    return StillBridge()


@pytest.fixture
def metrics(bridge: StillBridge) -> Metrics:
    return Metrics("tiny", 512, bridge.stats, {})


@pytest.fixture
def client(bridge: StillBridge, metrics: Metrics) -> Iterator[TestClient]:
    served = ServedModel(
        names=("tiny", "alias"), root="tiny", created=0, max_model_len=512, vocab_size=8,
        tokenizer=cast("object", None), defaults=cast("object", None), default_max_tokens=None,
    )  # type: ignore[arg-type]  # fmt: skip
    app = build_app(cast(Bridge, bridge), served, ServeOptions(), metrics)
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/ui/style.css", "text/css; charset=utf-8"),
        ("/ui/app.js", "text/javascript; charset=utf-8"),
        ("/ui/icon.svg", "image/svg+xml"),
    ],
)
def test_files_come_with_a_strict_policy(client: TestClient, path: str, media_type: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_every_file_is_served_as_it_lies(client: TestClient) -> None:
    for name in ASSETS:
        assert client.get(f"/ui/{name}").content == (WEB / name).read_bytes(), name
    assert client.get("/").content == (WEB / "index.html").read_bytes()


def test_a_browser_that_has_a_file_gets_304(client: TestClient) -> None:
    first = client.get("/ui/app.js")
    assert first.headers["cache-control"] == "no-cache"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}'):
        again = client.get("/ui/app.js", headers={"if-none-match": known})
        assert again.status_code == 304
        assert again.content == b""
        assert again.headers["etag"] == first.headers["etag"]
    assert client.get("/ui/app.js", headers={"if-none-match": '"other"'}).status_code == 200
    assert client.get("/ui/style.css").headers["etag"] != first.headers["etag"]


def test_head_and_wrong_methods(client: TestClient) -> None:
    assert client.head("/").status_code == 200
    assert client.post("/").status_code == 405


@pytest.mark.parametrize(
    "path", ["/ui/nothing.js", "/ui/..%2fweb.py", "/ui/../app.py", "/ui/", "/ui/__init__.py"]
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "error" in answer.json()


def test_stats_have_what_the_dashboard_draws(
    client: TestClient, bridge: StillBridge, metrics: Metrics
) -> None:
    metrics.first_token(0.03)
    metrics.token(0.02)
    metrics.token(1e9)
    answer = client.get("/ui/stats")
    assert answer.headers["cache-control"] == "no-store"
    stats = answer.json()
    assert stats["version"] == __version__
    assert (stats["ready"], stats["failure"]) == (True, None)
    assert stats["uptime_seconds"] >= 0
    assert stats["model"] == {"name": "tiny", "max_model_len": 512}
    assert stats["machine"]["cpus"] >= 1
    assert stats["machine"]["cpu"]
    assert stats["engine"]["num_running"] == 3
    assert stats["engine"]["requests_finished"]["stop"] == 2
    assert stats["engine"]["ops"][0] == {
        "name": "attention", "calls": 270, "seconds": 0.25, "roof_fraction": 0.75,
    }  # fmt: skip
    assert stats["engine"]["ops"][1]["roof_fraction"] is None
    for name, count in (("ttft", 1), ("itl", 2)):
        assert len(stats[name]["counts"]) == len(stats[name]["bounds"]) + 1
        assert sum(stats[name]["counts"]) == count
    assert stats["itl"]["counts"][-1] == 1  # beyond every bound
    assert stats["ttft"]["total"] == pytest.approx(0.03)


def test_stats_tell_of_draining_and_of_failure(client: TestClient, bridge: StillBridge) -> None:
    bridge.is_ready = False
    bridge.failure = "RuntimeError, id 7f"
    bridge.snapshot = replace(STATS, num_running=0)
    stats = client.get("/ui/stats").json()
    assert (stats["ready"], stats["failure"]) == (False, "RuntimeError, id 7f")
    assert stats["engine"]["num_running"] == 0


@pytest.mark.parametrize("path", sorted(WEB.iterdir()), ids=lambda path: path.name)
def test_assets_need_nothing_from_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]", text), "an address outside the server"
    assert not re.search(r"@import|@font-face|url\(", text)


@pytest.mark.parametrize("path", sorted(WEB.glob("*.js")), ids=lambda path: path.name)
def test_scripts_never_make_html_from_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    made = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function"
    assert not re.search(made, text)
    for imported in re.findall(r'from "([^"]+)"', text):
        assert (WEB / imported).is_file(), imported


def test_the_document_has_no_inline_script_or_style() -> None:
    text = (WEB / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", text)
    for name in re.findall(r'(?:src|href)="ui/([^"]+)"', text):
        assert (WEB / name).is_file(), name


def test_every_id_the_scripts_ask_for_is_in_the_document() -> None:
    there = re.findall(r'\bid="([^"]+)"', (WEB / "index.html").read_text(encoding="utf-8"))
    assert len(there) == len(set(there))
    asked = {
        name
        for path in WEB.glob("*.js")
        for name in re.findall(r'byId\("([^"]+)"\)', path.read_text(encoding="utf-8"))
    }
    assert asked <= set(there), asked - set(there)
