"""A Sawyer arm with MetaWorld's columns; the policy sees its gripper on the scale of openpi's DROID and ALOHA."""

from dataclasses import dataclass

from rlinf_core.data.transforms import Transform
from rlinf_plugins_openpi import Pi05DatasetConfig


@dataclass(frozen=True)
class RescaleGripper(Transform):
    """Action dimension 3: -1 (open) to 1 (closed) in the data, 0 (open) to 1 (closed) in the policy."""

    def __call__(self, sample):
        """From data to policy; samples at inference have no actions yet."""
        return self._scale(sample, 0.5, 0.5) if "actions" in sample else sample

    def inverse(self, sample):
        """From the policy's predictions back to the robot."""
        return self._scale(sample, 2, -1)

    def _scale(self, sample, factor, offset):
        actions = sample["actions"].copy()  # [steps, dimensions]; a transform must not change arrays in place
        actions[..., 3] = factor * actions[..., 3] + offset
        return {**sample, "actions": actions}


class SawyerTable(Pi05DatasetConfig):
    """A Sawyer arm at a table: one camera; hand displacement and gripper at 20 Hz."""

    images: dict[str, str] = {"base_0_rgb": "observation.image"}
    raw_action_is_delta: bool = True  # the actions are displacements already
    action_width: int = 4

    def transforms(self):
        """The gripper's transform, which sees the numbers as recorded, then those that follow from the fields."""
        return (RescaleGripper(), *super().transforms())
