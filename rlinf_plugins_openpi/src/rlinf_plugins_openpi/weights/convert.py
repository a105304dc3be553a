"""`rlinf convert`: weights of π0 or π0.5 from any known layout to openpi's PyTorch layout, tensor by tensor."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rlinf_core import UserError
from rlinf_core.files import check_writable, writing
from rlinf_core.terminal import print_progress
from rlinf_plugins_openpi.lora.config import EXPERTS
from rlinf_plugins_openpi.model.dimensions import VARIANTS, Pi0Dimensions
from rlinf_plugins_openpi.weights.files import SINGLE, TensorFiles, open_files, orbax_folder
from rlinf_plugins_openpi.weights.hub import find_weights
from rlinf_plugins_openpi.weights.layouts import JAX, FoundLayout, find_layout
from rlinf_plugins_openpi.weights.lora import MergedLora, Scaling, is_lora
from rlinf_plugins_openpi.weights.names import UNUSED_HEAD
from rlinf_plugins_openpi.weights.saving import (
    Entry,
    published_entries,
    published_key,
    write_safetensors,
)
from rlinf_plugins_openpi.weights.shapes import table_shapes
from rlinf_plugins_openpi.weights.source import PublishedWeights

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "F32", "bf16": "BF16"}
NAME_OUTPUT = "Name another folder with --output"

WHAT = """\
SOURCE is a folder with openpi's JAX parameters (`params/`, of a gs://openpi-assets checkpoint), a folder or file of
PyTorch weights from openpi, lerobot or RLinf, or a model's id on the hub. Its layout is recognised by its tensor names;
missing, unexpected or misshapen tensors are errors. FOLDER gets model.safetensors, for policy.weights and for openpi.
Parameters of openpi's LoRA training are merged into the weights that they change, in float32.
"""


class Converted(NamedTuple):
    """The result of a conversion."""

    path: Path
    layout: FoundLayout
    """The layout of the source."""
    dimensions: Pi0Dimensions
    tensors: int
    size: int
    """Bytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = WHAT
    parser.add_argument("source", metavar="SOURCE", help="a folder, a file, or owner/name[@revision] on the hub")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where model.safetensors is written")
    parser.add_argument(
        "--lora-alpha",
        nargs=2,
        type=float,
        metavar=("VLM", "EXPERT"),
        help="alpha of openpi's LoRA in both experts, which JAX parameters do not say; default: their ranks, as in "
        "gemma_2b_lora and gemma_300m_lora",
    )
    parser.add_argument("--rslora", action="store_true", help="openpi's LoRA was trained with rslora")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of all tensors in the file; default: as in SOURCE")


def run(options: argparse.Namespace) -> None:
    """Convert, and print the result."""
    scaling = None
    if options.lora_alpha or options.rslora:
        scaling = Scaling(dict(zip(EXPERTS, options.lora_alpha or (), strict=False)), options.rslora)
    done = convert(options.source, Path(options.output).expanduser(), options.dtype, scaling)
    kind = "π0.5" if done.dimensions.pi05 else "π0"
    print(f"{options.source}: {kind} in {done.layout}")
    print(f"{done.path}: {done.tensors} tensors, {done.size / 1e9:.1f} GB, openpi's PyTorch layout")


def convert(source: str, output: Path, dtype: str | None = None, scaling: Scaling | None = None) -> Converted:
    """Write weights in openpi's PyTorch layout.

    Args:
        source: The command's SOURCE.
        output: The folder for `model.safetensors`; created if needed.
        dtype: `"fp32"` or `"bf16"` for all tensors; None: each keeps its own.
        scaling: How openpi's LoRA is scaled; None: as in openpi's variants.

    Raises:
        UserError: The source does not fit π0 or π0.5 in a known size, or the output exists already, cannot be written
            or does not fit on the disk.
    """
    path = output / SINGLE
    if path.exists():
        raise UserError(f"{path} is already there: name another folder, or delete it")
    check_writable(output, NAME_OUTPUT)
    where = find_weights(source)
    files = _open(where)
    layout = find_layout(files.shapes, str(where))
    if layout.layout is JAX and any(map(is_lora, files.shapes)):
        files = MergedLora(files, scaling or Scaling({}))
    elif scaling is not None:
        raise UserError(f"--lora-alpha and --rslora are for openpi's LoRA, and {where} has none: leave them out")
    dimensions = dimensions_of(files, layout, where)
    weights = PublishedWeights(where, dimensions, files)
    shapes = table_shapes(dimensions)
    weights.check(shapes)
    # Parts of one stored tensor follow each other, so that stacked layers are read only once.
    names = sorted(shapes, key=lambda name: weights.slot(name).key)
    dtypes = {name: DTYPES[dtype] if dtype else files.dtypes[weights.slot(name).key] for name in names}
    published = published_entries({name: Entry(dtypes[name], shapes[name]) for name in names}, dimensions)

    def tensors(progress: Callable[[int, int], object]) -> Iterator[tuple[str, torch.Tensor]]:
        for done, name in enumerate(names, start=1):
            yield published_key(name, dimensions), weights.tensor(name)
            progress(done, len(names))

    with writing(output, NAME_OUTPUT), print_progress("converting", "tensors") as progress:
        output.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, published, tensors(progress), zeros={UNUSED_HEAD})
    return Converted(path, layout, dimensions, len(published), path.stat().st_size)


def _open(path: Path) -> TensorFiles:
    folder = orbax_folder(path)
    if folder is None:
        return open_files(path)
    from rlinf_plugins_openpi.weights.orbax import OrbaxParameters

    return OrbaxParameters(folder)


def dimensions_of(files: TensorFiles, layout: FoundLayout, path: Path) -> Pi0Dimensions:
    """The sizes of the model that these weights belong to; the horizon is unknown and set to 1.

    Raises:
        UserError: Neither π0 nor π0.5, or a size that no variant has.
    """
    any_size = Pi0Dimensions.of("dummy", pi05=True, action_dim=1, action_horizon=1)
    slots, there = layout.slots(any_size), files.shapes
    bias = there.get(slots["action_out_proj.bias"].key)
    if bias is None:
        raise UserError(f"{path} holds no action_out_proj: it is neither π0 nor π0.5 (π0-FAST is another model)")
    # Ask for the slot: the embedding may be stored under its other name, which is not in the table.
    embedding = there.get(PublishedWeights(path, any_size, files).slot("embedding.weight").key)
    pi05 = slots["time_mlp_in.bias"].key in there
    for name, sizes in VARIANTS.items():
        if embedding == (sizes.vocab_size, sizes.vlm.width):
            return Pi0Dimensions.of(name, pi05=pi05, action_dim=bias[0], action_horizon=1)
    known = ", ".join(f"{[sizes.vocab_size, sizes.vlm.width]} ({name})" for name, sizes in VARIANTS.items())
    raise UserError(f"{path} embeds its vocabulary as {list(embedding or ())}; the variants have {known}")
