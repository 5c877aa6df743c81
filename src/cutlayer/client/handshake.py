"""What a client tells the server before anything is trained, and what it checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor

from cutlayer.client.connection import Connection
from cutlayer.errors import Refused
from cutlayer.split.adapters import AdapterPlan
from cutlayer.split.cut import Cut
from cutlayer.split.loading import Checkpoint, Skeleton, config_digest, layer_digests
from cutlayer.wire import cutlayer_pb2 as pb
from cutlayer.wire.agreement import PROTOCOL
from cutlayer.wire.tensors import refuse_not_finite

__all__ = ["agreement_of", "check_adapter", "check_parameters", "spec_of"]


def agreement_of(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    cut: Cut,
    *,
    task: str,
    dtype: str,
    quantization: str,
    ends: Any,
) -> pb.Agreement:
    """Return what we hold, for the server to compare with what it holds."""
    return pb.Agreement(
        protocol=PROTOCOL,
        transformers_major=transformers.__version__.partition(".")[0],
        task=task,
        model_type=checkpoint.config.model_type,
        revision=checkpoint.revision,
        config_digest=config_digest(checkpoint.config),
        layer_digests=layer_digests(checkpoint, skeleton.anatomy, cut, trunk=False),
        num_layers=skeleton.anatomy.num_layers,
        lower=cut.lower,
        upper=cut.upper,
        dtype=dtype,
        attn_implementation=ends.config._attn_implementation or "",
        quantization=quantization,
    )


def spec_of(plan: AdapterPlan) -> pb.LoraSpec:
    """Return the trunk's LoRA for the server to make."""
    lora = plan.trunk
    return pb.LoraSpec(
        modules=[pb.LoraModule(name=t.name, rank=t.rank, alpha=t.alpha) for t in lora.targets],
        dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        gaussian_init=lora.gaussian_init,
        fan_in_fan_out=lora.fan_in_fan_out,
        seed=lora.seed,
    )


def check_parameters(plan: AdapterPlan, connection: Connection) -> None:
    """Compare the trunk's adapter as the server made it with the planned one.

    Raises:
        Refused: If they differ.
    """
    if connection.parameters != plan.trunk_parameters:
        odd = sorted(connection.parameters.items() ^ plan.trunk_parameters.items())
        raise Refused(
            f"the trunk's adapter differs from the planned one (first at {odd[0][0]}): install the "
            "same version of peft on both sides"
        )


def check_adapter(trunk: Mapping[str, Tensor], plan: AdapterPlan) -> None:
    """Check what a server exported before it is joined to our half and saved.

    Raises:
        Refused: If it is not the planned adapter of the trunk, or not finite.
    """
    planned = sorted(tuple(shape) for shape in plan.trunk_parameters.values())
    layers = {name.rpartition(".lora_")[0] for name in trunk}
    targets = {f"base_model.model.{target.name}" for target in plan.trunk.targets}
    if sorted(tuple(t.shape) for t in trunk.values()) != planned or layers != targets:
        raise Refused(
            f"the server sent {len(trunk)} tensors that are not the trunk's adapter as planned: "
            "nothing was saved; update both sides to the same version"
        )
    for name, tensor in trunk.items():
        refuse_not_finite(tensor, f"adapter tensor '{name}' from the server", "nothing was saved")
