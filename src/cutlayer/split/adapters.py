"""LoRA on the parts of a model: where it goes, what it starts from, how the halves become one.

Because layers keep their number, an adapter's names are those of the whole model everywhere. The
union of the parts' adapters is the whole model's adapter; nothing is renamed.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForSequenceClassification,
    get_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from cutlayer.errors import ConfigError
from cutlayer.split.cut import Anatomy, Cut
from cutlayer.split.loading import Skeleton

__all__ = [
    "PARTS",
    "AdapterPlan",
    "LoraTarget",
    "TrunkLora",
    "adapter_state",
    "ends_config",
    "plan_adapter",
    "seed_adapter",
    "trunk_config",
    "union",
]

PARTS = ("bottom", "trunk", "top")

ADAPTER = "default"


@dataclass(frozen=True)
class LoraTarget:
    """One linear map of the trunk that gets a LoRA."""

    name: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class TrunkLora:
    """All that a server must know to put a client's LoRA on its trunk: names and numbers."""

    targets: tuple[LoraTarget, ...]
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    gaussian_init: bool = False
    fan_in_fan_out: bool = False
    seed: int = 0


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter for the whole model, and how it falls into parts."""

    config: LoraConfig
    """The config of the unsplit adapter; what `merge` writes."""
    trunk: TrunkLora
    trunk_parameters: dict[str, tuple[int, ...]]
    """Trainable parameters of the trunk by their name in the unsplit PeftModel, in its order."""
    client_parameters: dict[str, tuple[int, ...]]
    """The same for the ends."""
    order: tuple[str, ...] = ()
    """All trainable parameters in the order of the unsplit PeftModel."""


def plan_adapter(
    skeleton: Skeleton,
    config: PeftConfig,
    cut: Cut,
    *,
    train: Iterable[str] = PARTS,
    seed: int = 0,
) -> AdapterPlan:
    """Put the adapter on the whole model without memory, and see where each piece falls.

    So patterns, `all-linear`, rank and alpha patterns mean what they mean to peft on the unsplit
    model, and a target that matches nothing is found before anything is loaded or sent.

    Args:
        skeleton: The whole model on `meta`. It is copied.
        config: The adapter that the user asks for.
        cut: Where the model is cut.
        train: Which parts are trained; the others get no LoRA.
        seed: Seed of the LoRA's start, with each parameter's name.

    Raises:
        ConfigError: If the adapter is not a LoRA that a shared, frozen trunk can carry, or its
            targets match nothing.
    """
    train = tuple(train)
    _refuse_unsupported(config, train)
    assert isinstance(config, LoraConfig)
    config = copy.deepcopy(config)
    # A config that was loaded from an adapter folder asks for frozen LoRAs.
    config.inference_mode = False
    frozen = _layers_of(skeleton.anatomy, cut, set(PARTS) - set(train))
    if frozen:
        config.exclude_modules = _excluding(config.exclude_modules, skeleton.anatomy, frozen)
    model = copy.deepcopy(skeleton.model)
    # Peft's class for classifiers trains the new head too, and writes so into the config.
    is_classifier = skeleton.task == "sequence-classification"
    kind = PeftModelForSequenceClassification if is_classifier else PeftModel
    try:
        whole = kind(model, config, ADAPTER, low_cpu_mem_usage=True)
    # A TypeError if the LoRA hits what is trained whole, as on DistilBERT's `pre_classifier`.
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the LoRA cannot be placed: {str(error).rstrip('.')}") from error
    _refuse_experts(whole.peft_config[ADAPTER])
    of_trunk = _in_trunk(skeleton.anatomy, cut)
    shapes = {n: tuple(p.shape) for n, p in whole.named_parameters() if p.requires_grad}
    modules = {
        name.removeprefix("base_model.model."): module
        for name, module in whole.named_modules()
        if isinstance(module, LoraLayer) and of_trunk(name)
    }
    targets = tuple(
        LoraTarget(name, module.r[ADAPTER], float(module.lora_alpha[ADAPTER]))
        for name, module in modules.items()
    )
    return AdapterPlan(
        config=config,
        trunk=TrunkLora(
            targets,
            dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            gaussian_init=config.init_lora_weights == "gaussian",
            fan_in_fan_out=config.fan_in_fan_out,
            seed=seed,
        ),
        trunk_parameters={n: s for n, s in shapes.items() if of_trunk(n)},
        client_parameters={n: s for n, s in shapes.items() if not of_trunk(n)},
        order=tuple(shapes),
    )


def _refuse_unsupported(config: PeftConfig, train: tuple[str, ...]) -> None:
    unknown = set(train) - set(PARTS)
    if unknown or not train:
        raise ConfigError(f"train={list(train)}: name one or more of {', '.join(PARTS)}")
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(f"adapters of type {kind} cannot be split: use a LoraConfig")
    faults = {
        f"bias='{config.bias}'": config.bias != "none",
        f"init_lora_weights='{config.init_lora_weights}'": config.init_lora_weights
        not in (True, "gaussian"),
        "layer_replication": bool(config.layer_replication),
        "target_parameters": bool(getattr(config, "target_parameters", None)),
    }
    found = [name for name, faulty in faults.items() if faulty]
    if found:
        raise ConfigError(
            f"LoRA with {', '.join(found)} would change or copy the frozen base weights, which "
            "tenants share: use bias='none', init_lora_weights=True or 'gaussian', and modules"
        )


def _refuse_experts(config: PeftConfig) -> None:
    """Refuse targets that peft, on seeing the model, turned into parameters of experts."""
    found = getattr(config, "target_parameters", None)
    if found:
        raise ConfigError(
            f"the LoRA's targets include {', '.join(sorted(found))}, experts' weights that are one "
            "tensor, on which no LoRA can be put here: name the attention's modules as "
            "target_modules, such as q_proj and v_proj"
        )


def _layers_of(anatomy: Anatomy, cut: Cut, parts: set[str]) -> list[int]:
    spans = {
        "bottom": range(cut.lower),
        "trunk": range(cut.lower, cut.upper),
        "top": range(cut.upper, anatomy.num_layers),
    }
    return [layer for part, span in spans.items() if part in parts for layer in span]


def _excluding(given: Any, anatomy: Anatomy, frozen: list[int]) -> str:
    numbers = "|".join(map(str, frozen))
    patterns = [rf".*\b{re.escape(anatomy.layers_path)}\.(?:{numbers})\..*"]
    if isinstance(given, str):
        patterns.append(given)
    elif given:
        patterns.append(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(given)))})")
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def _in_trunk(anatomy: Anatomy, cut: Cut) -> Any:
    pattern = re.compile(rf"(?:^|\.){re.escape(anatomy.layers_path)}\.(\d+)\.")

    def of_trunk(name: str) -> bool:
        found = pattern.search(name)
        return found is not None and int(found.group(1)) in cut

    return of_trunk


def ends_config(plan: AdapterPlan) -> LoraConfig:
    """Return the config for the client's part of the plan."""
    config = copy.deepcopy(plan.config)
    if not any(".lora_" in name for name in plan.client_parameters):
        # peft refuses a config that matches nothing, save for this name of its own.
        config.target_modules = DUMMY_TARGET_MODULES
        config.exclude_modules = None
    return config


