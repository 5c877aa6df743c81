"""The operator's port: metrics that Prometheus can read, and a page that a person can read."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page
from prometheus_client.parser import text_string_to_metric_families

from cutlayer.errors import ConfigError, Refused
from cutlayer.server.metrics import Metrics, RunFacts
from cutlayer.server.metrics_port import MetricsPort
from cutlayer.server.status_page import Status
from cutlayer.server.watch import Watch
from cutlayer.wire import cutlayer_pb2 as pb

HOSTILE = '</td><script>document.title="taken"</script><img src=x onerror="alert(1)">'
ABOUT = {
    "version": "0.1.0",
    "model": "SmolLM2-135M-Instruct",
    "layers": "2:28",
    "address": "gpu.example.org:7443",
    "auth": "both",
}
RUNS = [
    RunFacts("secret-session-id", "ward-a", "icd10", "streaming", 120, 4, 50 << 20, 0.2),
    RunFacts("s2", "ward-a", "letters", "parked", 40, 0, 0, 4000.0),
    RunFacts("s3", "ward-b", HOSTILE, "silent", 7, 0, 20 << 20, 70.0),
]


def forward(rows: int, tokens: int) -> pb.Head:
    """Return the head of a forward."""
    meta = pb.TensorMeta(name="smashed", shape=[rows, tokens, 8], nbytes=rows * tokens * 32)
    return pb.Head(forward=pb.Forward(), tensors=[meta])


def done(queue_s: float, compute_s: float, nbytes: int = 0) -> pb.Head:
    """Return the head of a reply."""
    tensors = [pb.TensorMeta(name="trunk_out", nbytes=nbytes)] if nbytes else []
    return pb.Head(done=pb.Done(queue_s=queue_s, compute_s=compute_s), tensors=tensors)


@pytest.fixture
def port() -> Iterator[MetricsPort]:
    """An operator's port of a server that has seen two tenants and a stranger."""
    metrics = Metrics()
    metrics.runs = lambda: RUNS
    metrics.queue_depth = lambda: 3
    watch = Watch(metrics=metrics)
    for _ in range(3):
        watch.answered("ward-a", "icd10", forward(4, 100), done(0.02, 0.5, 12_800))
        watch.answered("ward-a", "icd10", pb.Head(backward=pb.Backward()), done(0.2, 0.9))
        watch.answered("ward-a", "icd10", pb.Head(optim_step=pb.OptimStep()), done(0.0, 0.01))
    failed = pb.Head(failure=pb.Failure(code="over_quota", message="too much"))
    watch.answered("ward-b", HOSTILE, forward(1, 5), failed)
    watch.refused("", Refused("who are you"))
    made = MetricsPort(Status(metrics, ABOUT), "127.0.0.1", 0)
    yield made
    made.stop()


