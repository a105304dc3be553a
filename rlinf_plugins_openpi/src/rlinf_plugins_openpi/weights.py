"""Published weights: openpi's PyTorch layout on disk, the model's own names in memory, one table between them.

Every relation is one to one and keeps the shape (the modules hold their tensors as published), so the table of names is
the whole conversion, in both directions. Importing this, and comparing names, leaves torch unloaded.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from rlinf_core import UserError

if TYPE_CHECKING:
    import torch

    from rlinf_plugins_openpi.dimensions import Pi0Dimensions

PALIGEMMA = "paligemma_with_expert.paligemma."
EXPERT = "paligemma_with_expert.gemma_expert."
EMBEDDING = f"{PALIGEMMA}model.language_model.embed_tokens.weight"
EMBEDDING_IN_FILES = f"{PALIGEMMA}lm_head.weight"
"""The embedding's other name: safetensors stores tied weights once, and published files keep this one."""
UNUSED = frozenset({f"{EXPERT}lm_head.weight"})
"""In published files, but no part of the model."""
INDEX = "model.safetensors.index.json"


def published_names(dimensions: Pi0Dimensions) -> dict[str, str]:
    """The model's own parameter names -> published names, in the order of use."""
    return dict(_pairs(dimensions))


def _pairs(dimensions: Pi0Dimensions) -> Iterator[tuple[str, str]]:
    tower = f"{PALIGEMMA}model.vision_tower.vision_model."
    yield "vision.patch_embedding.weight", f"{tower}embeddings.patch_embedding.weight"
    yield "vision.patch_embedding.bias", f"{tower}embeddings.patch_embedding.bias"
    yield "vision.patch_embedding.position", f"{tower}embeddings.position_embedding.weight"
    for i in range(dimensions.vision.depth):
        own, published = f"vision.blocks.{i}.", f"{tower}encoder.layers.{i}."
        yield from _linear(f"{own}layer_norm1", f"{published}layer_norm1")
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{own}{projection}", f"{published}self_attn.{projection}")
        yield from _linear(f"{own}layer_norm2", f"{published}layer_norm2")
        yield from _linear(f"{own}fc1", f"{published}mlp.fc1")
        yield from _linear(f"{own}fc2", f"{published}mlp.fc2")
    yield from _linear("vision.head.norm", f"{tower}post_layernorm")
    yield from _linear("vision.head.projector", f"{PALIGEMMA}model.multi_modal_projector.linear")
    yield "embedding.weight", EMBEDDING
    for i in range(dimensions.vlm.depth):
        yield from _gemma_block(f"layers.{i}.vlm.", f"{PALIGEMMA}model.language_model.layers.{i}.", adaptive=False)
        yield from _gemma_block(f"layers.{i}.expert.", f"{EXPERT}model.layers.{i}.", adaptive=dimensions.pi05)
    yield from _gemma_norm("vlm_norm", f"{PALIGEMMA}model.language_model.norm", adaptive=False)
    yield from _gemma_norm("expert_norm", f"{EXPERT}model.norm", adaptive=dimensions.pi05)
    pi05 = ("time_mlp_in", "time_mlp_out")
    pi0 = ("state_proj", "action_time_mlp_in", "action_time_mlp_out")
    for projection in ("action_in_proj", "action_out_proj", *(pi05 if dimensions.pi05 else pi0)):
        yield from _linear(projection, projection)


def _linear(own: str, published: str) -> Iterator[tuple[str, str]]:
    for kind in ("weight", "bias"):
        yield f"{own}.{kind}", f"{published}.{kind}"


def _gemma_norm(own: str, published: str, *, adaptive: bool) -> Iterator[tuple[str, str]]:
    if adaptive:
        yield from _linear(f"{own}.dense", f"{published}.dense")
    else:
        yield f"{own}.weight", f"{published}.weight"


def _gemma_block(own: str, published: str, *, adaptive: bool) -> Iterator[tuple[str, str]]:
    yield from _gemma_norm(f"{own}input_norm", f"{published}input_layernorm", adaptive=adaptive)
    for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield f"{own}{projection}.weight", f"{published}self_attn.{projection}.weight"
    yield from _gemma_norm(f"{own}post_attention_norm", f"{published}post_attention_layernorm", adaptive=adaptive)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        yield f"{own}{projection}.weight", f"{published}mlp.{projection}.weight"


