"""Write examples/data/text_plans: requests to a kitchen robot, the plans that answer them, and a small tokenizer.

    python examples/write_text_plans.py

The plans follow a few rules (closed things are opened first, the hand must be empty before it grasps), so that a tiny
model can learn them and held-out requests show whether it has. This script generates all of the text.
"""

import json
import random
from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).parent / "data" / "text_plans"
COLORS = ("red", "blue", "green", "yellow", "white", "black")
THINGS = ("cup", "plate", "spoon", "bottle", "sponge", "towel", "bowl")
CLOSABLE = ("drawer", "cupboard", "oven", "fridge", "dishwasher")
OPEN = ("table", "shelf", "sink", "tray")
ASKS = ("Put the {thing} {place}.", "Could you put the {thing} {place}?", "The {thing} belongs {place}.")
EXAMPLES = 700
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def plan(thing, source, target, held):
    """The numbered steps that bring `thing` from `source` to `target`; `held` is in the hand at first, or empty."""
    steps = [f"Place the {held} on the table."] if held else []
    if source in CLOSABLE:
        steps.append(f"Open the {source}.")
    steps.append(f"Grasp the {thing}.")
    if source in CLOSABLE and source != target:
        steps.append(f"Close the {source}.")
    if target in CLOSABLE and source != target:
        steps.append(f"Open the {target}.")
    steps.append(f"Place the {thing} {where(target)}.")
    if target in CLOSABLE:
        steps.append(f"Close the {target}.")
    return " ".join(f"{number}. {step}" for number, step in enumerate(steps, start=1))


def where(place):
    """A place with its preposition."""
    return f"{'on' if place in ('table', 'shelf', 'tray') else 'in'} the {place}"


def examples():
    """Yield distinct chats, the same ones at every call."""
    draw = random.Random(0)
    things = [f"{color} {thing}" for color, thing in product(COLORS, THINGS)]
    seen = set()
    while len(seen) < EXAMPLES:
        thing, other = draw.sample(things, 2)
        source, target = draw.sample(CLOSABLE + OPEN, 2)
        held = other if draw.random() < 0.3 else ""
        asked = f"The {thing} is {where(source)}. " + (f"You hold the {other}. " if held else "")
        asked += draw.choice(ASKS).format(thing=thing, place=where(target))
        if asked not in seen:
            seen.add(asked)
            yield [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": plan(thing, source, target, held)},
            ]


def main():
    """Write the chats and a tokenizer trained on them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    chats = list(examples())
    lines = [json.dumps({"messages": chat}, ensure_ascii=False, separators=(",", ":")) for chat in chats]
    (FOLDER / "plans.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((message["content"] for chat in chats for message in chat), trainer)
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    settings["model_max_length"] = 512
    (FOLDER / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
