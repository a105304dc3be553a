"""The result of a benchmark for programs: with `--json`, the last line of standard output is one JSON object.

    {"benchmark": "norm_stats", "date": "2026-11-23", "machine": {...}, "results": {"vs_openpi_loader": 16.6}, ...}

`results` maps names to finite numbers, and is all that a program needs to read. Further keys (rounds, versions,
settings) are each benchmark's own. Standard library only, as benchmarks also run from plain files.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ResultLine:
    """Where a benchmark's result goes: a line of JSON if `wanted`, else text for people."""

    def __init__(self, benchmark: str, *, wanted: bool) -> None:
        """If wanted, send to standard error what anything else in this process prints from here on.

        Libraries, workers and exit handlers print, too; only the file descriptor is shared by all of them.
        """
        self._benchmark, self._load = benchmark, os.getloadavg()[0]
        self._descriptor = None
        if wanted:
            sys.stdout.flush()
            self._descriptor = os.dup(1)
            os.dup2(2, 1)

    def write(self, results: Mapping[str, float], text: str, **details: Any) -> None:
        """Print the result.

        Args:
            results: Name -> finite number.
            text: What people read instead, without `--json`.
            details: Further keys of the object.

        Raises:
            ValueError: A result is not a finite number.
        """
        if self._descriptor is None:
            print(text)
            return
        wrong = [name for name, value in results.items() if not _is_finite(value)]
        if wrong:
            raise ValueError(f"{self._benchmark}: {wrong[0]} is {results[wrong[0]]!r}, not a finite number")
        found = {
            "benchmark": self._benchmark,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine() | {"load": [round(self._load, 1), round(os.getloadavg()[0], 1)]},
            "results": dict(results),
        }
        with os.fdopen(self._descriptor, "w", encoding="utf-8") as stdout:
            stdout.write(json.dumps(found | details, allow_nan=False) + "\n")


def machine() -> dict[str, Any]:
    """What the numbers were measured on; `load` is the load average at the start and at the end."""
    torch = sys.modules.get("torch")
    on_cuda = torch is not None and torch.cuda.is_available()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **({"gpu": torch.cuda.get_device_name()} if torch is not None and on_cuda else {}),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
