"""A training batch in micro-chunks, each with its backward as soon as its loss is there.

`loss.backward()` after the whole forward is a barrier: no gradient leaves before the last chunk's
loss is known. Here the backward of each chunk is done within the forward, by arrival:

    the server has little to do    the next chunk's bottom; the activations leave
    a chunk's output is there      its top: loss and backward; the gradient leaves
    else a chunk is not yet sent   its bottom, as above
    else a gradient is there       that chunk's bottom backward
    else all outputs have come     a bottom of the next batch, if it is known (ahead.py)
    else                           wait for whichever comes first

A bottom is short and a top is long: were tops always first, the server would run dry behind one.
Which of these is done when decides no bit: tops, backwards and gradients keep the chunks' order.
Then `loss.backward()` hands out the gradients that were found, times the factor that comes in from
above: they are linear in it. Until then they are held apart on both sides, so a loss that is never
differentiated leaves no trace (docs/decisions/0010).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.client.ahead import Ahead
from cutlayer.client.chunks import joined, weight_of
from cutlayer.client.remote_trunk import Chunk, Hold, RemoteTrunk, chunks_sent
from cutlayer.client.tuning import Laps
from cutlayer.errors import ConfigError
from cutlayer.split.schedule import ENOUGH_ASKED

__all__ = ["Objective", "run_by_arrival"]


@dataclass(frozen=True)
class Objective:
    """Of which output the trainer makes its loss, and how.

    Attributes:
        output: `loss`; or the output whose elements the trainer sums, negates and divides by
            `items`, as TRL does with `log_probs`.
        items: That number; `None` is the number of supervised tokens in the batch.
    """

    output: str = "loss"
    items: int | None = None

    def derivatives(self, parts: Sequence[Mapping[str, Any]], weights: list[int]) -> list[float]:
        """Return the derivative of the batch's loss by each chunk's output, per element."""
        if self.output != "loss":
            return [-1.0 / max(self.items or sum(weights), 1)] * len(parts)
        if parts[0].get("num_items_in_batch") is not None:
            return [1.0] * len(parts)  # the chunks' losses are shares of a sum
        return [weight / max(sum(weights), 1) for weight in weights]


def run_by_arrival(
    run: Callable[..., Any],
    parts: Sequence[Mapping[str, Any]],
    remote: RemoteTrunk,
    parameters: Sequence[nn.Parameter],
    *,
    objective: Objective,
    top_only: Callable[[], contextlib.AbstractContextManager[None]],
    ahead: Ahead,
    laps: Laps,
) -> Any:
    """Return the output of the whole batch, whose gradients are found already.

    Args:
        run: The model's forward.
        parts: Its arguments, by chunk; a supervised token is in at least one.
        remote: The model's trunk.
        parameters: What the client trains.
        objective: What the loss is made of.
        top_only: While open, a forward of the model is the top's alone.
        ahead: Bottoms that were run before, and which are to be run now for later.
        laps: Gets the seconds of this batch.

    Raises:
        NotFinite: If an activation or a gradient is NaN or infinite.
    """
    assert remote.link is not None
    weights = [weight_of(part) for part in parts]
    derivatives = objective.derivatives(parts, weights)
    hold = remote.new_hold()
    last = max(index for index, derivative in enumerate(derivatives) if derivative)
    with _seeded_by_chunk(len(parts), remote) as seeded, _grads_aside(parameters) as found:
        outputs: list[Any] = []
        to_send = deque(enumerate(parts))
        at_trunk: deque[Chunk] = deque()
        coming_back: deque[Chunk] = deque()
        while to_send or at_trunk or coming_back:
            has_come = bool(at_trunk) and at_trunk[0].sent.output.arrived()
            if to_send and (not has_come or _asked(at_trunk, coming_back) < ENOUGH_ASKED):
                index, part = to_send.popleft()
                with seeded("bottom", index):
                    at_trunk.extend(chunks_sent(remote, [ahead.bottom_of(part, run, top_only)]))
                laps.lap("bottom")
            elif has_come:
                chunk, index = at_trunk.popleft(), len(outputs)
                chunk.sent.hold, chunk.sent.wants_norms = hold.number, index == last
                with top_only(), remote.receiving(chunk.cut_off()), seeded("top", index):
                    output = run(**parts[index])
                if derivatives[index]:
                    _backward(output[objective.output], derivatives[index])
                    if chunk.ticket.requires_grad:
                        coming_back.append(chunk)
                outputs.append(_detached(output))
                laps.lap("top")
            elif coming_back and coming_back[0].sent.gradient_arrived():
                _backward(coming_back.popleft().ticket, 1.0)
                laps.lap("bottom_backward")
            elif not at_trunk and ahead.run_one(run):
                laps.lap("ahead")
            else:
                oldest = [c[0].sent for c in (at_trunk, coming_back) if c]
                remote.link.wait_any([sent.gradient or sent.output for sent in oldest])
                laps.lap("waiting")
        hold.closed()
    is_mean = parts[0].get("num_items_in_batch") is None
    whole = joined(outputs, weights, loss_is_mean=is_mean)
    expected = 1.0 if objective.output == "loss" else derivatives[0]
    found_here = _Found(objective.output, expected, list(found), hold)
    anchor = torch.zeros((), requires_grad=True)
    return type(whole)(
        **{
            name: _HandOut.apply(value, found_here, anchor, *parameters)
            if name == objective.output
            else _without_way_back(value, anchor)
            for name, value in whole.items()
        }
    )


def _asked(at_trunk: deque[Chunk], coming_back: deque[Chunk]) -> int:
    """Count the requests that have no answer yet."""
    outputs = sum(not chunk.sent.output.arrived() for chunk in at_trunk)
    return outputs + sum(not chunk.sent.gradient_arrived() for chunk in coming_back)


@contextlib.contextmanager
def _grads_aside(parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor | None]]:
    """Let gradients accumulate apart; the list holds them once this is closed."""
    kept = [p.grad for p in parameters]
    found: list[Tensor | None] = []
    for parameter in parameters:
        parameter.grad = None
    try:
        yield found
        found.extend(p.grad for p in parameters)
    finally:
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad


_Seeded = Callable[[str, int], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def _seeded_by_chunk(chunks: int, remote: RemoteTrunk) -> Iterator[_Seeded]:
    """Give each half of each chunk dropout of its own, whatever order they are run in."""
    seeds = torch.randint(2**62, (2, chunks)).tolist() if remote.training else None

    @contextlib.contextmanager
    def seeded(half: str, index: int) -> Iterator[None]:
        if seeds is None:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(seeds[half == "top"][index])
            yield

    yield seeded


def _backward(output: Tensor, derivative: float) -> None:
    device = output.device.type
    is_on = torch.is_autocast_enabled(device)
    # A backward under autocast would compute in another dtype than one after the forward.
    with torch.autocast(device, enabled=False) if is_on else contextlib.nullcontext():
        output.backward(torch.full_like(output, derivative))


def _detached(output: Any) -> Any:
    return type(output)(
        **{n: v.detach() if isinstance(v, Tensor) else v for n, v in output.items()}
    )


@dataclass
class _Found:
    """The gradients that a batch's loss has with it.

    Attributes:
        output: The output that the trainer differentiates.
        expected: The derivative of its loss by each element of that output.
        grads: The client's gradients, in the order of its parameters.
        hold: The trunk's; `None` once they were handed out.
    """

    output: str
    expected: float
    grads: list[Tensor | None]
    hold: Hold | None

    def factor_for(self, derivative: Tensor) -> float:
        """Return by what the gradients must be multiplied, given the true derivative.

        Raises:
            ConfigError: If they were found for another objective than the trainer's.
        """
        if torch.equal(derivative, torch.full_like(derivative, self.expected)):
            return 1.0
        first = derivative.flatten()[0]
        if not torch.equal(derivative, first.expand_as(derivative)):
            raise ConfigError(
                f"the trainer's loss is not a mean of '{self.output}', and the backward of a batch "
                "in chunks was done as if it were: set split_chunks to 1"
            )
        return float(first) / self.expected


class _HandOut(torch.autograd.Function):
    """Stand for the whole graph of a batch whose gradients are found already."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, found: _Found, _anchor: Tensor, *_parameters: nn.Parameter
    ) -> Tensor:
        ctx.found = found
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> Any:
        found: _Found = ctx.found
        hold, found.hold = found.hold, None
        if hold is None:
            raise ConfigError(
                "the backward of a batch in chunks is done once (retain_graph is not supported "
                "through the split)"
            )
        factor = found.factor_for(derivatives[0])
        hold.commit(factor)
        grads, found.grads = found.grads, []
        if factor != 1.0:
            grads = [grad if grad is None else grad * factor for grad in grads]
        return None, None, None, *grads


class _NoWayBack(torch.autograd.Function):
    """An output whose graph is spent; to differentiate it is an error, not a silent zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, _anchor: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *_derivatives: Tensor) -> Any:
        raise ConfigError(
            "with labels, the backward of a batch in chunks is done with its loss and only the "
            "loss can be differentiated: leave the labels out and make your own loss of the "
            "logits, or set split_chunks to 1"
        )


def _without_way_back(value: Any, anchor: Tensor) -> Any:
    differentiable = isinstance(value, Tensor) and value.is_floating_point()
    return _NoWayBack.apply(value, anchor) if differentiable else value
