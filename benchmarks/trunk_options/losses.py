"""Say the loss of the base model over a trunk as it is stored in each way, a forward each."""

# Shapes:  K batches   B batch   T tokens

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cutlayer.split.cut import Cut, anatomy_of
from cutlayer.split.quantized import quantize_trunk


def main() -> None:
    """Print one line of JSON."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    tokens_BT = load_file(spec["tokens"])["tokens"][0]
    losses = {}
    for kind in spec["kinds"]:
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
        anatomy = anatomy_of(model)
        cut = Cut.leaving(**spec["cut"], num_layers=anatomy.num_layers)
        quantize_trunk(model, anatomy, cut, kind)
        with torch.no_grad():
            loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        losses[kind] = float(loss)
    print(json.dumps(losses), flush=True)


if __name__ == "__main__":
    main()
