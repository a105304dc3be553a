"""What RLinf's code decides by `config_name`, where that is not in our class of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from typing import Any

from rlinf_core.errors import did_you_mean
from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig
from rlinf_plugins_openpi.settings import OpenpiSettings

Delta = Mapping[bool, Mapping[str, Any]]
SIX: Delta = {True: {"relative": [True] * 6}, False: {"raw_action_is_delta": True}}
SEVEN: Delta = {True: {"relative": [True] * 7}, False: {"raw_action_is_delta": True}}
NINE: Delta = {True: {"relative": [True] * 9}, False: {"raw_action_is_delta": True}}
ALOHA: Delta = {
    True: {"raw_action_is_delta": False, "gripper": [6, 13]},
    False: {"raw_action_is_delta": True},
}
POSES: Delta = {True: {}, False: {"raw_action_is_delta": True, "relative_poses": False}}
CUSTOM: Delta = {
    True: {"raw_action_is_delta": True},
    False: {"relative": [True] * 9 + [False]},
}
"""RLinf reads the flag the other way around here: true means that the data are displacements already."""
PROMPT = {"default_prompt": "default_prompt"}
ROBOCASA: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "state_space": {"25d": {}, "16d": {"state_order": [*range(11, 25), 7, 8], "state_width": 16}},
    "image_space": {
        "2views": {},
        "3views": {
            "images": {
                "base_0_rgb": "image_left",
                "left_wrist_0_rgb": "wrist_image",
                "right_wrist_0_rgb": "image_right",
            }
        },
    },
    "action_space": {"12d": {}},
}
"""RLinf's names for parts of RoboCasa's state, cameras and action -> our fields."""


@dataclass(frozen=True)
class RlinfFormat:
    """Facts about a `config_name` in RLinf's code."""

    asset_id: str
    """Folder of the statistics below the weights: the dataset's name in RLinf's list, whatever is trained on."""
    delta: Delta | None = None
    """`openpi_data.extra_delta_transform` -> our fields; None: its code does not read the flag."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Other keys of `openpi_data` -> our field with the same meaning."""
    statistics_of_pi0: bool = False
    """Whether RLinf's list names π0's statistics for this format of π0.5."""


_LIBERO, _MANISKILL = "physical-intelligence/libero", "physical-intelligence/maniskill"
_METAWORLD, _CALVIN = "lerobot/metaworld_mt50", "InternRobotics/InternData-Calvin_ABC"
_FRANKA = {"default_prompt": "default_prompt", "output_action_dim": "action_width", "pad_state": "pad_state"}
_ALOHA = {"default_prompt": "default_prompt", "adapt_to_pi": "adapt_to_pi"}
_REAL, _ROBOCASA, _DROID = (
    "physical-intelligence/real_rl",
    "physical-intelligence/robocasa",
    "physical-intelligence/droid",
)

FORMATS: Mapping[str, RlinfFormat] = {
    "pi0_libero": RlinfFormat(_LIBERO, SIX),
    "pi0_libero_horizon10": RlinfFormat(_LIBERO, SIX),
    "pi05_libero": RlinfFormat(_LIBERO, SIX, statistics_of_pi0=True),
    "pi0_maniskill": RlinfFormat(_MANISKILL, SIX),
    "pi05_maniskill": RlinfFormat(_MANISKILL, SIX),
    "pi05_rlt_maniskill_joint": RlinfFormat(
        _MANISKILL, SEVEN, {"default_prompt": "default_prompt", "output_action_dim": "action_width"}
    ),
    "pi05_franka": RlinfFormat(_REAL, NINE, _FRANKA),
    "pi05_franka_state": RlinfFormat(_REAL, NINE, _FRANKA),
    "pi05_franka_pnp": RlinfFormat("RLinf/pick_red", None, PROMPT),
    "pi05_maniskill_sim_real_co_training": RlinfFormat("physical-intelligence/pick_and_place_real", NINE, _FRANKA),
    "pi0_metaworld": RlinfFormat(_METAWORLD, SIX),
    "pi05_metaworld": RlinfFormat(_METAWORLD, SIX, statistics_of_pi0=True),
    "pi0_calvin": RlinfFormat(_CALVIN, SIX),
    "pi05_calvin": RlinfFormat(_CALVIN, SIX, statistics_of_pi0=True),
    "pi0_robocasa_human": RlinfFormat("daixianjie/robocasa_human_lerobot"),
    "pi0_robocasa365_pretrain_human300": RlinfFormat(_ROBOCASA),
    "pi05_robocasa365_pretrain_human300": RlinfFormat(_ROBOCASA, statistics_of_pi0=True),
    "pi0_aloha_robotwin": RlinfFormat("physical-intelligence/robotwin", ALOHA, _ALOHA),
    "pi05_aloha_robotwin": RlinfFormat("physical-intelligence/robotwin", ALOHA, _ALOHA),
    "pi05_gsenv": RlinfFormat("RLinf/GSEnv-PutCubeOnPlate-v0", statistics_of_pi0=True),
    "pi0_realworld": RlinfFormat("realworld_franka_bin_relocation", None, PROMPT),
    "pi0_custom": RlinfFormat("physical-intelligence/custom_dataset", CUSTOM, PROMPT),
    "pi05_isaaclab_stack_cube": RlinfFormat("RLinf/IsaacLab-Stack-Cube-Data", None, PROMPT, statistics_of_pi0=True),
    "pi05_dualfranka_tcp_rot6d": RlinfFormat("", POSES, PROMPT),
    "pi0_droid_polaris": RlinfFormat(_DROID),
    "pi05_droid_polaris": RlinfFormat(_DROID),
}
"""RLinf's list, `rlinf/models/embodiment/openpi/dataconfig/`, as of August 2026."""


def find_format(name: str) -> tuple[type[OpenpiDatasetConfig] | None, str]:
    """Our class of a `config_name`, or None and why there is none."""
    found = [*entry_points(group="rlinf.datasets", name=name)]
    if found:
        loaded = found[0].load()
        if isinstance(loaded, type) and issubclass(loaded, OpenpiDatasetConfig):
            return loaded, ""
        return None, f"the format {name!r} is not one of π0 or π0.5"
    for pattern, text in OpenpiSettings.not_here.items():
        if fnmatchcase(name, pattern):
            return None, text
    known = {entry.name for entry in entry_points(group="rlinf.datasets")}
    return None, (
        f"there is no format {name!r}{did_you_mean(name, known)}. A format of your own needs a class "
        "(`rlinf new-plugin`), or pi0_custom or pi05_custom with data.images, data.state and data.actions"
    )
