"""The policy `text` as rlinf_core calls it. Imports no torch until a method needs it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from rlinf_core import Sample
from rlinf_core.contract.policy_options import CardNotes
from rlinf_core.data.sample import Batch
from rlinf_plugins_text.rows.samples import TextSample, describe, illustrate
from rlinf_plugins_text.rows.tokenizer import FILES, template_source
from rlinf_plugins_text.settings import RANDOM, TextPolicySettings
from rlinf_plugins_text.vision.families import FAMILIES, Family, names_in_files, part_of
from rlinf_plugins_text.vision.processor import FILES as PROCESSOR_FILES
from rlinf_plugins_text.vision.processor import Vision, check_torchvision
from rlinf_plugins_text.weights.folder import CONFIG, check_head, find_folder, find_weights, weight_files
from rlinf_plugins_text.weights.headers import Headers, check_headers

if TYPE_CHECKING:
    from torch import Tensor

    from rlinf_core import Policy
    from rlinf_core.contract.module import WeightSource
    from rlinf_core.contract.policy import TrainedOn
    from rlinf_core.illustration import Illustration


NOT_LINEAR = re.compile(
    r"\.(experts\.|router$|gate$|(\w+_)?norm$|(\w+_)?layernorm$)|conv1d$|pos_embed$|position_embedding$"
)
"""Names of modules with matrices that are no linear layers."""


USE = """\
`FOLDER` is this repository's id, or a copy of it.

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""
"""The model card's section on running the exported folder."""


