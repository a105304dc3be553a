"""Learning-rate schedules against those of transformers. numerics/test_optimizer.py has `cosine`."""

import pytest
import torch
from pydantic import ValidationError

from rlinf_core.training.recipes import ConstantConfig, HfCosineConfig, WsdConfig

LR = 3e-4
WSD = {"warmup_steps": 7, "stable_steps": 10, "decay_steps": 40}


def theirs(make, steps):
    """The rates of a schedule of transformers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = make(optimizer)
    rates = []
    for _ in range(steps):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return torch.tensor(rates, dtype=torch.float64)


CASES = {
    "constant": (ConstantConfig(lr=LR, warmup_steps=7), "get_constant_schedule_with_warmup", {"num_warmup_steps": 7}),
    "constant, no warm-up": (
        ConstantConfig(lr=LR, warmup_steps=0),
        "get_constant_schedule_with_warmup",
        {"num_warmup_steps": 0},
    ),
    "cosine": (
        HfCosineConfig(lr=LR, warmup_steps=7, decay_steps=40),
        "get_cosine_schedule_with_warmup",
        {"num_warmup_steps": 7, "num_training_steps": 40},
    ),
    "cosine, no warm-up": (
        HfCosineConfig(lr=LR, warmup_steps=0, decay_steps=40, min_lr=LR / 10),
        "get_cosine_with_min_lr_schedule_with_warmup",
        {"num_warmup_steps": 0, "num_training_steps": 40, "min_lr": LR / 10},
    ),
    "linear": (
        WsdConfig(lr=LR, warmup_steps=7, stable_steps=0, decay_steps=40, decay="linear"),
        "get_linear_schedule_with_warmup",
        {"num_warmup_steps": 7, "num_training_steps": 40},
    ),
    **{
        f"wsd, {curve}": (
            WsdConfig(lr=LR, min_lr=LR / 10, decay=curve, **WSD),
            "get_wsd_schedule",
            {
                "num_warmup_steps": 7,
                "num_stable_steps": 10,
                "num_decay_steps": 23,
                "decay_type": curve,
                "min_lr_ratio": 0.1,
            },
        )
        for curve in ("cosine", "linear", "1-sqrt")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_rates_are_those_of_transformers(case):
    """In float32, in the steps that it computes; its cosines would rise again afterwards."""
    import transformers

    ours, name, settings = CASES[case]
    expected = theirs(lambda optimizer: getattr(transformers, name)(optimizer, **settings), 41)
    found = torch.stack([ours.lr_at(torch.tensor(float(step))) for step in range(41)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=LR * 1e-6)
    assert float(ours.lr_at(torch.tensor(10_000))) == pytest.approx(getattr(ours, "min_lr", LR))


def test_stages_that_do_not_fit_are_refused():
    with pytest.raises(ValidationError, match=r"decay_steps \(17\) must be larger than warmup_steps \+ stable_steps"):
        WsdConfig(**WSD | {"decay_steps": 17})
    with pytest.raises(ValidationError, match=r"min_lr \(0.5\) must not be larger than lr \(0.1\)"):
        HfCosineConfig(lr=0.1, min_lr=0.5)
    with pytest.raises(ValidationError, match="stable_steps"):
        WsdConfig()


def test_a_schedule_says_when_it_outlasts_the_run():
    assert "warm-up of 7 steps (optim.warmup_steps) does not end" in ConstantConfig(warmup_steps=7).note(7)
    assert ConstantConfig(warmup_steps=7).note(8) == ""
    assert "decays until step 40 (optim.decay_steps)" in WsdConfig(**WSD).note(39)
    assert WsdConfig(**WSD).note(40) == ""
