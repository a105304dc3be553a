"""Keys of openpi, lerobot, RLinf, TRL and Hugging Face's Trainer, with the key that does the same here.

The error about an unknown key looks here, so that a config that was carried over names its new keys. Nothing here is
accepted as a key.
"""

from __future__ import annotations

from collections.abc import Mapping

_NO_LOG_INTERVAL = "metrics.jsonl has every step, and the console a line every ten seconds"
_ACCUMULATION = (
    "it follows from the batch: trainer.global_batch_size / (ranks x trainer.micro_batch_size); "
    "set trainer.global_batch_size to the samples of an optimizer step"
)

_TRACKER = "settings of a tracker are keys of its logger's table, e.g. [loggers.wandb], and runner.loggers names it"

_BY_KEY: Mapping[str, str] = {
    "optim.type": "optimizer_type optimizer_name optim_type optim_name optimizer_class",
    "optim.schedule": "lr_scheduler_type lr_scheduler_name scheduler_type scheduler_name lr_schedule_type",
    "optim.momentum": "muon_momentum mu",
    "optim.ns_steps": "newton_schulz_steps muon_ns_steps num_ns_steps",
    "optim.adjust_lr": "adjust_lr_fn muon_adjust_lr_fn",
    "optim.adamw_lr": "scalar_lr embed_lr adam_lr",
    "optim.stable_steps": "num_stable_steps lr_stable_steps",
    "optim.lr": "learning_rate peak_lr base_lr optimizer_lr",
    "optim.min_lr": "decay_lr lr_end end_lr eta_min min_learning_rate scheduler_decay_lr",
    "optim.warmup_steps": "lr_warmup_steps num_warmup_steps scheduler_warmup_steps warmup_iters",
    "optim.decay_steps": "lr_decay_steps scheduler_decay_steps total_training_steps lr_decay_iters num_decay_steps",
    "optim.betas": "adam_beta1 adam_beta2 adam_betas beta1 beta2 b1 b2 optimizer_betas",
    "optim.eps": "adam_eps adam_epsilon optimizer_eps",
    "optim.weight_decay": "adam_weight_decay optimizer_weight_decay",
    "optim.clip_grad": (
        "grad_clip max_grad_norm clip_grad_norm grad_clip_norm clip_gradient_norm gradient_clip_val "
        "optimizer_grad_clip_norm"
    ),
    "optim.ema_decay": "ema ema_rate use_ema",
    "trainer.global_batch_size": "batch_size train_batch_size total_batch_size",
    "trainer.micro_batch_size": "per_device_train_batch_size per_device_batch_size train_micro_batch_size_per_gpu",
    "trainer.param_dtype": "precision mixed_precision dtype torch_dtype bf16 fp16 pytorch_training_precision",
    "trainer.activation_checkpointing": "gradient_checkpointing use_gradient_checkpointing",
    "trainer.compile": "torch_compile compile_model use_torch_compile",
    "runner.max_steps": "num_train_steps num_training_steps max_train_steps train_steps num_steps steps max_iters",
    "runner.max_epochs": "num_train_epochs num_epochs epochs",
    "runner.save_interval": "save_freq save_steps save_every checkpoint_interval",
    "runner.keep_last": "save_total_limit",
    "runner.keep_every": "keep_period",
    "runner.val_check_interval": "eval_freq eval_steps eval_interval eval_every val_freq val_interval",
    "runner.val_at_start": "eval_on_start eval_at_start eval_before_train val_before_train sanity_evaluation",
    "runner.best_metric": "metric_for_best_model",
    "runner.loggers": "wandb wandb_enabled use_wandb report_to logger logger_backends log_with",
    "runner.name": "exp_name experiment_name job_name run_name",
    "runner.output_dir": "checkpoint_base_dir log_path log_dir",
    "policy.weights": (
        "model_path model_name_or_path pretrained_path pretrained_model_name_or_path pytorch_weight_path "
        "weight_loader checkpoint_path init_from"
    ),
    "policy.type": "model_type policy_type",
    "policy.action_horizon": "chunk_size n_action_steps num_action_chunks action_chunk_size",
    "policy.augmentations": "image_transforms image_aug image_augmentation image_augmentations",
    "data.repo_id": "dataset_name dataset_path data_path data_paths train_data_paths dataset_repo_id",
    "data.num_workers": "dataloader_num_workers num_dataloader_workers",
    "[optim]": "optimizer lr_schedule scheduler lr_scheduler",
    "[data]": "dataset datasets train_dataset",
    "[policy]": "model",
    "[trainer]": "training train fsdp_config",
}
"""Our key or table, and theirs; `[table]` is only suggested for a table."""

_CHOICES: Mapping[str, str] = {
    **dict.fromkeys(("optimizer", "optim"), "optim.type"),
    **dict.fromkeys(("lr_scheduler", "lr_schedule", "scheduler", "lr_decay_style"), "optim.schedule"),
}
"""Their key where it holds a name; as a table, it is one of those above."""

_SHARE = "a number of steps is set here: optim.warmup_steps, which is the ratio times the number of steps"
_RATE = "the learning rate itself is set here: optim.min_lr, which is the rate times optim.lr"

_LORA = "LoRA is the table [policy.lora] here, with rank, alpha, rslora, dropout, targets and modules_to_save"

_SENTENCES: Mapping[str, str] = {
    **dict.fromkeys(
        ["lora_rank", "lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_peft", "use_lora", "lora_config"],
        _LORA,
    ),
    **dict.fromkeys(["peft", "peft_config", "target_modules", "lora_target_modules"], _LORA),
    "warmup_style": "RLinf reads it nowhere: its schedule is lr_scheduler, constant by default; here optim.schedule",
    "lr_warmup_steps_ratio": _SHARE,
    "warmup_ratio": _SHARE,
    "min_lr_rate": _RATE,
    "min_lr_ratio": _RATE,
    "num_cycles": "the cosines here are half a cycle",
    "gradient_accumulation_steps": _ACCUMULATION,
    "grad_accumulation_steps": _ACCUMULATION,
    "accumulate_grad_batches": _ACCUMULATION,
    "log_freq": _NO_LOG_INTERVAL,
    "log_interval": _NO_LOG_INTERVAL,
    "logging_steps": _NO_LOG_INTERVAL,
    **dict.fromkeys(("project_name", "wandb_project", "wandb_entity", "wandb_group", "wandb_mode"), _TRACKER),
    "greater_is_better": "the policy or the evaluator that reports a metric says so",
    "overwrite": "it is an option of the command, --overwrite",
    "actor": "its keys are in [policy] (the model), [optim] and [trainer] (batch sizes, precision, sharding)",
    "fsdp_devices": "trainer.num_replicas is the number of ranks divided by it",
}
"""Their key, and what to say where no key of ours is the same."""

ALIASES: Mapping[str, str] = {theirs: ours for ours, names in _BY_KEY.items() for theirs in names.split()}


def hint(key: str, known: set[str], *, is_table: bool) -> str:
    """`"; here it is 'optim.lr'"` for a key of another project; empty for any other.

    Args:
        key: The unknown key, without its table.
        known: The dotted keys of this config's tables: a key that the chosen classes do not have is not suggested.
        is_table: Whether the unknown key is a table.
    """
    word = key.lower().replace("-", "_")
    if word in _SENTENCES:
        return f"; {_SENTENCES[word]}"
    ours = ALIASES.get(word, "")
    if not is_table:
        ours = _CHOICES.get(word, ours)
    if ours.startswith("["):
        return f"; here it is {ours}" if is_table else ""
    return f"; here it is {ours!r}" if ours in known else ""
