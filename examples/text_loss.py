"""The loss of a model on chats, computed with transformers alone; for a folder of `rlinf export` or any other.

    python examples/text_loss.py FOLDER CHATS.jsonl

The mean is over the assistant's tokens, which the chat template must mark by {% generation %}.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def loss_of(folder, chats):
    """Mean loss per assistant token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for line in Path(chats).read_text(encoding="utf-8").splitlines():
        chat = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        tokens, trained = chat["input_ids"], chat["assistant_masks"].bool()
        with torch.no_grad():
            loss = model(tokens, labels=tokens.masked_fill(~trained, -100)).loss
        total, count = total + float(loss) * int(trained.sum()), count + int(trained.sum())
    return total / count


if __name__ == "__main__":
    print(f"{loss_of(*sys.argv[1:]):.6f}")
