"""Rows of several tenants through the frozen trunk at once, each with its own LoRA.

The frozen weights are read once for all of them, which is what a small batch mostly waits for.
A tenant's LoRA is a unit of a batched product, so no sum has terms of two tenants: what is NaN in
one's rows stays there, and a tenant's gradients are of its own output alone.

The batch has one graph. Whose gradients come together go through it together; it stays for as
long as enough others may still come. Who is too few for that computes its own rows again, alone:
its backward never waits for anybody.
"""

# Shapes:  B batch   T tokens   D model width   N positions

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from cutlayer.server.fused_lora import CannotFuse, with_loras_of
from cutlayer.server.memory import counting_saved
from cutlayer.server.trunk import TenantTrunk, picked

__all__ = ["Asked", "Batch", "CannotFuse", "FusedBatches", "Share", "backward_together"]

_PLAIN_ATTENTION_TOKENS = 128


@dataclass(frozen=True)
class Asked:
    """One tenant's forward, which keeps a graph.

    Attributes:
        trunk: The tenant's.
        smashed_BTD: The activations that came up.
        carried: The attention mask and position ids that came with them.
        wants_gradient: Whether the backward must give the gradient of the activations.
        wanted_N: Positions whose output alone is returned.
        training: Whether modules are in training mode; of all in a batch the same.
        autocast: The dtype of autocast, if any; of all in a batch the same.
    """

    trunk: TenantTrunk
    smashed_BTD: Tensor
    carried: Mapping[str, Tensor]
    wants_gradient: bool = False
    wanted_N: Tensor | None = None
    training: bool = False
    autocast: torch.dtype | None = None


@dataclass(eq=False)
class Batch:
    """What the shares of one fused forward have in common.

    Attributes:
        size: How many tenants were computed together.
        shares: Those of them that have not had their backward; who was let go is not among them.
    """

    size: int
    shares: weakref.WeakSet[Share] = field(default_factory=weakref.WeakSet)

    def is_worth(self, count: int) -> bool:
        """Say whether so many backwards are cheaper through the graph of all than one by one.

        Alone each costs a forward more; the graph of all costs the rows of all.
        """
        return 3 * count >= self.size


@dataclass(eq=False)
class Share:
    """One tenant's part of a fused forward: what it leaves for its backward.

    Attributes:
        asked: The forward, with the activations as a leaf of the graph.
        batch: With whom it was computed.
        out_BTD: Its output, (B, T, D) or (1, N, D).
        graph_bytes: Its part of what the graph keeps.
        ready: The gradients of the activations and of the parameters, once they were computed
            together with others'.
        tenant: Whose it is.
    """

    asked: Asked
    batch: Batch
    out_BTD: Tensor
    graph_bytes: int
    ready: tuple[Tensor | None, Sequence[Tensor]] | None = None
    tenant: str = ""

    def __post_init__(self) -> None:
        self._changes = self._changes_now()

    @property
    def is_as_it_was(self) -> bool:
        """Whether the tenant's LoRA is the one of the forward."""
        return self._changes == self._changes_now()

    def _changes_now(self) -> int:
        return sum(parameter._version for parameter in self.asked.trunk.parameters.values())

    def backward(self, trunk: TenantTrunk, grad_BTD: Tensor, hold: int) -> Tensor | None:
        """Accumulate what was computed with the others; else compute it now, alone."""
        if self.ready is not None:
            grad_smashed_BTD, grads = self.ready
            trunk.gradients.add(grads, hold)
            return grad_smashed_BTD
        self.leave()
        asked = self.asked
        smashed_BTD = asked.smashed_BTD.detach().requires_grad_(asked.wants_gradient)
        out_BTD = trunk.run(
            smashed_BTD,
            asked.carried,
            training=asked.training,
            autocast=asked.autocast,
            wanted_N=asked.wanted_N,
        )
        with trunk.gradients.accumulating(hold):
            out_BTD.backward(grad_BTD.to(out_BTD.device))
        return smashed_BTD.grad

    def leave(self) -> None:
        """Let go of the graph of all."""
        self.batch.shares.discard(self)
        self.out_BTD = self.out_BTD.detach()


