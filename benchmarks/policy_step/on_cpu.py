"""The small model on one thread of a CPU: ours and lerobot's, with the same weights and batches, in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from policy_step.cases import CASES, Case, dimensions, make_samples, useful_flops
from policy_step.ours import OurStep, counted_flops, plain
from policy_step.timing import Step, factor, in_turn

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions

TOLERANCE = 1e-4
"""Largest relative difference between the sides' losses in float32. lerobot computes the time features in float64, the
reference and we in float32, where angles of 1570 rad have a resolution of 1e-4."""
SLOTS = 3
COUNTED = 8
"""Samples whose operations are counted."""


class Against(NamedTuple):
    """A variant of lerobot's step."""

    key: str
    """Name of the result."""
    case: str
    empty_cameras: int = 1
    checkpointing: bool = False
    compiled: bool = False


COMPARISONS = (
    Against("two_of_three", "two_of_three"),
    Against("two_of_three_no_empty", "two_of_three", empty_cameras=0),
    Against("vs_recipe", "two_of_three", checkpointing=True),
    Against("three_of_three", "three_of_three"),
    Against("one_of_three", "one_of_three"),
    Against("same_tokens", "same_tokens"),
)
COMPILED = Against("two_of_three_compiled", "two_of_three", compiled=True)


class DifferentLossesError(Exception):
    """The sides compute different losses, so that their times cannot be compared."""


def compare(
    *, size: str, batch: int, rounds: int, vocabulary: int | None, compiled: bool, peers: bool
) -> dict[str, Any]:
    """Everything that `--json` prints.

    Args:
        size: Of the model.
        batch: Samples of a step.
        rounds: Timed steps of each side.
        vocabulary: Rows of the embedding, if not the size's own.
        compiled: Compare both sides compiled, too.
        peers: Compare with lerobot; else only ours is timed.

    Raises:
        DifferentLossesError: The sides' losses of the same batch differ by more than rounding.
    """
    torch.set_num_threads(1)
    wanted = [*COMPARISONS, *([COMPILED] if compiled else [])]
    found: dict[str, Any] = {}
    details: dict[str, Any] = {}
    for name in dict.fromkeys(one.case for one in wanted):
        for made_compiled in (False, True):
            ways = [one for one in wanted if one.case == name and one.compiled == made_compiled]
            if ways:
                key = f"{name}_compiled" if made_compiled else name
                sized = dimensions(size, CASES[name], vocabulary=vocabulary)
                details[key] = one_case(
                    CASES[name], sized, ways if peers else [], batch, rounds, compiled=made_compiled
                )
                found |= {way: against["ratio"] for way, against in details[key]["times_as_fast"].items()}
    over = flops_over_useful(dict.fromkeys((size, "base")))
    settings = {
        "batch": batch,
        "rounds": rounds,
        "threads": 1,
        "dtype": "float32",
        "model": repr(dimensions(size, CASES["two_of_three"], vocabulary=vocabulary)),
    }
    packages = ("torch", "lerobot", "transformers") if peers else ("torch",)
    return found | {
        "flops_over_useful": round(max(over.values()), 4),
        "flops_over_useful_by_case": {key: round(value, 4) for key, value in over.items()},
        "cases": details,
        "settings": settings,
        "versions": {package: version(package) for package in packages},
    }


def one_case(
    case: Case, sized: Pi0Dimensions, ways: list[Against], batch: int, rounds: int, *, compiled: bool
) -> dict[str, Any]:
    """Seconds of our step and of every variant of lerobot's, and the speedup of ours."""
    samples = make_samples(case, sized, batch)
    policy = plain(sized, compiled=compiled)
    steps: dict[str, Step] = {}
    if ways:
        steps, apart = _peers(policy, case, sized, samples, ways, compiled=compiled)
    else:
        apart = None
        randomize(policy)
    seconds = in_turn({"ours": OurStep(policy, samples, micro_batch=batch), **steps}, rounds)
    return {
        "times_as_fast": {way: factor(seconds[way], seconds["ours"]) for way in steps},
        "loss_difference": apart,
        "seconds": {name: [round(one, 3) for one in taken] for name, taken in seconds.items()},
    }


def _peers(
    policy: Any, case: Case, sized: Any, samples: Any, ways: Any, *, compiled: bool
) -> tuple[dict[str, Step], float]:
    """Steps of lerobot, after ours was given its weights and the losses were found to agree."""
    from policy_step.lerobot import LerobotStep, build, optimizer_of

    model = build(sized, compiled=compiled)
    randomize(model)
    copy_weights(model, policy, sized)
    optimizer = optimizer_of(model)
    steps = {
        way.key: LerobotStep(
            model,
            optimizer,
            samples,
            micro_batch=len(samples),
            slots=min(SLOTS, case.images + way.empty_cameras),
            checkpointing=way.checkpointing,
        )
        for way in ways
    }
    own = float(OurStep(policy, samples, micro_batch=len(samples)).loss())
    with torch.no_grad():
        losses = {key: float(step.loss(step.batches[0])) for key, step in steps.items()}
    apart = max(abs(own - loss) / abs(loss) for loss in losses.values())
    if not apart <= TOLERANCE:
        raise DifferentLossesError(
            f"{case.like}: our loss of the same batch and weights is {own}, lerobot's {losses}: {apart:.1e} apart, "
            f"more than {TOLERANCE:.0e}. Nothing is timed"
        )
    return steps, apart


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Give a model arbitrary values."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def copy_weights(theirs: torch.nn.Module, ours: torch.nn.Module, sized: Pi0Dimensions) -> None:
    """Give our model the weights of lerobot's, as a run reads them from one of lerobot's files."""
    from safetensors.torch import save_file

    from rlinf_plugins_openpi.weights.names import EMBEDDING, EMBEDDING_IN_FILES
    from rlinf_plugins_openpi.weights.source import PublishedWeights

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        state = theirs.state_dict()
        state[EMBEDDING_IN_FILES] = state[EMBEDDING]  # lerobot's language-model head, on which no loss depends
        save_file({name: value.clone() for name, value in state.items()}, file)
        source = PublishedWeights(file, sized)
        source.check({name: tuple(parameter.shape) for name, parameter in ours.named_parameters()})
        for name, parameter in ours.named_parameters():
            parameter.copy_(source.tensor(name))


def flops_over_useful(sizes: Iterable[str]) -> dict[str, float]:
    """Counted operations over useful ones, for every case and size."""
    over = {}
    for size in sizes:
        for name, case in CASES.items():
            sized = dimensions(size, case)
            samples = make_samples(case, sized, COUNTED)
            over[f"{name}, {size}"] = counted_flops(sized, samples) / useful_flops(samples, sized)
    return over


def has_peers() -> bool:
    """Whether lerobot's policies can be built here."""
    return find_spec("lerobot") is not None and find_spec("transformers") is not None
