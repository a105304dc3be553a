"""How many steps, and what happens if compilation fails."""

import warnings

import numpy as np
import pytest
import torch
from small_pi0 import batch_of, build

from rlinf_core import UserError
from rlinf_core.sampling import EagerSampling, Sampler, check_steps
from rlinf_plugins_openpi import Pi05Config

BATCH = batch_of([[True, True]], [4])


class Breaking(Pi05Config):
    """Its compiler fails."""

    def compile_sampling(self, policy, *, on):
        policy.compile_sampling(on=on, backend=broken)
        return True


def broken(graph, inputs):
    raise RuntimeError("no C++ compiler")


def test_without_a_compiler_actions_are_computed_as_written_with_one_warning():
    torch._dynamo.reset()
    model = build(True)
    expected = Sampler(Pi05Config(variant="dummy"), model)(BATCH, BATCH["noise"])
    sampler = Sampler(Breaking(variant="dummy"), model, compiled=True)
    with pytest.warns(EagerSampling, match=r"torch\.compile failed: .*no C\+\+ compiler"):
        torch.testing.assert_close(sampler(BATCH, BATCH["noise"]), expected)
    assert not sampler.compiled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(sampler(BATCH, BATCH["noise"]), expected)


def test_steps_are_the_callers_then_the_samplers_then_the_policys():
    model, config = build(True), Pi05Config(variant="dummy")
    two, three, ten = (model.sample_actions(BATCH, BATCH["noise"], steps) for steps in (2, 3, 10))
    torch.testing.assert_close(Sampler(config, model)(BATCH, BATCH["noise"]), ten)
    torch.testing.assert_close(Sampler(config, model, steps=2)(BATCH, BATCH["noise"]), two)
    torch.testing.assert_close(Sampler(config, model, steps=2)(BATCH, BATCH["noise"], 3), three)


@pytest.mark.parametrize("steps", [0, -1, 101, 2.0, "3", True, float("nan"), [1], np.array([1, 2]), 10**40])
def test_other_numbers_of_steps_are_refused(steps):
    with pytest.raises(UserError, match="must be a whole number from 1 to 100"):
        check_steps(Pi05Config(variant="dummy"), steps)


def test_a_policy_without_steps_says_so():
    from toy_data import ToyPolicy

    assert check_steps(ToyPolicy(), None) is None
    with pytest.raises(UserError, match="does not draw actions in steps"):
        check_steps(ToyPolicy(), 3)
    with pytest.raises(UserError, match="cannot be compiled"):
        Sampler(ToyPolicy(), None, compiled=True)
