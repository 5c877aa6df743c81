"""What a run would need at a cut: memory on both sides, bytes, seconds. Pure arithmetic.

What each piece of the model computes and keeps comes from `trace`, what a step takes from
`schedule`. Privacy is no part of it: activations at any shallow cut can be inverted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cutlayer.split.cut import Cut
from cutlayer.split.schedule import (
    CLOSE_ENOUGH,
    Path,
    StepTime,
    Work,
    chunk_counts,
    step_seconds,
)
from cutlayer.split.trace import Piece, Pieces

__all__ = ["MOMENTS", "Prediction", "Setup", "Speed", "cuts_of", "predict", "recommended"]

MOMENTS = {"adamw": 2, "adam": 2, "rmsprop": 1, "sgd": 0}
"""Numbers that an optimizer keeps for each number that it trains."""

CLIENT_PROCESS_BYTES = 443 << 20
"""A client that has loaded its libraries and is connected (benchmarks/plan); 15% less or more on
another machine."""
SERVER_PROCESS_BYTES = 438 << 20
LOADED_OVER_WEIGHTS = 1.49
"""While weights are read, their file is in memory too, in part."""
HEAP_OVER_KEPT = 1.93
"""The C library's heap over what autograd keeps: holes that aligned tensors do not fill again."""
LOGITS_IN_BACKWARD = 3
"""Tensors as large as a chunk's logits while its loss goes backward."""

WIRE_OVER_PAYLOAD = 1.0019
"""TLS records and HTTP/2 frames of a large message."""
MESSAGE_BYTES = 170
"""Head, frame and TLS record of a message."""

_GRADIENT_BYTES = _MOMENT_BYTES = _ADAPTER_BYTES = 4
_MASK_BYTES = 4
_REFERENCE_BYTES = 35
"""A row's id in a message's head."""


@dataclass(frozen=True)
class Speed:
    """How fast a machine is in practice."""

    layer_flops_per_s: float
    """Layers, forward and backward, with all that is between their matrix products."""
    head_flops_per_s: float
    """The head and its loss."""
    layer_call_s: float = 0.0005
    """What calling a layer costs beyond its operations, forward and backward."""


@dataclass(frozen=True)
class Setup:
    """What a run is, besides its cut.

    Attributes:
        rows: Samples in a batch.
        token_bytes: Bytes on the wire of one position of so many values.
        train: Which parts have a LoRA that is trained.
        moments: Numbers that the optimizer keeps per trained number.
        lean_head: The head runs at supervised positions only, in tiles.
        supervised: Share of positions with a loss.
        chunks: Micro-chunks; 0 for the best number.
        gradient_checkpointing: The trunk keeps its layers' inputs and computes the rest again.
        rows_are_sent: An epoch after the first, with `split_send_once`: rows are named, and the
            bottom does not run.
        server_on_gpu: The trunk's memory is a GPU's, whose allocator fills its holes.
        client_process_bytes: A client of this machine that is connected, without any model.
        server_process_bytes: The same of a server.
    """

    rows: int
    client: Speed
    server: Speed
    path: Path
    token_bytes: Callable[[int], float]
    train: tuple[str, ...] = ("bottom", "trunk", "top")
    moments: int = 2
    lean_head: bool = False
    supervised: float = 1.0
    chunks: int = 0
    gradient_checkpointing: bool = False
    rows_are_sent: bool = False
    server_on_gpu: bool = False
    client_process_bytes: float = CLIENT_PROCESS_BYTES
    server_process_bytes: float = SERVER_PROCESS_BYTES


@dataclass(frozen=True)
class Prediction:
    """What a run needs at one cut."""

    cut: Cut
    num_layers: int
    chunks: int
    client_weight_bytes: int
    server_weight_bytes: int
    client_state_bytes: int
    """LoRA, gradients and the optimizer's numbers."""
    server_state_bytes: int
    """The same at the server: what one more tenant costs between steps."""
    client_bytes: float
    """The client's memory at most, libraries included."""
    server_bytes: float
    """The server's memory at most, with this tenant alone."""
    up_payload_bytes: float
    """Tensors in a step, without what frames them."""
    down_payload_bytes: float
    up_bytes: float
    """What crosses the wire in a step."""
    down_bytes: float
    client_flops: float
    server_flops: float
    step: StepTime

    @property
    def bottom_layers(self) -> int:
        """The client's layers below the trunk."""
        return self.cut.lower

    @property
    def top_layers(self) -> int:
        """The client's layers above it."""
        return self.num_layers - self.cut.upper


@dataclass(frozen=True)
class _Part:
    """The sums over some layers; per row."""

    pieces: Sequence[Piece]
    passes_back: bool

    def total(self, what: str) -> float:
        return float(sum(getattr(piece, what) for piece in self.pieces))

    @property
    def kept_bytes(self) -> float:
        return self.total("kept_bytes") if self.passes_back else 0.0

    @property
    def backward_flops(self) -> float:
        return self.total("backward_flops") if self.passes_back else 0.0


