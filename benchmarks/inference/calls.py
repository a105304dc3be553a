"""One call, from a batch to a chunk of actions: ours and lerobot's in turns, on one thread of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from policy_step.cases import CASES, dimensions, make_samples, padded
from policy_step.on_cpu import copy_weights, randomize
from policy_step.ours import collate, plain
from policy_step.timing import factor, in_turn, tensors

STEPS = 10
"""Denoising steps: the default of openpi and lerobot."""
COMPARED = {"pi05": "two_of_three", "pi0": "pi0_two_of_three"}
"""Policy -> case: two cameras with 57 and 17 tokens of text."""
TOLERANCE = 1e-4
"""Largest relative difference of actions. lerobot computes the time features in float64, the reference and we in
float32, where angles of 1570 rad have a resolution of 1e-4."""


class DifferentActionsError(Exception):
    """The sides compute different actions, so that their times cannot be compared."""


def compare_calls(size: str, rounds: int, *, compiled: bool) -> dict[str, Any]:
    """Both policies: seconds of each side's calls, and the speedup of ours."""
    torch.set_num_threads(1)
    return {policy: _compare(name, size, rounds, compiled=compiled) for policy, name in COMPARED.items()}


def _compare(name: str, size: str, rounds: int, *, compiled: bool) -> dict[str, Any]:
    from policy_step.lerobot import build

    case = CASES[name]
    sized = dimensions(size, case)
    theirs, ours = build(sized).eval(), plain(sized).eval()
    randomize(theirs)
    copy_weights(theirs, ours, sized)
    samples = make_samples(case, sized, 1)
    batch = collate(samples, ours)
    read = tensors(padded(samples, case.images), torch.device("cpu"))
    state = () if case.pi05 else (read["state"],)

    @torch.inference_mode()
    def own() -> torch.Tensor:
        return ours.sample_actions(batch, batch["noise"], STEPS)

    @torch.inference_mode()
    def lerobots() -> torch.Tensor:
        seen = (read["images"], read["image_masks"], read["tokens"], read["token_mask"], *state)
        found: torch.Tensor = theirs.sample_actions(*seen, noise=batch["noise"], num_steps=STEPS)
        return found

    @torch.inference_mode()
    def encode() -> torch.Tensor:
        cache = ours.prefill(ours.embed_prefix(batch))
        return cache[0].keys

    expected = lerobots()
    apart = _apart(own(), expected, name)
    steps: dict[str, Callable[[], torch.Tensor]] = {"lerobot": lerobots, "ours": own, "ours, prefix alone": encode}
    seconds = in_turn(steps, rounds)
    against = {"eager": factor(seconds["lerobot"], seconds["ours"])}
    if compiled:
        ours.compile_sampling()
        apart = max(apart, _apart(own(), expected, name))
        again = in_turn({"lerobot": lerobots, "ours": own}, rounds)
        seconds["ours, compiled"] = again["ours"]
        against["compiled"] = factor(again["lerobot"], again["ours"])
    return {
        "case": case._asdict(),
        "actions_apart": apart,
        "times_as_fast": against,
        "seconds": {side: [round(one, 4) for one in taken] for side, taken in seconds.items()},
    }


def _apart(own: torch.Tensor, expected: torch.Tensor, name: str) -> float:
    apart = float((own - expected).abs().max() / expected.abs().max())
    if not apart <= TOLERANCE:
        raise DifferentActionsError(
            f"{name}: our actions from the same weights, observation and noise are {apart:.1e} from lerobot's, more "
            f"than {TOLERANCE:.0e}. Nothing is timed"
        )
    return apart
