"""The measurements on a GPU as a table, each with its prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlinf_core.costs.gpus import peak_tflops

PREDICTED = {
    "ours, π0.5, LIBERO-like": 62,
    "ours, π0.5, ALOHA-like": 41,
    "ours, π0, LIBERO-like": 62,
    "openpi, bf16 as shipped, π0.5, LIBERO-like": 15.1,
    "openpi, bf16 as shipped, π0.5, ALOHA-like": 14.7,
    "lerobot, its LIBERO recipe (bf16, checkpointing), π0.5, LIBERO-like": 13.4,
    "openpi, float32, π0.5, LIBERO-like": 10,
}
"""Samples per second on one H100, predicted by a model of the step's time before any measurement (± 30 %)."""

LIBERO, SAME = "ours, π0.5, LIBERO-like", "ours, π0.5, same tokens"
RATIOS = {
    "against openpi as shipped": (LIBERO, "openpi, bf16 as shipped, π0.5, LIBERO-like"),
    "against openpi in float32": (LIBERO, "openpi, float32, π0.5, LIBERO-like"),
    "against lerobot's recipe": (LIBERO, "lerobot, its LIBERO recipe (bf16, checkpointing), π0.5, LIBERO-like"),
    "against lerobot, compiled": (LIBERO, "lerobot, bf16, compiled, no checkpointing, π0.5, LIBERO-like"),
    "against lerobot, no checkpointing": (LIBERO, "lerobot, bf16, no checkpointing, π0.5, LIBERO-like"),
    "against lerobot, no empty camera": (LIBERO, "lerobot, bf16, no checkpointing, no empty camera, π0.5, LIBERO-like"),
    # Both compute 3 x 256 image tokens, 200 text tokens and 10 actions: openpi always pads to these.
    "against openpi as shipped, same tokens": (SAME, "openpi, bf16 as shipped, π0.5, LIBERO-like"),
    "against openpi as shipped, ALOHA-like": (
        "ours, π0.5, ALOHA-like",
        "openpi, bf16 as shipped, π0.5, ALOHA-like",
    ),
    "against openpi as shipped, π0": ("ours, π0, LIBERO-like", "openpi, bf16 as shipped, π0, LIBERO-like"),
}
"""Which rows are divided by which."""

HEAD = (
    "row",
    "samples/s",
    "predicted",
    "MFU",
    "peak GB",
    "first step s",
    "micro batch",
    "with EMA: samples/s",
    "with EMA: peak GB",
    "waits for the card",
    "recompiled",
)


def markdown(found: Mapping[str, Any]) -> str:
    """The table, the ratios, and what was not measured and why."""
    measured = found["rows"]
    lines = [" | ".join(("", *HEAD, "")).strip(), "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(_cells(name, row)) + " |" for name, row in measured.items()]
    compared = [f"- {name}: {ratio:.2f} times as fast" for name, ratio in ratios(measured).items()]
    missing = [f"- {name}: {reason}" for name, reason in found["not_measured"].items()]
    notes = [
        f"- {name}: {row['card'] or 'CPU'}; " + ", ".join(f"{key} {value}" for key, value in row["versions"].items())
        for name, row in measured.items()
    ]
    parts = [lines, ["Ours:", "", *compared], ["Not measured:", "", *missing], ["Card and versions:", "", *notes]]
    return "\n\n".join("\n".join(part) for part in parts if len(part) > 2) + "\n"


def ratios(measured: Mapping[str, Any]) -> dict[str, float]:
    """The speedup of ours, for each of `RATIOS` whose rows were measured."""
    return {
        name: round(measured[ours]["samples_per_second"] / measured[peer]["samples_per_second"], 3)
        for name, (ours, peer) in RATIOS.items()
        if ours in measured and peer in measured
    }


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    ema = row.get("with_ema", {})
    ours = row["job"]["side"] == "ours"
    cells = (
        name,
        row["samples_per_second"],
        PREDICTED.get(name) if row["card"] else None,
        _share_of_peak(row),
        row["peak_memory_gb"],
        row["first_step_seconds"],
        row["job"]["micro_batch"],
        ema.get("samples_per_second"),
        ema.get("peak_memory_gb"),
        (row["host_waits"] or "no") if ours and row["card"] else None,
        row["recompiled_when_warm"] if ours else None,
    )
    return ["" if cell is None else str(cell) for cell in cells]


def _share_of_peak(row: Mapping[str, Any]) -> str | None:
    """Useful operations per second, divided by the GPU's bfloat16 peak."""
    peak = peak_tflops(row["card"]) if row["card"] else None
    return None if peak is None else f"{100 * row['useful_tflops_per_second'] / peak:.1f} %"
