"""The frozen trunk and each tenant's own module tree over the same weights.

Every tenant gets a copy of the module tree whose frozen parameters and buffers are the shared
ones, by address, and stock peft on that copy. One peft model with `set_adapter` between tenants
would be smaller and wrong: between a tenant's forward and its backward another tenant's turn
switches gradients off without a warning (design, 2.5).
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from cutlayer.errors import ConfigError, ProtocolError, Refused
from cutlayer.server.caches import KVCaches
from cutlayer.server.gradients import Gradients
from cutlayer.server.kept import Graph, Kept
from cutlayer.server.layers import TrainedLayers
from cutlayer.server.optimizers import Group, make_optimizer
from cutlayer.split.adapters import ADAPTER, TrunkLora, adapter_state, seed_adapter, trunk_config
from cutlayer.split.cut import Anatomy, Cut, Trunk, keep_trunk

if TYPE_CHECKING:
    from cutlayer.server.fused_batch import Share

__all__ = ["SharedTrunk", "TenantTrunk", "picked"]


@dataclass(frozen=True)
class SharedTrunk:
    """The frozen trunk that all tenants share; it compiles their layers if `compiles`."""

    model: PreTrainedModel
    anatomy: Anatomy
    cut: Cut
    compiles: bool = False

    def __post_init__(self) -> None:
        self.model.requires_grad_(False)
        self.model.eval()

    @property
    def device(self) -> torch.device:
        """Where the trunk is."""
        return next(self.model.parameters()).device

    def tenant(
        self, cut: Cut, lora: TrunkLora, *, gradient_checkpointing: bool = False
    ) -> TenantTrunk:
        """Return a module tree of one tenant's own over the shared weights.

        Args:
            cut: The tenant's cut, within this trunk's.
            lora: The tenant's LoRA; without targets the tenant only runs the base model.
            gradient_checkpointing: Keep layer inputs only and compute the rest again.

        Raises:
            ConfigError: If a target is no module of this trunk that can carry a LoRA.
        """
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        model = copy.deepcopy(self.model, memo=shared)  # type: ignore[arg-type]
        # The copy's layers outside the tenant's own cut become pass-throughs; hooks come after.
        keep_trunk(model, self.anatomy, cut)
        return TenantTrunk(
            model, self.anatomy, cut, lora, gradient_checkpointing, compiles=self.compiles
        )


@dataclass
class TenantTrunk:
    """One tenant's trunk: adapter, optimizer, pending graphs and KV caches.

    Attributes:
        parameters: The trainable parameters, by their name in the unsplit PeftModel.
        gradients: Their gradients, and those that wait for their commit.
        caches: Its KV caches.
        ahead: What was computed together with other tenants' for forwards that are done next.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    cut: Cut
    lora: TrunkLora
    gradient_checkpointing: bool = False
    compiles: bool = False
    optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    ahead: dict[int, Share] = field(default_factory=dict)
    _kept: dict[int, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.caches = KVCaches(self.model.config)
        self.peft: PeftModel | None = None
        if self.lora.targets:
            # Peft would ask the model for the embedding that weights are tied to: it is elsewhere.
            self.model._tied_weights_keys = None
            try:
                self.peft = PeftModel(self.model, trunk_config(self.lora), ADAPTER)
            except ValueError as error:
                raise ConfigError(f"the LoRA does not fit this trunk: {error}") from None
            seed_adapter(self.peft, self.lora.seed)
            self.model.eval()  # peft's new modules are born in training mode
        named = self.peft.named_parameters() if self.peft is not None else ()
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.gradients = Gradients(list(self.parameters.values()))
        # The hooks of `Trunk` sit on the layers of this copy, outside what is checkpointed or
        # compiled.
        self._trunk = Trunk(self.model, self.anatomy, self.cut)
        self._layers = TrainedLayers(
            list(self.anatomy.layers(self.model))[self.cut.lower : self.cut.upper],
            checkpoints=self.gradient_checkpointing,
            compiles=self.compiles,
        )

    @property
    def device(self) -> torch.device:
        """Where the trunk is."""
        return next(self.model.parameters()).device

    @property
    def kept(self) -> dict[int, Kept]:
        """The forwards that have a graph."""
        return dict(self._kept)

    @functools.cached_property
    def loras(self) -> list[LoraLayer]:
        """The layers that carry this tenant's LoRA, in the tree's order."""
        modules = self.peft.modules() if self.peft is not None else ()
        return [module for module in modules if isinstance(module, LoraLayer)]

    @functools.cached_property
    def likeness(self) -> str:
        """What two tenants' trunks have in common that differ in nothing but LoRA's numbers."""
        told = repr((self.cut, replace(self.lora, seed=0), self.gradient_checkpointing))
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def num_parameters(self) -> int:
        """How many numbers of this tenant's own are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def pending(self) -> int:
        """How many forwards wait for their backward, and gradients for their commit."""
        return len(self._kept) + self.gradients.holds

    @property
    def is_busy(self) -> bool:
        """Whether there is more to this than adapter and optimizer: it is within a step."""
        return bool(self.pending or self.caches or self.gradients.accumulated)

    # ------------------------------------------------------------------ forward and backward

    def forward(
        self,
        sequence: int,
        smashed_BTD: Tensor,
        carried: dict[str, Tensor],
        *,
        training: bool = False,
        keep_graph: bool = False,
        wants_gradient: bool = False,
        seed: int = 0,
        autocast: torch.dtype | None = None,
        adapter_disabled: bool = False,
        cache: int = 0,
        past_tokens: int = 0,
        cache_rows: Sequence[int] = (),
        wanted_N: Tensor | None = None,
    ) -> Tensor:
        """Return the trunk's output, (B, T, D), or (1, N, D) of the positions that are wanted.

        Args:
            sequence: The request's number, under which a kept graph is found again.
            smashed_BTD: The activations that came up.
            carried: The attention mask and position ids that came with them.
            training: Whether dropout is on.
            keep_graph: Keep the graph for a `backward`.
            wants_gradient: Whether the backward must give the gradient of the activations.
            seed: Seed of the dropout of this very call.
            autocast: The dtype of autocast, if the client runs under it.
            adapter_disabled: Run the base model.
            cache: The number of the KV cache to read and extend, 0 for none.
            past_tokens: How many tokens that cache must hold before this call.
            cache_rows: Which rows of the cache the rows of this call continue, when they moved.
            wanted_N: Positions, row after row, whose output alone is returned.

        Raises:
            Refused: If the cache is not as the client believes it is.
        """
        if sequence in self.ahead:
            self._kept[sequence] = self.ahead.pop(sequence)
            return self._kept[sequence].out_BTD.detach()
        smashed_BTD = smashed_BTD.to(self.device)
        if keep_graph and wants_gradient:
            smashed_BTD.requires_grad_(True)
        # Models in training ask for a cache by default, from which no one goes on. It is made all
        # the same: without one transformers looks for packed texts, and keys lie otherwise in
        # memory. Layers that are computed again do not go on from one.
        is_made = not (keep_graph and past_tokens and self.gradient_checkpointing)
        if keep_graph and not past_tokens and self.compiles and not _may_be_packed(carried):
            is_made = False  # compiled layers are within rounding anyway, and run without
        slot = self.caches.slot(cache, past_tokens, cache_rows) if cache and is_made else None
        with (
            torch.random.fork_rng(enabled=training, devices=_devices(self.device)),
            self._adapter_off() if adapter_disabled else contextlib.nullcontext(),
        ):
            if training:
                torch.manual_seed(seed)
            out_BTD = self.run(
                smashed_BTD,
                carried,
                training=training,
                keep_graph=keep_graph,
                autocast=autocast,
                cache=slot.cache if slot else None,
                wanted_N=wanted_N,
            )
        if slot:
            slot.past_tokens += smashed_BTD.shape[1]
        if keep_graph:
            self._kept[sequence] = Graph(smashed_BTD, out_BTD)
            self.caches.drop(cache)  # no one goes on from a training forward
        return out_BTD.detach()

    def run(
        self,
        smashed_BTD: Tensor,
        carried: Mapping[str, Tensor],
        *,
        training: bool,
        keep_graph: bool = True,
        autocast: torch.dtype | None = None,
        cache: DynamicCache | None = None,
        wanted_N: Tensor | None = None,
        as_it_is: bool = False,
    ) -> Tensor:
        """Return the layers' output with its graph; nothing is kept and nothing is seeded.

        `as_it_is` runs nothing compiled.
        """
        eager = as_it_is or not keep_graph or cache is not None
        device = self.device
        if self.model.training != training:
            self.model.train(training)
        with (
            torch.set_grad_enabled(keep_graph),
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
            contextlib.nullcontext() if eager else self._layers.compiled(),
        ):
            there = {name: tensor.to(device) for name, tensor in carried.items()}
            out_BTD = self._trunk(smashed_BTD, there, cache=cache)
            return out_BTD if wanted_N is None else picked(out_BTD, wanted_N)

    def _adapter_off(self) -> Any:
        return self.peft.disable_adapter() if self.peft is not None else contextlib.nullcontext()

    def backward(self, forward_sequence: int, grad_BTD: Tensor, *, hold: int = 0) -> Tensor | None:
        """Accumulate the adapter's gradients and free the graph.

        Args:
            forward_sequence: The number of the forward.
            grad_BTD: The gradient of its output.
            hold: Not 0: accumulate apart, under this number, until `commit`.

        Returns:
            The gradient of the activations, (B, T, D), if the forward was told to give it.

        Raises:
            ProtocolError: If there is no such graph, or the gradient has another shape or dtype.
        """
        kept = self._kept.get(forward_sequence)
        if kept is None:
            raise ProtocolError(
                f"there is no graph of forward {forward_sequence}: a graph lives for one backward "
                "(retain_graph is not supported through the split)"
            )
        out_BTD = kept.out_BTD
        if grad_BTD.shape != out_BTD.shape or grad_BTD.dtype != out_BTD.dtype:
            raise ProtocolError(
                f"gradient of shape {tuple(grad_BTD.shape)} and {grad_BTD.dtype} came for an "
                f"output of shape {tuple(out_BTD.shape)} and {out_BTD.dtype}"
            )
        return self._kept.pop(forward_sequence).backward(self, grad_BTD, hold)

    def discard(self, forward_sequence: int) -> None:
        """Free the graph of a forward that will have no backward."""
        self._kept.pop(forward_sequence, None)

    def discard_all(self) -> None:
        """Free all graphs; those that wait for this tenant do so no longer."""
        self._kept.clear()

    # ------------------------------------------------------------------ the optimizer

    def optim_step(
        self, step: int, optimizer: str, groups: Sequence[Group], clip_factor: float
    ) -> None:
        """Clip by the factor that the client computed from all norms, step, and zero.

        Raises:
            Refused: If the optimizer or its settings are not those of the table.
        """
        if self.optimizer is None or any(group.names for group in groups):
            self.optimizer = make_optimizer(optimizer, groups, self.parameters)
        for group, given in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(given.numbers)
            if given.betas:
                group["betas"] = given.betas
        if clip_factor != 1.0:
            self.gradients.scale(clip_factor)
        self.optimizer.step()
        self.gradients.zero()
        self.step = step

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state as `parameter|key` to tensor."""
        if self.optimizer is None:
            return {}
        return {
            f"{name}|{key}": torch.as_tensor(value).detach()
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def restore_optimizer(
        self, name: str, groups: Sequence[Group], tensors: Mapping[str, Tensor]
    ) -> None:
        """Make the optimizer anew with the state that `optimizer_tensors` gave.

        Raises:
            Refused: If the optimizer or its settings are not those of the table.
        """
        self.optimizer = make_optimizer(name, groups, self.parameters)
        mine = self.parameters
        for key, tensor in tensors.items():
            parameter, _, slot = key.partition("|")
            self.optimizer.state[mine[parameter]][slot] = tensor.to(mine[parameter].device)

    # ------------------------------------------------------------------ the adapter

    def export_adapter(self) -> dict[str, Tensor]:
        """Return the trunk's half of the adapter under the names of an adapter file."""
        return adapter_state(self.peft) if self.peft is not None else {}

    def import_adapter(self, state: Mapping[str, Tensor]) -> None:
        """Take up the trunk's half of an adapter.

        Raises:
            Refused: If names or shapes are not those of this session's LoRA.
        """
        mine = self.export_adapter()
        wrong = sorted(mine.keys() ^ state.keys()) or [
            name for name, tensor in mine.items() if tensor.shape != state[name].shape
        ]
        if wrong or self.peft is None:
            raise Refused(
                f"the adapter does not fit this session's LoRA (first at '{(wrong or ['-'])[0]}'): "
                "use the LoRA config it was trained with"
            )
        set_peft_model_state_dict(self.peft, dict(state), adapter_name=ADAPTER)


def _may_be_packed(carried: Mapping[str, Tensor]) -> bool:
    """Say whether positions may tell where packed texts begin, which a mask would hide."""
    return "position_ids" in carried and "attention_mask" not in carried


def picked(out_BTD: Tensor, wanted_N: Tensor) -> Tensor:
    """Return the output at some positions, counted row after row, (1, N, D)."""
    return out_BTD.flatten(0, 1)[wanted_N.to(out_BTD.device)][None]


def _devices(device: torch.device) -> list[torch.device]:
    return [] if device.type == "cpu" else [device]
