"""Recipes in RLinf's schema, with the folders from which they inherit: written for the tests, not RLinf's own files."""

from pathlib import Path
from textwrap import dedent, indent

HEAD = """
defaults:
  - model/{model}@actor.model
  - hybrid_engines/fsdp@actor.fsdp_config
  - override hydra/job_logging: stdout{self_last}
hydra:
  run: {{dir: .}}
  output_subdir: null
  searchpath: ["file://${{oc.env:EMBODIED_PATH}}/config/"]
cluster:
  num_nodes: 1
  component_placement:
    {placement}
runner:
  task_type: sft
  logger: {{log_path: ../results, project_name: rlinf, experiment_name: {name}, logger_backends: [tensorboard]}}
  max_epochs: {epochs}
  max_steps: {steps}
  val_check_interval: -1
  save_interval: 500
data:
{data}
actor:
  group_name: ActorGroup
  training_backend: fsdp
  micro_batch_size: {micro}
  global_batch_size: {batch}
  seed: 0
  model:
{recipe}
  optim:
{optim}
  fsdp_config:
    strategy: fsdp
    sharding_strategy: {sharding}
    gradient_checkpointing: {checkpointing}
    mixed_precision: {{param_dtype: {dtype}, reduce_dtype: {reduced}, buffer_dtype: {reduced}}}
"""
ADAM = "adam_beta1: 0.9\nadam_beta2: 0.95\nadam_eps: 1.0e-08\nclip_grad: 1.0\n"
STYLE = (
    ADAM + "lr: 2.5e-5\nweight_decay: 1e-10\nwarmup_style: cosine\nlr_warmup_steps: 1000\ntotal_training_steps: 30000"
)
PLAIN = ADAM + "lr: 7.91e-6\nweight_decay: 0.01"
COSINE = ADAM + (
    "lr: 2.5e-5\nweight_decay: 1e-10\nlr_scheduler: cosine\nlr_warmup_steps: 1000\nnum_cycles: 0.5\nmin_lr: 2.5e-6\n"
    "total_training_steps: ${runner.max_steps}"
)
OPENPI = COSINE.replace("lr_scheduler: cosine", "lr_scheduler: openpi_cosine")
MODELS = {
    "pi0": """
        model_type: openpi
        model_path: /models/none
        precision: null
        num_action_chunks: 10
        action_dim: 7
        is_lora: False
        lora_rank: 32
        use_proprio: True
        num_steps: 4
        add_value_head: False
        openpi:
          config_name: pi0_libero
          num_images_in_input: 2
          noise_level: 0.5
          action_chunk: ${actor.model.num_action_chunks}
          num_steps: ${..num_steps}
          train_expert_only: False
          action_env_dim: ${actor.model.action_dim}
          add_value_head: ${actor.model.add_value_head}
    """,
    "port": """
        model_type: openpi_rlinf
        precision: fp32
        pi05: False
        is_lora: False
        num_action_chunks: 50
        action_dim: 14
        num_steps: 5
        openpi:
          task: sft
          config_name: pi0_aloha_robotwin
          num_images_in_input: 3
          action_chunk: ${..num_action_chunks}
          model_action_dim: 32
          paligemma_variant: gemma_2b
          action_expert_variant: gemma_300m
    """,
}
ENGINE = """
    strategy: fsdp
    sharding_strategy: full_shard
    gradient_checkpointing: False
    cpu_offload: False
    reshard_after_forward: True
    enable_gradient_accumulation: True
    backward_prefetch: null
    mixed_precision: {param_dtype: null, reduce_dtype: null, buffer_dtype: null}
    amp_autocast: {enabled: False, precision: bf16}
    grad_scaler: {enabled: False}
"""
OF_PRECISION = {"dtype": "'${actor.model.precision}'", "reduced": "'${actor.model.precision}'"}
BF16 = {"dtype": "bf16", "reduced": "fp32"}
ALL = {
    # The kinds of recipes that RLinf has for fine-tuning: name -> what differs.
    "libero": {"optim": STYLE, "steps": 30000, "recipe": "num_action_chunks: 4\nopenpi: {config_name: pi0_libero}"},
    "custom": {"batch": 16, "micro": 1, "steps": 1000, "recipe": "openpi: {config_name: pi0_custom}"},
    "realworld": {"optim": STYLE, "steps": 2000, "recipe": "openpi: {config_name: pi0_realworld}"},
    "robotwin": {
        "optim": COSINE,
        "steps": 30000,
        "recipe": "num_action_chunks: 50\naction_dim: 14\nopenpi: {config_name: pi0_aloha_robotwin}",
    },
    "robotwin_pi05": {
        "optim": COSINE.replace("${runner.max_steps}", "30000"),
        "steps": 20000,
        "placement": "actor,env,rollout: 0-1",
        "sharding": "no_shard",
        "recipe": "num_action_chunks: 50\naction_dim: 14\nopenpi: {config_name: pi05_aloha_robotwin}",
    },
    "robotwin_port": {
        **BF16,
        "model": "port",
        "optim": OPENPI,
        "checkpointing": "True",
        "data": "train_data_paths: /data/robotwin\nnum_workers: 4",
        "recipe": "model_path: /models/pi0\nopenpi: {assets_dir: '${actor.model.model_path}', asset_id: cup}\n"
        "openpi_data:\n"
        "  norm_stats_path: ${actor.model.openpi.assets_dir}/${actor.model.openpi.asset_id}/norm_stats.json",
        "self_last": "\n  - _self_",
    },
    "dual_franka": {
        "placement": "actor,env,rollout: 0-3",
        "batch": 128,
        "micro": 16,
        "epochs": 100000,
        "steps": -1,
        "data": "train_data_paths: ${oc.env:DUAL_FRANKA_DATA_ROOT}",
        "recipe": "model_path: ${oc.env:PI05_BASE_CKPT}\naction_dim: 20\nnum_action_chunks: 20\n"
        "openpi: {config_name: pi05_dualfranka_tcp_rot6d, train_expert_only: False}\n"
        "openpi_data: {repo_id: lab/tcp_rot6d}",
    },
    "dual_franka_port": {
        **BF16,
        "model": "port",
        "placement": "actor,env,rollout: all",
        "optim": OPENPI,
        "epochs": 100,
        "recipe": "model_path: /models/pi05\nnum_action_chunks: 20\naction_dim: 20\npi05: true\n"
        "openpi: {config_name: pi05_dualfranka_tcp_rot6d, max_token_len: 200, discrete_state_input: false, "
        "assets_dir: /assets, asset_id: lab/tcp}",
    },
    "behavior": {
        **BF16,
        "model": "port",
        "optim": OPENPI,
        "data": "train_data_paths: /data/demos\nbehavior_dataset_root: /data/demos\ntolerance_s: 1.0e-4",
        "recipe": "model_path: /models/pi05\npi05: true\nopenpi: {config_name: pi05_behavior}",
    },
    "maniskill_rlt": {
        **BF16,
        "model": "port",
        "optim": COSINE,
        "data": "train_data_paths:\n  - {dataset_path: /data/peg, weight: 1.0}",
        "recipe": "model_path: /models/pi05\npi05: true\nnum_action_chunks: 10\naction_dim: 8\n"
        "openpi: {config_name: pi05_rlt_maniskill_joint, use_rlt: True, rlt_alpha: 1.0, discrete_state_input: True}\n"
        "openpi_data: {repo_id: peg, default_prompt: insert the peg in the hole, norm_stats_path: null}",
    },
    "realworld_rlt": {
        **BF16,
        "model": "port",
        "placement": "actor: 0-0",
        "optim": COSINE.replace("2.5e-5", "1e-5"),
        "steps": 20000,
        "recipe": "model_path: /models/pi05\npi05: true\nnum_action_chunks: 20\naction_dim: 7\n"
        "openpi: {config_name: pi05_franka_state, use_rlt: True, discrete_state_input: True}\n"
        "openpi_data: {repo_id: peg}",
    },
}
DEFAULTS = {
    **OF_PRECISION,
    "model": "pi0",
    "self_last": "",
    "placement": "actor,env,rollout: 0-0",
    "epochs": -1,
    "steps": 30000,
    "data": "train_data_paths: /data/some",
    "micro": 4,
    "batch": 128,
    "optim": PLAIN,
    "sharding": "full_shard",
    "checkpointing": "False",
}


def write_folder(root: Path) -> Path:
    """The files that recipes inherit from, in `config/` of a folder like RLinf's `examples/sft`."""
    config = root / "config"
    for folder in ("model", "hybrid_engines"):
        (config / folder).mkdir(parents=True)
    for name, text in MODELS.items():
        (config / "model" / f"{name}.yaml").write_text(dedent(text))
    (config / "hybrid_engines" / "fsdp.yaml").write_text(dedent(ENGINE))
    return config


def write_recipe(config: Path, name: str, kind: str = "", **changes: object) -> Path:
    """A recipe of one of the kinds of `ALL`, with changes, in the folder that `write_folder` wrote."""
    fields = DEFAULTS | {"name": f"sft_{name}"} | ALL[kind or name] | changes
    recipe = str(fields.pop("recipe"))
    if fields["model"] == "pi0" and "model_path" not in recipe:
        recipe = f"model_path: /models/pi0\n{recipe}"
    blocks = {key: indent(str(fields.pop(key)), " " * depth) for key, depth in (("data", 2), ("optim", 4))}
    text = HEAD.format(**fields, **blocks, recipe=indent(recipe, "    "))
    path = config / f"{name}.yaml"
    path.write_text(text)
    return path
