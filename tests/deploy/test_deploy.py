"""Deployment files hold what they promise, as far as that shows without an engine to run them.

No image is built and no cluster is asked: flags go through the real command line, metric names are
those of the real exposition, and systemd's own checker judges the unit where it is installed.
"""

from __future__ import annotations

import argparse
import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sinterlm.commands import serve
from sinterlm.engine.stats import OpStats
from sinterlm.options import ServeOptions
from sinterlm.serve.metrics import Metrics
from sinterlm.serve.settings import check_options
from tests.conftest import ROOT
from tests.serve.test_page import STATS

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def serve_flags(arguments: list[str]) -> argparse.Namespace:
    """What ``sinterlm serve`` makes of ``arguments`` (without the word serve)."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    serve.add_arguments(parser)
    args = parser.parse_args(arguments)
    names = ServeOptions.__dataclass_fields__
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    check_options(ServeOptions(**given))
    return args


# ---- Dockerfile


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each build stage, by its name, continuation lines joined."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            current = found.setdefault(rest.rpartition(" AS ")[2], [("FROM", rest)])
        else:
            current.append((word, rest))
    return found


def test_images_run_without_root() -> None:
    assert list(stages()) == ["install", "serve", "compile"]
    for name in ("serve", "compile"):
        users = [rest for word, rest in stages()[name] if word == "USER"]
        assert re.fullmatch(r"[1-9]\d*:0", users[-1]), "numeric, so that runAsNonRoot can tell"


def test_only_the_compiling_image_has_a_compiler() -> None:
    def installs(name: str) -> str:
        return " ".join(rest for word, rest in stages()[name] if word == "RUN")

    assert "g++" in installs("compile")
    assert "apt-get" not in installs("serve")
    assert "apt-get" not in installs("install"), "every dependency comes as a wheel"


def test_images_are_built_with_care() -> None:
    for name, instructions in stages().items():
        for word, rest in instructions:
            assert word != "ADD"
            if word == "FROM":
                assert ":latest" not in rest
                assert "-slim-" in rest or rest.split()[0] in stages()
            if word == "RUN" and "apt-get install" in rest:
                assert "--no-install-recommends" in rest
                assert "rm -rf /var/lib/apt/lists" in rest
            if word == "RUN" and "pip install" in rest:
                assert "--no-cache-dir" in rest
            if word in ("CMD", "ENTRYPOINT"):
                assert json.loads(rest), f"{name}: a shell would swallow SIGTERM"
    signals = [rest for word, rest in stages()["serve"] if word == "STOPSIGNAL"]
    assert signals == ["SIGTERM"]


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert kept[0] == "*"
    for word, rest in stages()["install"]:
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in kept, source


def test_the_images_command_is_one() -> None:
    command = next(json.loads(rest) for word, rest in stages()["serve"] if word == "CMD")
    assert command[0] == "serve"
    args = serve_flags(command[1:])
    assert args.host == "0.0.0.0", "a published port reaches nothing but that"


# ---- systemd


class Repeated(dict[str, Any]):
    """Keeps every value of a key that a unit gives more than once."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self and isinstance(value, list):
            self[key].extend(value)
        else:
            super().__setitem__(key, value)


def unit() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(strict=False, dict_type=Repeated)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / "sinterlm.service").read_text(encoding="utf-8"))
    return parser


def test_the_unit_starts_what_there_is_and_lets_it_drain() -> None:
    service = unit()["Service"]
    command = shlex.split(service["ExecStart"])
    assert command[0].endswith("/sinterlm")
    args = serve_flags(command[2:])
    assert args.host == "127.0.0.1"
    assert float(service["TimeoutStopSec"]) > args.shutdown_timeout
    assert service["KillSignal"] == "SIGTERM"
    assert service["Restart"] == "on-failure"


