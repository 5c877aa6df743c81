"""What an audit attacks: departures from a transcript, or made here as a run would make them."""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cutlayer.audit.embedding import defended_embedding
from cutlayer.audit.public import PublicModel
from cutlayer.errors import DataError
from cutlayer.privacy.mechanisms import Defense
from cutlayer.privacy.transcript import Departure
from cutlayer.split.cut import Trunk
from cutlayer.wire.codecs import codecs_of, in_force, round_trip

__all__ = ["Text", "made_here", "padded", "picked", "texts_of"]

NO_LABEL = -100


@dataclass(frozen=True)
class Text:
    """One sequence without its padding."""

    ids_T: Tensor
    smashed_TD: Tensor


def texts_of(departures: Sequence[Departure]) -> list[Text]:
    """Return every sequence of some departures, each without padding.

    Raises:
        DataError: If a departure was recorded without its tokens.
    """
    texts = []
    for departure in departures:
        ids_BT = departure.truth.get("input_ids")
        if ids_BT is None or departure.smashed_BTD.shape[:2] != ids_BT.shape:
            raise DataError(
                f"forward {departure.number} was recorded without its tokens, or with others: the "
                "model was called with embeddings, or a defense changed the length; it cannot be "
                "scored token by token"
            )
        mask_BT = departure.carried.get("attention_mask")
        for row, ids_T in enumerate(ids_BT):
            keep_T = torch.ones_like(ids_T, dtype=torch.bool)
            if mask_BT is not None and mask_BT.shape == ids_BT.shape:
                keep_T = mask_BT[row].bool()
            texts.append(Text(ids_T[keep_T], departure.smashed_BTD[row][keep_T].float()))
    return texts


def picked(departures: Iterable[Departure], rows: Collection[int]) -> list[Departure]:
    """Return the departures with these sequences only, counted from 0 over all of them."""
    found, count = [], 0
    for departure in departures:
        size = len(departure.smashed_BTD)
        mine = [row for row in range(size) if count + row in rows]
        count += size
        if mine:
            found.append(_rows_of(departure, mine))
        if count > max(rows):
            break
    return found


def _rows_of(departure: Departure, rows: list[int]) -> Departure:
    def of(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows]

    size = len(departure.smashed_BTD)
    return replace(
        departure,
        smashed_BTD=departure.smashed_BTD[rows],
        # Positions may be sent once for all rows.
        carried={n: t[rows] if len(t) == size else t for n, t in departure.carried.items()},
        truth={name: tensor[rows] for name, tensor in departure.truth.items()},
        trunk_out_BTD=of(departure.trunk_out_BTD),
        gradient_BTD=of(departure.gradient_BTD),
    )


def padded(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and labels, (B, T) each, of (ids, labels) pairs padded at the right."""
    longest = max(len(ids_T) for ids_T, _labels in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    labels_BT = torch.full_like(ids_BT, NO_LABEL)
    for row, (ids_T, labels_T) in enumerate(rows):
        ids_BT[row, : len(ids_T)] = ids_T
        labels_BT[row, : len(ids_T)] = labels_T
        mask_BT[row, : len(ids_T)] = 1
    return ids_BT, mask_BT, labels_BT


def made_here(
    public: PublicModel,
    rows: Sequence[tuple[Tensor, Tensor]],
    *,
    batch: int = 8,
    trunk: Trunk | None = None,
    defenses: Sequence[Defense] = (),
    codec: str | Mapping[str, str] = "raw",
    gradients: bool = True,
) -> list[Departure]:
    """Return what the first steps of a run would send, without sending it.

    Args:
        public: The model, cut where the run will be.
        rows: The samples, as (ids, labels) pairs of equal length; -100 carries no loss.
        batch: How many go together.
        trunk: The layers between. Without it the activations stand for the trunk's output, at
            which the gradient is then taken; label inversion is linear wherever it is.
        defenses: What is done to what leaves.
        codec: How it is written on the wire, as `connect` takes it. Statics are not learnt here:
            what goes before them is written in more bits, and shows more.
        gradients: Whether training sends gradients at all.
    """
    at = {defense.site: defense for defense in defenses}
    codecs = codecs_of(codec)
    up, back = in_force(codecs["activations_up"], None), codecs["gradients_up"]
    departures = []
    for number, start in enumerate(range(0, len(rows), batch), 1):
        ids_BT, mask_BT, labels_BT = padded(rows[start : start + batch])
        with torch.no_grad():
            with defended_embedding(public, at["embedding"].apply if "embedding" in at else None):
                smashed_BTD = public.bottom(ids_BT, attention_mask=mask_BT)
            if "lower cut" in at:
                smashed_BTD = at["lower cut"].apply(smashed_BTD, mask_BT)
            smashed_BTD = round_trip(up, smashed_BTD)
            trunk_out_BTD = smashed_BTD
            if trunk is not None:
                trunk_out_BTD = trunk(smashed_BTD.clone(), {"attention_mask": mask_BT})
        grad_BTD = None
        if gradients:
            grad_BTD = _gradient(public, trunk_out_BTD, mask_BT, labels_BT)
            if "upper cut" in at:
                grad_BTD = at["upper cut"].apply(grad_BTD)
            grad_BTD = round_trip(back, grad_BTD)
        departures.append(
            Departure(
                number=number,
                step=0,
                smashed_BTD=smashed_BTD,
                carried={"attention_mask": mask_BT},
                truth={"input_ids": ids_BT, "labels": labels_BT},
                trunk_out_BTD=trunk_out_BTD if gradients else None,
                gradient_BTD=grad_BTD,
            )
        )
    return departures


def _gradient(
    public: PublicModel, trunk_out_BTD: Tensor, mask_BT: Tensor, labels_BT: Tensor
) -> Tensor:
    """Return the gradient of the mean loss at the upper cut, as a trainer makes it."""
    point_BTD = trunk_out_BTD.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        logits = public.head(public.top(point_BTD, attention_mask=mask_BT))
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels_BT[:, 1:].flatten(),
            ignore_index=NO_LABEL,
        )
        (grad_BTD,) = torch.autograd.grad(loss, point_BTD)
    return grad_BTD
