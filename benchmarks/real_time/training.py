"""Train the smallest π0 on the course, in this process, from samples, draws and batches of the real pipeline."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from real_time.course import Conditions, CourseData, demonstrate
from rlinf_core.data.normalize import NormStats
from rlinf_core.data.pipeline import Pipeline, build_pipeline
from rlinf_core.inference import LoadedPolicy
from rlinf_core.training.state.fsdp import materialize
from rlinf_plugins_openpi import Pi0Config

BATCH, WARM_UP, LARGEST, SMALLEST, DECAY = 64, 50, 1e-3, 5e-5, 0.995


def statistics(values: NDArray[np.float32]) -> NormStats:
    """Of [N, D] numbers."""
    return NormStats(values.mean(0), values.std(0), *np.quantile(values, [0.01, 0.99], axis=0))


def demonstrations(
    count: int, seed: int, chunk: int, conditions: Conditions
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """States [N, 2] and chunks [N, H, 2] of each demonstration; after its end, the last action is repeated."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        states, actions = demonstrate(conditions, generator)
        steps = np.minimum(np.arange(len(actions))[:, None] + np.arange(chunk), len(actions) - 1)
        found.append((states, actions[steps]))
    return found


def train(
    *,
    max_delay: int,
    steps: int,
    episodes: int,
    seed: int,
    log: Callable[[str], object],
    chunk: int,
    conditions: Conditions,
) -> LoadedPolicy:
    """Train a policy from scratch; returns its averaged weights, ready to act.

    Args:
        max_delay: `policy.rtc_training_max_delay`.
        steps: Optimizer steps of 64 samples.
        episodes: Demonstrations.
        seed: Of demonstrations, initial values, order and draws.
        log: Called with the loss, now and then.
        chunk: `policy.action_horizon`.
        conditions: Of the course on which demonstrations are made.
    """
    config = Pi0Config(
        variant="dummy",
        weights="random",
        action_dim=2,
        action_horizon=chunk,
        augment=False,
        rtc_training_max_delay=max_delay,
    )
    data = CourseData(config_name="course")
    recorded = demonstrations(episodes, seed, chunk, conditions)
    states, chunks = (np.concatenate([one[part] for one in recorded]) for part in (0, 1))
    stats = {"state": statistics(states), "actions": statistics(chunks[:, 0])}
    pipeline = build_pipeline(data, config, stats)
    samples = [
        pipeline.encode({"observation.state": state, "action": chunk})
        for state, chunk in zip(states, chunks, strict=True)
    ]
    with torch.device("meta"):
        module = config.build()
    initial = torch.Generator().manual_seed(seed)
    materialize(module, torch.device("cpu"), lambda name, shape: module.initial_value(name, shape, initial))
    average = copy.deepcopy(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LARGEST, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    generator = np.random.default_rng(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps)
        chosen = generator.choice(len(samples), BATCH, replace=False)
        drawn = [{**samples[number], **config.draw(generator)} for number in chosen]
        output = module(config.collate(drawn))
        loss = output.loss_sum / output.weight
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - DECAY)
        if (step + 1) % 200 == 0:
            log(f"max_delay {max_delay}: step {step + 1} of {steps}, loss {loss.item():.4f}")
    return _loaded(config, data, pipeline, average)


def _loaded(config: Pi0Config, data: CourseData, pipeline: Pipeline, module: torch.nn.Module) -> LoadedPolicy:
    return LoadedPolicy(config, data, pipeline, module.eval())


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine."""
    if step < WARM_UP:
        return LARGEST * (step + 1) / WARM_UP
    return SMALLEST + (LARGEST - SMALLEST) * 0.5 * (1 + math.cos(math.pi * step / steps))