@pytest.mark.parametrize(
    "name",
    ["DynamicUser", "NoNewPrivileges", "PrivateTmp", "PrivateDevices", "ProtectHome",
     "ProtectKernelModules", "ProtectKernelTunables", "ProtectControlGroups", "RestrictNamespaces",
     "LockPersonality", "RestrictSUIDSGID"],
)  # fmt: skip
def test_the_unit_is_hardened(name: str) -> None:
    assert unit()["Service"][name] == "yes"
    assert unit()["Service"]["ProtectSystem"] == "strict"
    assert unit()["Service"]["CapabilityBoundingSet"] == ""


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    checker = shutil.which("systemd-analyze")
    if checker is None:
        pytest.skip("no systemd-analyze on this machine")
    text = (DEPLOY / "sinterlm.service").read_text(encoding="utf-8")
    copy = tmp_path / "sinterlm.service"
    copy.write_text(text.replace("/usr/local/bin/sinterlm", "/bin/true"), encoding="utf-8")
    done = subprocess.run([checker, "verify", str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sinterlm.service" not in done.stderr, done.stderr


# ---- Kubernetes


def documents() -> dict[str, Any]:
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def container() -> dict[str, Any]:
    (only,) = documents()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(only)


def test_every_selector_finds_the_pods() -> None:
    found = documents()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels


def test_pods_run_without_rights_under_any_user() -> None:
    pod = documents()["Deployment"]["spec"]["template"]["spec"]
    security = container()["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert "runAsUser" not in {**pod["securityContext"], **security}
    assert pod["automountServiceAccountToken"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_probes_ask_paths_that_answer_without_a_key() -> None:
    from sinterlm.serve.middleware import PUBLIC_PATHS

    found = {name: container()[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    for probe in found.values():
        assert probe["httpGet"]["path"] in PUBLIC_PATHS
        assert probe["httpGet"]["port"] in {port["name"] for port in container()["ports"]}
    assert found["liveness"]["httpGet"]["path"] == "/health", "draining must not look like death"
    assert found["readiness"]["httpGet"]["path"] == "/ready"


def test_flags_limits_and_grace_fit_together() -> None:
    pod = documents()["Deployment"]["spec"]["template"]["spec"]
    args = serve_flags(container()["args"][1:])
    sleep = re.search(r"sleep\((\d+)\)", str(container()["lifecycle"]["preStop"]))
    assert sleep is not None
    assert pod["terminationGracePeriodSeconds"] > args.shutdown_timeout + int(sleep[1])
    assert container()["resources"]["limits"] == container()["resources"]["requests"]
    assert {"cpu", "memory"} <= set(container()["resources"]["limits"])
    assert args.port == container()["ports"][0]["containerPort"]


def test_mounts_have_volumes_and_the_cache_is_writable() -> None:
    volumes = {
        v["name"]: v for v in documents()["Deployment"]["spec"]["template"]["spec"]["volumes"]
    }
    mounts = {m["mountPath"]: m for m in container()["volumeMounts"]}
    assert {m["name"] for m in mounts.values()} == set(volumes)
    assert mounts["/bundle"]["readOnly"] is True
    assert "emptyDir" in volumes[mounts["/cache"]["name"]]
    environment = dict(
        pair.split("=", 1)
        for word, rest in stages()["serve"]
        if word == "ENV"
        for pair in rest.split()
    )
    for name in ("HOME", "HF_HOME", "SINTERLM_CACHE_DIR"):
        assert environment[name].startswith("/cache"), "nothing else can be written to"


# ---- Grafana


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    targets = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    variables = [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    return targets + variables


def test_every_metric_of_the_dashboard_exists() -> None:
    metrics = Metrics("m", 512, lambda: STATS, {})
    metrics.rejected(429)
    metrics.responded("/v1/models", 200)
    assert isinstance(STATS.ops[0], OpStats)
    text = metrics.render(None)[0].decode()
    exposed = set(re.findall(r"^([a-z0-9_:]+)(?:\{| )", text, re.MULTILINE))
    asked = {
        name for e in expressions() for name in re.findall(r"\b(?:vllm:|sinterlm:|process_)\w+", e)
    }
    assert len(asked) > 15
    assert asked <= exposed, asked - exposed


def test_panels_have_ids_and_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        box = panel["gridPos"]
        own = {
            (x, y)
            for x in range(box["x"], box["x"] + box["w"])
            for y in range(box["y"], box["y"] + box["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