def _parts(pieces: Pieces, cut: Cut, train: tuple[str, ...]) -> dict[str, _Part]:
    spans = {
        "bottom": slice(0, cut.lower),
        "trunk": slice(cut.lower, cut.upper),
        "top": slice(cut.upper, len(pieces.layers)),
    }
    parts: dict[str, _Part] = {}
    passes_back = False
    for name, span in spans.items():
        layers = (pieces.layers if name in train else pieces.plain)[span]
        # A gradient passes through all that lies above the lowest LoRA.
        passes_back = passes_back or any(piece.adapter for piece in layers)
        parts[name] = _Part(layers, passes_back)
    return parts


def predict(pieces: Pieces, cut: Cut, setup: Setup) -> Prediction:
    """Return what a run needs at one cut."""
    parts = _parts(pieces, cut, setup.train)
    counts = [setup.chunks] if setup.chunks else chunk_counts(setup.rows)
    works = {chunks: _work(pieces, parts, setup, chunks) for chunks in counts}
    step = _best([step_seconds(works[chunks][0], setup.path, chunks) for chunks in counts])
    work, payload = works[step.chunks]
    ends = (pieces.before, *parts["bottom"].pieces, *parts["top"].pieces, pieces.behind)
    trunk = parts["trunk"].pieces
    size = pieces.dtype.itemsize
    each = _ADAPTER_BYTES + _GRADIENT_BYTES + setup.moments * _MOMENT_BYTES
    weights = [sum(piece.parameters for piece in side) * size for side in (ends, trunk)]
    states = [sum(piece.adapter for piece in side) * each for side in (ends, trunk)]
    memory = _memory(pieces, parts, setup, step, weights, states)
    return Prediction(
        cut=cut,
        num_layers=len(pieces.layers),
        chunks=step.chunks,
        client_weight_bytes=weights[0],
        server_weight_bytes=weights[1],
        client_state_bytes=states[0],
        server_state_bytes=states[1],
        client_bytes=memory[0],
        server_bytes=memory[1],
        up_payload_bytes=payload[0],
        down_payload_bytes=payload[1],
        up_bytes=work.activations_up_bytes + work.gradient_up_bytes,
        down_bytes=work.activations_down_bytes + work.gradient_down_bytes,
        client_flops=setup.rows
        * (
            _bottom_forward(parts["bottom"], setup)
            + parts["bottom"].backward_flops
            + parts["top"].total("forward_flops")
            + parts["top"].backward_flops
            + _head_flops(pieces, parts, setup)
        ),
        server_flops=setup.rows
        * (parts["trunk"].total("forward_flops") + _trunk_backward(parts["trunk"], setup)),
        step=step,
    )


def _bottom_forward(bottom: _Part, setup: Setup) -> float:
    return 0.0 if setup.rows_are_sent else bottom.total("forward_flops")


def _head_flops(pieces: Pieces, parts: dict[str, _Part], setup: Setup) -> float:
    share = setup.supervised if setup.lean_head else 1.0
    back = pieces.behind.backward_flops if parts["top"].passes_back else 0.0
    return share * (pieces.behind.forward_flops + back)


def _trunk_backward(trunk: _Part, setup: Setup) -> float:
    again = trunk.total("forward_flops") if setup.gradient_checkpointing else 0.0
    return trunk.backward_flops + (again if trunk.passes_back else 0.0)


def _trunk_kept(pieces: Pieces, trunk: _Part, setup: Setup) -> float:
    """Return what the trunk keeps of a row from forward to backward."""
    if not setup.gradient_checkpointing or not trunk.passes_back:
        return trunk.kept_bytes
    inputs = len(trunk.pieces) * pieces.columns * pieces.width * pieces.dtype.itemsize
    return inputs + max(piece.kept_bytes for piece in trunk.pieces)


def _best(steps: list[StepTime]) -> StepTime:
    fastest = min(step.seconds for step in steps)
    return next(step for step in steps if step.seconds <= CLOSE_ENOUGH * fastest)


