"""Small forwards of several tenants are computed as one batch, and each is as if it were alone."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import generate_latest
from torch import Tensor

from cutlayer.client.remote_trunk import Question
from cutlayer.errors import NotFinite
from cutlayer.server.fused_lora import CannotFuse, with_loras_of
from cutlayer.server.fusing import Fuser
from cutlayer.server.metrics import Metrics
from cutlayer.wire import cutlayer_pb2 as pb
from tests.site import Site, adapter_of, site_of

WIDTH = 48
SHAPES = {"ward-a": (1, 5), "ward-b": (2, 7), "ward-c": (1, 7), "ward-d": (1, 6)}


@dataclass
class Tenant:
    """One tenant's side of the wire: it fits the trunk's output to numbers of its own."""

    name: str
    model: Any
    rows: int
    tokens: int
    losses: list[float] = field(default_factory=list)
    came_down: list[Tensor] = field(default_factory=list)
    _out: Any = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(ord(self.name[-1]))
        shape = (self.rows, self.tokens, WIDTH)
        self.smashed_BTD = torch.randn(shape, generator=generator)
        self.target_BTD = torch.randn(shape, generator=generator)
        self.mask_BT = torch.ones(shape[:2], dtype=torch.int64)
        self.mask_BT[-1, -2:] = 0
        self.carried = {"attention_mask": self.mask_BT}
        self.step = 0

    def ask_forward(self) -> None:
        """Send the activations."""
        question = Question(
            carried=self.carried,
            wanted_N=torch.tensor([0, 2, 5]) if self.name == "ward-c" else None,
            training=True,
            keep_graph=True,
            wants_gradient=True,
            cache=self.step + 1,  # as models have it in training unless they are told otherwise
        )
        self._out = self.model.remote_trunk.link.forward(self.smashed_BTD, question)

    def take_output(self) -> None:
        """Take the output, and compute the gradient of the loss."""
        self._forward, answer = self._out
        self._grad_BTD = torch.ones_like(self.smashed_BTD)
        out_BTD = answer.wait().detach().requires_grad_(True)
        loss = (self.mask_BT[..., None] * (out_BTD - self.target_BTD) ** 2).mean()
        loss.backward()
        self.losses.append(float(loss.detach()))
        assert out_BTD.grad is not None
        self._grad_BTD = out_BTD.grad

    def ask_backward(self) -> None:
        """Send the gradient of the loss."""
        self._out = self.model.remote_trunk.link.backward(self._forward, self._grad_BTD)

    def finish(self, lr: float = 1e-2) -> None:
        """Take the gradient of the activations, and let the optimizer step."""
        self.came_down.append(self._out.wait())
        self.step += 1
        connection = self.model.connection
        group = pb.ParamGroup(
            numbers={"lr": lr, "weight_decay": 0.0, "eps": 1e-8},
            betas=(0.9, 0.999),
            names=list(connection.parameters) if self.step == 1 else [],
        )
        step = pb.OptimStep(step=self.step, optimizer="AdamW", groups=[group], clip_factor=1.0)
        connection.request(pb.Head(optim_step=step)).wait()


class House:
    """A server that fuses, and its tenants."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.stack = contextlib.ExitStack()
        self._tokens: dict[str, str] = {}

    @property
    def fused(self) -> dict[str, int]:
        """How many requests of each tenant were computed with others'."""
        return dict(self.site.server.sessions.fuser.fused)

    def tenant(self, name: str, rows: int, tokens: int, run: str) -> Tenant:
        """Let somebody in."""
        if name not in self._tokens:
            self._tokens[name] = self.site.server.gate.register.add(name)
        model = self.stack.enter_context(
            self.site.connect(token=self._tokens[name], run=run, seed=ord(name[-1]))
        )
        return Tenant(name, model, rows, tokens)

    @contextlib.contextmanager
    def all_at_once(self, count: int) -> Iterator[None]:
        """Have so many requests wait, and then be looked at together."""
        sessions, held, gate = self.site.server.sessions, threading.Event(), threading.Event()
        sessions.on_trunk(lambda: held.set() or gate.wait(), "gate")
        held.wait()
        yield
        until_s = time.monotonic() + 60.0
        while sessions.waiting() < count and time.monotonic() < until_s:
            time.sleep(0.001)
        gate.set()

    def steps(self, tenants: Sequence[Tenant], number: int) -> None:
        """Train, all tenants in step with each other."""
        for _ in range(number):
            self.forward(tenants)
            self.backward(tenants)
            for tenant in tenants:
                tenant.finish()

    def forward(self, tenants: Sequence[Tenant]) -> None:
        """Have forwards computed together."""
        with self.all_at_once(len(tenants)):
            for tenant in tenants:
                tenant.ask_forward()
        for tenant in tenants:
            tenant.take_output()

    def backward(self, tenants: Sequence[Tenant]) -> None:
        """Have backwards computed together."""
        with self.all_at_once(len(tenants)):
            for tenant in tenants:
                tenant.ask_backward()


@pytest.fixture
def house(folder_of: Any, certs: Path, tmp_path: Path) -> Iterator[House]:
    """A server that computes forwards of up to 14 tokens together."""
    site = site_of(folder_of("llama"), certs, tmp_path, auth="token", fuse_tokens=14)
    opened = House(site)
    with opened.stack:
        yield opened
    site.server.stop(grace_s=0.5)


