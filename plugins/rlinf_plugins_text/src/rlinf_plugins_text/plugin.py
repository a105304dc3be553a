"""The hooks of this distribution, registered through the entry point `rlinf-plugins-text`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlinf_core import DatasetConfig, EvaluatorConfig, PolicyConfig, SampleSource, UserError, hookimpl
from rlinf_plugins_text.answers import TextAnswersConfig
from rlinf_plugins_text.config import TextPolicyConfig
from rlinf_plugins_text.rows.dataset import TextDatasetConfig

if TYPE_CHECKING:
    from rlinf_core.contract.datasets import Split


@hookimpl
def rlinf_register_policies() -> list[type[PolicyConfig]]:
    """Register the policy `text`."""
    return [TextPolicyConfig]


@hookimpl
def rlinf_register_evaluators() -> list[type[EvaluatorConfig]]:
    """Register the evaluator `text_answers`."""
    return [TextAnswersConfig]


@hookimpl
def rlinf_open_dataset(dataset: DatasetConfig, policy: PolicyConfig, split: Split) -> SampleSource | None:
    """Open text as rows of tokens."""
    if not isinstance(dataset, TextDatasetConfig):
        return None
    if not isinstance(policy, TextPolicyConfig):
        raise UserError(f"the dataset {dataset.config_name!r} is for the policy 'text', not {policy.type!r}")
    from rlinf_plugins_text.rows.source import open_text

    vision = policy.known_vision()
    source = open_text(
        dataset,
        policy.text_tokenizer(),
        split,
        max_length=policy.max_length,
        overlong=policy.overlong,
        packing=policy.packing,
        stops=policy.stops(),
        vision=vision,
    )
    ahead = vision is not None and source.images is not None and vision.family.attention != "causal"
    if ahead and policy.attention == "documents":
        assert vision is not None
        raise UserError(
            f"{vision.model_type} lets tokens see later ones, within an image or its prompt, so that texts cannot be "
            'concatenated: set policy.attention = "padded"'
        )
    return source
