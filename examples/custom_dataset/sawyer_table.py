"""A Sawyer arm in MetaWorld's columns; the policy sees its gripper as openpi's DROID and ALOHA have theirs."""

from dataclasses import dataclass

from rlinf_core.data.transforms import Transform
from rlinf_plugins_openpi import Pi05DatasetConfig


@dataclass(frozen=True)
class RescaleGripper(Transform):
    """Number 3 of the action: -1 (open) to 1 (closed) in the data, 0 (open) to 1 (closed) in the policy."""

    def __call__(self, sample):
        """In training; when the policy acts there are no actions yet."""
        return self._scale(sample, 0.5, 0.5) if "actions" in sample else sample

    def inverse(self, sample):
        """Back to the robot's own, for what the policy predicts."""
        return self._scale(sample, 2, -1)

    def _scale(self, sample, factor, offset):
        actions = sample["actions"].copy()  # [steps, numbers]; a transform changes no array in place
        actions[..., 3] = factor * actions[..., 3] + offset
        return {**sample, "actions": actions}


class SawyerTable(Pi05DatasetConfig):
    """A Sawyer arm at a table: one camera, the hand's displacement and the gripper at 20 Hz."""

    images: dict[str, str] = {"base_0_rgb": "observation.image"}
    raw_action_is_delta: bool = True  # the actions are displacements already
    action_width: int = 4

    def transforms(self):
        """What the fields say, then the gripper."""
        return (*super().transforms(), RescaleGripper())
