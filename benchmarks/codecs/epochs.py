"""How much an example's activations change between epochs, and what a delta would gain by it."""

# Shapes:  E epochs   R rows   T tokens   D model width

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from cutlayer.wire.codecs import CODECS
from cutlayer.wire.statics import Learner, Statics

__all__ = ["changes_between_epochs", "coded", "coded_by_delta"]

BOTTOM = TOP = 2
THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.2)


def changes_between_epochs(
    model: str, rows_RT: Tensor, *, epochs: int, batch: int, rates: Sequence[float], dtype: str
) -> dict[str, float]:
    """Train the unsplit model and return what its activations at both cuts did from epoch to epoch.

    `all` trains a LoRA on every layer, `trunk` on those between the cuts; h1 is behind the bottom,
    h2 before the top, g2 the gradient there. Energies are of all tokens but the first of each row.
    """
    figures: dict[str, float] = {}
    for rate in rates:
        for trained in ("all", "trunk"):
            seen = _trained(model, rows_RT, epochs, batch, rate, trained == "all", dtype)
            for cut, x_ERTD in seen.items():
                if trained == "trunk" and cut == "h1":
                    continue  # frozen: it does not change, and goes up once
                name = f"epochs.{trained}_lr{rate:g}_{cut}"
                learns = cut != "g2"
                figures |= {f"{name}_{k}": v for k, v in _figures_of(x_ERTD, learns).items()}
    return figures


def _trained(
    model: str, rows_RT: Tensor, epochs: int, batch: int, rate: float, everywhere: bool, dtype: str
) -> dict[str, Tensor]:
    """Return what passed each cut when each row was trained on, (E, R, T, D).

    Args:
        model: Folder of the weights.
        rows_RT: What is trained on.
        epochs: How often.
        batch: Rows of a step.
        rate: Learning rate of AdamW.
        everywhere: Train bottom and top too.
        dtype: Of the weights.
    """
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    layers = whole.get_decoder().layers
    inner = None if everywhere else list(range(BOTTOM, len(layers) - TOP))
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=inner
    )
    tuned = get_peft_model(whole, lora).train()
    seen: dict[str, list[Tensor]] = {"h1": [], "h2": [], "g2": []}
    for name, place in {"h1": BOTTOM - 1, "h2": len(layers) - TOP - 1}.items():
        layers[place].register_forward_hook(
            lambda _m, _a, out, kept=seen[name]: kept.append(out.detach().float())
        )

    def keep_gradient(_module: Any, _args: Any, out: Tensor) -> None:
        out.register_hook(lambda grad: seen["g2"].append(grad.float()))

    layers[-TOP - 1].register_forward_hook(keep_gradient)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    drawn, orders = random.Random(0), []
    for _ in range(epochs):
        orders.append(drawn.sample(range(len(rows_RT)), len(rows_RT)))
        for start in range(0, len(rows_RT), batch):
            ids_BT = rows_RT[orders[-1][start : start + batch]]
            tuned(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    back = torch.tensor(orders).argsort(1)  # where in its epoch each row was
    found = {name: torch.cat(kept).unflatten(0, (epochs, -1)) for name, kept in seen.items()}
    return {
        name: torch.stack([x_RTD[places] for x_RTD, places in zip(x_ERTD, back, strict=True)])
        for name, x_ERTD in found.items()
    }


def coded_by_delta(
    x_ERTD: Tensor, first: str, bits: int, statics: Statics | None, *, feedback: bool = True
) -> list[Tensor]:
    """Return what the receiver has in each epoch, if it goes whole first and then as a delta.

    Args:
        x_ERTD: What is sent.
        first: The codec of the first epoch.
        bits: Of the rotated codec of deltas.
        statics: Those of the first epoch's codec.
        feedback: The delta is that to what the receiver had last, so that an epoch's error is fed
            back in the next; else to what it got in the first epoch.
    """
    held = [coded(first, x_ERTD[0], statics)]
    for x_RTD in x_ERTD[1:]:
        base_RTD = held[-1] if feedback else held[0]
        held.append(base_RTD + coded(f"rotated{bits}", x_RTD - base_RTD, None))
    return held


def coded(name: str, x_RTD: Tensor, statics: Statics | None) -> Tensor:
    """Return a tensor as the other side gets it; a delta and a gradient have no statics."""
    stored = CODECS[name].encode(x_RTD, statics).contiguous().view(-1).view(torch.uint8)
    return CODECS[name].decode(stored, x_RTD.shape, x_RTD.dtype, statics)


def _figures_of(x_ERTD: Tensor, learns: bool) -> dict[str, float]:
    figures = {}
    for epoch in range(1, len(x_ERTD)):
        x_RTD, before_RTD = x_ERTD[epoch], x_ERTD[epoch - 1]
        has_any_N = _norms(x_RTD) > 0  # a row's last token has no gradient
        change_N = (_norms(x_RTD - before_RTD) / _norms(x_RTD))[has_any_N]
        figures[f"change_{epoch + 1}"] = float(change_N.median())
        figures[f"change_{epoch + 1}_db"] = _db(x_RTD, before_RTD)
        for threshold in THRESHOLDS:
            share = float((change_N <= threshold).float().mean())
            figures[f"within_{threshold:g}_{epoch + 1}"] = share
    mean = _learnt(x_ERTD[0], basis=False, budget=0.0) if learns else None
    whole: dict[str, Statics | None] = {f"rotated{bits}": mean for bits in (2, 3, 4)}
    if learns:
        whole |= {f"klt{b}": _learnt(x_ERTD[0], basis=True, budget=float(b)) for b in (1, 2)}
    found = {
        name: [coded(name, x_RTD, statics) for x_RTD in x_ERTD] for name, statics in whole.items()
    }
    for bits in (1, 2, 3):
        found[f"delta{bits}"] = coded_by_delta(x_ERTD, "rotated4", bits, mean)
        found[f"fixed{bits}"] = coded_by_delta(x_ERTD, "rotated4", bits, mean, feedback=False)
    for name, through in found.items():
        for epoch in range(1, len(x_ERTD)):
            figures[f"{name}_{epoch + 1}_db"] = _db(x_ERTD[epoch], through[epoch])
    return figures


def _learnt(x_RTD: Tensor, *, basis: bool, budget: float) -> Statics:
    """Return statics as a run learns them: from its first 512 tokens, for a basis from 2 D."""
    tokens = 2 * x_RTD.shape[-1] if basis else 512
    learner: Any = Learner(x_RTD.shape[-1], basis=basis)
    learner.see(x_RTD[: -(-tokens // x_RTD.shape[1])], {})
    return learner.learnt(budget)


def _norms(x_RTD: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_RTD[:, 1:], dim=-1).flatten()


def _db(given_RTD: Tensor, found_RTD: Tensor) -> float:
    left = _norms(found_RTD - given_RTD).square().sum() / _norms(given_RTD).square().sum()
    return float(10 * left.clamp_min(1e-20).log10())
