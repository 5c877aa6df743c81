"""Training steps with each defense, all on the same trunk's weights."""

# Shapes:  B batch   T tokens   D model width   V vocabulary

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.one_process import Run, Site
from cutlayer.privacy.defenses import defense_of
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.mechanisms import Defense
from cutlayer.privacy.zeroth_order import LossScalar, move_along, step_along
from cutlayer.server.trunk import TenantTrunk
from tests.loopback import Arrived, Loopback

__all__ = ["Contestant", "contestants"]

Step = Callable[[Tensor], None]
FORMAL = {"clip": 100.0, "epsilon": 8.0, "delta": 1e-6, "planned": 10_000}


@dataclass(frozen=True)
class Contestant:
    """A training step with a defense.

    Attributes:
        step: Does it.
        own: Counts the CPU seconds of the mechanism and of booking its releases within the step;
            `None` where the defense is another way to train and not a thing that is added.
    """

    step: Step
    own: Stopwatch | None = None


class Stopwatch:
    """Count the CPU seconds of some calls."""

    def __init__(self) -> None:
        self.cpu_s = 0.0

    def over(self, watched: Any, name: str) -> Any:
        """Return what behaves as `watched`, whose method of this name is counted."""
        return _Watched(watched, name, self)


class _Watched:
    def __init__(self, watched: Any, name: str, watch: Stopwatch) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return getattr(watched, name)(*args, **kwargs)
            finally:
                watch.cpu_s += time.process_time() - began

        self._watched = watched
        self.__dict__[name] = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watched, name)


def contestants(site: Site, folder: Path) -> tuple[dict[str, Contestant], dict[str, Contestant]]:
    """Return training steps: those that add a mechanism, `none` first, and those that add much."""
    run = site.run()
    optimizer = torch.optim.AdamW(run.parameters, lr=1e-5)
    ledger = Ledger(folder / "ledger.jsonl", epsilon=8.0, delta=1e-6)
    embedding_VD = run.client.get_base_model().get_input_embeddings().weight
    listed: dict[str, list[Defense]] = {
        "none": [],
        "gaussian": [defense_of("gaussian", nsr=1.0)],
        "ldp_sequence": [defense_of("ldp_sequence", **FORMAL)],
        "ldp_sequence_pooled": [defense_of("ldp_sequence", **FORMAL, pool=16, spread=True)],
        "metric_dp_embed": [defense_of("metric_dp_embed", eta=100.0)],
        "metric_dp_embed_snap": [
            defense_of("metric_dp_embed", eta=100.0, snap=True, embedding_VD=embedding_VD)
        ],
        "gaussian_gradient": [defense_of("gaussian", nsr=1.0, channel="gradients")],
        "noisy_grad": [defense_of("noisy_grad", **FORMAL)],
    }
    light = {}
    for name, defenses in listed.items():
        own = Stopwatch()
        watched = [own.over(defense, "apply") for defense in defenses]
        light[name] = Contestant(_plain(run, optimizer, watched, own.over(ledger, "book")), own)
    top_only = site.run(train=("top",), defenses=[defense_of("no_backward")])
    few = torch.optim.AdamW(top_only.parameters, lr=1e-5)
    # The published size of the inverter; the bottom, which learns against it, is trained too.
    inverted = defense_of("adv_mi_bottom", vocabulary=len(embedding_VD), width=256)
    pulled = site.run(train=("bottom", "trunk", "top"))
    of_all = torch.optim.AdamW(pulled.parameters, lr=1e-5)
    heavy = {
        "no_backward": Contestant(_plain(top_only, few, [], None)),
        "loss_scalar": Contestant(_by_two_losses(run)),
        "two_server": Contestant(_on_two_servers(site)),
        "adv_mi_bottom": Contestant(_plain(pulled, of_all, [inverted], None)),
    }
    return light, heavy


def _update(run: Run, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(run.parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _plain(
    run: Run, optimizer: torch.optim.Optimizer, defenses: Sequence[Any], ledger: Any
) -> Step:
    """Return the step of a trainer; formal releases are booked, each on disk before it leaves."""
    booked = ledger if any(defense.formal for defense in defenses) else None

    def step(ids_BT: Tensor) -> None:
        run.defend(defenses, booked)
        run.client(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        _update(run, optimizer)

    return step


class _TwoLinks(Loopback):
    """Two servers: each runs the whole forward, and the backward of its own share."""

    def __init__(self, one: TenantTrunk, other: TenantTrunk) -> None:
        super().__init__(one)
        self.other = Loopback(other)

    def forward(self, smashed_BTD: Tensor, question: Any) -> tuple[int, Arrived]:
        """Run both."""
        self.other.forward(smashed_BTD, question)
        return super().forward(smashed_BTD, question)

    def backward(self, forward: int, grad_BTD: Tensor, **more: Any) -> Arrived:
        """Give each its share, and add up what they found as the client would."""
        self.other.backward(forward, grad_BTD[1], **more)
        answer = super().backward(forward, grad_BTD[0], **more)
        pairs = zip(
            self.trunk.parameters.values(), self.other.trunk.parameters.values(), strict=True
        )
        for mine, theirs in pairs:
            mine.grad += theirs.grad
            theirs.grad = None
        return answer


def _on_two_servers(site: Site) -> Step:
    run = site.run()
    run.remote.link = _TwoLinks(run.tenant, site.run().tenant)
    optimizer = torch.optim.AdamW(run.parameters, lr=1e-5)
    return _plain(run, optimizer, [defense_of("two_server")], None)


def _by_two_losses(run: Run) -> Step:
    """Return a step of DP-ZO: the losses on both sides of a direction, and no backward."""
    defense = LossScalar(clip=0.1, epsilon=8.0, delta=1e-6)
    scale, seed = 1e-3, 0

    def losses(ids_BT: Tensor) -> Tensor:
        logits_BTV = run.client(input_ids=ids_BT, use_cache=False).logits
        rows_BVT = logits_BTV[:, :-1].transpose(1, 2)
        return nn.functional.cross_entropy(rows_BVT, ids_BT[:, 1:], reduction="none").mean(1)

    @torch.no_grad()
    def step(ids_BT: Tensor) -> None:
        run.defend([])
        moved = list(run.tenant.parameters.values())
        move_along(moved, seed, scale)
        higher_B = losses(ids_BT)
        move_along(moved, seed, -2 * scale)
        difference_B = higher_B - losses(ids_BT)
        move_along(moved, seed, scale)
        released = float(defense.apply(difference_B))
        step_along(moved, seed, released, scale=scale, batch_size=len(ids_BT), lr=1e-6)

    return step
