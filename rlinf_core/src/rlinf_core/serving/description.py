"""What a server says about its policy before a client asks for anything."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.contract.weights.origin import DESCRIPTION
from rlinf_core.inference import LoadedPolicy
from rlinf_core.untrusted.text import read_json


def describe_policy(policy: LoadedPolicy, folder: Path) -> dict[str, Any]:
    """Cameras and names, sizes, state and action widths, horizon, prompts, and hashes of the folder's files."""
    description = read_json(folder / DESCRIPTION)
    data, coverage, normalize = policy.data, policy.coverage, policy.pipeline.normalize
    names = data.observation_names()
    described: dict[str, Any] = {
        "server": f"rlinf-core {metadata.version('rlinf-core')}",
        "policy": policy.config.type,
        "run": str(description.get("run", "")),
        "step": description.get("step"),
        "weights": str(description.get("weights", "")),
        "dataset": data.config_name or data.repo_id,
        "action_horizon": policy.config.chunk_length(),
        "real_time_chunking": dict(policy.config.continuation_ways()),
        "observation_columns": list(data.observation_columns()),
        "observation_names": dict(names),
        "sha256": {str(k): str(v) for k, v in dict(description.get("sha256", {})).items()},
    }
    sizes = coverage.images if coverage else {}
    if isinstance(data, LeRobotDatasetConfig):
        described["cameras"] = [
            {
                "name": camera,
                "column": column,
                "sizes": [list(one) for one in sizes.get(camera, ())],
            }
            for camera, column in data.images.items()
        ]
        described["state_columns"] = list(data.state)
        described["default_prompt"] = data.default_prompt
    if normalize:
        described |= {f"{key}_width": len(stats.mean) for key, stats in normalize.stats.items()}
    if coverage and coverage.state:
        described["state_range"] = [list(coverage.state_low), list(coverage.state_high)]
    return described
