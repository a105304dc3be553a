"""What a server says about its policy before a client asks for anything."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.contract.weights.origin import DESCRIPTION
from rlinf_core.data.coverage import Coverage
from rlinf_core.inference import LoadedPolicy
from rlinf_core.serving.observations import NOISE, SEED, STEPS
from rlinf_core.training.state.build import DTYPES
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
        "accepts": [NOISE, SEED, *([STEPS] if policy.config.sampling_steps() else [])],
        "dtype": next((name for name, dtype in DTYPES.items() if dtype == policy.dtype), str(policy.dtype)),
        "num_steps": policy.sample.steps or policy.config.sampling_steps(),
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
    if coverage:
        described |= _of_training(coverage)
    return described


def _of_training(coverage: Coverage) -> dict[str, Any]:
    """What is known of the training rows: names, rate, tasks, range of states; what is not known is left out."""
    known: dict[str, Any] = {f"{key.removesuffix('s')}_names": list(names) for key, names in coverage.names.items()}
    if coverage.state:
        known["state_range"] = [list(coverage.state_low), list(coverage.state_high)]
    if coverage.fps:
        known["fps"] = coverage.fps
    if coverage.num_tasks:
        known |= {"tasks": list(coverage.tasks), "num_tasks": coverage.num_tasks}
    return known
