"""What is deployed is linted, and speaks of flags, paths and metrics that there are."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cutlayer.cli import serve, train
from cutlayer.server.metrics import Metrics, RunFacts
from cutlayer.server.watch import Watch
from tests.server.test_status_page import done, forward

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
BIN = Path(sys.executable).parent


def run(*words: object) -> str:
    """Run a linter; return what it says once it has passed."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def parsed(verb: Any, words: list[str]) -> argparse.Namespace:
    """Return a verb's flags, which must all be known."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    verb.arguments(parser)
    return parser.parse_args(words)


def test_the_containerfile_is_clean():
    """Hadolint finds nothing in the Containerfile, and a broken one does not pass."""
    assert run(BIN / "hadolint", DEPLOY / "Containerfile") == ""

    broken = (DEPLOY / "Containerfile").read_text().replace("WORKDIR /src", "WORKDIR src")
    found = subprocess.run(
        [BIN / "hadolint", "-"], input=broken, capture_output=True, text=True, check=False
    )
    assert found.returncode != 0


def test_the_containers_run_as_nobody_and_start_the_server():
    """Both images drop root before their entry point, whose flags the server knows."""
    text = (DEPLOY / "Containerfile").read_text()
    entries = [json.loads(line) for line in re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.M)]

    assert text.index("USER 65532:65532") < text.index("FROM base AS client")
    assert [entry[:2] for entry in entries] == [["cutlayer"], ["cutlayer", "serve"]]
    needed = ["--model_name_or_path=x", "--split_bottom_layers=1", "--split_top_layers=1"]
    assert parsed(serve, [*entries[1][2:], *needed]).log_format == "json"


# ---------------------------------------------------------------------- systemd


def test_the_unit_is_sound_and_sandboxed(tmp_path: Path):
    """Systemd takes the unit without a word, and calls its exposure less than 2 of 10."""
    unit = tmp_path / "cutlayer.service"
    text = (DEPLOY / "systemd" / "cutlayer.service").read_text()
    unit.write_text(text.replace("/opt/cutlayer/bin/cutlayer", "/bin/true"))

    assert run("systemd-analyze", "verify", unit) == ""
    run("systemd-analyze", "security", "--offline=true", "--threshold=20", unit)


def test_the_units_flags_are_the_servers():
    """With the settings that lie beside it, the unit's command line is one that `serve` knows."""
    folder = DEPLOY / "systemd"
    lines = [line for line in (folder / "serve.env").read_text().splitlines() if "=" in line]
    settings = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    settings["STATE_DIRECTORY"] = "/var/lib/cutlayer"
    text = (folder / "cutlayer.service").read_text().replace("\\\n", " ")
    command = re.search(r"^ExecStart=(.*)$", text, re.M)[1]
    for name, value in settings.items():
        command = command.replace(f"${{{name}}}", value)

    words = shlex.split(command)
    assert "$" not in command
    assert words[1] == "serve"
    assert parsed(serve, words[2:]).auth == "both"


# ---------------------------------------------------------------------- Kubernetes


def resources(name: str) -> list[dict[str, Any]]:
    """Return the resources of a manifest."""
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


def containers(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a pod's containers, those that begin included."""
    pod = resource["spec"]["template"]["spec"]
    return [*pod["initContainers"], *pod["containers"]]


def pods() -> list[dict[str, Any]]:
    """Return the resources that make pods."""
    every = [*resources("server.yaml"), *resources("client.yaml")]
    return [resource for resource in every if "template" in resource["spec"]]


def test_the_manifests_fit_their_schemas():
    """Every resource fits the schema of its kind strictly, and a misspelt key does not pass."""
    manifests = sorted((DEPLOY / "kubernetes").glob("*.yaml"))

    assert run(BIN / "kubernetes-validate", "--strict", *manifests).count("passed") == 6
    with pytest.raises(AssertionError):
        run(BIN / "kubernetes-validate", "--strict", DEPLOY / "grafana" / "cutlayer.json")


@pytest.mark.parametrize("pod", pods(), ids=lambda pod: pod["metadata"]["name"])
def test_the_pods_have_no_rights(pod: dict[str, Any]):
    """Every container runs as nobody, with a read-only root, no capabilities and no account."""
    spec = pod["spec"]["template"]["spec"]

    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["automountServiceAccountToken"] is False
    for container in containers(pod):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]


def test_the_pods_flags_and_probes_are_ours():
    """The pods' arguments parse, and the probes ask paths that the operator's port has."""
    server, client = (containers(pod)[-1] for pod in pods())
    flags = parsed(serve, server["args"])
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}

    assert ports == {"trunk": flags.port, "metrics": flags.metrics_port}
    assert client["args"][0] == "train"
    assert parsed(train, client["args"][1:]).config == "/run-config/run.yaml"
    asked = {name: server[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness")}
    assert {probe["path"] for probe in asked.values()} == {"/healthz"}
    assert server["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}


# ---------------------------------------------------------------------- Grafana


def test_the_dashboard_asks_for_metrics_that_there_are():
    """Each metric and label in the dashboard's queries is one that the server exports."""
    metrics = Metrics()
    metrics.runs = lambda: [RunFacts("s", "ward-a", "r", "streaming")]
    watch = Watch(metrics=metrics)
    failed = pb_failure()
    for asked, reply in ((forward(1, 2), done(0.1, 0.1, 4)), (forward(1, 2), failed)):
        watch.answered("ward-a", "r", asked, reply)
    exported = {sample.name for metric in metrics.registry.collect() for sample in metric.samples}
    board = json.loads((DEPLOY / "grafana" / "cutlayer.json").read_text())

    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in board["templating"]["list"]]
    asked = {name for query in queries for name in re.findall(r"(?:cutlayer|process)_\w+", query)}
    assert asked <= exported | {"cutlayer_steps_total"}
    assert len(asked) >= 10
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [
        (x, y)
        for at in places
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def pb_failure() -> Any:
    """Return the head of a refusal."""
    from cutlayer.wire import cutlayer_pb2 as pb

    return pb.Head(failure=pb.Failure(code="refused", message="no"))
