"""Run the model row by row as the rows need it: the bottom for new ones only, the top for all."""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cutlayer.client.ahead import Ahead, generators
from cutlayer.client.chunks import rows_in
from cutlayer.client.connection import Connection
from cutlayer.client.link import TrunkLink
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.client.replies import Pending
from cutlayer.client.send_once import Batch, SendOnce
from cutlayer.errors import ConfigError, Refused
from cutlayer.privacy.defenses import Defense
from cutlayer.split.cut import bottom_bypassed
from cutlayer.split.entry import CARRIED
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.tensors import bytes_of, dtype_name, refuse_not_finite

__all__ = ["ByRows", "RowsAhead", "arrange_rows", "begin_send_once"]

_AHEAD = 8
"""Requests with rows that may be on their way ahead of training."""


class ByRows:
    """How a connected model runs if its rows are sent once."""

    def __init__(
        self,
        once: SendOnce,
        remote: RemoteTrunk,
        link: TrunkLink,
        top_only: Callable[[], contextlib.AbstractContextManager[None]],
        *,
        caches_by_default: bool,
    ) -> None:
        """Begin.

        Args:
            once: What was sent before.
            remote: The model's trunk.
            link: The way to it.
            top_only: While open, a forward of the model is the top's alone.
            caches_by_default: Whether a forward fills a KV cache unless it is told not to.
        """
        self.once = once
        self._remote = remote
        self._link = link
        self._top_only = top_only
        self._caches_by_default = caches_by_default

    def run(self, run: Callable[..., Any], *args: Any, **given: Any) -> Any:
        """Run the model as `run` does; the bottom runs for rows that never left before.

        Args:
            run: The model's forward.
            args: Its positional arguments; with any, nothing is sent once.
            given: Its arguments by name.
        """
        is_half = self._remote.is_receiving or self._remote.is_capturing
        if is_half or args or not self._is_of_rows(given):
            return run(*args, **given)
        batch = self._batch_of(run, given)
        with self._remote.sending_rows(batch), self._top_only():
            return run(**given)

    def _is_of_rows(self, given: Mapping[str, Any]) -> bool:
        has_tokens = isinstance(given.get("input_ids"), Tensor)
        if not has_tokens or given.get("past_key_values") is not None:
            return False
        # Whoever generates goes on from the bottom's own cache, so the bottom must fill it.
        is_generating = given.get("labels") is None and not torch.is_grad_enabled()
        use_cache = given.get("use_cache")
        return not (is_generating and (self._caches_by_default if use_cache is None else use_cache))

    def _batch_of(self, run: Callable[..., Any], given: Mapping[str, Any]) -> Batch:
        self._link.calibrate_if_due()  # what is learnt is among what decides the ids
        rows, device = rows_in(given), given["input_ids"].device.type
        is_on = torch.is_autocast_enabled(device)
        autocast = dtype_name(torch.get_autocast_dtype(device)) if is_on else ""
        batch = self.once.batch_of(given, rows, autocast)
        if batch.new:
            part = _only(given, rows, batch.new)
            hidden_BTD = self._remote.at_the_cut(functools.partial(run, **part))
            batch.hidden_BTD = hidden_BTD.detach()
        return batch

    def send_one_ahead(self, run: Callable[..., Any], given: Mapping[str, Any]) -> Pending | None:
        """Send the rows of one batch ahead; return the reply to come, `None` if all are there.

        Raises:
            NotFinite: If an activation is NaN or infinite; nothing was sent.
        """
        with torch.no_grad():
            batch = self._batch_of(run, given)
        if self.once.holds_all(batch):
            return None
        if batch.hidden_BTD is not None:
            refuse_not_finite(batch.hidden_BTD, "the smashed activations", "nothing was sent")
        carried = {k: given[k] for k in CARRIED if isinstance(given.get(k), Tensor)}
        return self._link.keep_rows(batch, carried)

    def send_ahead(self, run: Callable[..., Any], batches: Iterable[Mapping[str, Any]]) -> int:
        """Send the rows of batches before they are trained on; return how many had to go.

        Args:
            run: The model's forward.
            batches: As the trainer will give them to the model, masks and padding included.

        Raises:
            NotFinite: If an activation is NaN or infinite; nothing of its batch was sent.
            ConnectionFailed: If the server fell silent.
        """
        on_their_way: deque[Pending] = deque()
        before = self.once.rows_sent
        for given in batches:
            pending = self.send_one_ahead(run, given)
            if pending is not None:
                on_their_way.append(pending)
            if len(on_their_way) > _AHEAD:
                on_their_way.popleft().wait()
        for pending in on_their_way:
            pending.wait()
        return self.once.rows_sent - before


