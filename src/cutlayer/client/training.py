"""Keep the trunk's optimizer in step with the client's, whatever trainer drives it.

`attach` hooks the client's own torch optimizer: when it steps, the trunk steps, with the same
settings. The client owns time: schedule, epochs and clipping are computed here, the server is told
numbers. No round trip is added, because requests keep their order and nobody waits for the step's
reply.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from cutlayer.client.ahead import look_ahead
from cutlayer.client.model import SplitModel
from cutlayer.client.pipeline import Objective
from cutlayer.client.savepoints import keep_both_halves, load_both_halves
from cutlayer.errors import ConfigError
from cutlayer.wire import cutlayer_pb2 as pb

__all__ = ["TrunkOptimizer", "attach"]

log = logging.getLogger(__name__)

_LAYER = re.compile(r"\.\d+\.")
_ATTACHED = "_cutlayer_trunk"


class TrunkOptimizer:
    """The trunk's optimizer as the client sees it."""

    def __init__(self, model: SplitModel) -> None:
        self._model = model
        self._clip_factor = 1.0
        self._declared = False
        self._followed: torch.optim.Optimizer | None = None
        self._gradients_are_of = 0
        self._parameters = {
            name: p
            for name, p in model.named_parameters()  # type: ignore[attr-defined]
            if p.requires_grad
        }
        # A trainer drops gradients so: after each step, and when it begins after an interruption.
        _call_after(model, "zero_grad", self._zeroed)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the trunk step whenever `optimizer` steps.

        Raises:
            ConfigError: If the server has no optimizer of this name, or cannot be told how it is
                set.
        """
        offered = list(self._model.connection.offer.optimizers)
        name = type(optimizer).__name__
        if name not in offered or type(optimizer).__module__.split(".")[0] != "torch":
            raise ConfigError(
                f"optimizer {type(optimizer).__module__}.{name} cannot run at the server: choose "
                f"one of torch.optim's {', '.join(offered)} (--optim adamw_torch)"
            )
        _refuse_untold(optimizer)
        if self._followed is not optimizer:  # a trainer that trains again keeps its optimizer
            optimizer.register_step_post_hook(self._stepped)
            self._followed, self._declared = optimizer, False
            self._gradients_are_of = self._model.connection.gradient_changes()
            _call_after(optimizer, "zero_grad", self._zeroed)

    def _zeroed(self) -> None:
        """Drop the trunk's gradients with the client's; a step has dropped them already."""
        self._clip_factor = 1.0  # of a step that was left out
        connection = self._model.connection
        if self._model.remote_trunk.trains:
            if self._gradients_are_of != connection.gradient_changes():
                connection.request(pb.Head(zero_grad=pb.ZeroGrad()), unattended=True)
            self._gradients_are_of = connection.gradient_changes()

    def _stepped(self, optimizer: torch.optim.Optimizer, *_args: Any) -> None:
        remote = self._model.remote_trunk
        remote.optimizer_stepped()
        if not remote.trains:
            self._model.connection.mark_if_due()  # its forwards and backwards are in the log, too
            return
        step = pb.OptimStep(
            step=remote.step, optimizer=type(optimizer).__name__, clip_factor=self._clip_factor
        )
        members = self._members(optimizer) if not self._declared else {}
        for index, group in enumerate(optimizer.param_groups):
            step.groups.append(_group_of(group, members.get(index, [])))
        self._declared, self._clip_factor = True, 1.0
        self._model.connection.request(pb.Head(optim_step=step), unattended=True)
        self._model.connection.mark_if_due()
        self._gradients_are_of = self._model.connection.gradient_changes()

    def _members(self, optimizer: torch.optim.Optimizer) -> dict[int, list[str]]:
        """Put each parameter of the trunk into the group of its twin in another layer.

        So decay and learning rate depend on the kind of parameter, as the trainer meant it. What
        has no twin here (the client trains nothing of the kind) goes to the first group.
        """
        index_of = {
            id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]
        }
        twins = {
            _LAYER.sub(".", name, count=1): index_of[id(p)]
            for name, p in self._parameters.items()
            if id(p) in index_of
        }
        torn = [
            name
            for name, p in self._parameters.items()
            if index_of.get(id(p)) not in (None, twins.get(_LAYER.sub(".", name, count=1)))
        ]
        if torn and self._model.connection.parameters:
            log.warning(
                "'%s' and its like in other layers are in different groups of the optimizer: the "
                "trunk's are in the last of these",
                torn[0],
            )
        members: dict[int, list[str]] = {}
        for name in self._model.connection.parameters:
            members.setdefault(twins.get(_LAYER.sub(".", name, count=1), 0), []).append(name)
        return members

    def clip_grad_norm_(
        self, parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2.0
    ) -> Tensor:
        """Clip by the norm over all parts; takes the place of `torch.nn.utils.clip_grad_norm_`.

        The server's norms came with its last gradient. All norms are stacked in the unsplit
        model's order and the factor is computed as torch does, so it is bit-equal.

        Raises:
            ConfigError: If another norm than the 2-norm is asked for.
        """
        if float(norm_type) != 2.0:
            raise ConfigError(f"clipping by the {norm_type}-norm cannot be split: use the 2-norm")
        wanted = {id(p) for p in ([parameters] if isinstance(parameters, Tensor) else parameters)}
        named = {
            name: p
            for name, p in self._parameters.items()
            if id(p) in wanted and p.grad is not None
        }
        grads = [p.grad for p in named.values() if p.grad is not None]
        own = dict(zip(named, torch._foreach_norm(grads) if grads else [], strict=True))
        norms = self._in_unsplit_order(own)
        if not norms:
            return torch.tensor(0.0)
        total_norm = torch.linalg.vector_norm(torch.stack(norms))
        factor = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
        if grads:
            torch._foreach_mul_(grads, factor)
        self._clip_factor *= float(factor)
        return total_norm

    def _in_unsplit_order(self, own: dict[str, Tensor]) -> list[Tensor]:
        connection, plan = self._model.connection, self._model.plan
        theirs: dict[str, Tensor] = {}
        if connection.norms is not None and self._model.remote_trunk.trains:
            theirs = dict(zip(connection.parameters, connection.norms.unbind(), strict=True))
        device = next(iter(own.values())).device if own else torch.device("cpu")
        return [
            norm.to(device)
            for name in plan.order
            for norm in (own.get(name), theirs.get(name))
            if norm is not None
        ]


def _call_after(thing: Any, name: str, then: Callable[[], None]) -> None:
    """Have a method of one object followed by a call; torch has no hook for `zero_grad`."""
    method = getattr(thing, name)

    @functools.wraps(method)
    def followed(*args: Any, **kwargs: Any) -> Any:
        done = method(*args, **kwargs)
        then()
        return done

    setattr(thing, name, followed)


def _group_of(group: dict[str, Any], names: list[str]) -> pb.ParamGroup:
    told = pb.ParamGroup(names=names)
    for key, value in group.items():
        if isinstance(value, bool):
            told.flags[key] = value
        elif isinstance(value, int | float):
            told.numbers[key] = value
        elif isinstance(value, Tensor) and value.numel() == 1:
            told.numbers[key] = float(value)
        elif key == "betas":
            told.betas.extend(map(float, value))
    return told


def _refuse_untold(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a setting that is none of what `_group_of` tells: the trunk would have the default."""
    defaults = inspect.signature(type(optimizer)).parameters
    for group in optimizer.param_groups:
        told = _group_of(group, [])
        for key in group.keys() & defaults.keys() - {*told.numbers, *told.flags, "betas", "params"}:
            default = defaults[key].default
            if group[key] != default:
                raise ConfigError(
                    f"{type(optimizer).__name__}'s {key}={group[key]} cannot be told to the "
                    f"server: leave it at its default, {default}"
                )


