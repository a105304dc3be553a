"""The peers: trl's SFTTrainer and transformers' Trainer, on the batches that rlinf's loader made.

Both use fused AdamW, float32 and no gradient checkpointing, as rlinf does here; all else is their default.
"""

from __future__ import annotations

from typing import Any

import torch

from text_sft.job import DATA, LENGTH, Job

IGNORED = -100
"""transformers' label of a token that is not trained."""


def trl(job: Job, *, trained_only: bool = False) -> list[float]:
    """Train with trl's SFTTrainer; returns the losses that it logged.

    With packing, trl joins all packs of a batch into one row (`padding_free`) and separates texts by their positions.

    Args:
        job: What to train.
        trained_only: Compute logits of trained tokens only, as trl does on CUDA. On a CPU it computes all logits, for
            the same loss.
    """
    import trl.trainer.utils
    from trl import SFTConfig, SFTTrainer

    if trained_only:
        # The name in this module decides which positions are scored; the kernel's own decides how.
        trl.trainer.utils._use_triton = lambda device: True
    rows = []
    for batch in torch.load(job.batches):
        for one in _rows(batch):
            labels = [
                token if trained else IGNORED for token, trained in zip(one["tokens"], one["trained"], strict=True)
            ]
            rows.append({"input_ids": one["tokens"], "labels": labels, "seq_lengths": one["lengths"]})
    if not job.packed:
        rows = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    config = SFTConfig(
        packing=job.packed,
        max_length=LENGTH,
        bf16=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **_settings(job),
    )
    trainer = SFTTrainer(model=_model(job), args=config, train_dataset=_dataset(rows), processing_class=_tokenizer())
    return _train(trainer)


def transformers(job: Job) -> list[float]:
    """Train with transformers' Trainer and the model's own loss; returns the losses that it logged.

    With packing, each pack is a row of 256 tokens, and positions that restart at 0 separate its texts.
    """
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, default_data_collator

    rows = []
    for batch in torch.load(job.batches):
        for one in _rows(batch, keep_padding=job.packed):
            labels = [
                token if trained else IGNORED for token, trained in zip(one["tokens"], one["trained"], strict=True)
            ]
            row = {"input_ids": one["tokens"], "labels": labels}
            rows.append(row | ({"position_ids": one["positions"]} if job.packed else {}))
    trainer = Trainer(
        model=_model(job),
        args=TrainingArguments(**_settings(job)),
        train_dataset=_dataset(rows),
        data_collator=default_data_collator if job.packed else DataCollatorForSeq2Seq(_tokenizer()),
    )
    return _train(trainer)


SIDES = {
    "trl": trl,
    "trl_trained_only": lambda job: trl(job, trained_only=True),
    "transformers": transformers,
}


def _rows(batch: dict[str, torch.Tensor], *, keep_padding: bool = False) -> list[dict[str, list[int]]]:
    """A batch's samples as lists, with the lengths of their texts."""
    rows = []
    for tokens, trained, positions, lengths in zip(
        batch["tokens"], batch["trained"], batch["positions"], batch["document_lengths"], strict=True
    ):
        texts = [one for one in lengths[:-1].tolist() if one]
        size = len(tokens) if keep_padding else sum(texts)
        columns = {"tokens": tokens, "trained": trained, "positions": positions}
        rows.append({key: column[:size].tolist() for key, column in columns.items()} | {"lengths": texts})
    return rows


def _labels(row: dict[str, list[int]]) -> list[int]:
    return [token if trained else IGNORED for token, trained in zip(row["tokens"], row["trained"], strict=True)]


def _settings(job: Job) -> dict[str, Any]:
    """What both trainers are given."""
    return {
        "output_dir": str(job.folder / job.side),
        "max_steps": job.all_steps,
        "per_device_train_batch_size": job.batch,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-4,
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }


def _model(job: Job) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA)


def _dataset(rows: list[dict[str, list[int]]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _train(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