class RowsAhead(Ahead):
    """Sends the rows of the coming batch while this one's last gradients are waited for."""

    def __init__(self, by_rows: ByRows, remote: RemoteTrunk) -> None:
        super().__init__(remote)
        self._by_rows = by_rows

    def run_one(self, run: Callable[..., Any]) -> bool:
        """Send one more chunk of the coming batch; return whether there was one to be sent."""
        if not self._to_run:
            return False
        self.used += self._by_rows.send_one_ahead(run, self._to_run.popleft()) is not None
        return True

    def bottom_of(
        self,
        part: Mapping[str, Any],
        run: Callable[..., Any],
        bypass: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> Callable[[], Any]:
        """Return a call of the model, which names what was sent."""
        return functools.partial(run, **part)


def _only(given: Mapping[str, Any], rows: int, numbers: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of a forward for some of its rows."""
    if len(numbers) == rows:
        return dict(given)
    return {
        name: value[list(numbers)]
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
        else value
        for name, value in given.items()
    }


def begin_send_once(
    connection: Connection, defenses: Sequence[Defense], once: bool | str | Path
) -> None:
    """Give a connection the rows that a run has sent so far, if they are to be sent once.

    Args:
        connection: Not open yet.
        defenses: Those of the run.
        once: Whether rows are sent once; or the folder that knows which were sent.

    Raises:
        ConfigError: If a defense makes a row's activations others each time.
        Refused: If the server keeps no rows.
        StorageError: If the folder cannot be written.
    """
    if once is False:
        return
    for defense in defenses:
        if defense.site in ("embedding", "lower cut"):
            raise ConfigError(
                f"split_send_once keeps a row's activations and '{defense.name}' draws fresh noise "
                "for each: leave one of them out"
            )
    ttl_s = connection.offer.row_ttl_s
    if not ttl_s:
        raise Refused(
            "this server keeps no rows and split_send_once asks for it: leave it out, or ask the "
            "operator for 'cutlayer serve --send_once_ttl_s'"
        )
    connection.once = SendOnce(None if once is True else Path(once), ttl_s=ttl_s)


def arrange_rows(split: Any, asked: pb.OpenSessionRequest) -> RowsAhead | None:
    """Have a connected model send its rows once, if its connection does; return what looks ahead.

    Args:
        split: The model, which is complete but for that.
        asked: What both sides agree on, of which a row's activations depend on some.

    Raises:
        ConfigError: If the bottom is trained or draws at random.
    """
    once, remote = split.connection.once, split.remote_trunk
    if once is None:
        return None
    codec = asked.codecs["activations_up"]
    about = asked.agreement.SerializeToString(deterministic=True) + codec.encode()
    once.bind(about + _digest_of_frozen(split, remote))
    width = split.hf_model.config.get_text_config().hidden_size
    if statics := once.statics_of_an_earlier_run(width):
        remote.link.calibrate(statics)
    caches = bool(getattr(split.hf_model.config.get_text_config(), "use_cache", False))
    top_only = functools.partial(bottom_bypassed, split.hf_model, split.anatomy, split.cut)
    split.by_rows = ByRows(once, remote, remote.link, top_only, caches_by_default=caches)
    return RowsAhead(split.by_rows, remote)


def _digest_of_frozen(model: nn.Module, remote: RemoteTrunk) -> bytes:
    digest = hashlib.sha256()
    for place, module in _before_the_trunk(model, remote):
        trained = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
        if trained:
            raise ConfigError(
                f"split_send_once needs a frozen bottom and {place}.{trained[0]} of it is trained: "
                "leave bottom out of split_train"
            )
        drawn = [(name, p) for name, p in _dropout_of(module) if p > 0]
        if drawn:
            raise ConfigError(
                f"split_send_once needs the same activations each time and {place} of the bottom "
                f"has {drawn[0][0]} = {drawn[0][1]}: set that to 0 in the model's config, or leave "
                "split_send_once out"
            )
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in tensors:
            digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
            digest.update(bytes_of(tensor))
    if _draws(model, remote):
        raise ConfigError(
            "split_send_once needs the same activations each time and the bottom draws random "
            "numbers in training (a router's jitter?): turn that off in the model's config, or "
            "leave split_send_once out"
        )
    return digest.digest()


def _draws(model: nn.Module, remote: RemoteTrunk) -> bool:
    """Say whether the bottom in training draws, which no module need say in a number of its own."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        with torch.random.fork_rng():
            before = generators()
            _run_bottom(model, remote)
            return any(not torch.equal(a, b) for a, b in zip(before, generators(), strict=True))
    finally:
        for module, training in modes.items():
            module.training = training


def _run_bottom(model: nn.Module, remote: RemoteTrunk) -> None:
    device = next(model.parameters()).device
    tokens_BT = torch.ones(1, 2, dtype=torch.long, device=device)
    with torch.no_grad():
        remote.at_the_cut(functools.partial(model, input_ids=tokens_BT, use_cache=False))


def _before_the_trunk(model: nn.Module, remote: RemoteTrunk) -> list[tuple[str, nn.Module]]:
    """Return the modules that are called before the trunk with their names, in that order."""
    names = {id(module): name for name, module in model.named_modules()}
    called: dict[str, nn.Module] = {}

    def note(module: nn.Module, _args: Any) -> None:
        called.setdefault(names[id(module)].removeprefix("base_model.model."), module)

    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        _run_bottom(model, remote)
    finally:
        for handle in handles:
            handle.remove()
    return [(name, module) for name, module in called.items() if module is not remote]


def _dropout_of(module: nn.Module) -> Iterable[tuple[str, float]]:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        yield "p", module.p
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float | int) and not isinstance(value, bool):
            yield name, float(value)