class FusedBatches:
    """Run batches of several tenants, and know which kinds of trunk can."""

    def __init__(self) -> None:
        self._apart: set[tuple[str, bool]] = set()
        self._bytes: dict[tuple[object, ...], int] = {}

    def forward(self, asked: Sequence[Asked]) -> list[Share]:
        """Compute several tenants' forwards as one batch.

        Args:
            asked: The forwards, of trunks that are alike (`TenantTrunk.likeness`).

        Returns:
            Each one's share; where it is dropped, its part is over.

        Raises:
            CannotFuse: If these trunks draw random numbers, treat rows as anything but rows, or
                let one row's numbers into another's.
        """
        leader = asked[0]
        rows = [each.smashed_BTD.shape[0] for each in asked]
        longest = max(each.smashed_BTD.shape[1] for each in asked)
        asked = [_with_leaf(each) for each in asked]
        if len(set(rows)) == 1:
            units = [each.trunk for each in asked]
        else:
            units = [e.trunk for e, count in zip(asked, rows, strict=True) for _ in range(count)]
        shape = (sum(rows), longest)
        kind = (leader.trunk.likeness, leader.training, leader.autocast, shape, len(units))
        with (
            torch.enable_grad(),
            _drawing_nothing(leader.trunk.device, leader.training),
            with_loras_of([trunk.loras for trunk in units], leader.trunk.loras, shape),
            self._measured(kind, asked),
            _attention_for(leader, longest),
        ):
            batch_BTD = torch.cat([_padded(each.smashed_BTD, longest) for each in asked])
            out_BTD = leader.trunk.run(
                batch_BTD,
                _carried_of_all(asked, longest),
                training=leader.training,
                autocast=leader.autocast,
                as_it_is=True,  # the layers' LoRA is another function in each batch
            )
        shares = self._shares(asked, out_BTD, self._bytes[kind])
        if (known := (leader.trunk.likeness, leader.training)) not in self._apart:
            _refuse_mixed(shares)
            self._apart.add(known)
        return shares

    @contextlib.contextmanager
    def _measured(self, kind: tuple[object, ...], asked: Sequence[Asked]) -> Iterator[None]:
        if kind in self._bytes:
            yield
            return
        with counting_saved([each.trunk for each in asked]) as seen:
            yield
        self._bytes[kind] = sum(seen.values())

    def _shares(self, asked: Sequence[Asked], out_BTD: Tensor, graph_bytes: int) -> list[Share]:
        batch, shares, first = Batch(len(asked)), [], 0
        for each in asked:
            rows, tokens, _ = each.smashed_BTD.shape
            mine_BTD = out_BTD[first : first + rows, :tokens]
            if each.wanted_N is not None:
                mine_BTD = picked(mine_BTD, each.wanted_N)
            mine_bytes = graph_bytes * rows // out_BTD.shape[0]
            shares.append(Share(each, batch, mine_BTD, mine_bytes))
            first += rows
        batch.shares.update(shares)
        return shares


def backward_together(batch: Batch, gradients: Mapping[Share, Tensor]) -> bool:
    """Compute the gradients of some of a batch, as each one's `ready`.

    Args:
        batch: The batch; whoever of it is not among `gradients` may come later, or not at all.
        gradients: The gradient of each share's output.

    Returns:
        Whether it was done; they are too few otherwise. Who has stepped since its forward goes
        alone in any case.
    """
    shares = [s for s in gradients if s in batch.shares and s.is_as_it_was]
    others = batch.shares - set(shares)
    if not batch.is_worth(len(shares)):
        return False
    inputs = [_inputs(share) for share in shares]
    stays = bool(others) and batch.is_worth(len(others))
    found = iter(
        torch.autograd.grad(
            [share.out_BTD for share in shares],
            [tensor for each in inputs for tensor in each],
            [gradients[share].to(share.out_BTD.device) for share in shares],
            retain_graph=stays,
        )
    )
    for share, mine in zip(shares, inputs, strict=True):
        grads = [next(found) for _ in mine]
        share.ready = (grads.pop(0) if share.asked.wants_gradient else None, grads)
        share.leave()
    if not stays:
        for share in others:
            share.leave()
    return True


