"""A split run in one process: both sides are the product's own, only the wire is left out.

What leaves passes the same `Departures` as in a run over gRPC, so a defense does here what it does
there. Many runs share the loaded trunk, as tenants of a server do.
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from cutlayer.client.departures import Departures
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.privacy.mechanisms import Defense
from cutlayer.server.trunk import SharedTrunk, TenantTrunk
from cutlayer.split.adapters import ADAPTER, ends_config, plan_adapter, seed_adapter
from cutlayer.split.cut import Cut
from cutlayer.split.entry import watch_entry
from cutlayer.split.loading import load_ends, load_trunk, open_checkpoint, skeleton_of
from tests.loopback import Loopback

__all__ = ["Run", "Site"]


@dataclass
class Run:
    """One run: a client's model, a tenant's trunk, and what stands between them."""

    client: PeftModel
    tenant: TenantTrunk
    remote: RemoteTrunk
    _hook: Any = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return what both sides train."""
        ours = [p for p in self.client.parameters() if p.requires_grad]
        return [*ours, *self.tenant.parameters.values()]

    def defend(self, defenses: Sequence[Defense], ledger: Any = None) -> None:
        """Put these in the place of what defends now, as `cutlayer.connect` does."""
        self.remote.departures = Departures(defenses, ledger)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        for defense in defenses:
            if defense.site == "embedding":
                embedding = self.client.get_base_model().get_input_embeddings()
                self._hook = embedding.register_forward_hook(
                    lambda _module, _args, output, _apply=defense.apply: _apply(output)
                )

    def last_logits(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Return the logits at the last position, (B, V)."""
        given = {"attention_mask": mask_BT, "position_ids": positions_BT, "use_cache": False}
        out = self.client(input_ids=ids_BT, logits_to_keep=1, **given)
        logits_BV: Tensor = out.logits[:, -1]
        return logits_BV


class Site:
    """A model cut in two, of which runs are made; the trunk's weights are loaded once."""

    def __init__(self, model: str | Path, *, bottom_layers: int, top_layers: int) -> None:
        self._checkpoint = open_checkpoint(str(model))
        self._skeleton = skeleton_of(self._checkpoint.config, "causal-lm")
        self.anatomy = self._skeleton.anatomy
        self.cut = Cut.leaving(
            bottom_layers=bottom_layers,
            top_layers=top_layers,
            num_layers=self.anatomy.num_layers,
        )
        served = load_trunk(self._checkpoint, self._skeleton, self.cut, dtype=torch.float32)
        self.shared = SharedTrunk(served, self.anatomy, self.cut)

    def run(
        self,
        *,
        train: Iterable[str] = ("trunk", "top"),
        defenses: Sequence[Defense] = (),
        rank: int = 8,
        seed: int = 0,
    ) -> Run:
        """Return a run with an untrained adapter on these parts."""
        remote = RemoteTrunk(self.anatomy, self.cut.lower, seed=seed)
        ends = load_ends(self._checkpoint, self._skeleton, self.cut, remote, dtype=torch.float32)
        lora = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        plan = plan_adapter(self._skeleton, lora, self.cut, train=tuple(train), seed=seed)
        tenant = self.shared.tenant(self.cut, plan.trunk)
        remote.link = Loopback(tenant)
        remote.entry = watch_entry(ends, self.anatomy)
        remote.trains = bool(plan.trunk.targets)
        ends.requires_grad_(False)
        client = PeftModel(ends, ends_config(plan), ADAPTER)
        seed_adapter(client, seed)
        run = Run(client, tenant, remote)
        run.defend(defenses)
        return run
