"""Frozen parts keep their bits and cost nothing; the others train as ever."""

import pytest
import torch

from rlinf_core import UserError
from rlinf_core.config.load import load_config
from rlinf_core.plugins.registry import get_plugins
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder
from rlinf_plugins_openpi.weights.saving import save_published

TRAINED = {
    "vision": (".embedding.", ".layers.", ".modulation.", ".action_", ".time_"),
    "vlm": (".expert.", ".modulation.", ".action_", ".time_"),
    "all_but_expert": (".expert.", ".modulation."),
}


@pytest.fixture
def configure(tmp_path):
    """The quickstart with given initial weights, two steps."""

    def configure(*overrides):
        settings = ["runner.max_steps=2", "runner.val_check_interval=0", "trainer.global_batch_size=4"]
        settings += [
            "optim.weight_decay=1e-10",
            "trainer.micro_batch_size=2",
            f"runner.output_dir={tmp_path}",
            "optim.warmup_steps=0",
        ]
        return load_config("examples/quickstart.toml", [*settings, *overrides])

    return configure


@pytest.fixture
def weights(configure, tmp_path):
    model = configure().policy.build()
    state = {
        name: model.initial_value(name, tuple(p.shape), torch.Generator().manual_seed(i))
        for i, (name, p) in enumerate(model.named_parameters())
    }
    (tmp_path / "given").mkdir()
    save_published(state, tmp_path / "given" / "model.safetensors", model.dimensions)
    return str(tmp_path / "given"), state


@pytest.mark.parametrize("part", TRAINED)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_frozen_part_keeps_its_bits(configure, weights, part, checkpointing, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    folder, start = weights
    run = configure(
        f"policy.weights={folder}", f"policy.freeze={part}", f"trainer.activation_checkpointing={checkpointing}"
    )
    with processes("cpu") as group:
        trainer = run.trainer.build(run, start=prepare_folder(run, overwrite=False), group=group, plugins=get_plugins())
        trainer.train()
        end = {name: p.detach().full_tensor() for name, p in trainer.policy.named_parameters()}
    moved = {name for name in end if not torch.equal(end[name], start[name])}
    trained = {name for name in end if any(piece in f".{name}" for piece in TRAINED[part])}
    # The last layer's prefix and the final norm do not reach the loss: no gradient, no state, no average.
    assert moved <= trained
    assert {name for name in trained if ".expert." in name} <= moved
    trained = {name for name in trained if not name.startswith("prefix_end.")}
    assert trainer.ema.state_dict().keys() == trained
    assert {name.split(".", 1)[1] for name in trainer.optimizer.state_dict() if "." in name} == trained


def test_freezing_random_numbers_is_refused(configure):
    with pytest.raises(UserError, match=r"freeze = \"vlm\" would keep random weights untrained: set policy\.weights"):
        configure("policy.freeze=vlm")


RUN = """
[runner]
name = "run"
max_steps = 1
[data]
config_name = "pi05_metaworld"
[policy]
variant = "dummy"
"""
LORA = "LoRA is switched on by the table [policy.lora] of pi0 and pi05, with rank, alpha and targets"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("policy.lora_rank=16", "'lora_rank' asks for LoRA"),
        ("policy.use_peft=true", "'use_peft' asks for LoRA"),
        ("policy.variant=gemma_2b_lora", "'variant' asks for LoRA"),
        ("policy.paligemma_variant=gemma_2b_lora", "'paligemma_variant' asks for LoRA"),
        (
            "policy.type=pi05_lora",
            "'pi05_lora' is not compatible with dataset 'pi05_metaworld', which is for pi05: LoRA is switched on",
        ),
    ],
)
def test_lora_by_other_names_is_refused_with_the_table_for_it(tmp_path, override, named):
    (tmp_path / "run.toml").write_text(RUN)
    with pytest.raises(UserError, match="1 mistake in the config") as caught:
        load_config(tmp_path / "run.toml", [override])
    assert named in str(caught.value)
    assert LORA in str(caught.value)


def test_policies_say_what_there_is_instead_of_types_that_others_have():
    with pytest.raises(UserError, match=r"unknown policy 'pi0_lora': LoRA is switched on by") as caught:
        get_plugins().policy("pi0_lora")
    assert LORA in str(caught.value)
    with pytest.raises(UserError, match="π0-FAST is another model"):
        get_plugins().policy("pi0_fast")
