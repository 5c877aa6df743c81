"""A split model in one process: the client's part, and a tenant's trunk called directly.

Everything but the wire is the product's own: `RemoteTrunk` with its autograd nodes at the client,
`TenantTrunk` with its graphs and KV caches at the server. What crosses is copied, as on a wire.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cutlayer.client.remote_trunk import Question, RemoteTrunk
from cutlayer.server.trunk import TenantTrunk
from cutlayer.split.adapters import TrunkLora
from cutlayer.split.cut import Anatomy, Cut, anatomy_of, keep_ends, keep_trunk
from cutlayer.split.entry import watch_entry
from cutlayer.split.loading import load_ends, load_trunk, open_checkpoint, skeleton_of


@dataclass(frozen=True)
class Arrived:
    """A tensor that is here already."""

    tensor: Tensor | None

    def arrived(self) -> bool:
        """It is."""
        return True

    def wait(self) -> Tensor | None:
        """Return the tensor."""
        return self.tensor


class Loopback:
    """A link to a trunk in this process."""

    def __init__(self, trunk: TenantTrunk) -> None:
        self.trunk = trunk
        self._sequence = 0
        self._changes = 0

    def forward(self, smashed_BTD: Tensor, question: Question) -> tuple[int, Arrived]:
        """Run the trunk at once."""
        self._sequence += 1
        # Rows that are sent once are the wire's business.
        asked = {k: v for k, v in vars(question).items() if k not in ("carried", "rows")}
        carried = {name: tensor.clone() for name, tensor in question.carried.items()}
        out_BTD = self.trunk.forward(self._sequence, smashed_BTD.clone(), carried, **asked)
        return self._sequence, Arrived(out_BTD.clone())

    def backward(
        self, forward: int, grad_BTD: Tensor, *, hold: int = 0, wants_norms: bool = True
    ) -> Arrived:
        """Run the trunk's backward at once."""
        self._changes += 1
        return Arrived(self.trunk.backward(forward, grad_BTD.clone(), hold=hold))

    def commit(self, hold: int, factor: float, *, norms_are_of: int) -> None:
        """Commit held gradients."""
        self.trunk.gradients.commit(hold, factor)

    def release(self, hold: int) -> None:
        """Drop held gradients."""
        self.trunk.gradients.release(hold)

    def gradient_changes(self) -> int:
        """Count backwards."""
        return self._changes

    def wait_any(self, answers: Sequence[Arrived]) -> None:
        """Everything has arrived."""

    def discard(self, forward: int) -> None:
        """Drop a graph."""
        self.trunk.discard(forward)

    def drop_cache(self, cache: int) -> None:
        """Drop a KV cache."""
        self.trunk.caches.drop(cache)


@dataclass(frozen=True)
class Split:
    """The two parts of a model; calling it runs both."""

    client: PreTrainedModel
    served: PreTrainedModel

    def gradients(self) -> dict[str, Tensor]:
        """Return every gradient of both parts by parameter name."""
        found = {
            n: p.grad for part in (self.client, self.served) for n, p in part.named_parameters()
        }
        return {name: grad for name, grad in found.items() if grad is not None}


def _joined(
    client: PreTrainedModel, served: PreTrainedModel, anatomy: Anatomy, cut: Cut, remote: Any
) -> Split:
    remote.entry = watch_entry(client, anatomy)
    remote.link = Loopback(TenantTrunk(served, anatomy, cut, TrunkLora(())))
    return Split(client, served)


def split_copies(whole: PreTrainedModel, cut: Cut) -> Split:
    """Return a split of two copies of `whole`."""
    anatomy = anatomy_of(whole)
    client, served = copy.deepcopy(whole), copy.deepcopy(whole)
    remote = RemoteTrunk(anatomy, cut.lower)
    keep_ends(client, anatomy, cut, remote)
    keep_trunk(served, anatomy, cut)
    return _joined(client, served, anatomy, cut, remote)


def split_loaded(folder: Path, cut: Cut, task: str, **settings: Any) -> Split:
    """Return a split whose parts were each loaded as a client and a server load them."""
    checkpoint = open_checkpoint(str(folder))
    skeleton = skeleton_of(checkpoint.config, task)
    remote = RemoteTrunk(skeleton.anatomy, cut.lower)
    client = load_ends(checkpoint, skeleton, cut, remote, **settings)
    served = load_trunk(checkpoint, skeleton, cut, **settings)
    return _joined(client, served, skeleton.anatomy, cut, remote)


def step(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run forward and backward in training mode; return loss and logits."""
    model.train()
    output = model(**batch)
    output.loss.backward()
    return output.loss.detach(), output.logits.detach()


def differences(whole: PreTrainedModel, split: Split, batch: dict[str, Tensor]) -> list[str]:
    """Return what differs between a step of the whole model and of its split; empty if exact."""
    for part in (whole, split.client, split.served):
        part.zero_grad(set_to_none=True)
    expected_loss, expected_logits = step(whole, batch)
    loss, logits = step(split.client, batch)
    expected = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}
    found = split.gradients()
    faults = []
    if not torch.equal(expected_logits, logits):
        faults.append("logits")
    if not torch.equal(expected_loss, loss):
        faults.append("loss")
    if expected.keys() != found.keys():
        faults.append(f"gradients of {sorted(expected.keys() ^ found.keys())[0]}, …")
    wrong = [n for n in expected.keys() & found.keys() if not torch.equal(expected[n], found[n])]
    if wrong:
        faults.append(f"gradient of {sorted(wrong)[0]} and {len(wrong) - 1} more")
    return faults


def generated(
    model: PreTrainedModel, batch: dict[str, Tensor], **settings: Any
) -> tuple[Tensor, ...]:
    """Return the tokens that a model generates, and the logits of each."""
    model.eval()
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=6,
        min_new_tokens=6,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    return (out.sequences, *out.logits)
