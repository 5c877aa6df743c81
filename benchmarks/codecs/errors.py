"""What each codec leaves of real activations, how fast it is, and whether it sees other tokens."""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cutlayer.wire.codecs import CODECS, round_trip
from cutlayer.wire.statics import Learner, Statics

__all__ = ["causality_violations", "errors_of", "speeds"]

# Codecs of gradients alone may look at other positions, which a gradient comes from.
_CAUSAL = [name for name, codec in CODECS.items() if "activations" in codec.carries]
_LOSSY = [name for name in CODECS if name not in ("raw", "int32")]


def errors_of(model: str, learnt_from_BT: Tensor, held_BT: Tensor) -> dict[str, float]:
    """Return what is left of each tensor's energy, in dB, and what the loss grows by in nats.

    Behind layer 2 and before the last 2; statics are learnt on other rows; no retraining.
    """
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    whole.requires_grad_(False)
    layers = whole.get_decoder().layers
    cuts = {"h1": layers[1], "h2": layers[len(layers) - 3]}
    learning, _loss = _captured(whole, cuts, learnt_from_BT)
    held, base = _captured(whole, cuts, held_BT, gradient=True)
    figures = {"errors.loss_without_codec": base}
    for name in _LOSSY:
        codec = CODECS[name]
        statics: dict[str, Statics | None] = {"h1": None, "h2": None}
        if codec.learns:
            for cut in cuts:
                learner = Learner(held[cut].shape[-1], basis=codec.learns == "basis")
                learner.see(learning[cut], {})
                statics[cut] = learner.learnt(getattr(codec, "budget", 0.0))
        for cut in ("h1", "h2"):
            if "activations" in codec.carries:
                found = round_trip(name, held[cut], statics[cut])
                figures[f"errors.{name}_{cut}_db"] = _db(held[cut][:, 1:], found[:, 1:])
        if "gradients" in codec.carries:
            figures[f"errors.{name}_g2_db"] = _db(held["g2"], round_trip(name, held["g2"]))
        if "activations" in codec.carries:
            hooks = [
                layer.register_forward_hook(
                    lambda _m, _a, out, n=name, s=statics[cut]: round_trip(n, out, s)
                )
                for cut, layer in cuts.items()
            ]
            figures[f"errors.{name}_more_loss"] = _loss_of(whole, held_BT) - base
            for hook in hooks:
                hook.remove()
    return figures


def _captured(
    whole: Any, cuts: dict[str, Any], rows_BT: Tensor, *, gradient: bool = False
) -> tuple[dict[str, Tensor], float]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(_module: Any, _args: Any, out: Tensor) -> Tensor:
            found[name] = out.detach().requires_grad_(gradient and name == "h2")
            return found[name]

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in cuts.items()]
    loss = whole(input_ids=rows_BT, labels=rows_BT).loss
    if gradient:
        loss.backward()
        grad = found["h2"].grad
        assert grad is not None
        found["g2"] = grad
    for hook in hooks:
        hook.remove()
    return {name: tensor.detach() for name, tensor in found.items()}, float(loss.detach())


@torch.no_grad()
def _loss_of(whole: Any, rows_BT: Tensor) -> float:
    return float(whole(input_ids=rows_BT, labels=rows_BT).loss)


def _db(given: Tensor, found: Tensor) -> float:
    left = (found - given).square().sum() / given.square().sum()
    return float(10 * left.clamp_min(1e-20).log10())


def speeds(*, tokens: int, width: int) -> dict[str, float]:
    """Return GB of bfloat16 that are encoded and decoded again in a second, on one thread."""
    x_ND = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)) + 1
    learner = Learner(width, basis=True)
    learner.see(x_ND[None], {})
    known = {"mean": Statics(x_ND[1:].mean(0), x_ND[0] * 30), "basis": learner.learnt(1.0)}
    figures = {}
    for name in _LOSSY:
        codec, statics = CODECS[name], known.get(CODECS[name].learns)
        stored = codec.encode(x_ND, statics).view(-1).view(torch.uint8)
        encode_s = _best(lambda c=codec, s=statics: c.encode(x_ND, s))
        decode_s = _best(
            lambda c=codec, s=statics, b=stored: c.decode(b, x_ND.shape, torch.float32, s)
        )
        gigabytes = x_ND.numel() * 2 / 1e9
        figures[f"speed.{name}_encode_gb_s"] = gigabytes / encode_s
        figures[f"speed.{name}_decode_gb_s"] = gigabytes / decode_s
        figures[f"speed.{name}_both_gb_s"] = gigabytes / (encode_s + decode_s)
    return figures


def _best(work: Callable[[], Any], repeats: int = 12) -> float:
    seconds = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)


def causality_violations() -> int:
    """Count tokens that changed when another one did, over codecs of activations and positions."""
    drawn = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(4, 24, 192, generator=drawn) * torch.logspace(1, -1, 192) + 3
    x_BTD[:, 0] *= 40
    violations = 0
    for name in _CAUSAL:
        statics = None
        if CODECS[name].learns:
            learner = Learner(192, basis=CODECS[name].learns == "basis")
            learner.see(torch.randn(40, 24, 192, generator=drawn) + 3, {})
            statics = learner.learnt(getattr(CODECS[name], "budget", 0.0))
        before = round_trip(name, x_BTD, statics)
        for t in range(24):
            changed = x_BTD.clone()
            changed[:, t] += 10 * torch.randn(4, 192, generator=drawn)
            differs_T = (round_trip(name, changed, statics) != before).any(-1).any(0)
            differs_T[t] = False
            violations += int(differs_T.sum())
    return violations
