#!/usr/bin/env python3
"""Split training in one process, with nothing hidden: the two exchanges are written out by hand.

One model is cut into a bottom and a top (the client's) and a trunk (the server's). The loop below
trains both parts and compares every loss with that of the unsplit model. There is no network, no
configuration and no LoRA here; `cutlayer.connect` does the same over gRPC with autograd nodes in
place of the lines marked EXCHANGE. Example:

    python recipes/minimal_loop.py                  # a tiny random Llama, made on the spot
    python recipes/minimal_loop.py MODEL_FOLDER     # a real one, e.g. of prepare_smollm2.py
"""

# Shapes:  B batch   T tokens   D model width

from __future__ import annotations

import copy
import sys

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cutlayer.split.cut import Cut, Trunk, anatomy_of, bottom_bypassed, hidden_of
from cutlayer.split.cut import keep_ends, keep_trunk

SENTENCES = ["The diagnosis never leaves this machine as text.", "Its activations do, and tell it."]
STEPS = 10

torch.manual_seed(0)
if len(sys.argv) > 1:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    whole = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    rows = [tokenizer(sentence)["input_ids"] for sentence in SENTENCES]
else:
    whole = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=48,
            intermediate_size=112,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    rows = [list(sentence.encode()) for sentence in SENTENCES]  # a token is a byte
whole.train()

# One batch, padded on the right; no loss on the padding.
width = max(map(len, rows))
tokens_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
labels_BT = tokens_BT.masked_fill(mask_BT == 0, -100)


class Leaving(Exception):
    """Ends the bottom's forward once its activations are there."""


class Seam(nn.Module):
    """Stands in the client's model where the trunk was. It has no parameters."""

    smashed_BTD = trunk_out_BTD = None

    def forward(self, *args, **kwargs):
        if self.trunk_out_BTD is None:
            self.smashed_BTD = hidden_of(args, kwargs)
            raise Leaving
        return anatomy.as_returned(self.trunk_out_BTD)


# The same starting weights three times: unsplit, the client's part, the server's part.
anatomy = anatomy_of(whole)
cut = Cut.leaving(bottom_layers=2, top_layers=2, num_layers=anatomy.num_layers)
client, server, seam = copy.deepcopy(whole), copy.deepcopy(whole), Seam()
keep_ends(client, anatomy, cut, seam)
keep_trunk(server, anatomy, cut)
trunk = Trunk(server, anatomy, cut)
whole_optimizer, client_optimizer, server_optimizer = (
    torch.optim.AdamW(model.parameters(), lr=1e-4) for model in (whole, client, server)
)

for step in range(STEPS):
    # CLIENT. The bottom: embedding and first layers.
    seam.trunk_out_BTD = None
    try:
        client(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False)
    except Leaving:
        smashed_BTD = seam.smashed_BTD

    # EXCHANGE 1, forward: activations up, trunk output down. `detach` is where a network would
    # be: autograd does not cross it, so each side has a graph of its own that begins at a leaf.
    arrived_BTD = smashed_BTD.detach().requires_grad_()
    trunk_out_BTD = trunk(arrived_BTD, {"attention_mask": mask_BT})  # SERVER
    returned_BTD = trunk_out_BTD.detach().requires_grad_()

    # CLIENT. The top: last layers, norm, head and loss. The labels are used here and only here.
    seam.trunk_out_BTD = returned_BTD
    with bottom_bypassed(client, anatomy, cut):
        loss = client(
            input_ids=tokens_BT, attention_mask=mask_BT, labels=labels_BT, use_cache=False
        ).loss
    loss.backward()  # stops at the leaf returned_BTD

    # EXCHANGE 2, backward: the gradient at the upper cut up, that at the lower cut down.
    trunk_out_BTD.backward(returned_BTD.grad)  # SERVER, stops at the leaf arrived_BTD
    smashed_BTD.backward(arrived_BTD.grad)  # CLIENT, the bottom

    for optimizer in (client_optimizer, server_optimizer):
        optimizer.step()
        optimizer.zero_grad()

    # The ordinary loop, for comparison.
    whole_loss = whole(
        input_ids=tokens_BT, attention_mask=mask_BT, labels=labels_BT, use_cache=False
    ).loss
    whole_loss.backward()
    whole_optimizer.step()
    whole_optimizer.zero_grad()

    if step == 0:
        print(f"B, T, D = {tuple(smashed_BTD.shape)}; {4 * smashed_BTD.nbytes:,} bytes a step")
    print(f"step {step}  split {loss.item():.8f}  unsplit {whole_loss.item():.8f}")
    if not torch.equal(loss, whole_loss):
        sys.exit("the losses differ")
print("every loss of the split loop equals that of the unsplit one, bit for bit")
