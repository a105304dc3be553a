"""What known environments of Gymnasium need: packages, columns of lerobot's datasets, instructions, rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Known:
    """An environment whose settings are known."""

    package: str
    """The module that registers it, on import."""
    extra: str
    """The extra of this package that installs it."""
    observation: Mapping[str, str]
    """Part of the observation, by its path such as `pixels/top` -> column of the dataset."""
    prompt: str
    horizon: int
    """Control steps after which it ends."""
    control_hz: float
    actions: str
    """Part of the observation that, as an action, keeps the robot where it is: positions. Empty: zeros do."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `gymnasium.make`."""


def _aloha(prompt: str) -> Known:
    return Known(
        package="gym_aloha",
        extra="aloha",
        observation={"pixels/top": "observation.images.top", "agent_pos": "observation.state"},
        prompt=prompt,
        horizon=400,
        control_hz=50.0,
        actions="agent_pos",
        options={"obs_type": "pixels_agent_pos"},
    )


KNOWN = {
    "gym_pusht/PushT-v0": Known(
        package="gym_pusht",
        extra="pusht",
        observation={"pixels": "observation.image", "agent_pos": "observation.state"},
        prompt="Push the T-shaped block onto the T-shaped target.",
        horizon=300,
        control_hz=10.0,
        actions="agent_pos",
        options={"obs_type": "pixels_agent_pos"},
    ),
    "gym_aloha/AlohaInsertion-v0": _aloha("Insert the peg into the socket."),
    "gym_aloha/AlohaTransferCube-v0": _aloha("Pick up the cube with the right arm and transfer it to the left arm."),
}
"""By the environments' ids, with the columns and instructions of `lerobot/pusht` and `lerobot/aloha_sim_*_human`."""
