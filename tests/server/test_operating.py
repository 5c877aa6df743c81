"""What an operator asks on the server's machine: sessions, checkpoints, status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cutlayer.cli.main import main
from cutlayer.errors import ConfigError, Refused
from cutlayer.server.audit_log import verify
from cutlayer.server.metrics import Metrics
from cutlayer.server.metrics_port import MetricsPort
from cutlayer.server.overview import runs_of
from cutlayer.server.presence import Presence, server_in
from cutlayer.server.status_page import Status
from cutlayer.wire import cutlayer_pb2 as pb
from tests.server.test_status_page import ABOUT
from tests.site import Loop, Site, batch_of, site_of


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs a verb with `--format json` and reads what it prints."""

    def ask(*words: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([*words, "--format", "json"]) == code
        return json.loads(capsys.readouterr().out)

    return ask


@pytest.fixture
def site(folder_of: Any, certs: Path, tmp_path: Path) -> Iterator[Site]:
    """A server with a folder of its own, and a run of the tenant `default` that is open."""
    site = site_of(folder_of("llama"), certs, tmp_path)
    yield site
    site.server.stop(grace_s=0.2)


def trained(site: Site, run: str) -> Any:
    """Return an open run that took two steps and saved both."""
    model = site.connect(run=run)
    loop = Loop.over(model)
    for step in (1, 2):
        loop.step(batch_of(step))
        model.connection.request(pb.Head(save_state=pb.SaveState(step=step))).wait()
    return model


def test_sessions_are_listed_and_shown(site: Site, tmp_path: Path, told: Any):
    """An open session is listed under tenant and run; an unknown one is refused by name."""
    with trained(site, "mine"):
        (listed,) = told("sessions", "list", "--state_dir", str(tmp_path))["sessions"]
        shown = told("sessions", "show", "default/mine", "--state_dir", str(tmp_path))
        error = told("sessions", "show", "default/x", "--state_dir", str(tmp_path), code=2)

    assert listed == shown
    assert (shown["name"], shown["layers"], shown["rank"]) == ("default/mine", "2:5", 3)
    assert error["error"]["code"] == "config"


def test_a_session_is_stopped_through_its_server(site: Site, tmp_path: Path, told: Any):
    """`sessions stop` ends a run that is open: its client is told, and what it saved stays."""
    presence = Presence(tmp_path)
    model = trained(site, "mine")
    loop = Loop.over(model)

    stopped = told("sessions", "stop", "default/mine", "--state_dir", str(tmp_path))

    assert stopped["by"] == "server"
    assert told("sessions", "list", "--state_dir", str(tmp_path))["sessions"] == []
    with pytest.raises(Refused, match="no such session"):
        loop.step(batch_of(3))
    kept = told("checkpoints", "list", "--state_dir", str(tmp_path))["checkpoints"]
    assert [state["step"] for state in kept] == [1, 2]
    presence.close()


def test_a_session_is_stopped_without_a_server(site: Site, tmp_path: Path, told: Any):
    """While no server runs, `sessions stop` takes the session out of the journal."""
    trained(site, "mine")
    site.server.stop(grace_s=0.2)

    stopped = told("sessions", "stop", "default/mine", "--state_dir", str(tmp_path))

    assert stopped["by"] == "journal"
    assert told("sessions", "list", "--state_dir", str(tmp_path))["sessions"] == []


def test_checkpoints_are_listed_and_deleted(site: Site, tmp_path: Path, told: Any):
    """A saved state is deleted by tenant, run and step, and the audit log says by whom."""
    trained(site, "mine").close()
    trained(site, "other").close()
    folder = ("--state_dir", str(tmp_path))

    gone = told("checkpoints", "delete", "default/mine", "--step", "1", *folder)["deleted"]
    told("checkpoints", "delete", "default/mine", "--step", "1", *folder, code=2)
    told("checkpoints", "delete", "../other", *folder, code=2)

    kept = told("checkpoints", "list", *folder)["checkpoints"]
    assert [(k["run"], k["step"]) for k in kept] == [("mine", 2), ("other", 1), ("other", 2)]
    assert gone[0]["size_bytes"] > 1000
    assert told("checkpoints", "list", "--tenant", "nobody", *folder)["checkpoints"] == []
    assert verify(tmp_path / "audit.jsonl").lines == 1


def test_status_tells_what_the_server_does(site: Site, tmp_path: Path, told: Any):
    """`status` finds the server by its folder, reads its port, and then tells that it is off."""
    metrics = Metrics()
    metrics.runs = lambda: runs_of(site.server.sessions)
    status = Status(metrics, ABOUT)
    port = MetricsPort(status, "127.0.0.1", 0)
    presence = Presence(tmp_path)
    presence.tell({"metrics": f"http://127.0.0.1:{port.port}/", "address": "here:7443"})
    with trained(site, "mine"):
        facts = told("status", "--state_dir", str(tmp_path))
        (live,) = told("sessions", "list", "--state_dir", str(tmp_path))["sessions"]
    port.stop()

    assert (facts["running"], facts["runs"][0]["step"]) == (True, 2)
    assert (live["state"], live["step"]) == ("streaming", 2)
    assert "metrics_error" in told("status", "--state_dir", str(tmp_path))
    presence.close()
    assert told("status", "--state_dir", str(tmp_path), code=1) == {"running": False}
    assert told("status", "--state_dir", str(tmp_path / "x"), code=2)["error"]["code"] == "config"


def test_one_server_has_a_folder(tmp_path: Path):
    """A second server in the same folder is refused, until the first is gone."""
    first = Presence(tmp_path)
    first.tell({"address": "a"})

    with pytest.raises(ConfigError, match="another server uses"):
        Presence(tmp_path)
    assert server_in(tmp_path)["address"] == "a"
    first.close()
    assert server_in(tmp_path) is None
    Presence(tmp_path).close()


def test_numbers_that_no_server_can_have_are_refused(capsys: pytest.CaptureFixture[str]):
    """All at once; a lease of no time would have the server look for silent tenants without end."""
    words = ["--model_name_or_path", "x", "--split_bottom_layers", "1", "--split_top_layers", "1"]
    wrong = ["--lease_s", "0", "--max_sessions", "0", "--fuse_tokens", "-1"]

    assert main(["serve", *words, *wrong, "--plaintext", "--send_once_ttl_s", "nan"]) == 2
    told = capsys.readouterr().err
    for flag in ("--lease_s 0.0", "--max_sessions 0", "--fuse_tokens -1", "--send_once_ttl_s nan"):
        assert f"{flag} must be at least" in told
