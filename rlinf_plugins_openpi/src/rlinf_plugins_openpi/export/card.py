"""The policy's part of the model card: how each project loads the folder, and what its files cannot express."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlinf_core.contract.policy_options import CardNotes
from rlinf_plugins_openpi.datasets.config import asset_name
from rlinf_plugins_openpi.export.lerobot import notes_for_lerobot

if TYPE_CHECKING:
    from rlinf_core.contract.policy import TrainedOn
    from rlinf_plugins_openpi.settings import OpenpiSettings

TITLES = {"pi0": "π0", "pi05": "π0.5"}
WITH_LEROBOT = """\
`FOLDER` is this repository's id, or a copy of it.

```python
from lerobot.policies.{module} import {name}
from lerobot.policies.factory import make_pre_post_processors

policy = {name}.from_pretrained("FOLDER")
prepare, finish = make_pre_post_processors(policy.config, pretrained_path="FOLDER")
```
"""
WITH_OPENPI = """\
`FOLDER` is a copy of this repository. `CONFIG` is openpi's config of this robot, which has the transforms of the data;
its asset id must be {assets}.

```python
from openpi.policies import policy_config
from openpi.training import config

policy = policy_config.create_trained_policy(config.get_config("CONFIG"), "FOLDER")
```
"""


def card_notes(policy: OpenpiSettings, format: str, sources: Sequence[TrainedOn]) -> CardNotes:
    """What the model card of a folder says of π0 and π0.5.

    Args:
        policy: The exported policy.
        format: `rlinf`, `openpi` or `lerobot`.
        sources: The datasets it was trained on.
    """
    title, tags = TITLES[policy.type], ("vision-language-action",)
    if policy.variant != "base":
        title += f" at a tiny size (`variant = {policy.variant}`)"
    if format == "lerobot":
        name = "PI0Policy" if policy.type == "pi0" else "PI05Policy"
        use = WITH_LEROBOT.format(module=policy.type, name=name)
        notes = notes_for_lerobot(policy, sources)
        return CardNotes(title, "lerobot", "robotics", ("lerobot", *tags), use, notes)
    if format == "openpi":
        assets = " or ".join(f"`{asset_name(source.data.repo_id)}`" for source in sources)
        return CardNotes(title, "openpi", "robotics", ("openpi", *tags), WITH_OPENPI.format(assets=assets))
    return CardNotes(title, tags=tags)
