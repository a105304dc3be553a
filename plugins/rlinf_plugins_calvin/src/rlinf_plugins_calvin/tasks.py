"""CALVIN's tasks: instructions, and the initial states of the benchmark from which a task can be solved.

The benchmark asks for chains of five tasks. Here each task is played alone, from the states with which a chain can
begin with it. Seven of the 34 tasks can only come later in a chain (a block must be in the gripper, stacked or in the
drawer) and are left out: `place_in_slider`, `place_in_drawer`, `stack_block`, `unstack_block`, `lift_*_block_drawer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import product
from typing import Any

import numpy as np

State = Mapping[str, Any]
"""An initial state as the benchmark describes it: part of the scene -> where or how it is."""
COLORS = ("red", "blue", "pink")
HORIZON = 360
"""Control steps after which the benchmark gives up a task."""

_PARTS: Mapping[str, tuple[Any, ...]] = {
    "led": (0, 1),
    "lightbulb": (0, 1),
    "slider": ("right", "left"),
    "drawer": ("closed", "open"),
    **{f"{color}_block": ("table", "slider_right", "slider_left") for color in COLORS},
    "grasped": (0,),
}


def _prompts() -> dict[str, str]:
    """The instructions of the benchmark's evaluation (`new_playtable_validation.yaml`)."""
    found = {
        "move_slider_left": "slide the door to the left",
        "move_slider_right": "slide the door to the right",
        "open_drawer": "open the drawer",
        "close_drawer": "close the drawer",
        "turn_on_lightbulb": "turn on the light bulb",
        "turn_off_lightbulb": "turn off the light bulb",
        "turn_on_led": "turn on the led light",
        "turn_off_led": "turn off the led light",
        "push_into_drawer": "push the block into the drawer",
    }
    for color in COLORS:
        for side in ("right", "left"):
            found[f"rotate_{color}_block_{side}"] = f"rotate the {color} block to the {side}"
            found[f"push_{color}_block_{side}"] = f"push the {color} block to the {side}"
        found[f"lift_{color}_block_table"] = f"pick up the {color} block"
        found[f"lift_{color}_block_slider"] = f"pick up the {color} block in the sliding cabinet"
    return found


PROMPTS: Mapping[str, str] = _prompts()
"""Task -> instruction."""
_NEEDED: Mapping[str, Callable[[State], bool]] = {
    "move_slider_left": lambda state: state["slider"] == "right",
    "move_slider_right": lambda state: state["slider"] == "left",
    "open_drawer": lambda state: state["drawer"] == "closed",
    "close_drawer": lambda state: state["drawer"] == "open",
    "turn_on_lightbulb": lambda state: not state["lightbulb"],
    "turn_off_lightbulb": lambda state: bool(state["lightbulb"]),
    "turn_on_led": lambda state: not state["led"],
    "turn_off_led": lambda state: bool(state["led"]),
    "push_into_drawer": lambda state: state["drawer"] == "open",
}
"""What must hold for tasks without a block of their own."""


@cache
def initial_states(task: str) -> tuple[State, ...]:
    """The benchmark's initial states from which a task can be solved, in a fixed order that mixes them."""
    found = [state for state in _all_states() if _can_begin(task, state)]
    order = np.random.default_rng(0).permutation(len(found))
    return tuple(found[number] for number in order)


def _can_begin(task: str, state: State) -> bool:
    if task in _NEEDED:
        return _NEEDED[task](state)
    block = next(state[f"{color}_block"] for color in COLORS if f"_{color}_" in task)
    if task.endswith("_slider"):  # The door of the cabinet must not be in front of the block.
        return block in ("slider_left", "slider_right") and block != f"slider_{state['slider']}"
    return bool(block == "table")


def _all_states() -> list[State]:
    """The 192 initial states: one or two blocks on the table, and at most one on each side of the cabinet."""
    states = [dict(zip(_PARTS, values, strict=True)) for values in product(*_PARTS.values())]
    return [state for state in states if _has_room([state[f"{color}_block"] for color in COLORS])]


def _has_room(blocks: list[str]) -> bool:
    return blocks.count("table") in (1, 2) and max(blocks.count("slider_right"), blocks.count("slider_left")) < 2