def close(mine: Any, alone: Any) -> None:
    """See that two runs are one within rounding."""
    torch.testing.assert_close(mine, alone, rtol=1e-5, atol=1e-5)


def see_as_alone(house: House, mine: Tenant, steps: int) -> None:
    """See that a tenant's run is the one that it has without company."""
    fused = house.fused
    alone = house.tenant(mine.name, mine.rows, mine.tokens, run="alone")
    alone.carried = mine.carried
    house.steps([alone], steps)
    assert house.fused == fused
    assert alone.losses[-1] < alone.losses[0]
    close(mine.losses, alone.losses)
    close(mine.came_down, alone.came_down)
    close(adapter_of(mine.model), adapter_of(alone.model))


def test_each_of_a_batch_is_as_if_it_were_alone(house: House):
    """Tenants of other lengths and rows have the losses, gradients and adapters of solo runs."""
    together = [house.tenant(name, *shape, run="together") for name, shape in SHAPES.items()]
    house.steps(together, 4)
    assert house.fused == dict.fromkeys(SHAPES, 8)
    metrics = Metrics()
    metrics.fused = house.site.server.sessions.fuser.fused.copy
    assert b'cutlayer_fused_total{tenant="ward-a"} 8.0' in generate_latest(metrics.registry)

    for mine in together:
        see_as_alone(house, mine, 4)


def test_what_is_computed_together_is_charged_by_tokens(house: House):
    """Forward and backward of a batch cost each tenant as many seconds as it has tokens."""
    few, many = house.tenant("ward-a", 1, 1, "together"), house.tenant("ward-b", 2, 7, "together")
    few.mask_BT.fill_(1)
    house.steps([few, many], 2)  # the first of a kind is looked at, too
    sessions = {s.tenant: s for s in house.site.server.sessions.in_memory()}
    seen: dict[str, list[float]] = {"ward-a": [], "ward-b": []}
    ahead, fuser = Fuser.ahead, house.site.server.sessions.fuser

    @contextlib.contextmanager
    def noting(joints: Sequence[Any]) -> Iterator[list[float]]:
        with ahead(fuser, joints) as seconds:
            for joint, mine_s in zip(joints, seconds, strict=True):
                assert sessions[joint.what.session.tenant].ahead_s == mine_s
                seen[joint.what.session.tenant].append(mine_s)
            yield seconds

    fuser.ahead = noting
    house.steps([few, many], 1)

    assert len(seen["ward-a"]) == 2
    for less_s, more_s in zip(seen["ward-a"], seen["ward-b"], strict=True):
        assert more_s == pytest.approx(14 * less_s)


def test_a_tree_that_cannot_be_fused_is_left_as_it_was(house: House):
    """If one layer's LoRA is of another kind, no layer keeps running that of others."""
    house.forward([house.tenant(name, *SHAPES[name], run="together") for name in list(SHAPES)[:2]])
    first, second = (s.trunk for s in house.site.server.sessions.in_memory())
    first.loras[-1].lora_variant = {"default": "of another kind"}

    with (
        pytest.raises(CannotFuse, match="no plain LoRA"),
        with_loras_of([first.loras, second.loras], first.loras, (2, 7)),
    ):
        pass

    assert not any("forward" in vars(layer) for layer in first.loras)


def test_what_overflows_at_one_does_not_reach_another(house: House):
    """A tenant whose adapter grew beyond all bounds gets NaN, and the other its own results."""
    good, bad = (house.tenant(n, *SHAPES[n], run="together") for n in ("ward-a", "ward-b"))
    good.carried = bad.carried = {}  # without masks, of other lengths all the same
    house.forward([good, bad])
    house.backward([good, bad])
    good.finish()
    bad.finish(lr=1e36)
    with pytest.raises(NotFinite):  # as the client tells it
        house.forward([good, bad])
    house.backward([good, bad])
    good.finish()
    with pytest.raises(NotFinite):
        bad.finish()
    house.steps([good], 1)

    assert house.fused == {"ward-a": 4, "ward-b": 4}
    see_as_alone(house, good, 3)


def test_nobody_waits_for_who_leaves(house: House):
    """One of a batch goes on early and alone, one closes its run: all have their own results."""
    early, leaver, *others = [
        house.tenant(name, *shape, run="together") for name, shape in SHAPES.items()
    ]
    house.forward([early, leaver, *others])
    house.backward([early])
    early.finish()
    leaver.model.close()
    house.backward(others)
    for tenant in others:
        tenant.finish()

    assert house.fused == {t.name: 1 for t in (early, leaver)} | {t.name: 2 for t in others}
    for mine in (early, *others):
        house.steps([mine], 1)
        see_as_alone(house, mine, 2)


def test_what_draws_random_numbers_goes_alone(folder_of: Any, certs: Path, tmp_path: Path):
    """A model with dropout of its own draws what it draws alone, and says so once."""
    folder = tmp_path / "model"
    shutil.copytree(folder_of("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    site = site_of(folder, certs, tmp_path / "state", auth="token", fuse_tokens=14)
    house = House(site)
    with house.stack:
        house.steps([house.tenant(n, 1, 7, run="together") for n in ("ward-a", "ward-c")], 2)
        assert house.fused == {}
    site.server.stop(grace_s=0.5)
