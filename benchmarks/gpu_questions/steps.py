"""Where does the time of a whole step go, by micro batch, compiled and not?"""

from __future__ import annotations

import gc
import itertools
import os
import time
from pathlib import Path
from typing import Any

import torch
from policy_step.cases import CASES, dimensions, make_samples, useful_flops
from policy_step.ours import Options, OurStep, collate, sharded

from gpu_questions.measuring import Probe
from rlinf_core.costs.gpus import peak_tflops
from rlinf_core.torch_names import compiled_graphs
from rlinf_core.training.distributed.processes import set_cuda_defaults, to_device

CASE = CASES["two_of_three"]
SETS, TIMED = 6, 12


def step(probe: Probe, options: Any) -> None:
    """Steps of π0.5 on LIBERO-like samples whose prompts differ in length, as from a loader."""
    samples = 4 if probe.tiny else options.samples
    for one in ["2e"] if probe.tiny else options.micro_batches.split():
        micro, compiled = int(one.rstrip("e")), not one.endswith("e")
        try:
            _measure(probe, samples, micro, compiled=compiled)
        except torch.OutOfMemoryError as error:
            print(f"step, micro batch {one}: out of memory: {str(error).splitlines()[0][:120]}", flush=True)
        gc.collect()


def _measure(probe: Probe, samples: int, micro: int, *, compiled: bool) -> None:
    if probe.on_cuda:
        set_cuda_defaults()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    before = compiled_graphs()
    sized = dimensions("minimal" if probe.tiny else "base", CASE)
    options = Options(compiled=compiled, compute_dtype=torch.bfloat16)
    made = [make_samples(CASE, sized, samples, seed=seed, spread=3.0) for seed in range(1 if probe.tiny else SETS)]
    run = OurStep(sharded(sized, probe.device, options), made[0], micro_batch=micro, options=options)
    sets = [
        [to_device(collate(one[i : i + micro], run.policy), probe.device) for i in range(0, samples, micro)]
        for one in made
    ]
    first = []
    for batches in itertools.islice(itertools.cycle(sets), len(sets) + 2):
        run.batches = batches
        start = time.perf_counter()
        run()
        _wait(probe)
        first.append(time.perf_counter() - start)
    gpu, host = _times(probe, run, sets)
    found = {
        "ms": gpu,
        "host_ms": host,
        "samples_per_second": 1e3 * samples / gpu,
        "first_step_s": first[0],
        "second_step_s": first[1],
        "graphs": compiled_graphs() - before,
    }
    if probe.on_cuda:
        found |= {
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        }
        if peak := peak_tflops(torch.cuda.get_device_name()):
            found["mfu"] = sum(useful_flops(one, sized) for one in made) / len(made) / gpu / peak / 1e9
    probe.report(f"step, micro batch {micro}{'' if compiled else ', not compiled'}", **found)
    if probe.on_cuda:
        _profile(run, f"kernels_{micro}{'' if compiled else 'e'}.txt")


def _times(probe: Probe, run: OurStep, sets: list[Any]) -> tuple[float, float]:
    """Median milliseconds of a step on the device, and until the host has started it."""
    device, host = [], []
    for batches in itertools.islice(itertools.cycle(sets), 1 if probe.tiny else TIMED):
        run.batches = batches
        begin = time.perf_counter()
        device.append(probe.milliseconds(run, rounds=1) if not probe.on_cuda else _one(run, host))
        if not probe.on_cuda:
            host.append(1e3 * (time.perf_counter() - begin))
    return sorted(device)[len(device) // 2], sorted(host)[len(host) // 2]


def _one(run: OurStep, host: list[float]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
    start = time.perf_counter()
    begin.record()
    run()
    end.record()
    host.append(1e3 * (time.perf_counter() - start))
    end.synchronize()
    return begin.elapsed_time(end)


def _wait(probe: Probe) -> None:
    if probe.on_cuda:
        torch.cuda.synchronize()


def _profile(run: OurStep, name: str) -> None:
    """Write the time of each kernel to `$OUT`, or here."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
    Path(os.environ.get("OUT", "."), name).write_text(table, encoding="utf-8")
    print(table[:6000], flush=True)
