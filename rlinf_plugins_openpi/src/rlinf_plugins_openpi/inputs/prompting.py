"""What `[policy]` says of prompts: how they become tokens, and which of these the embedding is trained for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Self, cast

from pydantic import Field, PrivateAttr

from rlinf_core import PolicyConfig, Sample
from rlinf_plugins_openpi.inputs.tokenizer import PromptTokenizer, find_tokenizer
from rlinf_plugins_openpi.inputs.transforms import OpenpiSample
from rlinf_plugins_openpi.inputs.vocabulary import possible_tokens

ROWS = "rows of the embedding that prompts use"
"""In the layout that follows from a run's data."""


class PromptedPolicyConfig(PolicyConfig):
    """A policy that reads prompts as tokens."""

    max_token_len: int = Field(ge=1)
    """Tokens of a prompt at most; longer ones are cut."""
    discrete_state_input: bool
    """Whether the state stands in the prompt, as integers of 0..255."""
    tokenizer: str = ""
    """A sentencepiece model, PaliGemma's for published weights: a file, a folder, or a model on the hub, `owner/name`
    with an optional `@revision` (`google/paligemma-3b-pt-224`). Empty: the small one shipped, for `dummy` only."""
    train_embedding: Literal["all", "used_rows"] = "all"
    """Which rows of the token embedding have gradients, optimizer state and a moving average: `all`, or those of tokens
    that prompts of the training and held-out rows can have (with `discrete_state_input`, with any state). The others
    change by weight decay alone, as they would without it; exported policies have them all."""
    _rows: tuple[int, ...] = PrivateAttr(default=())
    """With `used_rows`, once the data are known: the rows that are trained, ascending."""

    def data_layout(self, prompts: Iterable[str]) -> Mapping[str, Sequence[int]]:
        """With `train_embedding = "used_rows"`, the rows of the embedding that prompts like these use."""
        if self.train_embedding == "all":
            return {}
        return {ROWS: possible_tokens(self._prompt_tokenizer(), prompts, with_state=self.discrete_state_input)}

    def with_data_layout(self, layout: Mapping[str, Sequence[int]]) -> Self:
        """The same, which trains those rows and takes no prompts that need others."""
        if not layout:
            return self
        known = self.model_copy()
        known._rows = tuple(layout[ROWS])
        return known

    def exported(self) -> Self:
        """The same with one embedding, as its file has it."""
        return self.model_copy(update={"train_embedding": "all"}).with_data_layout({ROWS: ()})

    def describe(self, samples: Iterable[Sample]) -> Mapping[str, str]:
        """How long the prompts are and how many are cut; those of rows, where each row's state is in its prompt."""
        lengths: dict[object, int] = {}
        rows = 0
        for rows, sample in enumerate(cast("Iterable[OpenpiSample]", samples), start=1):
            lengths[rows if self.discrete_state_input else sample["prompt"]] = sample["prompt_length"]
        if not lengths:
            return {}
        cut = sum(length > self.max_token_len for length in lengths.values())
        counted = "prompts with their states" if self.discrete_state_input else "different prompts"
        return {
            "prompts": f"{cut} of {len(lengths)} {counted} cut to policy.max_token_len = {self.max_token_len}, "
            f"the longest has {max(lengths.values())} tokens; in {rows} rows from all over the training data"
        }

    def files(self) -> Mapping[str, str]:
        """The tokenizer, unless it is the small one that is shipped."""
        return {"tokenizer": self._tokenizer_path} if self.tokenizer else {}

    def _prompt_tokenizer(self) -> PromptTokenizer:
        return PromptTokenizer(self._tokenizer_path, self.max_token_len)

    @property
    def _tokenizer_path(self) -> str:
        return find_tokenizer(self.tokenizer)
