"""Make the small built-in tokenizer: 512 entries, for models trained from scratch.

    python make_small_tokenizer.py src/rlinf_plugins_openpi/assets/small_tokenizer.model

It follows Gemma's conventions, so that the prompt formats are the same: <pad> 0, </s> 1, <s> 2, <unk> 3, byte fallback,
one token per digit, the newline as a token of its own, no normalisation. The corpus is the sentences generated below;
the result is deterministic (sentencepiece 0.2).
"""

import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

VOCAB_SIZE = 512

COLOURS = "red green blue yellow black white small large"
OBJECTS = """
    block bowl bottle box bread button can cube cup door drawer handle hammer lever lid mug nut object peg plate puck
    ball soup spoon stick sauce towel tray
"""
PLACES = [
    *("on the table", "in the basket", "into the bin", "on the left", "on the right", "to the goal", "on the shelf"),
    *("in the hole", "from the top", "from the side", "between the plates", "behind the wall", "under the cabinet"),
]
VERBS = [
    *("pick up", "put", "place", "push", "pull", "press", "slide", "stack", "move", "lift", "turn", "rotate", "insert"),
    *("hang", "fold", "take", "bring", "grasp"),
]
WHOLE = """
    open the drawer and put the bowl inside
    close the top drawer of the cabinet
    turn on the stove
    turn off the faucet
    unlock the door by rotating the lock
    reach a goal position
    reach the goal while avoiding the wall
    press a button from the top
    push the puck to a goal
    pick and place a puck to a goal
    pour water into the cup
    insert the gripper into the hole
    assemble the nut onto the peg with both arms
    sweep the puck off the table next to the stove
""".strip().split("\n    ")


def sentences() -> Iterator[str]:
    """Task descriptions, partly also capitalised, and π0.5's prompt format with every bin of a state."""
    for verb, colour, thing, place in itertools.product(VERBS, COLOURS.split(), OBJECTS.split(), PLACES):
        yield f"{verb} the {colour} {thing} {place}"
    for whole in WHOLE * 500:
        yield whole
        yield whole.capitalize()
    for number in range(256):
        for whole in WHOLE:
            yield f"Task: {whole}, State: {number} {255 - number};\nAction: "


def train() -> bytes:
    """The serialised model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n", "\t"],
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(train())
