"""Recipes of RLinf for vision-language models, written here in its schema: translated, and valid for our policy."""

import tomllib

import pytest
from distributions import repository_plugins

from rlinf_core import UserError
from rlinf_core.config.load import load_config
from rlinf_plugins_openpi.recipes.hydra_files import read_recipe
from rlinf_plugins_openpi.recipes.import_rlinf import render
from rlinf_plugins_openpi.recipes.translate import translate

RECIPE = """\
defaults: []
cluster: {num_nodes: 1, component_placement: {actor: all}}
runner:
  task_type: sft
  max_epochs: -1
  max_steps: 6000
  save_interval: 1000
  val_check_interval: 1000
  experiment_name: questions
  output_dir: ../results
  per_worker_log: true
  resume_dir: null
  logger:
    log_path: ${runner.output_dir}/${runner.experiment_name}
    project_name: rlinf
    experiment_name: ${runner.experiment_name}
    logger_backends: [tensorboard]
data:
  type: vlm
  dataset_name: robo2vlmsft
  train_data_paths: /data/Robo2VLM-1/data
  val_data_paths: /data/Robo2VLM-1/eval_data
  prompt_key: question
  choice_key: choices
  answer_key: correct_answer
  image_keys: [image]
  apply_chat_template: true
  use_chat_template: true
  max_prompt_length: 1024
  lazy_loading: true
  num_workers: 16
actor:
  group_name: ActorGroup
  training_backend: fsdp
  micro_batch_size: 4
  eval_batch_size: 4
  global_batch_size: 256
  seed: 42
  model:
    model_type: qwen2.5_vl
    model_path: /models/Qwen2.5-VL-3B-Instruct
    precision: fp32
    is_lora: false
  optim:
    lr: 1e-5
    adam_beta1: 0.9
    adam_beta2: 0.999
    adam_eps: 1e-8
    weight_decay: 0.01
    clip_grad: 1.0
    lr_scheduler: cosine
    lr_warmup_steps: 200
    total_training_steps: ${runner.max_steps}
  fsdp_config:
    strategy: fsdp
    sharding_strategy: full_shard
    gradient_checkpointing: false
    use_orig_params: false
    mixed_precision: {param_dtype: bf16, reduce_dtype: fp32, buffer_dtype: bf16}
"""


@pytest.fixture
def recipe(tmp_path):
    (path := tmp_path / "questions.yaml").write_text(RECIPE)
    return path


def imported(path, *overrides):
    return translate(read_recipe(path, overrides), {})


def test_a_recipe_on_questions_with_images_is_a_config_of_the_policy_text(recipe, tmp_path):
    found = imported(recipe)
    text = render(read_recipe(recipe), found)
    assert tomllib.loads(text) == found.tables
    (file := tmp_path / "run.toml").write_text(text)
    run = load_config(file, plugins=repository_plugins())
    assert (run.policy.type, run.policy.weights, run.policy.max_length) == (
        "text",
        "/models/Qwen2.5-VL-3B-Instruct",
        1024,
    )
    assert (run.data.format, run.data.repo_id) == ("multiple_choice", "/data/Robo2VLM-1")
    assert run.data.files == ("data/**/*",)
    assert run.data.validation_files == ("eval_data/**/*",)
    assert run.data.keys == {"answer": "correct_answer", "images": "image"}
    assert (run.optim.lr, run.optim.warmup_steps, run.optim.decay_steps, run.optim.min_lr) == (1e-5, 200, 6000, 0.0)
    assert (run.trainer.global_batch_size, run.trainer.param_dtype) == (256, "bf16")
    assert (run.runner.max_steps, run.runner.val_check_interval, run.optim.ema_decay) == (6000, 1000, 0.0)
    assert any("counts in its loss" in warning for warning in found.warnings)
    assert "data.lazy_loading" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.dataset_name=vlm_trend_reward_sft"], "it trains on videos, of which some are in pickles"),
        (["data.dataset_name=mine"], "'mine': robo2vlmsft, multiple-choice questions with images, is imported"),
        (["data.image_keys=[]"], "data.image_keys: .* one column"),
        (["data.use_chat_template=False"], "data.use_chat_template: false"),
        (["actor.model.is_lora=True"], "write a table \\[policy.lora\\]"),
        (["+actor.model.sample_reweight.enabled=True"], "it changes the loss"),
        (["+data.bananas=1"], "data.bananas: unknown key"),
        (["actor.training_backend=megatron"], "is a recipe for qwen2.5_vl; only those for"),
        (["actor.model.model_type=qwen3_vl_moe"], "is a recipe for qwen3_vl_moe; only those for"),
    ],
)
def test_what_is_not_here_is_refused_by_name(recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        imported(recipe, *overrides)


def test_without_held_out_rows_nothing_is_validated(recipe):
    found = imported(recipe, "~data.val_data_paths")
    assert found.tables["runner"]["val_check_interval"] == 0
    assert found.tables["data"]["repo_id"] == "/data/Robo2VLM-1/data"
    assert any("set data.validation_fraction" in warning for warning in found.warnings)
