"""What deltas and reuse between epochs do to the loss: codecs in the loop of the unsplit model.

No server and no wire, as the product has neither (docs/decisions/0017). The first ways differ in
how the trunk's output comes down: the activations of a frozen bottom go up once in `rotated4`, the
gradient in `rotated3`. Those that begin with `up` train all layers and differ in how the
activations go up: nothing else is coded.
"""

# Shapes:  B batch   R rows   T tokens   D model width

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.codecs.epochs import BOTTOM, TOP, coded
from cutlayer.wire.codecs import CODECS
from cutlayer.wire.statics import Learner, Statics

__all__ = ["WAYS", "Way", "held_out_through", "ways_summed"]

_UP, _GRADIENT = "rotated4", "rotated3"


@dataclass(frozen=True)
class Way:
    """How activations cross one of the cuts.

    Attributes:
        whole: The codec of an example's first epoch, and of what is sent whole later.
        delta: The codec of what it differs by later from what the receiver has of it.
        feedback: What the receiver has is the last value, else the first.
        threshold: A token that changed by at most so much of its length is not sent again.
    """

    whole: str = ""
    delta: str = ""
    feedback: bool = True
    threshold: float = -1.0
    is_up: bool = False
    """At the lower cut, with a bottom that is trained."""


WAYS = {
    "plain": Way(),
    "klt2": Way("klt2"),
    "rotated3": Way("rotated3"),
    "delta1": Way("rotated4", "rotated1"),
    "delta2": Way("rotated4", "rotated2"),
    "fixed1": Way("rotated4", "rotated1", feedback=False),
    "fixed2": Way("rotated4", "rotated2", feedback=False),
    "reuse10": Way("rotated4", threshold=0.1),
    "up_plain": Way(is_up=True),
    "up_rotated4": Way("rotated4", is_up=True),
    "up_klt2": Way("klt2", is_up=True),
    "up_delta1": Way("rotated4", "rotated1", is_up=True),
    "up_reuse5": Way("rotated4", threshold=0.05, is_up=True),
}


