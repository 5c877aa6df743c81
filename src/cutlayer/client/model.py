"""What a connected model has besides being a PeftModel."""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    set_peft_model_state_dict,
)
from torch import Tensor
from transformers import PreTrainedModel

from cutlayer.client.ahead import Ahead
from cutlayer.client.by_rows import ByRows
from cutlayer.client.checkpoint import PARTIAL_NOTE, read_adapter, write_adapter
from cutlayer.client.chunks import joined, rows_in, rows_of, spans, weight_of
from cutlayer.client.connection import Connection
from cutlayer.client.handshake import check_adapter
from cutlayer.client.head import LeanHead
from cutlayer.client.pipeline import Objective, run_by_arrival
from cutlayer.client.remote_trunk import RemoteTrunk, chunks_sent
from cutlayer.client.tuning import Laps, Tuning
from cutlayer.errors import ConfigError, Refused
from cutlayer.split.adapters import (
    ADAPTER,
    AdapterPlan,
    adapter_state,
    union,
)
from cutlayer.split.cut import Anatomy, Cut, bottom_bypassed
from cutlayer.wire import cutlayer_pb2 as pb

__all__ = [
    "SplitModel",
    "SplitModelForCausalLM",
    "SplitModelForSequenceClassification",
]


class SplitModel:
    """What a connected model has besides being a PeftModel: its trunk, and how to save it whole.

    Attributes:
        connection: The session with the server.
        remote_trunk: The module that stands for the trunk.
        plan: The whole model's adapter and how it falls into parts.
        chunks: Into how many micro-chunks a training batch is cut.
        objective: What a trainer makes of TRL's head, if `attach` knows it.
        lean_head: Runs the head at labelled positions only, if that was asked for.
        ahead: Bottoms that were run before their batch came.
        coming: The arguments of the next training forward, where they are known.
        tuning: Finds `chunks` in the first steps, if that was asked for.
        laps: The seconds of the last batch that was done by arrival.
        by_rows: Runs the bottom for rows that never left before, if rows are sent once.
        resumes_from: The checkpoint from which a trainer goes on.
    """

    connection: Connection
    remote_trunk: RemoteTrunk
    plan: AdapterPlan
    anatomy: Anatomy
    cut: Cut
    chunks: int = 1
    objective: Objective | None = None
    keeps_adapter: bool = False
    lean_head: LeanHead | None = None
    ahead: Ahead
    coming: Mapping[str, Any] | None = None
    tuning: Tuning | None = None
    laps: Laps | None = None
    by_rows: ByRows | None = None
    resumes_from: Path | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; a training batch goes in micro-chunks if `chunks` is more than one.

        The trunk works on one chunk while we work on another. The loss is that of the whole batch,
        each token weighing the same. If the model is given labels, each chunk's backward is done
        as soon as its loss is there (`pipeline.run_by_arrival`); else at `loss.backward()`.
        """
        rows = rows_in(kwargs)
        run = super().forward  # type: ignore[misc]
        if self.by_rows is not None:
            run = functools.partial(self.by_rows.run, run)
        training: bool = self.training  # type: ignore[attr-defined]
        by_trl = self.objective is not None
        if self.lean_head and self.lean_head.scores(kwargs, training=training, by_trl=by_trl):
            run = functools.partial(self.lean_head.run, run)
        if self.tuning and self.training and torch.is_grad_enabled() and rows > 1:  # type: ignore[attr-defined]
            self.chunks = self.tuning.chunks_for(rows, self.laps)
        whole = self.chunks == 1 or args or rows < 2 or kwargs.get("past_key_values") is not None
        # Outputs are joined by their names, which a tuple has not.
        whole = whole or kwargs.get("return_dict") is False
        if whole or not torch.is_grad_enabled():
            return run(*args, **kwargs)
        parts = [rows_of(kwargs, rows, span) for span in spans(rows, self.chunks)]
        top_only = functools.partial(bottom_bypassed, self.hf_model, self.anatomy, self.cut)
        objective = self._objective(kwargs)
        trained = [p for p in self.parameters() if p.requires_grad]  # type: ignore[attr-defined]
        if objective and (trained or self.remote_trunk.trains):
            self.ahead.begin(self._parts_of_coming(kwargs))
            self.laps = Laps()
            return run_by_arrival(
                run,
                parts,
                self.remote_trunk,
                trained,
                objective=objective,
                top_only=top_only,
                ahead=self.ahead,
                laps=self.laps,
            )
        on_their_way = chunks_sent(
            self.remote_trunk, [functools.partial(run, **part) for part in parts]
        )
        outputs = []
        for part, sent in zip(parts, on_their_way, strict=True):
            with self.remote_trunk.receiving(sent), top_only():
                outputs.append(run(**part))
        loss_is_mean = kwargs.get("num_items_in_batch") is None
        return joined(outputs, [weight_of(part) for part in parts], loss_is_mean=loss_is_mean)

    def comes(self, batch: Mapping[str, Any]) -> None:
        """Say before a training forward what the one after it will be called with.

        The bottom of that batch is then run while this one's last gradients are waited for, where
        that is exact. `attach` does so for a trainer. Another batch may come after all.
        """
        self.coming = batch

    def _parts_of_coming(self, kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the chunks of the batch after this one; none if it is not known."""
        coming, self.coming = self.coming, None
        rows = rows_in(coming or {})
        by_row = {n for n, v in kwargs.items() if isinstance(v, Tensor) and v.dim()}
        if not coming or rows < 2 or not by_row <= coming.keys():
            return []
        told = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
        whole = told | {name: coming[name] for name in by_row}
        return [rows_of(whole, rows, span) for span in spans(rows, self.chunks)]

    def send_ahead(self, batches: Iterable[Mapping[str, Any]]) -> int:
        """Send the rows of batches before they are trained on; return how many had to go.

        Args:
            batches: Arguments of the model as a trainer will give them, padding included.

        Raises:
            ConfigError: If the model was connected without `send_once`.
        """
        if self.by_rows is None:
            raise ConfigError("rows are sent ahead with connect(send_once=True) only")
        return self.by_rows.send_ahead(super().forward, batches)  # type: ignore[misc]

    def _objective(self, kwargs: dict[str, Any]) -> Objective | None:
        """Return what the loss of this call will be made of, `None` if that is not known."""
        labels = kwargs.get("labels", kwargs.get("shift_labels"))
        if labels is None or not self.training or not weight_of(kwargs):  # type: ignore[attr-defined]
            return None
        # TRL's head gives log-probabilities, of which its trainer makes the loss.
        return self.objective if kwargs.get("fused_lm_head") else Objective()

    @property
    def hf_model(self) -> PreTrainedModel:
        """The Hugging Face model inside."""
        model: PreTrainedModel = self.get_base_model()  # type: ignore[attr-defined]
        return model

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base model while open, on both sides."""
        was, self.remote_trunk.adapter_disabled = self.remote_trunk.adapter_disabled, True
        try:
            with super().disable_adapter():  # type: ignore[misc]
                yield
        finally:
            self.remote_trunk.adapter_disabled = was

    def whole_adapter(self) -> dict[str, Tensor]:
        """Return the whole model's adapter: our half, and the trunk's from the server.

        Raises:
            Refused: If the server keeps its half.
        """
        head = pb.Head(export_adapter=pb.ExportAdapter())
        trunk = self.connection.request(head).wait() if self.plan.trunk.targets else {}
        check_adapter(trunk, self.plan)
        return union(self.own_adapter(), trunk)

    def own_adapter(self) -> dict[str, Tensor]:
        """Return the client's half of the adapter."""
        return adapter_state(self) if self.plan.client_parameters else {}  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | Path, **_kwargs: Any) -> None:
        """Write the whole adapter as one ordinary PEFT folder, or nothing.

        If the server keeps the trunk's half, ours alone is written, with a note that says so.

        Raises:
            StorageError: If the disk says no; what stood there before is untouched.
        """
        state = self.own_adapter() if self.keeps_adapter else self.whole_adapter()
        write_adapter(Path(save_directory), state, self.plan.config, partial=self.keeps_adapter)

    def load_adapter(self, model_id: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Take up an adapter on both sides, or let peft load one of another name on ours."""
        _refuse_another(args[0] if args else kwargs.get("adapter_name", ADAPTER))
        self.take_up(Path(model_id))

    def add_adapter(self, adapter_name: str, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse a second adapter: the trunk would run the first one with it."""
        _refuse_another(adapter_name)
        raise ConfigError(f"the adapter '{ADAPTER}' is there already: connect() has put it on")

    def set_adapter(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Activate the one adapter that there is."""
        _refuse_another(adapter_name)
        return super().set_adapter(adapter_name, *args, **kwargs)  # type: ignore[misc]

    def merge_and_unload(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse a merge, which would be of the client's half alone."""
        raise ConfigError(
            "the trunk's weights are elsewhere, so the adapter cannot be merged here: save it "
            "(save_pretrained) and merge it into the whole model, loaded with peft"
        )

    def take_up(self, folder: Path) -> None:
        """Load an adapter folder into both halves.

        Raises:
            ModelError: If the folder is no adapter.
            Refused: If it does not fit the LoRA of this session.
        """
        state = read_adapter(folder)
        mine = self.own_adapter()
        if mine.keys() - state.keys():
            raise Refused(f"adapter '{folder}' lacks {sorted(mine.keys() - state.keys())[0]}")
        trunk = {name: tensor for name, tensor in state.items() if name not in mine}
        if self.plan.trunk.targets and not trunk and not (folder / PARTIAL_NOTE).exists():
            raise Refused(
                f"adapter '{folder}' has nothing for the trunk, which has a LoRA in this session: "
                "leave trunk out of split_train, or name another adapter"
            )
        set_peft_model_state_dict(self, {name: state[name] for name in mine}, adapter_name=ADAPTER)
        if trunk:
            self.connection.request(pb.Head(import_adapter=pb.ImportAdapter()), trunk).wait()

    def close(self, *, keep_rows: bool = False) -> None:
        """Give the session back, and let another process have the ledger.

        Args:
            keep_rows: Keep what was sent once, here and at the server: the run will be resumed.
        """
        self.connection.close(keep_rows=keep_rows)
        if self.by_rows is not None and not keep_rows:
            self.by_rows.once.forget()
        ledger = self.remote_trunk.departures.ledger
        if ledger is not None:
            ledger.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: object, *_exc: object) -> None:
        self.close(keep_rows=kind is not None)


def _refuse_another(adapter: str) -> None:
    if adapter != ADAPTER:
        raise ConfigError(
            f"a split model has one adapter, '{ADAPTER}', and '{adapter}' was asked for: where a "
            "trainer makes its reference so, give it a ref_model (DPO, KTO) or beta=0.0 (GRPO)"
        )


class SplitModelForCausalLM(SplitModel, PeftModelForCausalLM):
    """A causal language model whose trunk is elsewhere."""


class SplitModelForSequenceClassification(SplitModel, PeftModelForSequenceClassification):
    """A sequence classifier whose trunk is elsewhere."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; a classifier's loss is the mean over its rows."""
        # Trainers tell it to every model, and no classifier of transformers makes a sum of it: a
        # chunk's loss must not be taken for a share of one.
        kwargs.pop("num_items_in_batch", None)
        return super().forward(*args, **kwargs)