class TextPolicyConfig(TextPolicySettings):
    """A causal language model of transformers, fine-tuned on text."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        "optim": {"lr": 1e-5, "min_lr": 1e-6, "warmup_steps": 20, "decay_steps": 1000, "betas": (0.9, 0.999)},
        "runner": {"evaluators": ["text_answers"]},
    }
    validation_metrics: ClassVar[Mapping[str, Callable[[Mapping[str, float]], float]]] = {
        "perplexity": lambda means: math.exp(min(means["loss"], 700.0)),
        "token_accuracy": itemgetter("token_accuracy"),
    }
    larger_is_better: ClassVar[frozenset[str]] = frozenset({"token_accuracy"})

    def describe(self, samples: Iterable[Sample]) -> Mapping[str, str]:
        """Lengths of the texts, what is cut and what is trained; the first sample with its trained parts marked."""
        return describe(
            cast("Iterable[TextSample]", samples),
            self.text_tokenizer(),
            max_length=self.max_length,
            overlong=self.overlong,
            packing=self.packing,
        )

    def illustrate(self, sample: Sample, draws: Mapping[str, Mapping[str, Any]]) -> Illustration:
        """The sample's tokens, with the trained ones marked."""
        cuts = self.overlong == "cut"
        return illustrate(cast("TextSample", sample), self.text_tokenizer(), self.max_length, cuts=cuts)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples into CPU tensors; see `rows.collate.stack`."""
        from rlinf_plugins_text.rows.collate import stack, stack_with_images

        given = cast("Sequence[TextSample]", samples)
        # Packs are full anyway, and compiled code then sees a single shape.
        if (vision := self.known_vision()) is not None:
            return stack_with_images(given, vision, max_length=self.max_length, fixed=self.packing)
        return stack(given, max_length=self.max_length, fixed=self.packing)

    def build(self) -> Policy:
        """Build the model. Raises `UserError` if the tokenizer has more entries than its embedding has rows."""
        return self._built(to_count=False)

    def build_to_count(self) -> Policy:
        """Build the model without reading the tokenizer; it computes padding wherever CUDA would."""
        return self._built(to_count=True)

    def _built(self, *, to_count: bool) -> Policy:
        from rlinf_plugins_text.model.policy import TextPolicy

        policy = TextPolicy(self, to_count=to_count)
        if policy.lm.sees:
            family = FAMILIES[str(self.model_table()["model_type"])]
            unread = policy.lm.unread()
            for name, parameter in policy.named_parameters():
                part = part_of(name.removeprefix("lm.model."), family)
                parameter.requires_grad_(part not in self.freeze and id(parameter) not in unread)
        return policy

    def known_vision(self) -> Vision | None:
        """`vision`, found once per process: loader workers inherit it, and ask no hub."""
        return _vision_of(type(self), self.model_dump_json())

    def largest_sample(self, cameras: Sequence[str]) -> Sample:
        """One text of `max_length` tokens, all of them trained."""
        sample = TextSample(
            tokens=np.zeros(self.max_length, np.int32),
            trained=np.ones(self.max_length, np.bool_),
            document_lengths=np.array([self.max_length], np.int32),
            full_lengths=np.array([self.max_length], np.int64),
            left_out="",
        )
        return cast("Sample", sample)

    def useful_flops(self, batch: Batch) -> float | None:
        """Operations of a training step on this batch, padding excluded; None: unknown for this architecture."""
        from rlinf_plugins_text.model.flops import ModelCost, training_flops

        cost = ModelCost.of(self)
        return None if cost is None else training_flops(cost, batch)

    def published_name(self, name: str) -> str:
        """The parameter's name in files written by transformers, and on the hub."""
        return self._names_in_files(name)[0]

    def _names_in_files(self, name: str) -> list[str]:
        """The names that a parameter may have in files, that of files on the hub first."""
        own = name.removeprefix("lm.model.")
        family = _family_of(type(self), self.model_dump_json())
        return [own] if family is None or own == name else names_in_files(own, family)

    def lora_shapes(self) -> Mapping[str, tuple[int, ...]] | None:
        """The parameters in the files of `weights`, if they are here."""
        folder = self._weights_folder()
        files = weight_files(folder, self.weights) if folder is not None else []
        if folder is None or not files:
            return None
        return {name: one.shape for name, one in Headers.read(folder, files).tensors.items()}

    def lora_matrices(self, shapes: Mapping[str, tuple[int, ...]]) -> Collection[str]:
        """The linear layers, by name: not routers and experts, and none of GPT-2, whose layers are transposed."""
        if self.model_table().get("model_type") == "gpt2":
            return []
        return [name for name in super().lora_matrices(shapes) if not NOT_LINEAR.search(name)]

    def exported(self) -> TextPolicyConfig:
        """Without the keys that the exported folder answers itself: `config.json`, tokenizer, chat template."""
        return self.model_copy(
            update={"config": {}, "config_from": "", "tokenizer": "", "chat_template": "", "image_processor": {}}
        )

    def card(self, format: str, sources: Sequence[TrainedOn]) -> CardNotes:
        """What the model card says: transformers loads the folder."""
        sees = "vision_config" in self.model_table()
        tag, auto = ("image-text-to-text", "ImageTextToText") if sees else ("text-generation", "CausalLM")
        return CardNotes(library="transformers", pipeline_tag=tag, use=USE.format(auto=f"AutoModelFor{auto}"))

    def save_weights(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write a folder that `from_pretrained` loads: weights, config, tokenizer."""
        from rlinf_plugins_text.weights.tensors import save_folder, save_processor

        published = {self.published_name(name): tensor for name, tensor in tensors.items()}
        source, stops = self._weights_folder(), self.stop_ids()
        save_folder(folder, published, self.model_table(), self.text_tokenizer(), source, stops)
        if self.vision() is not None:
            save_processor(folder, self.text_tokenizer(), self.image_processor)

    def open_weights(self) -> WeightSource:
        """Open the safetensors files of `weights`; a model on the hub is downloaded first."""
        from rlinf_plugins_text.weights.tensors import PublishedWeights

        return PublishedWeights(find_weights(self.weights), self._names_in_files, self.model_table())

    def check_files(self) -> None:
        """Raise `UserError` if weights, config or tokenizer are missing or do not fit together.

        Reads headers only. Not found before the run loads them: damaged tensors, NaN or infinity, names and shapes that
        only the architecture's code knows, and weights that are still on the hub.
        """
        folder = self._weights_folder()
        if folder is not None:
            self._check_headers(folder)
        if self.chat_template:
            template_source(self.chat_template)
        if self.chat_template_kwargs:
            _ = self.text_tokenizer().chat
        self.stop_ids()
        self.check_vocabulary()
        if self.vision() is not None:
            check_torchvision()

    def local_files(self) -> Mapping[str, Sequence[Path]]:
        """Weights, the model's config, the tokenizer and a chat template in a file."""
        folder, found = self._weights_folder(), dict[str, Sequence[Path]]()
        if folder is not None:
            found["policy.weights"] = weight_files(folder, self.weights)
        model = find_folder(self.config_from, "policy.config_from") if self.config_from else folder
        if model is not None:
            found["policy.config_from" if self.config_from else "the model's config"] = [model / CONFIG]
        tokenizer = self.text_tokenizer().folder
        names = [*FILES, *PROCESSOR_FILES]
        found["policy.tokenizer"] = [tokenizer / name for name in names if (tokenizer / name).is_file()]
        if (template := Path(self.chat_template).expanduser()).name.endswith(".jinja") and template.is_file():
            found["policy.chat_template"] = [template]
        return found

    def _check_headers(self, folder: Path) -> None:
        if files := weight_files(folder, self.weights):
            check_headers(Headers.read(folder, files), self.model_table())
            check_head(files, self.model_table())

    def _weights_folder(self) -> Path | None:
        """The folder of the pretrained weights; for a model on the hub, without the weight files themselves."""
        return None if self.weights == RANDOM else find_folder(self.weights, "policy.weights")


@functools.lru_cache(maxsize=8)
def _vision_of(cls: type[TextPolicyConfig], dumped: str) -> Vision | None:
    return cls.model_validate_json(dumped).vision()


@functools.lru_cache(maxsize=8)
def _family_of(cls: type[TextPolicyConfig], dumped: str) -> Family | None:
    return FAMILIES.get(str(cls.model_validate_json(dumped).model_table().get("model_type")))
