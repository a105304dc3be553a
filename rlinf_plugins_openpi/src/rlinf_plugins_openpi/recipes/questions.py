"""RLinf's recipes for vision-language models: `[data]` and `[policy]` of a run on questions with images.

RLinf trains Qwen2.5-VL and Qwen3-VL on Robo2VLM: multiple-choice questions, each with an image, through the model's
chat template (`rlinf/data/datasets/vlm.py`). Here that is the policy `text` of rlinf-plugins-text, of which nothing is
imported: this writes its keys.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from rlinf_plugins_openpi.recipes.values import Values

MODELS = ("qwen2.5_vl", "qwen3_vl")
DATASET, TREND = "robo2vlmsft", "vlm_trend_reward_sft"
REQUIRED = (
    "actor.model.model_path",
    "actor.optim.lr",
    "actor.optim.adam_beta1",
    "actor.optim.adam_beta2",
    "actor.optim.clip_grad",
    "data.train_data_paths",
    "data.prompt_key",
    "data.choice_key",
    "data.answer_key",
)
ALWAYS = (
    "the config needs rlinf-plugins-text[vision]",
    "RLinf keeps no moving average of the weights in fine-tuning: optim.ema_decay = 0",
    "RLinf renders each answer followed by the beginning of another turn of the assistant, which counts in its loss, "
    "too; here a turn ends with the token that ends it",
)
"""Said of every such recipe."""
_NOWHERE = "RLinf's code reads it nowhere"
NOT_NEEDED: Mapping[str, str] = {
    "actor.eval_batch_size": "validation uses trainer.micro_batch_size",
    "actor.calculate_flops": "operations are always counted here",
    "actor.enable_dp_load_balance": "texts are packed here with policy.packing",
    "actor.model.attn_implementation": "policy.attention chooses how texts attend, and the device the kernel",
    "actor.model.trainable_modules": f"{_NOWHERE}; policy.freeze names the parts that are not trained",
    "actor.model.format_ce_coef": _NOWHERE,
    "actor.tokenizer.*": "the tokenizer is that of the weights",
    "data.answer_separator": _NOWHERE,
    "data.lazy_loading": "images are always read when a sample needs them",
    "data.video_*": _NOWHERE,
    "data.eval_data_paths": "RLinf reads data.val_data_paths",
    "runner.experiment_name": "runner.logger.experiment_name is the name that RLinf reads",
    "runner.output_dir": "runner.logger.log_path is the folder that RLinf reads",
}
"""Keys that such a recipe may have, and that change nothing here."""


def is_about_questions(values: Values) -> bool:
    """Whether a recipe is one for a vision-language model that can be imported."""
    backend = values.peek_text("actor.training_backend")
    return values.peek_text("actor.model.model_type") in MODELS and backend in ("fsdp", "fsdp2")


def read_questions(values: Values) -> dict[str, Any]:
    """`[data]`: multiple-choice questions in the columns that the recipe names."""
    if (kind := values.text("data.type", "vlm")) != "vlm":
        values.refuse("data.type", f"{kind!r}: a recipe for a vision-language model has vlm")
    name = (values.text("data.dataset_name") or "").lower()
    if name == TREND:
        values.refuse(
            "data.dataset_name", f"{name}: it trains on videos, of which some are in pickles; images are read"
        )
    elif name != DATASET:
        values.refuse(
            "data.dataset_name",
            f"{name!r}: {DATASET}, multiple-choice questions with images, is imported. Chats with images need "
            'data.config_name = "text" and data.format = "messages", see docs/vlm.md',
        )
    for key in ("apply_chat_template", "use_chat_template"):
        if not values.switch(f"data.{key}", default=True):
            values.refuse(f"data.{key}", "false: questions go through the model's chat template here")
    keys = {
        "question": values.text("data.prompt_key"),
        "choices": values.text("data.choice_key"),
        "answer": values.text("data.answer_key"),
        "images": _image_column(values),
    }
    data: dict[str, Any] = {"config_name": "text", "format": "multiple_choice", **_files(values)}
    if renamed := {ours: theirs for ours, theirs in keys.items() if theirs and theirs != ours}:
        data["keys"] = renamed
    if workers := values.integer("data.num_workers", least=0):
        data["num_workers"] = workers
    return data


def _image_column(values: Values) -> str | None:
    given = values.anything("data.image_keys")
    columns = [given] if isinstance(given, str) else given
    if not isinstance(columns, list) or len(columns) != 1 or not isinstance(columns[0], str):
        values.refuse("data.image_keys", f"{given!r}: one column with the images of a row must be named")
        return None
    return columns[0]


def _files(values: Values) -> dict[str, Any]:
    """The folder that has both kinds of rows, with patterns for each; without held-out rows the path as it is."""
    train, held_out = (_path(values, f"data.{name}_data_paths") for name in ("train", "val"))
    if not train or not held_out:
        return {"repo_id": train or ""}
    folder = os.path.commonpath([os.path.dirname(train), os.path.dirname(held_out)])
    return {
        "repo_id": folder,
        "files": [_pattern(train, folder)],
        "validation_files": [_pattern(held_out, folder)],
    }


def _path(values: Values, key: str) -> str:
    given = values.anything(key)
    paths = given if isinstance(given, list) else [given] if given else []
    if len(paths) > 1 or not all(isinstance(one, str) for one in paths):
        values.refuse(key, f"{given!r}: one folder or file is imported; data.files may name several patterns")
        return ""
    return str(paths[0]).rstrip("/") if paths else ""


def _pattern(path: str, folder: str) -> str:
    inside = os.path.relpath(path, folder)
    return inside if PurePosixPath(path).suffix else f"{inside}/**/*"


def read_model(values: Values) -> dict[str, Any]:
    """`[policy]`: the weights, whose folder has tokenizer and processor, too."""
    values.text("actor.model.model_type")
    if values.switch("actor.model.is_lora"):
        values.refuse(
            "actor.model.is_lora",
            "where RLinf puts adapters is not translated: import with actor.model.is_lora=False, and write a table "
            "[policy.lora] with rank, alpha and targets into the config",
        )
    for extra in ("extra_label_loss", "success_head", "sample_reweight"):
        if values.switch(f"actor.model.{extra}.enabled"):
            values.refuse(
                f"actor.model.{extra}.enabled", "true: it changes the loss, which is next-token cross entropy"
            )
        elif left := values.below(f"actor.model.{extra}"):
            for key in left:
                values.drop(f"actor.model.{extra}.{key}", "it is switched off")
    policy: dict[str, Any] = {"weights": values.text("actor.model.model_path")}
    if length := values.integer("data.max_prompt_length", least=2):
        policy["max_length"] = length
        values.warn(
            f"data.max_prompt_length = {length} is policy.max_length: a longer text ends before the image that would "
            "be cut, and one whose answer is lost is left out and counted; RLinf pads every text to that length"
        )
    return policy


def read_validation(values: Values) -> dict[str, Any]:
    """The keys of `[runner]` about validation."""
    interval = max(values.integer("runner.val_check_interval", -1) or -1, 0)
    if interval:
        values.warn(
            "RLinf's validation counts right answers that the model generates; here it reports loss, perplexity and "
            "token accuracy of held-out answers, and shows some"
        )
    return {"val_check_interval": interval}
