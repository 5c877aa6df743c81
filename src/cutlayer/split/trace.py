"""What each layer computes and keeps, found by running it without memory.

Two layers of each kind are run, forward and backward, on tensors that have shapes and no numbers
(torch's FakeTensorMode), while the operations and the storages that autograd keeps are counted.
So every family is counted by its own code, and a model of 70B takes as long as one of 1B.
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cutlayer.errors import CannotCut
from cutlayer.split.adapters import ADAPTER, plan_adapter
from cutlayer.split.cut import Anatomy, Cut, PassThrough, hidden_of
from cutlayer.split.loading import Skeleton

__all__ = ["Piece", "Pieces", "trace"]

_ROWS = 2
"""What all rows share weighs less than with one row; nothing is computed anyway."""


@dataclass(frozen=True)
class Piece:
    """One layer, or what stands before or behind all layers; per row of T tokens."""

    parameters: int = 0
    """Numbers of the base model."""
    adapter: int = 0
    """Numbers of the LoRA."""
    adapter_tensors: int = 0
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    kept_bytes: float = 0.0
    """What autograd keeps from forward to backward."""


@dataclass(frozen=True)
class Pieces:
    """A whole model in pieces, with its LoRA and without."""

    columns: int
    """Tokens in a row."""
    width: int
    """Model width."""
    vocabulary: int
    """Numbers for each scored position: the vocabulary's size, or the number of labels."""
    scored_per_row: int
    """Positions with logits: every token, or one for a classifier."""
    before: Piece
    """Embeddings."""
    layers: tuple[Piece, ...]
    plain: tuple[Piece, ...]
    """The same layers where no LoRA is trained and a gradient passes."""
    behind: Piece
    """The last norm, the head and the loss; the logits are not in `kept_bytes`."""
    dtype: torch.dtype


def trace(
    skeleton: Skeleton,
    config: LoraConfig,
    *,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> Pieces:
    """Count every piece of a model.

    Args:
        skeleton: The whole model on `meta`.
        config: The LoRA.
        columns: Tokens in a row.
        dtype: Of the base weights.

    Raises:
        CannotCut: If the family's code needs numbers to run.
        ConfigError: If the LoRA cannot be placed.
    """
    anatomy, model = skeleton.anatomy, skeleton.model
    everything = plan_adapter(skeleton, config, Cut(0, anatomy.num_layers))
    shapes = everything.trunk_parameters | everything.client_parameters
    kinds = _kinds(anatomy.layers(model))
    with_lora = _run(skeleton, kinds, columns, dtype, everything.config)
    without = _run(skeleton, kinds, columns, dtype, None)
    layers = anatomy.layers(model)
    numbers = [_numel(layer) for layer in layers]

    def piece(number: int, counted: _Counted, *, lora: bool) -> Piece:
        prefix = f"{anatomy.layers_path}.{number}."
        mine = [shape for name, shape in shapes.items() if prefix in name] if lora else []
        return Piece(
            parameters=numbers[number],
            adapter=sum(torch.Size(shape).numel() for shape in mine),
            adapter_tensors=len(mine),
            forward_flops=counted.forward_flops,
            backward_flops=counted.backward_flops,
            kept_bytes=counted.kept_bytes,
        )

    head = model.get_output_embeddings()
    head_numbers = _numel(head) if isinstance(head, nn.Module) else 0
    if any(a is b for a in (head.parameters() if head else ()) for b in _embedded(model)):
        head_numbers = 0  # tied: counted with the embedding
    outside = {n: s for n, s in shapes.items() if f"{anatomy.layers_path}." not in n}
    behind = with_lora[anatomy.num_layers]
    return Pieces(
        columns=columns,
        width=model.config.get_text_config().hidden_size,
        vocabulary=behind.logits_shape[-1],
        scored_per_row=torch.Size(behind.logits_shape[1:-1]).numel(),
        before=Piece(
            parameters=_numel(model) - sum(numbers) - head_numbers,
            adapter=sum(torch.Size(shape).numel() for shape in outside.values()),
            adapter_tensors=len(outside),
            forward_flops=with_lora[-1].forward_flops,
            kept_bytes=with_lora[-1].kept_bytes,
        ),
        layers=tuple(piece(n, with_lora[kind], lora=True) for n, kind in enumerate(kinds)),
        plain=tuple(piece(n, without[kind], lora=False) for n, kind in enumerate(kinds)),
        behind=Piece(
            parameters=head_numbers,
            forward_flops=behind.forward_flops,
            backward_flops=behind.backward_flops,
            kept_bytes=behind.kept_bytes,
        ),
        dtype=dtype,
    )


@dataclass
class _Counted:
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    kept_bytes: float = 0.0
    logits_shape: tuple[int, ...] = ()


def _kinds(layers: nn.ModuleList) -> list[int]:
    """Return for each layer the number of the layer that is run in its stead.

    It is the second of its kind where there is one: the first also keeps what all share (masks,
    angles of positions).
    """
    of_kind: dict[object, list[int]] = {}
    for number, layer in enumerate(layers):
        of_kind.setdefault(_kind(layer), []).append(number)
    return [of_kind[_kind(layer)][:2][-1] for layer in layers]


def _kind(layer: nn.Module) -> object:
    plain = {
        (path, name, value)
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | None)
        and not name.startswith("_")
        and name not in ("layer_idx", "layer_id", "layer_number", "training")
    }
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    return type(layer), shapes, frozenset(plain)


