"""What an operator counts, by tenant: steps, tokens, bytes, waiting, computing, refusals.

Numbers only: no run's content is here, and no loss, which the server does not have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

__all__ = ["Metrics", "RunFacts"]

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_RECENT_S = 60.0


@dataclass(frozen=True)
class RunFacts:
    """One session as an operator sees it."""

    session: str
    tenant: str
    run: str
    state: str
    """`streaming`, `silent` or `parked`."""
    step: int = 0
    pending: int = 0
    """Forwards that wait for their backward."""
    memory_bytes: int = 0
    silent_s: float = 0.0


class Metrics:
    """The numbers of one server, for Prometheus and the status page."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.started_s = time.time()
        self.runs: Callable[[], Iterable[RunFacts]] = tuple
        """Gives the sessions of the moment; set by who has them."""
        self.queue_depth: Callable[[], int] = int
        """Gives how many requests wait for the trunk; set by who has the queue."""
        self.fused: Callable[[], Mapping[str, int]] = dict
        """Gives how many of each tenant's requests were computed together with others'."""
        made: dict[str, Any] = {"registry": self.registry}
        by_tenant = ["tenant"]
        self._steps = Counter("cutlayer_steps", "Optimizer steps", by_tenant, **made)
        self._tokens = Counter("cutlayer_tokens", "Tokens, padding included", by_tenant, **made)
        self._bytes = Counter(
            "cutlayer_tensor_bytes", "Bytes of tensors", ["tenant", "direction"], **made
        )
        self._refused = Counter("cutlayer_refused", "Refusals", ["tenant", "code"], **made)
        self._queued = Histogram(
            "cutlayer_queue_seconds",
            "Waiting for the trunk's turn",
            by_tenant,
            buckets=_SECONDS,
            **made,
        )
        self._computed = Histogram(
            "cutlayer_phase_seconds",
            "Computing one request",
            ["tenant", "phase"],
            buckets=_SECONDS,
            **made,
        )
        self._recent: dict[str, dict[int, int]] = {}
        """By tenant: the tokens of each second of the last minute."""
        ProcessCollector(registry=self.registry)
        self.registry.register(_Now(self))

    def answered(
        self,
        tenant: str,
        *,
        phase: str | None,
        tokens: int,
        received_bytes: int,
        sent_bytes: int,
        queued_s: float,
        computed_s: float,
    ) -> None:
        """Count a request that was done."""
        self._bytes.labels(tenant, "received").inc(received_bytes)
        self._bytes.labels(tenant, "sent").inc(sent_bytes)
        self._queued.labels(tenant).observe(max(queued_s, 0.0))
        if phase:
            self._computed.labels(tenant, phase).observe(computed_s)
        if phase == "optim":
            self._steps.labels(tenant).inc()
        if tokens:
            self._tokens.labels(tenant).inc(tokens)
            # By seconds, not by requests: nobody may ask for the rate for weeks.
            recent = self._now_recent(tenant)
            second = int(time.monotonic())
            self._recent[tenant] = {**recent, second: recent.get(second, 0) + tokens}

    def refused(self, tenant: str, code: str) -> None:
        """Count a refusal; of somebody unknown the tenant is empty."""
        self._refused.labels(tenant, code).inc()

    def tokens_per_s(self, tenant: str) -> float:
        """Return the tokens a second in the last minute."""
        return sum(self._now_recent(tenant).values()) / _RECENT_S

    def _now_recent(self, tenant: str) -> dict[int, int]:
        since_s = time.monotonic() - _RECENT_S
        return {at: n for at, n in self._recent.get(tenant, {}).items() if at > since_s}

    def table(self) -> dict[str, dict[str, float]]:
        """Return the sums by tenant: steps, tokens, bytes, waiting, computing, refusals."""
        found: dict[str, dict[str, float]] = {}
        for metric in self.registry.collect():
            for sample in metric.samples:
                if "tenant" in sample.labels and not sample.name.endswith(("_bucket", "_created")):
                    row = found.setdefault(sample.labels["tenant"], {})
                    name = sample.name.removeprefix("cutlayer_")
                    rest = [v for k, v in sample.labels.items() if k != "tenant"]
                    key = ":".join([name, *rest])
                    row[key] = row.get(key, 0.0) + sample.value
        return found


class _Now:
    """What others count, or is true at the moment of asking."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """Yield gauges and counters, for prometheus_client."""
        runs = list(self._metrics.runs())
        sums: Mapping[str, tuple[str, Callable[[RunFacts], float]]] = {
            "cutlayer_sessions": ("Open sessions", lambda _: 1),
            "cutlayer_pending": ("Forwards that wait for their backward", lambda run: run.pending),
            "cutlayer_memory_bytes": ("Memory of sessions", lambda run: run.memory_bytes),
        }
        for name, (text, value) in sums.items():
            gauge = GaugeMetricFamily(name, text, labels=["tenant"])
            for tenant in sorted({run.tenant for run in runs}):
                mine = [run for run in runs if run.tenant == tenant and run.state != "parked"]
                gauge.add_metric([tenant], sum(map(value, mine)))
            yield gauge
        fused = CounterMetricFamily(
            "cutlayer_fused", "Requests computed together with other tenants'", labels=["tenant"]
        )
        for tenant, requests in sorted(self._metrics.fused().items()):
            fused.add_metric([tenant], requests)
        yield fused
        depth = self._metrics.queue_depth()
        yield GaugeMetricFamily("cutlayer_queue_depth", "Requests that wait", value=depth)
        started_s = self._metrics.started_s
        yield GaugeMetricFamily(
            "cutlayer_start_time_seconds", "Start of the server", value=started_s
        )
