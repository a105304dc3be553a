"""Write docs/datasets.md, the facts of every dataset format for π0 and π0.5, from the classes that hold them.

python docs/render_datasets.py
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from rlinf_core.config.toml import dotted
from rlinf_plugins_openpi.datasets.config import OpenpiDatasetConfig

PAGE = Path(__file__).with_name("datasets.md")
DISTRIBUTION = PAGE.parents[1] / "rlinf_plugins_openpi"
HEAD = """\
# Dataset formats

What `data.config_name` may be for π0 and π0.5, and how a dataset of your own is described in TOML alone. Written by
`docs/render_datasets.py` from the classes in `rlinf_plugins_openpi/datasets/`: change those, not this page. `rlinf
datasets --json` tells the same of what is installed. All fields are in [settings.md](settings.md).

A format is a set of defaults. Every one of them can be set in `[data]` and `[policy]`: another camera, other columns,
another horizon.

"""
TAIL = """\
## Your own, without code

`pi05_custom` and `pi0_custom` take every fact from the config. Which camera of the policy sees which column, which
columns are state and action (several are concatenated in their order), and how actions are trained:

```toml
[data]
config_name = "pi05_custom"
repo_id = "my-lab/franka-pick"
state = ["observation.joints", "observation.gripper"]
actions = ["action.joints", "action.gripper"]
raw_action_is_delta = false                  # absolute in the data: trained relative to the state ...
gripper = [7]                                # ... but for the eighth number

[data.images]
base_0_rgb = "observation.images.front"
left_wrist_0_rgb = "observation.images.wrist"

[policy]
action_horizon = 25
```

The policies' cameras are `base_0_rgb`, `left_wrist_0_rgb` and `right_wrist_0_rgb`; one without a column is masked. A
column that the dataset lacks is an error that lists those it has, nearest first.

### What the policy is trained to predict

There is no default; one of these must be said, by you or by the class:

- `raw_action_is_delta = true`: actions as they are. They are displacements already, or absolute ones are meant.
- `raw_action_is_delta = false` and `gripper = [...]`: absolute actions, from which the state at the start of the chunk
  is subtracted, number by number; the numbers in `gripper`, counted from 0, stay as they are. `gripper = []` if none
  does. Numbers of the action must stand where the same number of the state stands.
- `relative = [true, true, false]`: the general form, a mask. What it does not reach stays absolute.

What is set in TOML puts what the class says out of force. When the policy acts, the state is added again.

### Rotations