class PublishedWeights:
    """Weights on disk under published names, read one tensor at a time (`rlinf_core.policy.WeightSource`).

    Args:
        path: A `.safetensors` file, or a folder with `model.safetensors` or with an index and its shards.
        dimensions: Of the model that asks; they decide which names there are.

    Raises:
        UserError: Nothing readable at `path`.
    """

    def __init__(self, path: str | Path, dimensions: Pi0Dimensions) -> None:
        self.path = Path(path)
        self._names = published_names(dimensions)
        self._files = {key: file for file in _weight_files(self.path) for key in _keys(file)}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of the parameter `name` (the model's own name), whole, on the CPU, in the dtype of the file."""
        return self._read(self._key(name))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the files with what the model expects.

        Args:
            shapes: The model's own parameter names -> shapes.

        Raises:
            UserError: Names every published key that is missing, unexpected or of another shape, and an embedding that
                is stored under both of its names with different values.
        """
        expected = {self._key(name): shape for name, shape in shapes.items()}
        problems = [f"missing: {key} {list(shape)}" for key, shape in expected.items() if key not in self._files]
        for key in self._files:
            shape = self._shape(key)
            if key in expected and shape != tuple(expected[key]):
                problems.append(f"wrong shape: {key} is {list(shape)}, the model has {list(expected[key])}")
        problems += [f"unexpected: {key} {list(self._shape(key))}" for key in self._unexpected(expected)]
        if self._embeddings_differ():
            problems.append(f"ambiguous: {EMBEDDING} and {EMBEDDING_IN_FILES} are one parameter but differ")
        self._refuse(problems)

    def check_names(self) -> None:
        """Compare the names in the files' headers with the table; reads no tensor, builds no model.

        Raises:
            UserError: Names every published key that is missing or unexpected.
        """
        expected = [self._key(name) for name in self._names]
        problems = [f"missing: {key}" for key in expected if key not in self._files]
        self._refuse(problems + [f"unexpected: {key}" for key in self._unexpected(expected)])

    def _unexpected(self, expected: Collection[str]) -> list[str]:
        known = {*expected, *UNUSED, EMBEDDING_IN_FILES}
        return [key for key in self._files if key not in known]

    def _refuse(self, problems: Sequence[str]) -> None:
        if problems:
            raise UserError(
                f"{self.path} does not fit the model ({len(problems)} problems); check policy.type, policy.variant and "
                f"policy.weights:\n  " + "\n  ".join(problems)
            )

    def _key(self, name: str) -> str:
        """The key under which the files hold a parameter (or should)."""
        key = self._names[name]
        return EMBEDDING_IN_FILES if key == EMBEDDING and key not in self._files else key

    def _read(self, key: str) -> torch.Tensor:
        with safe_open(self._files[key], framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    def _shape(self, key: str) -> tuple[int, ...]:
        with safe_open(self._files[key], framework="np") as file:
            return tuple(file.get_slice(key).get_shape())

    def _embeddings_differ(self) -> bool:
        if EMBEDDING not in self._files or EMBEDDING_IN_FILES not in self._files:
            return False
        import torch

        return not torch.equal(self._read(EMBEDDING), self._read(EMBEDDING_IN_FILES))


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files at a path, all of which exist."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"policy.weights: there is no file or folder {path}")
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not (path / INDEX).is_file():
        raise UserError(f"policy.weights: {path} holds neither model.safetensors nor {INDEX}")
    try:
        shards = sorted({path / file for file in json.loads((path / INDEX).read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"policy.weights: {path / INDEX} is not an index of safetensors shards: {error}") from error
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(f"policy.weights: {path / INDEX} names shards that are not there: {', '.join(absent)}")
    return shards


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="np") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise UserError(f"policy.weights: {path} is not a readable safetensors file: {error}") from error


def save_published(state: Mapping[str, torch.Tensor], path: str | Path, dimensions: Pi0Dimensions) -> None:
    """Write a model's parameters to one file under published names, in the dtypes they have.

    The embedding is stored as published files store it: under the name of the tied head, as the metadata says.

    Args:
        state: The model's own parameter names -> whole tensors on the CPU.
        path: The `.safetensors` file to write.
        dimensions: The model's.

    Raises:
        ValueError: `state` does not hold exactly the model's parameters.
    """
    from safetensors.torch import save_file

    names = published_names(dimensions)
    if state.keys() != names.keys():
        raise ValueError(f"not the parameters of this model: {sorted(state.keys() ^ names.keys())}")
    tensors = {names[name]: tensor.detach().contiguous() for name, tensor in state.items()}
    tensors[EMBEDDING_IN_FILES] = tensors.pop(EMBEDDING)
    save_file(tensors, path, metadata={"format": "pt", EMBEDDING: EMBEDDING_IN_FILES})
