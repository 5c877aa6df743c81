"""How much memory is one tenant's alone: adapter, gradients, optimizer, graphs, KV caches."""

# Shapes:  B batch   T tokens

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cutlayer.wire import cutlayer_pb2 as pb

if TYPE_CHECKING:
    from cutlayer.server.trunk import TenantTrunk

__all__ = ["Memory", "counting_saved"]


class Memory:
    """The memory of one session's trunk. Any thread may ask; only the trunk's thread measures."""

    def __init__(self, trunk: TenantTrunk) -> None:
        self._trunk = trunk
        self._graphs: dict[int, int] = {}
        self._known: dict[tuple[object, ...], int] = {}

    @property
    def pending(self) -> int:
        """Forwards that wait for their backward."""
        return self._trunk.pending

    @property
    def memory_bytes(self) -> int:
        """All of it, in bytes."""
        return self.state_bytes + self.graph_bytes + self.cache_bytes

    @property
    def state_bytes(self) -> int:
        """Adapter, gradients and optimizer, as they are or will be from the first step on."""
        mine = list(self._trunk.parameters.values())
        weights = sum(p.nbytes for p in mine)
        try:
            optimizer = sum(t.nbytes for t in self._trunk.optimizer_tensors().values())
        except RuntimeError:  # the trunk's thread makes it at this moment
            optimizer = 0
        return 2 * weights + (optimizer or 2 * weights)

    @property
    def graph_bytes(self) -> int:
        """What forwards keep for their backwards."""
        kept = self._trunk.kept
        return sum(size for number, size in list(self._graphs.items()) if number in kept)

    @property
    def cache_bytes(self) -> int:
        """The KV caches."""
        layers = [layer for cache in self._trunk.caches.all for layer in cache.layers]
        pairs = [(getattr(at, "keys", None), getattr(at, "values", None)) for at in layers]
        return sum(t.nbytes for pair in pairs for t in pair if isinstance(t, Tensor))

    @contextlib.contextmanager
    def admitting(
        self,
        sequence: int,
        asked: pb.Forward,
        smashed_BTD: Tensor,
        admit: Callable[[int], None],
    ) -> Iterator[None]:
        """Let the forward inside be done if its memory is allowed, and count what it keeps.

        A forward of a kind that was seen before is asked for beforehand, with what the last one
        took; a new kind is measured, and undone if it was too much.

        Args:
            sequence: The forward's number.
            asked: What is asked of it.
            smashed_BTD: What it is computed from.
            admit: Is given the bytes that are needed more, and raises if they are too many.
        """
        flags = (asked.training, asked.wants_gradient, asked.adapter_disabled)
        kind = (tuple(smashed_BTD.shape), asked.autocast, *flags)
        admit(self._known.get(kind, 0) if asked.keep_graph else 0)
        with self._measuring(sequence, kind) if asked.keep_graph else contextlib.nullcontext():
            yield
        try:
            admit(0)
        except BaseException:
            self._trunk.discard(sequence)
            self._trunk.caches.drop(asked.cache)
            raise

    @contextlib.contextmanager
    def _measuring(self, sequence: int, kind: tuple[object, ...]) -> Iterator[None]:
        """Count what the forward inside keeps for its backward; each kind is measured once."""
        ahead = self._trunk.ahead.get(sequence)
        if ahead is not None or kind in self._known:
            yield
        else:
            with counting_saved([self._trunk]) as seen:
                yield
            self._known[kind] = sum(seen.values())
        kept = self._trunk.kept
        graphs = {number: size for number, size in self._graphs.items() if number in kept}
        mine = self._known[kind] if ahead is None else ahead.graph_bytes
        self._graphs = {**graphs, sequence: mine}


@contextlib.contextmanager
def counting_saved(trunks: Iterable[TenantTrunk]) -> Iterator[dict[int, int]]:
    """Yield the bytes that what is computed inside keeps for its backward, by their address.

    Args:
        trunks: Whose weights are not counted.
    """
    seen: dict[int, int] = {}
    models = [trunk.model if trunk.peft is None else trunk.peft for trunk in trunks]
    tensors = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
    shared = {at for tensor in tensors for at in _storages(tensor)}

    def pack(tensor: Tensor) -> Tensor:
        seen.update({k: v for k, v in _storages(tensor).items() if k not in shared})
        # Not the tensor itself: of an output that would be a cycle, and never be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen


def _storages(tensor: Tensor) -> dict[int, int]:
    """Return the bytes of what a tensor lies in, by address; a quantized one lies in several."""
    if is_traceable_wrapper_subclass(tensor):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return {at: size for each in inner for at, size in _storages(each).items()}
    storage = tensor.untyped_storage()
    return {storage.data_ptr(): storage.nbytes()}
