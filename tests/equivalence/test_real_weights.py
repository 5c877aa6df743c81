"""The demo's own model: real weights, real text, over TLS."""

# Shapes:  B batch   T tokens

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from tests.site import Loop, adapter_of, equal, lora, site_of

DATA = Path(__file__).parents[2] / ".data"  # made by `make test`
STEPS, ROWS = 10, 2


def batches() -> list[dict]:
    """Return the first training samples of the demo, padded at the right."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "smollm2")
    lines = (DATA / "icd10/train.jsonl").read_text().splitlines()[: STEPS * ROWS]
    chats = [row["prompt"] + row["completion"] for row in map(json.loads, lines)]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    tokenizer.pad_token = tokenizer.eos_token
    made = []
    for start in range(0, len(texts), ROWS):
        batch = dict(tokenizer(texts[start : start + ROWS], return_tensors="pt", padding=True))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        made.append(batch)
    return made


def test_ten_steps_on_real_weights_are_those_of_the_unsplit_model(certs: Path, tmp_path: Path):
    """SmolLM2 split 2 + 26 + 2 sees the same losses, logits, norms and adapter, bit for bit."""
    site = site_of(DATA / "smollm2", certs, tmp_path, bottom_layers=2, top_layers=2)
    config = lora(r=4, target_modules=["q_proj", "v_proj"])

    whole = Loop.over(site.unsplit(config, dtype="float32"), lr=1e-3)
    expected = [whole.step(batch) for batch in batches()]
    with site.connect(peft_config=config, top_layers=2) as model:
        split = Loop.over(model, lr=1e-3)
        found = [split.step(batch) for batch in batches()]
        adapter = adapter_of(model)
    site.server.stop(0)

    assert equal(expected, found)
    assert equal(adapter_of(whole.model), adapter)