def _inputs(share: Share) -> list[Tensor]:
    smashed = [share.asked.smashed_BTD] if share.asked.wants_gradient else []
    return [*smashed, *share.asked.trunk.parameters.values()]


def _with_leaf(asked: Asked) -> Asked:
    smashed_BTD = asked.smashed_BTD.to(asked.trunk.device).detach()
    given = {**vars(asked), "smashed_BTD": smashed_BTD.requires_grad_(asked.wants_gradient)}
    return Asked(**given)


def _padded(smashed_BTD: Tensor, tokens: int) -> Tensor:
    missing = tokens - smashed_BTD.shape[1]
    return functional.pad(smashed_BTD, (0, 0, 0, missing)) if missing else smashed_BTD


def _carried_of_all(asked: Sequence[Asked], tokens: int) -> dict[str, Tensor]:
    """Return mask and position ids of all rows; padding at the right is masked."""
    names = set(asked[0].carried)
    if not names and len({each.smashed_BTD.shape[1] for each in asked}) > 1:
        names = {"attention_mask"}
    return {name: torch.cat([_of_rows(each, name, tokens) for each in asked]) for name in names}


def _of_rows(asked: Asked, name: str, tokens: int) -> Tensor:
    rows, mine, _ = asked.smashed_BTD.shape
    given = asked.carried.get(name)
    if given is None:
        given = torch.ones(rows, mine, dtype=torch.int64)
    return functional.pad(given.expand(rows, mine), (0, tokens - mine))


def _attention_for(asked: Asked, tokens: int) -> AbstractContextManager[None]:
    """Choose how attention is computed that torch's own function computes.

    Of few tokens in bfloat16 the CPU's flash kernel takes 1.7 to twelve times as long in its
    backward as the plain products, which are done in float32 besides. Torch keeps the choice for
    the whole process: a client in the same one may compute by it meanwhile.
    """
    dtype, device = asked.autocast or asked.smashed_BTD.dtype, asked.trunk.device.type
    if device == "cpu" and dtype == torch.bfloat16 and tokens <= _PLAIN_ATTENTION_TOKENS:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _drawing_nothing(device: torch.device, training: bool) -> Iterator[None]:
    """Refuse what is computed inside if it drew random numbers: a solo run would draw others."""
    with torch.random.fork_rng(enabled=training, devices=[] if device.type == "cpu" else [device]):
        before = _states(device)
        yield
        if any(not torch.equal(a, b) for a, b in zip(before, _states(device), strict=True)):
            raise CannotFuse("the model itself has dropout")


def _states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device.type != "cuda" else [*states, torch.cuda.get_rng_state(device)]


def _refuse_mixed(shares: Sequence[Share]) -> None:
    """Refuse a batch if the first one's output depends on anything of the others'.

    Raises:
        CannotFuse: If so.
    """
    first, *others = shares
    generator = torch.Generator().manual_seed(0)  # the global one is others' too
    grad_BTD = torch.randn(first.out_BTD.shape, generator=generator).to(first.out_BTD)
    inputs = [tensor for share in others for tensor in _inputs(share)]
    found = torch.autograd.grad(
        first.out_BTD,
        inputs,
        grad_BTD,
        retain_graph=True,
        allow_unused=True,
    )
    if any(grad is not None and bool(grad.any()) for grad in found):
        raise CannotFuse("the model lets one row's numbers into another's")
