#!/usr/bin/env python3
"""Split training in one process, with nothing hidden: the two exchanges are written out by hand.

One model is cut into a bottom and a top (the client's) and a trunk (the server's). The loop trains
both parts and compares every loss with that of the unsplit model. There is no network, no
configuration and no LoRA; `cutlayer.connect` does the same over gRPC, with two autograd nodes in
place of the lines marked EXCHANGE. Example:

    python recipes/minimal_loop.py                  # a tiny random Llama, made on the spot
    python recipes/minimal_loop.py .data/smollm2    # a real one: prepare_smollm2.py made it
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import copy
import sys

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cutlayer.split import cut

SENTENCES = ["The diagnosis stays here as text.", "Its activations leave, and they tell it."]
TINY = LlamaConfig(  # a token is a byte
    vocab_size=256, hidden_size=48, intermediate_size=112, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


class Leaving(Exception):
    """Ends the bottom's forward once its activations are there."""


class Seam(nn.Module):
    """Stands in the client's model where the trunk was; it has no parameters."""

    def __init__(self, anatomy: cut.Anatomy) -> None:
        super().__init__()
        self.anatomy, self.smashed_BTD, self.returned_BTD = anatomy, None, None

    def forward(self, *args, **kwargs):
        """Keep what the bottom made and stop, or go on with what the trunk returned."""
        if self.returned_BTD is None:
            self.smashed_BTD = cut.hidden_of(args, kwargs)
            raise Leaving
        return self.anatomy.as_returned(self.returned_BTD)


def main() -> None:
    """Train split and unsplit side by side, and say whether their losses are equal."""
    torch.manual_seed(0)
    if len(sys.argv) > 1:
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        whole = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
        rows = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
    else:
        whole, rows = LlamaForCausalLM(TINY), [list(text.encode()) for text in SENTENCES]
    whole.train()

    # One batch, padded on the right, with no loss on the padding.
    width = max(map(len, rows))
    tokens_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels_BT = tokens_BT.masked_fill(mask_BT == 0, -100)
    inputs = {"input_ids": tokens_BT, "attention_mask": mask_BT, "use_cache": False}

    # The same starting weights three times: unsplit, the client's part, the server's part.
    anatomy = cut.anatomy_of(whole)
    where = cut.Cut.leaving(bottom_layers=2, top_layers=2, num_layers=anatomy.num_layers)
    client, server, seam = copy.deepcopy(whole), copy.deepcopy(whole), Seam(anatomy)
    cut.keep_ends(client, anatomy, where, seam)
    cut.keep_trunk(server, anatomy, where)
    trunk = cut.Trunk(server, anatomy, where)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4) for m in (client, server, whole)]

    for step in range(5):
        # CLIENT. The bottom: embedding and first layers.
        seam.returned_BTD = None
        try:
            client(**inputs)
        except Leaving:
            smashed_BTD = seam.smashed_BTD

        # EXCHANGE 1, forward: activations up, trunk output down. `detach` is where the network
        # would be: autograd does not cross it, so each side's graph begins at a leaf of its own.
        arrived_BTD = smashed_BTD.detach().requires_grad_()
        trunk_out_BTD = trunk(arrived_BTD, {"attention_mask": mask_BT})  # SERVER
        returned_BTD = trunk_out_BTD.detach().requires_grad_()

        # CLIENT. The top: last layers, norm, head and loss. Labels are used here and only here.
        seam.returned_BTD = returned_BTD
        with cut.bottom_bypassed(client, anatomy, where):
            loss = client(**inputs, labels=labels_BT).loss
        loss.backward()  # stops at the leaf returned_BTD

        # EXCHANGE 2, backward: gradient at the upper cut up, gradient at the lower cut down.
        trunk_out_BTD.backward(returned_BTD.grad)  # SERVER, stops at the leaf arrived_BTD
        smashed_BTD.backward(arrived_BTD.grad)  # CLIENT, the bottom

        # The ordinary loop on the unsplit model, for comparison.
        whole_loss = whole(**inputs, labels=labels_BT).loss
        whole_loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        if step == 0:
            print(f"B, T, D = {tuple(smashed_BTD.shape)}: 4 x {smashed_BTD.nbytes:,} bytes a step")
        print(f"step {step}  split {loss.item():.8f}  unsplit {whole_loss.item():.8f}")
        if not torch.equal(loss, whole_loss):
            sys.exit("the losses differ")
    print("every loss of the split loop equals that of the unsplit one, bit for bit")


if __name__ == "__main__":
    main()