def _run(
    skeleton: Skeleton,
    kinds: Sequence[int],
    columns: int,
    dtype: torch.dtype,
    config: LoraConfig | None,
) -> dict[int, _Counted]:
    """Run layers of each kind with what stands around; -1 is before, L behind the layers."""
    anatomy = skeleton.anatomy
    model = copy.deepcopy(skeleton.model)
    model.config._attn_implementation = skeleton.model.config._attn_implementation
    layers = anatomy.layers(model)
    run = {number for kind in kinds for number in (kinds.index(kind), kind)}
    for number in set(range(anatomy.num_layers)) - run:
        layers[number] = PassThrough(layers[number], number, anatomy)
    called: nn.Module = model
    if config is not None:
        called = PeftModel(model, copy.deepcopy(config), ADAPTER, low_cpu_mem_usage=True)
    else:
        model.requires_grad_(False)
    called.train()
    # What it writes before it raises is said in our own sentence.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            _give_fake_tensors(called, dtype)
            return _count(called, model, anatomy, columns)
    except Exception as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise CannotCut(
            f"models of type '{model.config.model_type}' cannot be planned for: what they compute "
            f"depends on their numbers, or the LoRA cannot be placed ({what}); 'cutlayer preview' "
            "counts weights and bytes"
        ) from error


def _give_fake_tensors(model: nn.Module, dtype: torch.dtype) -> None:
    """Put tensors of shapes alone in place of those on `meta`; LoRA stays in float32."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                kind = torch.float32 if parameter.requires_grad else dtype
                empty = torch.empty(parameter.shape, dtype=kind)
                made.setdefault(id(parameter), nn.Parameter(empty, parameter.requires_grad))
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@dataclass
class _Counter:
    """What autograd has kept and what was computed, since a mark."""

    flops: FlopCounterMode
    held: set[int]
    saved: list[Any] = field(default_factory=list)
    kept_bytes: int = 0
    marks: dict[str, tuple[float, int]] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is kept, each storage once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.held:
            self.held.add(storage._cdata)
            self.saved.append(storage)  # alive, so that no other gets its number
            self.kept_bytes += storage.nbytes()
        return tensor

    def since(self, mark: str) -> tuple[float, int]:
        """Return operations and kept bytes since a mark."""
        flops, kept = self.marks.get(mark, (0.0, 0))
        return self.flops.get_total_flops() - flops, self.kept_bytes - kept

    def mark(self, name: str) -> None:
        """Remember where we are."""
        self.marks[name] = (self.flops.get_total_flops(), self.kept_bytes)


def _count(called: nn.Module, model: Any, anatomy: Anatomy, columns: int) -> dict[int, _Counted]:
    flops = FlopCounterMode(display=False)
    held = {t.untyped_storage()._cdata for t in (*called.parameters(), *called.buffers())}
    counter = _Counter(flops, held)
    found: dict[int, _Counted] = {}
    tokens_BT = torch.ones(_ROWS, columns, dtype=torch.long)
    labels = tokens_BT
    if type(model).__name__.endswith("ForSequenceClassification"):
        labels = torch.zeros(_ROWS, dtype=torch.long)
        model.config.problem_type = "single_label_classification"
        # A classifier looks for the last token that is no padding.
        model.config.pad_token_id = None
    layers = anatomy.layers(model)
    kept = torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor)
    # Rows are full, and attention needs no mask then; padding costs a layer about a tenth more.
    # With a cache transformers sees that without looking at numbers, which are not there.
    with flops, kept, _watched(layers, counter, found):
        output = called(
            input_ids=tokens_BT,
            labels=labels,
            use_cache=True,
        )
        behind = found[len(layers)] = _Counted(logits_shape=tuple(output.logits.shape))
        behind.forward_flops, kept_bytes = counter.since("behind")
        logits = output.logits.untyped_storage()
        own = logits.nbytes() if logits._cdata in counter.held else 0
        behind.kept_bytes = kept_bytes - own
        counter.mark("backward")
        output.loss.backward()
    for counted in found.values():
        counted.forward_flops /= _ROWS
        counted.backward_flops /= _ROWS
        counted.kept_bytes /= _ROWS
    return found


@contextlib.contextmanager
def _watched(
    layers: nn.ModuleList, counter: _Counter, found: dict[int, _Counted]
) -> Iterator[None]:
    """Note what lies between the entry and the exit of each layer, forward and backward."""

    def enter(number: int, args: Any, kwargs: Any) -> None:
        hidden_BTD = hidden_of(args, kwargs)
        if number == 0:
            before = found[-1] = _Counted()
            before.forward_flops, before.kept_bytes = counter.since("start")
            if not hidden_BTD.requires_grad:
                hidden_BTD.requires_grad_(True)
        if not isinstance(layers[number], PassThrough):
            found[number] = _Counted()
            hidden_BTD.register_hook(lambda _grad: note_backward(number))
        counter.mark("layer")

    def note_backward(number: int) -> None:
        found[number].backward_flops, _ = counter.since("backward")
        counter.mark("backward")

    def leave(number: int, output: Any) -> None:
        if number in found:
            found[number].forward_flops, found[number].kept_bytes = counter.since("layer")
        if number == len(layers) - 1:
            counter.mark("behind")
            hidden_BTD = output[0] if isinstance(output, tuple) else output

            def note_behind(_grad: Tensor) -> None:
                found[len(layers)].backward_flops, _ = counter.since("backward")
                counter.mark("backward")

            hidden_BTD.register_hook(note_behind)

    handles = []
    for at, layer in enumerate(layers):
        handles += [
            layer.register_forward_pre_hook(
                lambda _m, args, kwargs, at=at: enter(at, args, kwargs), with_kwargs=True
            ),
            layer.register_forward_hook(lambda _m, _args, output, at=at: leave(at, output)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _embedded(model: Any) -> list[nn.Parameter]:
    embedding = model.get_input_embeddings()
    return list(embedding.parameters()) if isinstance(embedding, nn.Module) else []


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