def _work(
    pieces: Pieces, parts: dict[str, _Part], setup: Setup, chunks: int
) -> tuple[Work, tuple[float, float]]:
    """Return a step's work, and the bytes of its tensors up and down."""
    rows, tokens = setup.rows, setup.rows * pieces.columns
    client, server = setup.client, setup.server
    layer_s = rows / client.layer_flops_per_s
    trunk_s = rows / server.layer_flops_per_s
    bottom, trunk, top = parts["bottom"], parts["trunk"], parts["top"]
    head_s = rows * _head_flops(pieces, parts, setup) / client.head_flops_per_s
    smashed = tokens * setup.token_bytes(pieces.width)
    # With no layer above the cut only supervised positions are asked for.
    lean = setup.supervised if setup.lean_head and not top.pieces else 1.0
    leaves = trunk.passes_back
    # The norms of the trunk's gradients come with the last gradient; with chunks also with the
    # commit of what was held.
    norms = 4.0 * trunk.total("adapter_tensors") * (2 if chunks > 1 else 1) if leaves else 0.0
    tensors = {
        "activations_up": (
            setup.rows * _REFERENCE_BYTES if setup.rows_are_sent else smashed + tokens * _MASK_BYTES
        ),
        "activations_down": lean * smashed,
        "gradient_up": lean * smashed if leaves else 0.0,
        "gradient_down": norms + (smashed if bottom.passes_back else 0.0),
    }
    sizes = {
        f"{name}_bytes": WIRE_OVER_PAYLOAD * size + MESSAGE_BYTES * chunks if size else 0.0
        for name, size in tensors.items()
    }
    work = Work(
        bottom_s=layer_s * _bottom_forward(bottom, setup),
        top_s=layer_s * (top.total("forward_flops") + top.backward_flops) + head_s,
        trunk_forward_s=trunk_s * trunk.total("forward_flops"),
        trunk_backward_s=trunk_s * _trunk_backward(trunk, setup),
        bottom_backward_s=layer_s * bottom.backward_flops,
        client_s_per_chunk=client.layer_call_s * (len(bottom.pieces) + len(top.pieces) + 1),
        server_s_per_chunk=server.layer_call_s * len(trunk.pieces),
        **sizes,
    )
    up = tensors["activations_up"] + tensors["gradient_up"]
    return work, (up, tensors["activations_down"] + tensors["gradient_down"])


def _memory(
    pieces: Pieces,
    parts: dict[str, _Part],
    setup: Setup,
    step: StepTime,
    weights: Sequence[float],
    states: Sequence[float],
) -> tuple[float, float]:
    """Return the most memory that client and server take, in bytes."""
    chunk_rows = math.ceil(setup.rows / step.chunks)
    bottoms = min(step.bottoms_held * chunk_rows, setup.rows)
    trunks = min(step.trunks_held * chunk_rows, setup.rows)
    kept = bottoms * parts["bottom"].kept_bytes + chunk_rows * parts["top"].kept_bytes
    logits = _logits_bytes(pieces, setup, chunk_rows, whole=step.chunks > 1)
    client = max(
        setup.client_process_bytes + weights[0] + states[0] + HEAP_OVER_KEPT * kept + logits,
        setup.client_process_bytes + LOADED_OVER_WEIGHTS * weights[0],
    )
    graphs = trunks * _trunk_kept(pieces, parts["trunk"], setup)
    if setup.server_on_gpu:
        return client, weights[1] + states[1] + graphs
    server = max(
        setup.server_process_bytes + weights[1] + states[1] + HEAP_OVER_KEPT * graphs,
        setup.server_process_bytes + LOADED_OVER_WEIGHTS * weights[1],
    )
    return client, server


_TILE_POSITIONS = 256


def _logits_bytes(pieces: Pieces, setup: Setup, chunk_rows: int, *, whole: bool) -> float:
    size = torch.float32.itemsize * pieces.vocabulary
    if setup.lean_head:
        return LOGITS_IN_BACKWARD * _TILE_POSITIONS * size
    row = pieces.scored_per_row * size
    return (LOGITS_IN_BACKWARD * chunk_rows + (setup.rows if whole else 0)) * row


def cuts_of(num_layers: int, *, at_most: int = 0) -> list[Cut]:
    """Return every cut that leaves a trunk, or an even choice of at most so many."""
    cuts = [
        Cut(lower, upper)
        for lower in range(num_layers)
        for upper in range(lower + 1, num_layers + 1)
    ]
    step = math.ceil(len(cuts) / at_most) if at_most else 1
    return cuts[::step]


def recommended(
    found: Sequence[Prediction],
    *,
    client_bytes: float = math.inf,
    server_bytes: float = math.inf,
    close: float = 1.03,
) -> Prediction | None:
    """Return the cut to take: the fastest that fits, with the least client among those as fast.

    A layer is left to the client at both ends: activations below the first layer are rows of a
    public table, and without one above the cut the gradients are those of the logits' input.

    Args:
        found: The predictions to choose from.
        client_bytes: Memory that the client has.
        server_bytes: Memory that the server has.
        close: By what factor a step may be slower than the fastest and still count as fast.

    Returns:
        `None` if no cut fits.
    """
    fits = [
        each
        for each in found
        if each.client_bytes <= client_bytes
        and each.server_bytes <= server_bytes
        and each.bottom_layers
        and each.top_layers
    ]
    if not fits:
        return None
    fastest = min(each.step.seconds for each in fits)
    near = [each for each in fits if each.step.seconds <= close * fastest]
    return min(near, key=lambda each: (each.client_bytes, each.step.seconds))
