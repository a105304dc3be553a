"""lerobot's own π0 and π0.5 modules with the same random weights: a second opinion, from another port of the reference.

They compute in the same float32; where they differ by more than rounding, docs/numerics.md says why.
"""

from importlib.util import find_spec

import pytest
from pair_of_lerobot import batch_of, in_float64, theirs_of
from pair_of_lerobot import pair as equal_pair
from tiny_lerobot import tiny_dimensions

from rlinf_plugins_openpi.model import pi0
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.weights.names import published_names

pytestmark = pytest.mark.skipif(
    not (find_spec("lerobot") and find_spec("transformers")),
    reason="needs lerobot, whose policies need transformers: uv sync --group test",
)

PEERS = "peers"
FLOAT32 = 1e-5
FLOAT64_TIME = 2e-4
"""lerobot computes the angles of the time features in float64, the reference in float32 (up to 1570 rad): the features
differ by 1e-4, and what follows by as much."""


@pytest.fixture(params=[False, True], ids=["pi0", "pi05"])
def pair(request):
    """Ours and lerobot's with equal weights."""
    return equal_pair(tiny_dimensions(pi05=request.param))


def distance(ours, theirs):
    return float((ours.detach() - theirs.detach()).abs().max() / theirs.detach().abs().max())


@pytest.mark.parametrize(("time", "tolerance"), [("as it is", FLOAT64_TIME), ("in float64 too", FLOAT32)])
def test_losses_and_gradients_are_lerobots(pair, report, monkeypatch, time, tolerance):
    ours, theirs = pair
    if tolerance == FLOAT32:
        monkeypatch.setattr(pi0, "time_features", in_float64)
    batch = batch_of(ours.dimensions)
    case = f"{PEERS}/lerobot/{'pi05' if ours.dimensions.pi05 else 'pi0'} (time features {time})"
    losses = theirs.forward(*theirs_of(batch, ours), batch["actions"], batch["noise"], batch["time"]).mean(-1)
    own = ours.losses(batch)
    report(case, "loss of every action", distance(own, losses), tolerance)
    own.mean().backward()
    losses.mean().backward()
    gradients = dict(theirs.named_parameters())
    names = published_names(ours.dimensions)
    # The true gradient of a key's bias is zero: both are rounding noise.
    own = unpacked({name: p.grad for name, p in ours.named_parameters() if p.grad is not None}, ours.dimensions)
    compared = [name for name in names if not name.endswith("k_proj.bias")]
    assert {name for name in compared if name not in own} == {
        name for name in compared if gradients[names[name]].grad is None or not gradients[names[name]].grad.any()
    }
    pairs = [(own[name], gradients[names[name]].grad) for name in compared if name in own]
    apart = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    report(case, "gradient", apart**0.5, tolerance)


@pytest.mark.parametrize("steps", [1, 10])
def test_samples_are_lerobots(pair, report, steps):
    ours, theirs = pair
    batch = batch_of(ours.dimensions)
    case = f"{PEERS}/lerobot/{'pi05' if ours.dimensions.pi05 else 'pi0'} (time features as it is)"
    wanted = theirs.sample_actions(*theirs_of(batch, ours), noise=batch["noise"], num_steps=steps)
    own = ours.sample_actions(batch, batch["noise"], num_steps=steps)
    report(case, f"sample_actions/steps{steps}", distance(own, wanted), FLOAT64_TIME)