def held_out_through(
    way: Way,
    model: str,
    rows_RT: Tensor,
    held_RT: Tensor,
    *,
    epochs: int,
    batch: int,
    rate: float,
    seed: int,
    dtype: str,
) -> dict[str, float]:
    """Train a LoRA; return the held-out loss without codecs, and the bits a value took.

    Args:
        way: How activations cross; without a codec for whole ones there is none anywhere.
        model: Folder of the weights.
        rows_RT: What is trained on.
        held_RT: What is scored.
        epochs: How often.
        batch: Rows of a step.
        rate: Learning rate of AdamW.
        seed: Of the LoRA and the order.
        dtype: Of the weights.
    """
    torch.manual_seed(seed)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    layers = whole.get_decoder().layers
    inner = None if way.is_up else list(range(BOTTOM, len(layers) - TOP))
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], layers_to_transform=inner
    )
    tuned = get_peft_model(whole, lora).train()
    seam = _Seam(way)
    handles = []
    if way.whole:
        lower, upper = layers[BOTTOM - 1], layers[-TOP - 1]
        seam.learn(tuned, {"h1": lower, "h2": upper}, rows_RT)
        crossed = lower if way.is_up else upper
        handles = [crossed.register_forward_hook(lambda _m, _a, out: _Crossed.apply(out, seam))]
        if not way.is_up:
            handles.append(lower.register_forward_hook(lambda _m, _a, out: seam.at_lower(out)))
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    order, drawn = list(range(len(rows_RT))), random.Random(seed)
    for _ in range(epochs):
        drawn.shuffle(order)
        for start in range(0, len(order), batch):
            seam.rows = order[start : start + batch]
            ids_BT = rows_RT[seam.rows]
            tuned(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for handle in handles:
        handle.remove()
    tuned.eval()
    with torch.no_grad():
        losses = [float(tuned(input_ids=r[None], labels=r[None]).loss) for r in held_RT]
    return {
        "held_out": sum(losses) / len(losses),
        "bits": seam.bits / seam.tokens if seam.tokens else 16.0,
    }


def ways_summed(found: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Return the figures of all ways over their seeds, against the plain one at the same seed."""
    figures: dict[str, float] = {}
    for name, runs in found.items():
        if not runs:
            continue
        more = [
            run["held_out"] / plain["held_out"] - 1
            for run, plain in zip(runs, found[_plain_of(name)], strict=False)
        ]
        figures[f"ways.{name}_over_plain"] = sum(more) / len(more)
        figures[f"ways.{name}_over_plain_worst"] = max(more)
        figures[f"ways.{name}_bits"] = sum(run["bits"] for run in runs) / len(runs)
        figures[f"ways.{name}_seeds"] = float(len(runs))
    return figures


def _plain_of(name: str) -> str:
    return "up_plain" if WAYS[name].is_up else "plain"


class _Seam:
    """Codecs at both cuts, and what the receiver has of each row.

    Attributes:
        rows: The numbers of the rows of the batch that passes.
        bits: Bits a value, summed over tokens that crossed.
        tokens: How many crossed.
    """

    def __init__(self, way: Way) -> None:
        self.way = way
        self.rows: list[int] = []
        self.bits = self.tokens = 0.0
        self._statics: dict[str, Statics] = {}
        self._held: dict[int, Tensor] = {}
        self._sent: dict[int, Tensor] = {}  # before the codec, which errs by more than a threshold

    def learn(self, model: Any, places: dict[str, Any], rows_RT: Tensor) -> None:
        """Learn statics at both cuts before the first step, from 2 D tokens."""
        seen: dict[str, Tensor] = {}
        handles = [
            place.register_forward_hook(lambda _m, _a, out, n=name: seen.__setitem__(n, out))
            for name, place in places.items()
        ]
        width = model.config.hidden_size
        with torch.no_grad():
            model(input_ids=rows_RT[: 1 + 2 * width // rows_RT.shape[1]])
        for handle in handles:
            handle.remove()
        whole = self.way.whole
        for name, codec in {"h1": whole if self.way.is_up else _UP, "h2": whole}.items():
            learner = Learner(width, basis=CODECS[codec].learns == "basis")
            learner.see(seen[name], {})
            self._statics[name] = learner.learnt(getattr(CODECS[codec], "budget", 0.0))

    def at_lower(self, out_BTD: Tensor) -> Tensor:
        """Return activations as the server has them; the bottom is frozen."""
        return coded(_UP, out_BTD.detach(), self._statics["h1"])

    def through(self, out_BTD: Tensor) -> Tensor:
        """Return activations as the other side has them."""
        return torch.stack(
            [self._row(row, x_TD) for row, x_TD in zip(self.rows, out_BTD, strict=True)]
        )

    def _row(self, row: int, x_TD: Tensor) -> Tensor:
        way, held_TD = self.way, self._held.get(row)
        statics = self._statics["h1" if way.is_up else "h2"]
        x_TD, dtype = x_TD.float(), x_TD.dtype
        self.tokens += len(x_TD)
        if held_TD is None or not (way.delta or way.threshold >= 0):
            got_TD = coded(way.whole, x_TD, statics)
            self._sent[row] = x_TD
            self.bits += len(x_TD) * int(way.whole[-1])
        elif way.delta:
            got_TD = held_TD + coded(way.delta, x_TD - held_TD, None)
            self.bits += len(x_TD) * int(way.delta[-1])
        else:
            change_T = (x_TD - self._sent[row]).norm(dim=-1)
            is_new_T = change_T > way.threshold * x_TD.norm(dim=-1)
            self._sent[row] = torch.where(is_new_T[:, None], x_TD, self._sent[row])
            whole_TD = coded(way.whole, x_TD, statics)
            got_TD = torch.where(is_new_T[:, None], whole_TD, held_TD)
            self.bits += float(is_new_T.sum()) * int(way.whole[-1])
        if held_TD is None or way.feedback:
            self._held[row] = got_TD
        return got_TD.to(dtype)


class _Crossed(torch.autograd.Function):
    """Activations cross a cut; in backward their gradient does."""

    @staticmethod
    def forward(ctx: Any, out_BTD: Tensor, seam: _Seam) -> Tensor:
        ctx.is_up = seam.way.is_up
        return seam.through(out_BTD.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] if ctx.is_up else coded(_GRADIENT, grads[0], None), None
