"""Tasks of ManiSkill 3.0.1 with one Panda on a table, which need no assets besides those in the package.

ManiSkill's tasks have no instructions: these are made of the tasks' descriptions in its documentation. A policy knows
those of its data only, which the setting `prompts` names.
"""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """A task."""

    prompt: str
    horizon: int
    """Control steps of its registration, `max_episode_steps`."""


KNOWN = {
    "PickCube-v1": Known("Pick up the red cube and move it to the goal position", 50),
    "PushCube-v1": Known("Push the cube to the goal region", 50),
    "PullCube-v1": Known("Pull the cube to the goal region", 50),
    "PokeCube-v1": Known("Poke the cube to the goal region with the peg", 50),
    "StackCube-v1": Known("Stack the red cube on top of the green cube", 50),
    "LiftPegUpright-v1": Known("Lift the peg and place it upright", 50),
    "PlaceSphere-v1": Known("Place the sphere into the bin", 50),
    "RollBall-v1": Known("Push and roll the ball to the goal region", 80),
    "PullCubeTool-v1": Known("Pull the cube within reach with the tool", 100),
    "PegInsertionSide-v1": Known("Insert the peg into the hole in the box", 100),
    "PlugCharger-v1": Known("Plug the charger into the receptacle", 200),
    "StackPyramid-v1": Known("Stack the cubes into a pyramid", 250),
}
"""Id -> what is known of it."""