def ask(port: MetricsPort, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    """Return status, body and headers of one GET."""
    call = http.client.HTTPConnection("127.0.0.1", port.port, timeout=10)
    call.request("GET", path, headers=headers)
    reply = call.getresponse()
    found = (reply.status, reply.read().decode(), dict(reply.getheaders()))
    call.close()
    return found


def test_prometheus_reads_what_was_counted(port: MetricsPort):
    """Steps, tokens, bytes, waiting, time by phase, memory and refusals are there by tenant."""
    _, text, _ = ask(port, "/metrics")

    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    expected = {
        ("cutlayer_steps_total", "ward-a"): 3,
        ("cutlayer_tokens_total", "ward-a"): 1200,
        ("cutlayer_tensor_bytes_total", "received", "ward-a"): 3 * 12_800,
        ("cutlayer_tensor_bytes_total", "sent", "ward-a"): 3 * 12_800,
        ("cutlayer_queue_seconds_count", "ward-a"): 9,
        ("cutlayer_queue_seconds_bucket", "0.03", "ward-a"): 6,
        ("cutlayer_phase_seconds_count", "forward", "ward-a"): 3,
        ("cutlayer_phase_seconds_count", "backward", "ward-a"): 3,
        ("cutlayer_phase_seconds_count", "optim", "ward-a"): 3,
        ("cutlayer_memory_bytes", "ward-a"): 50 << 20,
        ("cutlayer_sessions", "ward-a"): 1,
        ("cutlayer_refused_total", "over_quota", "ward-b"): 1,
        ("cutlayer_refused_total", "", "refused"): 1,
        ("cutlayer_queue_depth",): 3,
    }
    assert expected.items() <= found.items()
    assert "secret-session-id" not in text


def test_no_session_id_and_no_loss_is_told(port: MetricsPort):
    """Neither the page nor its facts name a session's id, and nothing is called a loss."""
    page, facts = ask(port, "/")[1], ask(port, "/status.json")[1]

    for text in (page, facts, ask(port, "/metrics")[1]):
        assert "secret-session-id" not in text
    assert "loss" not in facts
    assert json.loads(facts)["tenants"][0]["steps"] == 3


def test_probes_follow_the_server(port: MetricsPort):
    """`/readyz` turns to 503 when the server stops taking work; `/healthz` stays."""
    assert [ask(port, path)[0] for path in ("/healthz", "/readyz", "/nothing")] == [200, 200, 404]
    port._server.status.is_serving = lambda: False

    assert [ask(port, path)[0] for path in ("/healthz", "/readyz")] == [200, 503]


def test_only_this_machine_is_answered(port: MetricsPort):
    """A request that names another host is refused, as a rebound name would send it."""
    assert ask(port, "/metrics", Host="evil.example.org:9464")[0] == 421
    assert ask(port, "/metrics", Host="localhost:9464")[0] == 200
    with pytest.raises(ConfigError, match="cannot listen"):
        MetricsPort(port._server.status, "127.0.0.1", port.port)


def test_silent_callers_do_not_shut_out_the_next(port: MetricsPort):
    """While ten callers send nothing, the eleventh is answered; the port holds few threads."""
    before = threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", port.port)) for _ in range(10)]
    time.sleep(0.2)

    assert ask(port, "/healthz")[0] == 200
    assert threading.active_count() - before <= 16
    for caller in silent:
        caller.close()


# ---------------------------------------------------------------------- in a browser


@pytest.fixture
def opened(browser: Browser, port: MetricsPort) -> Iterator[Any]:
    """Return a function that opens the page; what it complains of is in `page.troubles`."""
    pages = []

    def open_(**settings: Any) -> Page:
        page = browser.new_context(**settings).new_page()
        page.troubles = []
        page.on("console", lambda message: page.troubles.append(message.text))
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on("dialog", lambda dialog: page.troubles.append(dialog.message))
        page.on(
            "request",
            lambda request: (
                request.url.endswith(("/", "/favicon.ico")) or page.troubles.append(request.url)
            ),
        )
        page.goto(f"http://127.0.0.1:{port.port}/")
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.context.close()


def test_a_person_reads_tenants_runs_and_load(opened: Any):
    """Tenants, runs, throughput, queue, memory and uptime stand there, names escaped."""
    page = opened(java_script_enabled=False)

    text = page.inner_text("main")
    for words in (
        "SmolLM2-135M-Instruct",
        "tokens/s",
        "requests waiting",
        "up for",
        "streaming",
        "parked",
        "50.0 MiB",
        "1 × over_quota",  # noqa: RUF001  # as it stands there
        "1 calls of somebody unknown",
    ):
        assert words in text
    assert page.locator("#tenants ~ .wide tbody tr").count() == 2
    assert page.locator("#runs ~ .wide tbody tr").count() == 3
    assert page.locator("tbody th", has_text="onerror").inner_text() == HOSTILE


def test_a_hostile_name_runs_nothing(opened: Any):
    """A run's name with markup in it is text: no script, no picture, no complaint."""
    page = opened()

    assert page.title() == "cutlayer: 2 tenants, 3 runs"
    assert page.locator("script, img").count() == 0
    assert [told for told in page.troubles if "favicon" not in told] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible(opened: Any, scheme: str):
    """Axe finds nothing on a phone, in either colour scheme, and nothing overflows."""
    page = opened(viewport={"width": 360, "height": 740}, color_scheme=scheme, bypass_csp=True)

    found = Axe().run(page).response["violations"]

    assert [(v["id"], v["nodes"][0]["html"]) for v in found] == []
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360