def trunk_config(lora: TrunkLora) -> LoraConfig:
    """Return the config for the trunk's part: plain names, every pattern escaped."""
    return LoraConfig(
        target_modules=[target.name for target in lora.targets],
        r=lora.targets[0].rank,
        lora_alpha=lora.targets[0].alpha,  # type: ignore[arg-type]  # peft divides; floats do
        rank_pattern={re.escape(t.name): t.rank for t in lora.targets[1:]},
        alpha_pattern={re.escape(t.name): t.alpha for t in lora.targets[1:]},  # type: ignore[misc]
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        fan_in_fan_out=lora.fan_in_fan_out,
        init_lora_weights="gaussian" if lora.gaussian_init else True,
    )


def seed_adapter(model: nn.Module, seed: int = 0) -> None:
    """Give every LoRA of `model` the start that (seed, its name) determines.

    So a run split anywhere, or not at all, starts from the same numbers; on any device, because
    they are drawn on the CPU. Call it on the unsplit PeftModel to compare with a split run.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        key = f"{seed}/{name.removeprefix('base_model.model.')}"
        for adapter, rank in module.r.items():
            config = getattr(model, "peft_config", {}).get(adapter)
            _seed_layer(module, adapter, rank, key, config)


def _seed_layer(module: LoraLayer, adapter: str, rank: int, key: str, config: Any) -> None:
    digest = hashlib.sha256(key.encode()).digest()
    # Of the CPU, and our own: other threads draw from the global one.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    with torch.no_grad():
        gaussian = getattr(config, "init_lora_weights", True) == "gaussian"
        if adapter in module.lora_A:
            weight = module.lora_A[adapter].weight
            start = torch.empty(weight.shape)
            if gaussian:
                nn.init.normal_(start, std=1 / rank, generator=generator)
            else:
                nn.init.kaiming_uniform_(start, a=5**0.5, generator=generator)
            weight.copy_(start)
            module.lora_B[adapter].weight.zero_()
        if adapter in module.lora_embedding_A:
            module.lora_embedding_A[adapter].zero_()
            module.lora_embedding_B[adapter].copy_(
                torch.randn(module.lora_embedding_B[adapter].shape, generator=generator)
            )


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Return the adapter's tensors under the names of an adapter file."""
    state: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=ADAPTER, save_embedding_layers=False
    )
    return state


def union(*parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapter of the whole model from the disjoint adapters of its parts."""
    whole: dict[str, Tensor] = {}
    for part in parts:
        assert not whole.keys() & part.keys()
        whole.update(part)
    return whole
