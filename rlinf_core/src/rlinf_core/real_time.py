"""Real-time chunking: from actions in the robot's units to what the policy's module continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlinf_core.contract.continuation import Continuation
from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.contract.module import PreviousActions
from rlinf_core.contract.policy import PolicyConfig
from rlinf_core.data.pipeline import Pipeline, encode_observation
from rlinf_core.data.sample import Sample
from rlinf_core.errors import UserError


@dataclass(frozen=True, eq=False)
class Encoded:
    """A continuation as the policy gets it."""

    actions: NDArray[np.float32]
    """[H, A], normalised, zeros after the last."""
    weights: NDArray[np.float32]
    """[H]."""
    delay: int
    max_guidance_weight: float
    trained: bool


def choose_way(config: PolicyConfig, continuation: Continuation) -> bool:
    """Whether to give the actions to the policy (`trained`) or to guide it.

    Raises:
        UserError: The policy cannot continue chunks, or not in this way or with this delay.
    """
    ways = config.continuation_ways()
    if not ways:
        raise UserError(
            f"the policy {config.type!r} cannot continue a chunk (real-time chunking): send the observation alone"
        )
    delay = continuation.delay
    way = continuation.way
    if way == "auto":
        way = "trained" if delay <= ways.get("trained", -1) else "guided"
    if way not in ways:
        raise UserError(
            f"the policy {config.type!r} does not offer {way!r} real-time chunking, but {', '.join(ways)}"
            + (": it was not trained for it" if way == "trained" else "")
        )
    if delay > ways[way]:
        also = ", or choose guided or auto" if way == "trained" and "guided" in ways else ""
        raise UserError(f"the delay is {delay} actions, but {way} real-time chunking takes at most {ways[way]}{also}")
    return way == "trained"


def encode_continuation(
    config: PolicyConfig,
    data: DatasetConfig,
    pipeline: Pipeline,
    observation: Mapping[str, Any],
    sample: Sample,
    continuation: Continuation,
) -> Encoded:
    """Encode the actions to continue exactly as training actions: relative to the state that is observed now.

    Args:
        config: The policy.
        data: The format of the observation.
        pipeline: The pipeline of both.
        observation: A row in the dataset's format.
        sample: The same, encoded.
        continuation: The actions to continue, and how.

    Raises:
        UserError: They do not fit the policy, or it cannot continue them.
    """
    trained, horizon = choose_way(config, continuation), config.chunk_length()
    actions = np.asarray(continuation.actions)
    width = len(config.draw(np.random.default_rng(0))["noise"][0])
    wanted = pipeline.decode(np.zeros((1, width), np.float32), sample).shape[-1]
    if len(actions) > horizon or actions.shape[1] != wanted:
        raise UserError(
            f"the actions to continue are {list(actions.shape)}, but must be at most {horizon} actions of {wanted} "
            "numbers: those of the last chunk that are not executed yet, in the units in which they were given"
        )
    encoded = encode_observation(pipeline, data, dict(observation), actions)["actions"]
    padded = np.zeros((horizon, width), np.float32)
    padded[: len(encoded)] = encoded
    return Encoded(
        padded, continuation.weights(horizon), int(continuation.delay), continuation.max_guidance_weight, trained
    )


def continue_actions(
    module: Any, batch: Mapping[str, Any], noise: torch.Tensor, encoded: Sequence[Encoded], steps: int | None = None
) -> torch.Tensor:
    """Draw chunks that continue others, which are all guided or all given.

    Args:
        module: A `ContinuingPolicy`.
        batch: The observations, on the module's device.
        noise: [B, H, A] on the module's device.
        encoded: What each chunk continues.
        steps: Denoising steps, for a policy that has them; None: the policy's own number.

    Returns:
        [B, H, A] normalised actions, float32.
    """

    def stacked(values: Sequence[Any]) -> torch.Tensor:
        return torch.from_numpy(np.stack(values)).to(noise.device)

    previous = PreviousActions(
        actions=stacked([one.actions for one in encoded]),
        delays=stacked([np.int64(one.delay) for one in encoded]),
        weights=stacked([one.weights for one in encoded]),
        max_guidance_weight=stacked([np.float32(one.max_guidance_weight) for one in encoded]),
        trained=encoded[0].trained,
    )
    options = {} if steps is None else {"num_steps": steps}
    with torch.no_grad():  # Not inference mode: guidance computes gradients.
        actions: torch.Tensor = module.continue_actions(batch, noise, previous, **options)
    return actions
