"""The LM head, run where there is a loss only.

Of a small client's work the head is the most: its vocabulary is wide and the layers are few. But
only positions with a label have a loss. Their hidden states are packed into one row, as long as
there are labels in the batch; head and loss then run on that row, by TRL's head, which never holds
all logits at once. Where the client keeps no layer above the cut, the trunk's output is asked for
at these positions alone, and only their gradients leave.

Equal to the whole head up to rounding: a matrix product of fewer rows may round otherwise.
"""

# Shapes:  B batch   T tokens   D model width   N positions with a label

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from cutlayer.client.chunks import IGNORED_LABEL
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.errors import ConfigError

__all__ = ["LeanHead"]


class LeanHead:
    """Runs a causal LM whose head and loss see the labelled positions only."""

    def __init__(self, ends: PreTrainedModel, remote: RemoteTrunk, *, is_all: bool) -> None:
        """Give the model TRL's head; before peft wraps it.

        Args:
            ends: The client's parts.
            remote: What stands for the trunk, its departures arranged.
            is_all: Whether the client has no layer above the cut.

        Raises:
            ConfigError: If trl is not installed.
        """
        try:
            from trl.trainer.utils import add_fused_lm_head
        except ImportError as error:
            raise ConfigError(
                "lean_head scores the head in TRL's tiles and trl is not installed: "
                "pip install 'cutlayer[train]'"
            ) from error
        add_fused_lm_head(ends)
        self._ends, self._remote = ends, remote
        # A layer above mixes positions; a defense of the gradient hides which of them have a label.
        self._asks_labelled_only = is_all and remote.departures.defense("upper cut") is None

    def wraps(self, kwargs: Mapping[str, Any], *, training: bool) -> bool:
        """Say whether a call's loss is all that is asked of it."""
        labels = kwargs.get("labels", kwargs.get("shift_labels"))
        is_asked = training or bool(kwargs.get("fused_lm_head"))
        return isinstance(labels, Tensor) and is_asked and not kwargs.get("output_hidden_states")

    def run(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward; the output is of the shape that it has without us.

        Where the model makes the loss itself the logits are `None`.
        """
        is_shifted = kwargs.get("shift_labels") is not None
        labels_BT = kwargs.pop("shift_labels", None) if is_shifted else kwargs["labels"]
        if not is_shifted:
            labels_BT = pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL)
        kwargs.pop("shift_labels", None)
        scored_BT = labels_BT != IGNORED_LABEL
        if not scored_BT.any():
            scored_BT[0, 0] = True  # something must be run, and its label says that it is ignored
        # The model shifts labels by one: one to begin with, and one state more than is scored.
        packed_1N = pad(labels_BT[scored_BT], (1, 0), value=IGNORED_LABEL)[None]
        scores_itself = not kwargs.pop("fused_lm_head", False)
        with self._packing(scored_BT):
            output = run(*args, **{**kwargs, "labels": packed_1N, "fused_lm_head": True})
        if scores_itself:
            return CausalLMOutputWithPast(loss=output.loss)
        end = None if is_shifted else -1
        return type(output)(
            **{name: _placed(value, scored_BT)[:, :end] for name, value in _rows(output)},
            **{name: value for name, value in output.items() if value.dim() == 0},
        )

    @contextlib.contextmanager
    def _packing(self, scored_BT: Tensor) -> Iterator[None]:
        def pack(_module: Any, _args: Any, output: Any) -> Any:
            states_BTD = output.last_hidden_state
            states_ND = states_BTD[scored_BT.to(states_BTD.device)]
            output.last_hidden_state = pad(states_ND, (0, 0, 0, 1))[None]
            return output

        hook = self._ends.base_model.register_forward_hook(pack)
        if self._asks_labelled_only:
            self._remote.wanted_N = scored_BT.flatten().nonzero()[:, 0]
        try:
            yield
        finally:
            hook.remove()
            self._remote.wanted_N = None


def _rows(output: ModelOutput) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in output.items() if value.dim() == 2]


def _placed(packed_1N: Tensor, scored_BT: Tensor) -> Tensor:
    """Return the values at their positions, and zero elsewhere."""
    return packed_1N.new_zeros(scored_BT.shape).masked_scatter(scored_BT, packed_1N[0])
