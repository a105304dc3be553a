"""Real-time chunking from the robot's side: units, states that have moved, batches, and what a policy refuses."""

import re

import numpy as np
import pytest
import torch
from arm_policy import ArmDataset, ArmPolicy

from rlinf_core import UserError
from rlinf_core.config.load import load_config
from rlinf_core.contract.continuation import Continuation
from rlinf_core.data.normalize import NormStats
from rlinf_core.data.pipeline import build_pipeline
from rlinf_core.inference import LoadedPolicy

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
NOISE = np.random.default_rng(1).standard_normal((5, 8), np.float32)
STATE = np.array([0.2, -0.1, 0.3, 0.5], np.float32)


def observation(state=STATE):
    return {"observation.image": IMAGE, "observation.state": state, "task": "push"}


def stats(width, seed):
    rng = np.random.default_rng(seed)
    low = -1 - rng.random(width)
    return NormStats(mean=rng.random(width), std=0.5 + rng.random(width), q01=low, q99=low + 2 + rng.random(width))


@pytest.fixture(scope="module", params=["pi0_metaworld", "pi05_metaworld"])
def policy(request):
    """A policy with random weights whose actions are relative to the state, and which is trained for delays up to 3."""
    overrides = ["policy.action_dim=8", "policy.num_sampling_steps=4", "policy.rtc_training_max_delay=3"]
    name = f"data.config_name={request.param}"
    run = load_config(
        "examples/quickstart.toml", [*overrides, name, "data.relative=[true,true,true]", "policy.action_horizon=5"]
    )
    torch.manual_seed(0)
    module = run.policy.build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    pipeline = build_pipeline(run.data, run.policy, {"state": stats(4, 1), "actions": stats(4, 2)})
    return LoadedPolicy(run.policy, run.data, pipeline, module.eval())


def encoded(policy, continuation, state=STATE):
    return policy.encode_continuation(observation(state), policy.encode(observation(state)), continuation)


def test_actions_to_continue_are_encoded_as_training_actions(policy):
    """By the path of training, on a row that has the observed state and these actions."""
    actions = np.random.default_rng(3).standard_normal((5, 4)).astype(np.float32)
    row = observation() | {"action": actions, "action_is_pad": np.zeros(5, bool)}
    trained = policy.pipeline.encode(row)["actions"]
    np.testing.assert_array_equal(encoded(policy, Continuation(actions, 2)).actions, trained)
    short = encoded(policy, Continuation(actions[:3], 2)).actions
    np.testing.assert_array_equal(short[:3], trained[:3])
    assert not short[3:].any()


def test_actions_that_a_policy_gave_are_those_that_it_continues(policy):
    """Absolute actions stay where they are when the state has moved: relative to it, they are others."""
    sample = policy.encode(observation())
    own = np.zeros((5, 8), np.float32)
    own[:, :4] = np.random.default_rng(4).uniform(-1, 1, (5, 4))
    given = policy.pipeline.decode(own, sample)
    back = encoded(policy, Continuation(given, 2))
    np.testing.assert_allclose(back.actions, own, atol=1e-5)
    moved = STATE + np.float32([0.1, -0.2, 0.3, 0.4])
    later = encoded(policy, Continuation(given, 2), moved)
    assert np.abs(later.actions - own)[:, :3].min() > 0.01
    np.testing.assert_allclose(later.actions[:, 3:], own[:, 3:], atol=1e-5)
    np.testing.assert_allclose(
        policy.pipeline.decode(later.actions, policy.encode(observation(moved))), given, atol=1e-5
    )


def test_trained_chunks_begin_with_the_given_actions_in_the_robots_units(policy):
    left = policy.infer(observation(), NOISE)[2:]
    moved = observation(STATE + np.float32(0.05))
    chunk = policy.infer(moved, NOISE, continuing=Continuation(left, 2))
    np.testing.assert_allclose(chunk[:2], left[:2], atol=1e-5)
    plain = policy.infer(moved, NOISE)
    assert np.abs(chunk[2:] - plain[2:]).max() > 1e-3
    guided = policy.infer(moved, NOISE, continuing=Continuation(left, 2, way="guided"))
    apart = [np.abs(one[:2] - left[:2]).max() for one in (guided, plain)]
    assert 0 < apart[0] < 0.5 * apart[1]


def test_a_batch_may_mix_all_ways(policy):
    left = policy.infer(observation(), NOISE)[1:]
    ways = [None, Continuation(left, 1, way="guided"), Continuation(left, 2), None, Continuation(left, 0, way="guided")]
    states = [STATE + np.float32(0.02 * number) for number in range(len(ways))]
    noises = [np.random.default_rng(number).standard_normal((5, 8), np.float32) for number in range(len(ways))]
    together = policy.infer_batch([observation(state) for state in states], noises, ways)
    for chunk, state, noise, way in zip(together, states, noises, ways, strict=True):
        alone = policy.infer(observation(state), noise, continuing=way)
        np.testing.assert_allclose(chunk, alone, atol=2e-4)


def test_auto_takes_the_trained_way_for_delays_that_were_trained(policy):
    left = np.zeros((5, 4), np.float32)
    assert [encoded(policy, Continuation(left, delay)).trained for delay in (0, 3, 4, 5)] == [True, True, False, False]
    with pytest.raises(UserError, match="4 actions, but trained real-time chunking takes at most 3, or choose guided"):
        encoded(policy, Continuation(left, 4, way="trained"))


def test_what_does_not_fit_is_one_message(policy):
    with pytest.raises(UserError, match=r"\[3, 7\], but must be at most 5 actions of 4 numbers"):
        encoded(policy, Continuation(np.zeros((3, 7)), 1))
    with pytest.raises(UserError, match=r"\[6, 4\], but must be at most 5 actions of 4 numbers"):
        encoded(policy, Continuation(np.zeros((6, 4)), 1))
    wrong = [
        ({"actions": np.zeros(4)}, r"are float64 [4], but must be [T, D]"),
        ({"actions": np.full((2, 4), np.nan)}, "contain NaN or infinity"),
        ({"delay": 3}, "the delay is 3, but must be a whole number from 0 to 2"),
        ({"delay": 1.5}, "the delay is 1.5"),
        (
            {"way": "magic", "schedule": "cubic"},
            "the way is 'magic', but must be one of auto, guided, trained; the sch",
        ),
        ({"execution_horizon": 0}, "execution_horizon is 0, but must be a whole number above 0"),
        ({"max_guidance_weight": float("nan")}, "max_guidance_weight is nan, but must be greater than 0"),
    ]
    for change, message in wrong:
        with pytest.raises(UserError, match=re.escape(message)):
            Continuation(**{"actions": np.zeros((2, 4)), "delay": 1} | change)


def test_a_policy_that_cannot_continue_says_so():
    config, data = ArmPolicy(), ArmDataset()
    module = config.build()
    module.rebuild_buffers()
    pipeline = build_pipeline(data, config, {"state": stats(4, 1), "actions": stats(4, 2)})
    arm = LoadedPolicy(config, data, pipeline, module)
    row = {"observation.images.front": IMAGE, "observation.state": STATE, "task": "push"}
    with pytest.raises(UserError, match="the policy 'arm' cannot continue a chunk"):
        arm.infer(row, continuing=Continuation(np.zeros((2, 4)), 1))
    run = load_config("examples/quickstart.toml", ["policy.action_dim=8"])
    assert run.policy.continuation_ways() == {"guided": run.policy.action_horizon}
