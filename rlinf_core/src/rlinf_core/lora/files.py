"""Adapters in files of PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

PEFT is not needed to read or write them. A matrix is found by the published name of its module, with
`base_model.model.` and perhaps other wrappers before it; `.lora_A.weight` and `.lora_B.weight` follow. Modules that are
trained whole are in the same file under their own names. Importing this loads no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlinf_core.errors import UserError
from rlinf_core.lora.config import LoraConfig
from rlinf_core.lora.selection import LISTED, Change, Named, Selection, select
from rlinf_core.untrusted.text import read_json

if TYPE_CHECKING:
    import torch

    from rlinf_core.lora.layers import LowRank

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before every name."""
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "model.")
"""Other wrappers around a model, also repeated: PEFT's own, DDP's, torch.compile's, lerobot's."""
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<kind>[AB])(?:\.[^.]+)?\.weight")
_COPY = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.)")
_FLOATS = ("F64", "F32", "F16", "BF16")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Initial values of PEFT that change the base weights, too."""
_UNSUPPORTED = {
    "use_dora": "DoRA's magnitudes",
    "use_qalora": "QALoRA",
    "lora_bias": "biases of adapters",
    "fan_in_fan_out": "transposed layers",
    "trainable_token_indices": "single trained tokens",
    "target_parameters": "adapters of parameters that are in no linear layer",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron's parallel layers",
}
"""Keys of PEFT's LoraConfig -> what they switch on that is not supported here."""
LARGEST = 1e30
"""No alpha is as large."""
MOST_REPETITIONS = 4
"""Most repetitions in a regular expression of a file."""
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Stored(NamedTuple):
    """A tensor in the file."""

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterFiles:
    """The adapters in a folder."""

    folder: Path
    config: Mapping[str, Any]
    """`adapter_config.json`."""
    tensors: Mapping[str, tuple[int, ...]]
    """Keys in the file -> shapes."""

    @classmethod
    def open(cls, folder: str | Path) -> AdapterFiles:
        """Read the config and the header of the tensors.

        Raises:
            UserError: There are no such files, they cannot be read, or they use something that is not supported here.
        """
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise UserError(f"policy.lora.weights: there is no folder {path} (in {Path.cwd()})")
        if not (path / CONFIG).is_file():
            raise UserError(f"policy.lora.weights: {path} has no {CONFIG}: it does not hold adapters in PEFT's layout")
        try:
            config = read_json(path / CONFIG)
        except (OSError, ValueError) as error:
            raise UserError(f"policy.lora.weights: {path / CONFIG} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"policy.lora.weights: {path / CONFIG} must hold a JSON object")
        if unsupported := _unsupported(config):
            raise UserError(f"policy.lora.weights: {path / CONFIG} has {', '.join(unsupported)}, not supported here")
        return cls(path, config, _header(path))

    def selection(
        self, matrices: Mapping[str, tuple[int, ...]], parameters: Mapping[str, tuple[int, ...]]
    ) -> Selection:
        """Which layers have adapters, and what is trained whole.

        Args:
            matrices: Modules of the policy that can have adapters -> shapes of their weights.
            parameters: All published parameters -> shapes.

        Raises:
            UserError: Lists every tensor that is not of the policy, lacks its other half, or has another shape.
        """
        pairs = self.pairs(matrices)
        whole = self.whole(parameters)
        known = {one.key for pair in pairs.values() for one in pair.values()} | {one.key for one in whole.values()}
        problems = {
            "unexpected": sorted(self.tensors.keys() - known),
            "without its other half": sorted(name for name, pair in pairs.items() if len(pair) < 2),
            "of another shape": [
                f"{one.key} is {list(one.shape)}, the policy has {list(parameters[name])}"
                for name, one in whole.items()
                if one.shape != parameters[name]
            ],
        }
        adapters = {}
        for name, pair in pairs.items():
            if len(pair) < 2:
                continue
            (rank, columns), (rows, also) = pair["A"].shape, pair["B"].shape
            if (rows, columns) != tuple(matrices[name]) or rank != also or not rank:
                shapes = f"{name}: A {list(pair['A'].shape)} and B {list(pair['B'].shape)}, for {list(matrices[name])}"
                problems["of another shape"].append(shapes)
            else:
                adapters[name] = Change(rank, self._scale(name, rank))
        if texts := [f"{_listed(names)} {what}" for what, names in problems.items() if names]:
            raise UserError(f"policy.lora.weights: {self.folder} does not fit the policy: {'; '.join(texts)}")
        return Selection(adapters, frozenset(whole))

    def pairs(self, modules: Collection[str]) -> dict[str, dict[str, Stored]]:
        """The stored halves of adapters: published module -> "A" or "B" -> tensor."""
        out: dict[str, dict[str, Stored]] = {}
        for key, shape in self.tensors.items():
            if (found := _MATRIX.fullmatch(key)) and (name := _known(found["module"], modules)) and len(shape) == 2:
                out.setdefault(name, {})[found["kind"]] = Stored(key, shape)
        return {name: out[name] for name in modules if name in out}

    def whole(self, parameters: Collection[str]) -> dict[str, Stored]:
        """The parameters that are stored whole: published name -> tensor."""
        found = {key: _known(_COPY.sub("", key), parameters) for key in self.tensors if not _MATRIX.fullmatch(key)}
        return {name: Stored(key, self.tensors[key]) for key, name in found.items() if name}

    def read(self, key: str) -> torch.Tensor:
        """A tensor, on the CPU; raises `UserError` if it contains NaN or infinity."""
        import torch
        from safetensors import safe_open

        with safe_open(self.folder / TENSORS, framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        if tensor.numel() and not all(torch.isfinite(one) for one in tensor.aminmax()):
            raise UserError(f"policy.lora.weights: {self.folder / TENSORS}: {key} contains NaN or infinity")
        return tensor

    def _scale(self, module: str, rank: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise UserError(f"policy.lora.weights: {self.folder / CONFIG}: alpha_pattern must be a table")
        alpha = next((value for name, value in patterns.items() if _names(name, module)), self.config.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < LARGEST:
            raise UserError(f"policy.lora.weights: {self.folder / CONFIG}: lora_alpha of {module} is {alpha!r}")
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _names(pattern: str, module: str) -> bool:
    """Whether a key of PEFT's `alpha_pattern` means a module: a regular expression for the end of its name.

    A full name, as PEFT and this project write them, has other wrappers before it than the module here.
    """
    if pattern.endswith(f".{module}"):
        return True
    # Groups and many repetitions may take forever, and the file may come from anybody.
    if "(" in pattern or sum(pattern.count(one) for one in "*+?{") > MOST_REPETITIONS:
        raise UserError(f"policy.lora.weights: alpha_pattern {pattern!r} is too complex a regular expression")
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error:
        return False


def _known(name: str, there: Collection[str]) -> str:
    """The name that a policy has of a module or parameter with other wrappers before it; empty if it has none."""
    if name in there:
        return name
    for wrapper in _WRAPPERS:
        if name.startswith(wrapper) and (found := _known(name.removeprefix(wrapper), there)):
            return found
    return ""


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    found = []
    if (kind := config.get("peft_type")) != "LORA":
        found.append(f"peft_type = {kind!r} instead of 'LORA'")
    if (bias := config.get("bias", "none")) != "none":
        found.append(f"bias = {bias!r} (trained biases)")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        found.append(f"init_lora_weights = {start!r} (which changes the base weights)")
    return [*found, *(f"{key} ({what})" for key, what in _UNSUPPORTED.items() if config.get(key))]


def check_base(lora: LoraConfig | None, weights: str) -> None:
    """Raise `UserError` if a run would continue adapters without the weights that they belong to."""
    if lora is not None and lora.weights and weights in ("", "random"):
        raise UserError(
            f"policy.lora.weights: the adapters in {lora.weights} belong to pretrained weights: name them in "
            "policy.weights"
        )


def selected(
    lora: LoraConfig, policy: Named, matrices: Collection[str], shapes: Mapping[str, tuple[int, ...]]
) -> Selection:
    """What `[policy.lora]` trains: by its expressions, or as the adapters in `lora.weights`.

    Args:
        lora: The table.
        policy: The policy's config.
        matrices: Published modules that can have adapters.
        shapes: All published parameters -> shapes.

    Raises:
        UserError: An expression matches nothing, or the adapters do not fit.
    """
    if not lora.weights:
        return select(lora, policy, matrices, shapes)
    return AdapterFiles.open(lora.weights).selection({name: shapes[f"{name}.weight"] for name in matrices}, shapes)


def _header(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    path = folder / TENSORS
    if not path.is_file():
        pickled = (
            ", only adapter_model.bin, a pickle: save it as safetensors" * (folder / "adapter_model.bin").is_file()
        )
        raise UserError(f"policy.lora.weights: {folder} has no {TENSORS}{pickled}")
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118  # not a mapping
                stored = file.get_slice(key)
                if stored.get_dtype() not in _FLOATS:
                    raise UserError(f"policy.lora.weights: {path}: {key} is {stored.get_dtype()}, not floating-point")
                shapes[key] = tuple(stored.get_shape())
    except (SafetensorError, OSError) as error:
        raise UserError(f"policy.lora.weights: {path} is not a readable safetensors file: {error}") from error
    return shapes


def write_adapters(
    folder: Path,
    adapters: Mapping[str, LowRank],
    whole: Mapping[str, torch.Tensor],
    *,
    base: str,
    dropout: float = 0.0,
    dtype: str = "fp32",
) -> None:
    """Write adapters so that PEFT loads them.

    Args:
        folder: An existing folder.
        adapters: Published module -> its change.
        whole: Published parameter -> its trained value.
        base: The weights that the adapters belong to.
        dropout: Probability of dropout in training.
        dtype: `fp32` or `bf16`, of the file.
    """
    import torch
    from safetensors.torch import save_file

    kind = getattr(torch, _DTYPES[dtype])
    tensors = {f"{PREFIX}{name}": tensor.to(kind).contiguous() for name, tensor in whole.items()}
    for name, change in adapters.items():
        tensors |= {
            f"{PREFIX}{name}.lora_A.weight": change.a.to(kind).contiguous(),
            f"{PREFIX}{name}.lora_B.weight": change.b.to(kind).contiguous(),
        }
    modules = dict.fromkeys(name.rpartition(".")[0] for name in whole)
    (folder / CONFIG).write_text(json.dumps(_peft_config(adapters, modules, base, dropout), indent=2) + "\n")
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def _peft_config(adapters: Mapping[str, LowRank], modules: Iterable[str], base: str, dropout: float) -> dict[str, Any]:
    ranks = {name: change.a.shape[0] for name, change in adapters.items()}
    # PEFT multiplies by alpha / rank.
    alphas = {name: _whole_number(change.scale * ranks[name]) for name, change in adapters.items()}
    rank, alpha = _most(list(ranks.values()), 1), _most(list(alphas.values()), 1)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": list(adapters),
        "rank_pattern": {name: one for name, one in ranks.items() if one != rank},
        "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
        "modules_to_save": list(modules) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _whole_number(alpha: float) -> int | float:
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def _most[N: (int, float)](numbers: Sequence[N], otherwise: N) -> N:
    """The most frequent number."""
    return max(numbers, key=list(numbers).count) if numbers else otherwise


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + f" and {len(names) - LISTED} more" * (len(names) > LISTED)
