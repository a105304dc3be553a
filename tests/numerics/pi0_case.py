"""A recorded model: its sizes, weights and inputs as ours."""

import json
from pathlib import Path

import numpy as np
import torch

from rlinf_plugins_openpi.model.dimensions import CAMERAS, GemmaDimensions, Pi0Dimensions, VisionDimensions
from rlinf_plugins_openpi.model.pi0 import Pi0
from rlinf_plugins_openpi.weights.source import PublishedWeights


def read_dimensions(folder: Path) -> Pi0Dimensions:
    config = json.loads((folder / "config.json").read_text())
    height, width = config["vision"]["patch_size"]
    assert height == width
    return Pi0Dimensions(
        pi05=config["kind"] == "pi05",
        action_dim=config["action_dim"],
        action_horizon=config["action_horizon"],
        vocab_size=config["vocab_size"],
        vlm=GemmaDimensions(**config["paligemma"]),
        expert=GemmaDimensions(**config["action_expert"]),
        vision=VisionDimensions(**config["vision"] | {"patch_size": width}),
    )


def read_model(folder: Path, weights: Path | None = None) -> Pi0:
    """The recorded model with the weights of its folder, or others; loaded strictly."""
    dimensions = read_dimensions(folder)
    model = Pi0(dimensions)
    source = PublishedWeights(weights or folder / "params_torch.safetensors", dimensions)
    source.check({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(source.tensor(name))
    return model


def read_batch(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """A batch from recorded arrays, every camera and all padding kept."""
    tensor = {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}
    names = {"tokenized_prompt": "tokens", "tokenized_prompt_mask": "token_mask"}
    batch = {names.get(key, key): value for key, value in tensor.items() if "/" not in key}
    batch["images"] = torch.stack([tensor[f"image/{camera}"] for camera in CAMERAS], dim=1)
    batch["image_mask"] = torch.stack([tensor[f"image_mask/{camera}"] for camera in CAMERAS], dim=1)
    return batch


def without_absent(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out cameras that no sample has and text that is padding in all samples."""
    cameras = batch["image_mask"].any(0)
    length = int(batch["token_mask"].any(0).nonzero().max()) + 1
    trimmed = {"tokens": batch["tokens"][:, :length], "token_mask": batch["token_mask"][:, :length]}
    return batch | trimmed | {"images": batch["images"][:, cameras], "image_mask": batch["image_mask"][:, cameras]}


def max_distance(ours: torch.Tensor, theirs: np.ndarray) -> float:
    """max|difference| / max|reference|."""
    reference = torch.from_numpy(np.asarray(theirs))
    assert ours.shape == reference.shape
    return float((ours.detach() - reference).abs().max() / reference.abs().max())
