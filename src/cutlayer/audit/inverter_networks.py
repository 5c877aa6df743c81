"""The two networks of the learned inversion (A2): a GRU, and a noise-aware mixture of GRUs.

References:
    Chen et al., CCS 2024, https://arxiv.org/abs/2409.00960
"""

# Shapes:  B batch   T tokens   D width of what is sent   K tokens that are known
#          V vocabulary   H width of the GRUs   E experts   M embedding's width   N rows

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

__all__ = ["EmbeddingHead", "GruInverter", "Head", "LinearHead", "MixtureInverter"]

_GATE_HEADS = 4


class _Standardise(nn.Module):
    """Bring each coordinate to mean 0 and deviation 1; before `fit`, leave it as it is."""

    mean_D: Tensor
    deviation_D: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("deviation_D", torch.ones(width))

    def fit(self, rows_ND: Tensor) -> None:
        """Measure mean and deviation on these rows."""
        self.mean_D.copy_(rows_ND.mean(0))
        self.deviation_D.copy_(rows_ND.std(0).clamp_min(1e-6))

    def forward(self, smashed_BTD: Tensor) -> Tensor:
        return (smashed_BTD - self.mean_D) / self.deviation_D


class LinearHead(nn.Module):
    """As published: a linear layer over the tokens of the public text.

    Args:
        width: Of the states that it reads.
        tokens_K: The tokens that it can answer with.
    """

    tokens_K: Tensor

    def __init__(self, width: int, tokens_K: Tensor) -> None:
        super().__init__()
        self.register_buffer("tokens_K", tokens_K)
        self.linear = nn.Linear(width, len(tokens_K))

    def forward(self, states_BTH: Tensor, scaled_BTD: Tensor) -> Tensor:
        """Return the logits, (B, T, K)."""
        del scaled_BTD
        logits_BTK: Tensor = self.linear(states_BTH)
        return logits_BTK

    def open(self, _wide: bool) -> None:
        """Do nothing: a token that was not learned has no weights."""


class EmbeddingHead(nn.Module):
    """Say what embedding a token must have had, and compare with the public table.

    What an activation keeps of its token is much the same for all tokens, so tokens that no public
    text had are read as well. Learned on the tokens that are there, it answers with any.

    Args:
        width: Of the states that it reads.
        sent: Width of what is sent, which it reads as well.
        tokens_K: The tokens of the public text.
        table_VM: The public embedding.
    """

    table_VM: Tensor

    def __init__(self, width: int, sent: int, tokens_K: Tensor, table_VM: Tensor) -> None:
        super().__init__()
        centred_VM = table_VM.float() - table_VM.float().mean(0)
        self.register_buffer("table_VM", normalize(centred_VM, dim=-1), persistent=False)
        self.query = nn.Linear(width + sent, table_VM.shape[-1])
        self.sharpness = nn.Parameter(torch.ones(()))
        self._seen_K = tokens_K
        self.open(False)

    def open(self, wide: bool) -> None:
        """Answer from now on with every token, or with those of the public text only."""
        every_V = torch.arange(len(self.table_VM), device=self.table_VM.device)
        self.tokens_K = every_V if wide else self._seen_K
        self._rows_KM = self.table_VM if wide else self.table_VM[self._seen_K]

    def forward(self, states_BTH: Tensor, scaled_BTD: Tensor) -> Tensor:
        """Return the logits, (B, T, K)."""
        query_BTM = self.query(torch.cat([states_BTH, scaled_BTD], -1)) * self.sharpness.exp()
        logits_BTK: Tensor = query_BTM @ self._rows_KM.T
        return logits_BTK


Head = LinearHead | EmbeddingHead


class GruInverter(nn.Module):
    """One GRU and a head.

    Args:
        sent: Width of what is sent.
        head: Reads the GRU's states.
        width: Of the GRU.
        dropout: Between the GRU and the head.
    """

    def __init__(self, sent: int, head: Head, *, width: int, dropout: float) -> None:
        super().__init__()
        self.scale = _Standardise(sent)
        self.gru = nn.GRU(sent, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.head = head

    def forward(self, smashed_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the logits, (B, T, K)."""
        del mask_BT  # padding at the right does not reach back
        scaled_BTD = self.scale(smashed_BTD)
        states_BTH, _ = self.gru(scaled_BTD)
        logits_BTK: Tensor = self.head(self.dropout(states_BTH), scaled_BTD)
        return logits_BTK


class MixtureInverter(nn.Module):
    """GRUs that each learned another strength of noise, weighed for each text by a gate.

    The gate attends over the positions of one text. In the published code it attends over the
    texts of a batch, so that an answer depends on what else happens to be asked.

    Args:
        sent: Width of what is sent.
        head: Reads the GRUs' states, mixed.
        experts: How many GRUs.
        width: Of each.
        dropout: Behind each, and in the gate.
    """

    def __init__(self, sent: int, head: Head, experts: int, *, width: int, dropout: float) -> None:
        super().__init__()
        self.scale = _Standardise(sent)
        self.experts = nn.ModuleList(nn.GRU(sent, width, batch_first=True) for _ in range(experts))
        self.dropout = nn.Dropout(dropout)
        self.head = head
        self.gate_in = nn.Linear(sent, width)
        self.gate_attention = nn.MultiheadAttention(
            width, _GATE_HEADS, dropout=dropout, batch_first=True
        )
        self.gate_out = nn.Linear(width, experts)

    def gate_parameters(self) -> list[nn.Parameter]:
        """Return those that decide how much each expert counts."""
        parts = (self.gate_in, self.gate_attention, self.gate_out)
        return [parameter for part in parts for parameter in part.parameters()]

    def expert_parameters(self) -> list[nn.Parameter]:
        """Return the others."""
        return [*self.experts.parameters(), *self.head.parameters()]

    def of_expert(self, expert: int, smashed_BTD: Tensor) -> Tensor:
        """Return the logits of one expert alone, (B, T, K)."""
        scaled_BTD = self.scale(smashed_BTD)
        states_BTH, _ = self.experts[expert](scaled_BTD)
        logits_BTK: Tensor = self.head(self.dropout(states_BTH), scaled_BTD)
        return logits_BTK

    def weights(self, smashed_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return how much each expert counts for each text, (B, E); each row sums to 1."""
        asked_BTH = self.gate_in(self.scale(smashed_BTD))
        mixed_BTH, _ = self.gate_attention(
            asked_BTH, asked_BTH, asked_BTH, key_padding_mask=~mask_BT, need_weights=False
        )
        counted_BT1 = mask_BT.unsqueeze(-1)
        mean_BE: Tensor = (self.gate_out(mixed_BTH) * counted_BT1).sum(1) / counted_BT1.sum(1)
        return mean_BE.softmax(-1)

    def forward(self, smashed_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the logits, (B, T, K)."""
        scaled_BTD = self.scale(smashed_BTD)
        states_EBTH = torch.stack([self.dropout(gru(scaled_BTD)[0]) for gru in self.experts])
        weights_BE = self.weights(smashed_BTD, mask_BT)
        mixed_BTH = torch.einsum("ebth,be->bth", states_EBTH, weights_BE)
        logits_BTK: Tensor = self.head(mixed_BTH, scaled_BTD)
        return logits_BTK
