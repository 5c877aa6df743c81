"""How much one tenant may use. What exceeds a quota waits, or is refused with both numbers."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cutlayer.errors import OverQuota

__all__ = ["QUOTAS", "Bucket", "Desk", "Quotas", "Usage"]

_BURST_S = 5.0
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Quotas:
    """What one tenant may use; 0 is no limit."""

    sessions: int = 0
    """Sessions open at once; parked ones do not count."""
    pending: int = 0
    """Forwards of all its sessions that may wait for their backward (micro-chunks)."""
    memory_bytes: int = 0
    """Adapters, gradients, optimizer states, graphs and KV caches of all its sessions."""
    batch_tokens: int = 0
    """Tokens of one forward, padding included."""
    tokens_per_minute: int = 0
    """Tokens of all its forwards; more than that waits."""
    checkpoint_bytes: int = 0
    """States saved at the server, of all its runs."""
    rank: int = 0
    """Rank of a LoRA."""
    row_bytes: int = 0
    """Rows kept for send-once, of all its runs; what is beyond is not kept and comes again."""

    def but(self, others: Mapping[str, int]) -> Quotas:
        """Return these quotas with some in place of others; unknown names are passed over."""
        return dataclasses.replace(self, **{k: v for k, v in others.items() if k in QUOTAS})


QUOTAS = tuple(field.name for field in dataclasses.fields(Quotas))


class Usage(Protocol):
    """What one open session uses now."""

    @property
    def pending(self) -> int:
        """Forwards that wait for their backward."""

    @property
    def memory_bytes(self) -> int:
        """Memory that is this session's alone."""


class Bucket:
    """Tokens that may be asked for now. It fills with time, and may go into debt by one request.

    So a request that is larger than the bucket waits no longer than its tokens are worth, and over
    any long time no more is let through than the rate.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._level: float | None = None
        self._at_s = clock()
        self._lock = threading.Lock()

    def take(self, tokens: int, tokens_per_minute: int) -> float:
        """Take tokens if there is no debt; return the seconds to wait before asking again, or 0."""
        rate = tokens_per_minute / 60.0
        with self._lock:
            now_s = self._clock()
            level = rate * _BURST_S if self._level is None else self._level
            level = min(level + rate * (now_s - self._at_s), rate * _BURST_S)
            self._at_s = now_s
            if level < -1e-6:
                self._level = level
                return -level / rate
            self._level = level - tokens
            return 0.0


class Desk:
    """Say yes, not yet, or no to what tenants ask for."""

    def __init__(
        self,
        defaults: Quotas | None = None,
        overrides: Callable[[str], Mapping[str, int]] = lambda _tenant: {},
    ) -> None:
        """Open the desk.

        Args:
            defaults: The quotas of every tenant.
            overrides: Gives a tenant's own quotas, by its name.
        """
        self.defaults = defaults or Quotas()
        self.usages: Callable[[str], Iterable[Usage]] = lambda _tenant: ()
        """Gives what a tenant's open sessions use; set by who has the sessions."""
        self._overrides = overrides
        self._buckets: dict[str, Bucket] = {}

    def of(self, tenant: str) -> Quotas:
        """Return a tenant's quotas as they are now."""
        return self.defaults.but(self._overrides(tenant))

    def admit_session(self, tenant: str, open_sessions: int, ranks: Iterable[int]) -> None:
        """Let a session be opened beside the tenant's others.

        Raises:
            OverQuota: If it has too many, or the LoRA's rank is too large.
        """
        quotas = self.of(tenant)
        _within("sessions open", open_sessions + 1, quotas.sessions, "close one of them")
        _within("as the rank of a LoRA", max(ranks, default=0), quotas.rank, "use a smaller lora_r")

    def admit_memory(self, tenant: str, more_bytes: int = 0) -> None:
        """Let a tenant take so much more memory than it uses.

        Raises:
            OverQuota: If that is more than it may.
        """
        limit = self.of(tenant).memory_bytes
        if limit:
            used = sum(usage.memory_bytes for usage in self.usages(tenant))
            hint = "send smaller batches or fewer at once, or use gradient checkpointing"
            _within("bytes of memory", used + more_bytes, limit, hint)

    def admit_forward(self, tenant: str, tokens: int, *, keeps_graph: bool) -> None:
        """Let a forward be computed.

        Raises:
            OverQuota: If the batch has too many tokens, or too many forwards wait for a backward.
        """
        quotas = self.of(tenant)
        _within("tokens in one forward", tokens, quotas.batch_tokens, "use more split_chunks")
        if keeps_graph and quotas.pending:
            pending = 1 + sum(usage.pending for usage in self.usages(tenant))
            hint = "use fewer split_chunks, or fewer runs at once"
            _within("forwards waiting for their backward", pending, quotas.pending, hint)

    def admit_checkpoint(self, tenant: str, held_bytes: int, more_bytes: int) -> None:
        """Let a state be saved beside those that are held.

        Raises:
            OverQuota: If they would be more than the tenant may keep.
        """
        limit = self.of(tenant).checkpoint_bytes
        hint = "lower save_total_limit, or have old runs deleted"
        _within("bytes of saved states", held_bytes + more_bytes, limit, hint)

    def wait_for_tokens(self, tenant: str, tokens: int, ended: threading.Event) -> bool:
        """Wait until the tenant may ask for more tokens; the stream is not read meanwhile.

        Returns:
            Whether it was waited for.
        """
        waited = False
        while tokens and not ended.is_set():
            limit = self.of(tenant).tokens_per_minute
            bucket = self._buckets.setdefault(tenant, Bucket())
            wait_s = bucket.take(tokens, limit) if limit else 0.0
            if not wait_s:
                break
            waited = True
            # Not all of it at once: the quota may be raised meanwhile.
            ended.wait(min(wait_s, _LOOK_EVERY_S))
        return waited


def _within(what: str, found: int, limit: int, hint: str) -> None:
    if limit and found > limit:
        raise OverQuota(f"{found} {what} would exceed this tenant's quota of {limit}: {hint}")