Angles jump at half a turn and quaternions have two names for one rotation; networks learn neither well. With
`action_train_with_rotation_6d` the policy sees and predicts the first two columns of the rotation matrix ([Zhou et al.
2019](https://arxiv.org/abs/1812.07035)), six numbers that do not jump; whatever it predicts becomes a rotation again by
Gram-Schmidt.

```toml
[data]
config_name = "pi05_custom"
raw_action_is_delta = false
gripper = [6]                                # counted in the data's action, x y z roll pitch yaw gripper
action_train_with_rotation_6d = true
rotation_format = "euler_xyz"                # roll, pitch, yaw in radians, about fixed axes
state_rotations = [3]                        # the first number of each rotation
action_rotations = [3]                       # two arms: [3, 10]
```

- `rotation_format` is `quaternion_wxyz`, `quaternion_xyzw`, `axis_angle`, or Euler angles in SciPy's notation: small
  letters are fixed axes, capital ones those of the turning body.
- Relative rotations are composed, not subtracted: the turn about the state's own axes, `R_state^T R_action`. They need
  the rotation at the same place in state and action. `gripper` and `relative` count the data's own numbers.
- Actions come back in `rotation_format`, written one way: angles in -π..π and the middle one in -π/2..π/2, an axis
  times an angle of at most π, quaternions with w ≥ 0. Recorded actions are compared in the same form. At its edges,
  such as a tool that points straight down, neighbouring rotations have different numbers: the errors that validation
  reports jump there, the policy's loss does not.
- RLinf has a flag of this name that changes nothing. Statistics of RLinf or openpi do not fit data with six numbers.

### Prompts

The prompt is the row's task. `default_prompt` is that of rows without a task text; with `prompt_from_task = false`, of
all rows.

```toml
[data]
config_name = "pi0_custom"
raw_action_is_delta = true
prompt_from_task = false
default_prompt = "fold the towel"
stride = 2                                   # every second frame: trains for 15 Hz on data of 30 Hz

[data.crops.base_0_rgb]                      # pixels; what is cut away, the policy never sees
top = 0
left = 80
height = 480
width = 480

[data.assets]
assets_dir = "checkpoints/pi0_base/assets"   # statistics: <assets_dir>/<asset_id>/norm_stats.json
asset_id = "franka"                          # left out: the dataset's id
```

### Crops, stride, statistics

A crop is checked against the size of the pictures, before training and whenever the policy acts. A chunk has
`contract.policy.action_horizon` actions, `stride` frames apart; past the end of the episode the last one repeats.

Statistics are computed from the training episodes unless `norm_stats` names a file, or `assets` a folder of openpi's.
Files of vectors that were filled up first are cut to the data.

RLinf's `pi0_custom` fills state and action up to 32 numbers before it normalises, subtracts by a mask of nine, and cuts
actions to seven; with these settings every stage is the same number for number:

```toml
[data]
config_name = "pi0_custom"
relative = [true, true, true, true, true, true, true, true, true, false]
action_width = 7
padded_width = 32
```

Left out, `padded_width` changes nothing for π0, which normalises by mean and spread. π0.5 normalises by quantiles,
which would turn numbers that are always 0 into -1: `pi05_custom` fills up after it has normalised.

### As a package

A class holds the same fields under a name, for others to install ([README](../README.md#a-dataset-of-your-own)). What
fields cannot say is a transform:

```python
from collections.abc import Sequence
from dataclasses import dataclass

from rlinf_core import Sample
from rlinf_core.data.transforms import Transform
from rlinf_plugins_openpi import Pi05DatasetConfig


@dataclass(frozen=True)
class OpenGripper(Transform):
    \"\"\"The last number of the action from 'closed' to 'open'.\"\"\"

    def __call__(self, sample: Sample) -> Sample:
        return self._flipped(sample)

    def inverse(self, sample: Sample) -> Sample:
        return self._flipped(sample)

    def _flipped(self, sample: Sample) -> Sample:
        if "actions" not in sample:
            return sample
        actions = sample["actions"].copy()
        actions[..., 6] = 1 - actions[..., 6]
        return {**sample, "actions": actions}


class FrankaPick(Pi05DatasetConfig):
    \"\"\"Franka picking: a front camera, six joints and a gripper.\"\"\"

    repo_id: str = "my-lab/franka-pick"
    images: dict[str, str] = {"base_0_rgb": "observation.images.front"}
    raw_action_is_delta: bool = False
    gripper: tuple[int, ...] = (6,)

    def transforms(self) -> Sequence[Transform]:
        \"\"\"Before ours, on the data's own numbers; its inverse runs last.\"\"\"
        return (OpenGripper(), *super().transforms())
```
"""


def render() -> str:
    """The page's text."""
    names = tomllib.loads((DISTRIBUTION / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    formats = {name: _load(place) for name, place in sorted(names["rlinf.datasets"].items())}
    return HEAD + "\n".join(_table(formats)) + "\n\n" + TAIL


def _load(place: str) -> type[OpenpiDatasetConfig]:
    module, name = place.split(":")
    found: type[OpenpiDatasetConfig] = getattr(import_module(module), name)
    return found


def _table(formats: Mapping[str, type[OpenpiDatasetConfig]]) -> Iterator[str]:
    """One row a format, whole: cells that the formats of both policies share stand there twice."""
    yield "| format | dataset | cameras | state | action | trained on | sets |"
    yield "|---|---|---|---|---|---|---|"
    for name, cls in formats.items():
        facts = cls.facts()
        cells = [
            f"`{name}`",
            f"`{cls.model_fields['repo_id'].default}`" if cls.model_fields["repo_id"].default else "",
            ", ".join(f"`{camera}`: `{column}`" for camera, column in facts["cameras"].items()),
            _vector(facts["state"], facts["state_dim"]),
            _vector(facts["actions"], facts["action_dim"]),
            _trained(cls),
            ", ".join(f"`{key} = {value}`" for key, value in _sets(cls)),
        ]
        yield f"| {' | '.join(cells)} |"


def _vector(columns: Iterable[str], width: int | None) -> str:
    return f"{width or 'any'}: " + ", ".join(f"`{column}`" for column in columns)


def _trained(cls: type[OpenpiDatasetConfig]) -> str:
    default = {name: field.get_default() for name, field in cls.model_fields.items()}
    if default["raw_action_is_delta"] is None and default["relative"] is None:
        return "must be said"
    config = cls()
    names = [type(step).__name__ for step in config.transforms()]
    if "RelativeUnless" in names:
        return f"distance to the state, but for {', '.join(map(str, config.gripper or ()))}"
    if "RelativeActions" in names:
        return f"distance to the state in the first {len(config.relative or ())}"
    return "actions as they are"


def _sets(cls: type[OpenpiDatasetConfig]) -> Iterator[tuple[str, Any]]:
    """What differs from the policy's own defaults, and what the class adds."""
    for section, table in cls.run_defaults.items():
        for key, value in table.items():
            if key != "type":
                yield dotted((section, key)), str(value).lower() if isinstance(value, bool) else value
    for key in ("padded_width", "adapt_to_pi"):
        if value := cls.model_fields[key].default if key in cls.model_fields else None:
            yield f"data.{key}", str(value).lower()


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
