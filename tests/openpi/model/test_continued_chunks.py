"""Real-time chunking: the published formulas, lerobot's implementation, and what training for it changes."""

import copy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from pair_of_lerobot import batch_of, in_float64, theirs_of
from pair_of_lerobot import pair as equal_pair
from test_pi0 import build, make_batch
from tiny_lerobot import tiny_dimensions

from rlinf_core.contract.continuation import prefix_weights
from rlinf_core.contract.module import PreviousActions
from rlinf_plugins_openpi import Pi0Config, Pi05Config
from rlinf_plugins_openpi.model import pi0
from rlinf_plugins_openpi.model.draws import DELAY
from rlinf_plugins_openpi.model.real_time import continue_chunks, guidance_weight

needs_lerobot = pytest.mark.skipif(
    not (find_spec("lerobot") and find_spec("transformers")), reason="needs lerobot: uv sync --group test"
)
BOTH = pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])


def previous_of(batch, delay, end, *, trained=False, schedule="exp", largest=5.0, length=None):
    """The first actions of the batch's chunks, as those to continue."""
    size, horizon = batch["actions"].shape[:2]
    actions = batch["actions"].clone()
    actions[:, horizon if length is None else length :] = 0
    weights = torch.from_numpy(prefix_weights(delay, end, horizon, schedule)).expand(size, -1)
    return PreviousActions(actions, torch.full((size,), delay), weights, torch.full((size,), largest), trained)


