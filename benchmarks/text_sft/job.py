"""What one process of the benchmark does, the model, and where the files of a job are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_UP, PROFILED = 2, 2
"""Steps before the timed ones, and after them."""
DATA = Path(__file__).parents[2] / "examples" / "data" / "text_plans"
MODEL: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
LENGTH = 256
"""Tokens of a text or a pack at most."""


@dataclass(frozen=True)
class Job:
    """What a process does; it finds and leaves files in `folder`."""

    side: str
    """`record`, `rlinf`, or one of `peers.SIDES`."""
    packed: bool
    folder: Path
    batch: int
    steps: int
    """Timed ones."""
    vocabulary: int

    @property
    def all_steps(self) -> int:
        """Steps in all."""
        return WARM_UP + self.steps + PROFILED

    @property
    def model(self) -> Path:
        """The weights that every side starts from, as transformers saves them."""
        return self.folder / "model"

    @property
    def batches(self) -> Path:
        """What every side trains on: a list of batches as rlinf's loader makes them."""
        return self.folder / f"batches-{'packed' if self.packed else 'unpacked'}.pt"