class _TrainerLink(TrainerCallback):
    """Tie a transformers Trainer to the trunk: optimizer, clipping, the step it resumes at."""

    def __init__(self, trainer: Any, model: SplitModel) -> None:
        self._trainer = trainer
        self._model = model
        self._trunk = TrunkOptimizer(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Follow the optimizer that the trainer has made by now."""
        if args.fp16:
            raise ConfigError("fp16 with loss scaling cannot be split: use bf16 or float32")
        optimizer = self._trainer.optimizer
        self._trunk.follow(getattr(optimizer, "optimizer", optimizer))
        self._trainer.accelerator.clip_grad_norm_ = self._trunk.clip_grad_norm_
        if state.global_step:
            load_both_halves(self._trainer, self._model, state.global_step)
            self._trunk._declared = True


def attach(driver: Any, model: Any = None) -> TrunkOptimizer:
    """Make the trunk's optimizer follow a trainer's, or a plain loop's.

    To attach again what is attached already changes nothing.

    Args:
        driver: A transformers or TRL trainer, or a torch optimizer.
        model: The connected model; only with a torch optimizer.

    Returns:
        The trunk's optimizer, whose `clip_grad_norm_` a plain loop calls instead of torch's.

    Raises:
        ConfigError: If the trainer's model is not connected, or the optimizer is not supported.
    """
    if isinstance(driver, torch.optim.Optimizer):
        if not isinstance(model, SplitModel):
            raise ConfigError("attach(optimizer, model) needs the model that connect() returned")
        if (known := _attached(driver, model)) is not None:
            return known
        trunk = TrunkOptimizer(model)
        trunk.follow(driver)
        vars(driver)[_ATTACHED] = trunk
        return trunk
    split = getattr(driver, "model", None)
    if not isinstance(split, SplitModel):
        raise ConfigError("attach(trainer) needs a trainer whose model connect() returned")
    if (known := _attached(driver, split)) is not None:
        return known
    _check_routers(split)
    if split.by_rows is not None:
        _check_rows_last(driver)
    _tell_objective(driver, split)
    keep_both_halves(driver, split)
    look_ahead(driver, split.comes)
    link = _TrainerLink(driver, split)
    driver.add_callback(link)
    vars(driver)[_ATTACHED] = link._trunk
    return link._trunk


def _attached(driver: Any, model: SplitModel) -> TrunkOptimizer | None:
    """Return what follows a driver: a second would step the trunk twice, and clip neither step."""
    known: TrunkOptimizer | None = vars(driver).get(_ATTACHED)
    return known if known is not None and known._model is model else None


def _check_routers(model: SplitModel) -> None:
    """Refuse a loss that needs what the routers of all layers said; TRL's has it by default."""
    if getattr(model.hf_model.config.get_text_config(), "output_router_logits", False):
        raise ConfigError(
            "the balancing loss of a mixture of experts is made of all layers' routers, and the "
            "trunk's are elsewhere: set router_aux_loss_coef to 0.0 in TRL's config, or "
            "output_router_logits to False in the model's"
        )


def _check_rows_last(trainer: Any) -> None:
    """Look whether a trainer gives the model the same rows in each epoch."""
    if getattr(trainer.args, "neftune_noise_alpha", None) is not None:
        raise ConfigError(
            "split_send_once keeps a row's activations and neftune_noise_alpha draws fresh noise "
            "for each: leave one of them out"
        )
    is_flat = getattr(trainer, "padding_free", False)
    if is_flat and trainer.args.per_device_train_batch_size > 1:
        log.warning(
            "without padding a batch is one row, which shuffling never gives again: "
            "split_send_once saves nothing; set per_device_train_batch_size to 1, or pad"
        )


def _tell_objective(trainer: Any, model: SplitModel) -> None:
    """Let the model know what TRL's trainer makes of its head's log-probabilities.

    Each chunk's backward can then be done before the trainer has made the loss. A trainer whose
    loss is another than TRL's own gets the plain pipeline.
    """
    compute_loss = trainer.compute_loss
    mean_of_log_probs = (
        type(trainer).compute_loss.__module__ == "trl.trainer.sft_trainer"
        and getattr(trainer.args, "loss_type", None) == "nll"
        and trainer.compute_loss_func is None
        and trainer.label_smoother is None
    )
    if not mean_of_log_probs:
        return

    @functools.wraps(compute_loss)
    def noting(*args: Any, **kwargs: Any) -> Any:
        items = kwargs.get("num_items_in_batch")
        model.objective = Objective("log_probs", None if items is None else int(items))
        try:
            return compute_loss(*args, **kwargs)
        finally:
            model.objective = None

    trainer.compute_loss = noting