@needs_lerobot
@pytest.mark.parametrize("schedule", ["exp", "linear", "ones", "zeros"])
def test_the_soft_mask_is_lerobots(schedule):
    from lerobot.configs import RTCAttentionSchedule
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot.policies.rtc.modeling_rtc import RTCProcessor

    theirs = RTCProcessor(RTCConfig(prefix_attention_schedule=RTCAttentionSchedule(schedule.upper())))
    for horizon in (1, 2, 8, 50):
        for start in range(0, horizon + 1, 1 + horizon // 7):
            for end in range(0, horizon + 1, 1 + horizon // 7):
                wanted = theirs.get_prefix_weights(start, end, horizon).numpy()
                np.testing.assert_allclose(prefix_weights(start, end, horizon, schedule), wanted, atol=1e-6)


def test_the_soft_mask_is_the_papers():
    """Equation 5 of arXiv 2506.07339, with horizon 8, delay 2 and 3 actions executed between two chunks."""
    horizon, delay, executed = 8, 2, 3
    c = [(horizon - executed - i) / (horizon - executed - delay + 1) for i in range(horizon)]
    wanted = [1.0] * delay + [c[i] * (np.e ** c[i] - 1) / (np.e - 1) for i in range(delay, horizon - executed)]
    np.testing.assert_allclose(prefix_weights(delay, horizon - executed, horizon), [*wanted, 0, 0, 0], rtol=1e-6)


def test_guidance_is_clipped_at_both_ends():
    """(1 - τ) / (τ r²) has its smallest value, 2, in the middle, and is infinite at noise and at data."""
    five = torch.tensor([5.0, 100.0])
    assert guidance_weight(1.0, five).tolist() == [5.0, 100.0]
    assert guidance_weight(0.5, five).tolist() == [2.0, 2.0]
    for time in (0.1, 0.3, 0.7, 0.9):
        tau = 1 - time
        exact = (1 - tau) / tau * ((tau**2 + (1 - tau) ** 2) / (1 - tau) ** 2)
        assert guidance_weight(time, five).tolist() == pytest.approx([min(5.0, exact), exact])


class Exact:
    """lerobot's guidance with the gradient of the model: it calls the model before it asks for gradients."""

    def __init__(self, processor):
        self.processor = processor

    def is_debug_enabled(self):
        return False

    def denoise_step(self, *, original_denoise_step_partial, **options):
        def velocity(x_t):
            return original_denoise_step_partial(x_t.requires_grad_())

        return self.processor.denoise_step(original_denoise_step_partial=velocity, **options)


@needs_lerobot
@BOTH
@pytest.mark.parametrize(
    ("gradient", "delay", "end", "length"),
    [("of the model", 2, 4, 4), ("of the model", 3, 3, 3), ("of the model", 0, 2, 4), ("as shipped", 1, 5, 5)],
)
def test_guided_chunks_are_lerobots(monkeypatch, pi05, gradient, delay, end, length):
    """With the same weights, noise and actions to continue. As shipped (0.6), lerobot leaves out the model's gradient,
    which the paper has: its correction is the weighted error itself."""
    from lerobot.configs import RTCAttentionSchedule
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot.policies.rtc.modeling_rtc import RTCProcessor

    monkeypatch.setattr(pi0, "time_features", in_float64)
    ours, theirs = equal_pair(tiny_dimensions(pi05=pi05))
    batch = batch_of(ours.dimensions)
    settings = RTCConfig(prefix_attention_schedule=RTCAttentionSchedule.EXP, max_guidance_weight=5.0)
    processor = RTCProcessor(settings)
    theirs.rtc_processor = Exact(processor) if gradient == "of the model" else processor
    theirs.config.rtc_config = settings
    left = batch["actions"][:, :length]
    wanted = theirs.sample_actions(
        *theirs_of(batch, ours),
        noise=batch["noise"],
        num_steps=10,
        inference_delay=delay,
        prev_chunk_left_over=left,
        execution_horizon=end,
    )
    previous = previous_of(batch, delay, end, length=length)
    own = ours.continue_actions(batch, batch["noise"], previous, 10)
    if gradient == "as shipped":
        prefix = ours.embed_prefix(batch)
        cache = ours.prefill(prefix)

        def velocity(x_t, time):
            return ours.velocity(ours.run(prefix, ours.embed_suffix(batch["state"], x_t, time), cache=cache)).detach()

        apart = own
        own = continue_chunks(velocity, batch["noise"], previous, pi0.euler_times(10))
        assert not torch.allclose(apart, own, atol=1e-2)
    plain = ours.sample_actions(batch, batch["noise"], 10)
    assert not torch.allclose(plain, own, atol=1e-2)
    assert not own.requires_grad
    torch.testing.assert_close(own, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


@BOTH
def test_nothing_to_continue_is_plain_sampling(pi05):
    model, batch = build(pi05), make_batch()
    plain = model.sample_actions(batch, batch["noise"])
    for previous in (previous_of(batch, 0, 0), previous_of(batch, 0, 0, trained=True)):
        torch.testing.assert_close(model.continue_actions(batch, batch["noise"], previous), plain)


@BOTH
def test_given_actions_are_kept_and_change_the_others(pi05):
    model, batch = build(pi05), make_batch()
    plain = model.sample_actions(batch, batch["noise"])
    kept = model.continue_actions(batch, batch["noise"], previous_of(batch, 2, 4, trained=True))
    assert torch.equal(kept[:, :2], batch["actions"][:, :2])
    assert not torch.allclose(kept[:, 2:], plain[:, 2:])
    guided = model.continue_actions(batch, batch["noise"], previous_of(batch, 2, 4))
    distances = [(chunk[:, :2] - batch["actions"][:, :2]).norm() for chunk in (guided, plain)]
    assert distances[0] < 0.2 * distances[1]


@BOTH
def test_each_sample_of_a_batch_has_its_own_delay_and_weights(pi05):
    model, batch = build(pi05), make_batch(size=3)
    for trained in (False, True):
        every = [previous_of(batch, delay, end, trained=trained) for delay, end in ((0, 2), (1, 3), (3, 5))]
        mixed = PreviousActions(
            batch["actions"],
            torch.tensor([0, 1, 3]),
            torch.stack([one.weights[number] for number, one in enumerate(every)]),
            every[0].max_guidance_weight,
            trained,
        )
        together = model.continue_actions(batch, batch["noise"], mixed)
        for number, one in enumerate(every):
            alone = model.continue_actions(batch, batch["noise"], one)
            torch.testing.assert_close(together[number], alone[number], atol=2e-5, rtol=1e-4)


@BOTH
def test_a_delay_of_zero_trains_as_without(pi05):
    model, batch = build(pi05), make_batch(size=3)
    plain, delayed = model(batch), model(batch | {DELAY: torch.zeros(3, dtype=torch.int64)})
    torch.testing.assert_close(delayed.loss_sum, plain.loss_sum)
    assert delayed.weight == plain.weight == 15
    torch.testing.assert_close(delayed.sample_losses, plain.sample_losses)


def losses_one_by_one(model, batch, delay):
    """The loss of each action that is not given, with the given ones as they are and a time for each token."""
    noise, actions, time = batch["noise"][0], batch["actions"][0], batch["time"][0]
    times = torch.tensor([0.0 if step < delay else float(time) for step in range(len(actions))])
    x_t = torch.stack(
        [action if t == 0 else t * one + (1 - t) * action for t, one, action in zip(times, noise, actions, strict=True)]
    )
    suffix = model.embed_suffix(batch["state"][:1], x_t[None], times[None])
    prefix = model.embed_prefix({key: value[:1] for key, value in batch.items()})
    velocity = model.velocity(model.run(prefix, suffix))[0]
    return (velocity - (noise - actions)).square().mean(-1)[delay:]


@BOTH
def test_given_actions_are_clean_and_out_of_the_loss(pi05):
    model, batch = build(pi05), make_batch(size=3)
    delays = torch.tensor([0, 2, 4])
    output = model(batch | {DELAY: delays})
    assert output.weight == 15 - 6
    for number, delay in enumerate(delays.tolist()):
        one = {key: value[number : number + 1] for key, value in batch.items()}
        torch.testing.assert_close(output.sample_losses[number, 0], losses_one_by_one(model, one, delay).sum())
    assert output.sample_losses[:, 1].tolist() == [5, 3, 1]
    batch["noise"][1, :2], batch["noise"][2, :4] = 100.0, -100.0
    torch.testing.assert_close(model(batch | {DELAY: delays}).loss_sum, output.loss_sum)


def test_padded_steps_and_given_ones_are_left_out_together():
    model, batch = build(), make_batch(size=2)
    model.mask_padded_steps = True
    batch["actions_is_pad"] = torch.tensor([[False] * 5, [False, False, False, True, True]])
    output = model(batch | {DELAY: torch.tensor([1, 2])})
    assert output.sample_losses[:, 1].tolist() == [4, 1]
    assert output.weight == 5


@BOTH
def test_gradients_are_those_of_differences(pi05):
    """In float64, along a random direction."""
    model, batch = build(pi05).double(), make_batch(size=2)
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    batch[DELAY] = torch.tensor([2, 0])
    model(batch).loss_sum.backward()
    generator = torch.Generator().manual_seed(3)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]
    slope = sum(float((p.grad * way).sum()) for p, way in zip(trained, direction, strict=True))
    losses = []
    for step in (1e-6, -1e-6):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            own = [p for p, q in zip(moved.parameters(), model.parameters(), strict=True) if q.grad is not None]
            for parameter, way in zip(own, direction, strict=True):
                parameter += step * way
        losses.append(moved(batch).loss_sum.item())
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("kind", [Pi0Config, Pi05Config])
def test_a_delay_is_drawn_last_and_every_number_is_equally_likely(kind):
    plain, trained = (kind(variant="dummy", rtc_training_max_delay=delay) for delay in (0, 4))
    assert DELAY not in plain.draw(np.random.default_rng(0))
    drawn, without = trained.draw(np.random.default_rng(0)), plain.draw(np.random.default_rng(0))
    assert all(np.array_equal(drawn[key], without[key]) for key in ("noise", "time"))
    generator = np.random.default_rng(1)
    counts = np.bincount(
        [int(trained.model_copy(update={"augment": False}).draw(generator)[DELAY]) for _ in range(4000)]
    )
    assert len(counts) == 5
    assert counts.min() > 700


def test_a_delay_must_leave_something_to_learn():
    with pytest.raises(ValueError, match=r"rtc_training_max_delay = 8 may give all 8 actions.*set it to 7 or less"):
        Pi05Config(variant="dummy", action_horizon=8, rtc_training_max_delay=8)
