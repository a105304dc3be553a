"""Runs on images and text: two ranks as one, resumed to the bit, exported for AutoProcessor and from_pretrained."""

import json
import math
import re
import shutil

import pytest
import torch
from distributions import ROOT
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlinf_core import cli, open_rows
from rlinf_core.config.load import load_config
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.plugins.registry import get_plugins
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder

EXAMPLE = "examples/vlm_sft.toml"
SMALL = [
    *("policy.config.text_config.num_hidden_layers=1", "trainer.global_batch_size=8", "optim.warmup_steps=0"),
    *("runner.max_steps=4", "policy.shown_tokens=2", "policy.shown_samples=1", "optim.lr=2e-3"),
]
MODEL = ("rlinf_plugins_text.model.policy", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, start_ranks):
    """The same run on two ranks and on one. Without packing, some micro batches have no image at all."""
    folder = tmp_path_factory.mktemp("vlm")
    for ranks, name, micro in ((2, "two", 1), (1, "one", 8)):
        options = f"trainer.micro_batch_size={micro},trainer.activation_checkpointing=full,policy.packing=false"
        settings = ",".join([*SMALL, "runner.val_check_interval=2", "runner.val_samples=6", options])
        result = start_ranks("option_runs:main", ranks, folder, EXAMPLE, f"{name}:{settings}", imports=MODEL)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.slow  # Two runs take 20 s.
def test_two_ranks_train_what_one_does(runs):
    """The vision tower included, also in micro batches that have text alone on one rank."""
    one, two = (read_rows(runs / name / "metrics.jsonl") for name in ("one", "two"))
    for mine, other in zip(one, two, strict=True):
        for key in {"loss", "token_accuracy", "val_loss", "val_perplexity"} & mine.keys():
            assert mine[key] == pytest.approx(other[key], rel=1e-4)
    parts = {
        (name, part): load_file(runs / name / f"{part}.safetensors")
        for name in ("one", "two")
        for part in ("start", "end")
    }
    start, end = parts["one", "start"], parts["one", "end"]
    assert all(torch.equal(start[key], parts["two", "start"][key]) for key in start)
    moved = math.sqrt(sum(float((end[key] - start[key]).square().sum()) for key in start))
    apart = math.sqrt(sum(float((end[key] - parts["two", "end"][key]).square().sum()) for key in start))
    assert apart <= 5e-3 * moved
    assert all(not torch.equal(start[key], end[key]) for key in start if ".visual.blocks" in key)


def from_weights(folder, path):
    """The example with weights instead of the model's config."""
    text = (ROOT / EXAMPLE).read_text()
    begin, end = text.index("[policy.config]"), text.index("[optim]")
    text = (text[:begin] + text[end:]).replace('tokenizer = "examples/data/vlm_shapes"', "")
    path.write_text(text.replace('weights = "random"', f'weights = "{folder}"'))
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in this process, whole and stopped after two steps."""
    folder = tmp_path_factory.mktemp("runs")
    losses = {}
    for name, stops in {"whole": [3], "resumed": [2, 3]}.items():
        for stop in stops:
            with pytest.MonkeyPatch.context() as patch, processes("cpu") as group:
                patch.delenv("RANK", raising=False)
                given = [f"runner.output_dir={folder}", f"runner.name={name}", *SMALL, "trainer.micro_batch_size=4"]
                given += [f"runner.max_steps={stop}", "runner.val_check_interval=3", "data.num_workers=1"]
                given += ["policy.image_processor={ max_pixels = 6272 }"]
                run = load_config(EXAMPLE, given)
                trainer = run.trainer.build(
                    run, start=prepare_folder(run, overwrite=False), group=group, plugins=get_plugins()
                )
                trainer.train()
        losses[name] = [row["loss"] for row in read_rows(run.folder / "metrics.jsonl") if "loss" in row]
    return trainer, losses


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(trained):
    _, losses = trained
    assert len(losses["whole"]) == 3
    assert losses["resumed"] == losses["whole"]


@pytest.mark.slow
def test_an_exported_run_is_a_model_and_a_processor_of_transformers(trained, tmp_path, capsys):
    """Its weights are those of the run, and its processor makes the same tokens of the same images."""
    trainer, _ = trained
    assert cli.main(["export", str(trainer.run.folder), "--output", str(tmp_path / "tuned")]) == 0
    folder = shutil.move(tmp_path / "tuned", tmp_path / "moved")
    assert "visual.patch_embed.proj.weight" in load_file(folder / "model.safetensors")  # As on the hub.
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["max_pixels"] == 6272
    table = json.loads((folder / "config.json").read_text())["text_config"]
    assert table["rope_theta"] == 10000.0  # For transformers 4, with the sections of positions.
    assert table["rope_scaling"]["mrope_section"] == [2, 3, 3]
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    for name, parameter in trainer.policy.named_parameters():
        there = model.get_parameter(name.removeprefix("lm.model."))
        assert torch.equal(there, parameter.detach().full_tensor()), name
    for row in open_rows(trainer.run, split="validation")[:2]:
        images = [Image.fromarray(pixels) for pixels in row["images"].values()]
        text = processor.tokenizer.decode(row["tokens"])
        # What the processor made of an image becomes its placeholder again.
        text = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", text)
        inputs = processor(text=[text], images=images or None, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == row["tokens"].tolist()
    capsys.readouterr()
    assert cli.main(["validate", from_weights(folder, tmp_path / "tuned.toml")]) == 0


@pytest.mark.slow
def test_a_run_starts_from_its_export_with_a_frozen_tower(trained, tmp_path, monkeypatch):
    trainer, _ = trained
    monkeypatch.delenv("RANK", raising=False)
    cli.main(["export", str(trainer.run.folder), "--output", str(tmp_path / "tuned")])
    given = [f"runner.output_dir={tmp_path}", "runner.max_steps=2", "runner.val_check_interval=0"]
    given += ['policy.freeze=["vision_tower"]', "policy.shown_samples=0"]
    run = load_config(from_weights(tmp_path / "tuned", tmp_path / "tuned.toml"), given)
    with processes("cpu") as group:
        start = prepare_folder(run, overwrite=False)
        second = run.trainer.build(run, start=start, group=group, plugins=get_plugins())
        second.train()
    before = load_file(tmp_path / "tuned" / "model.safetensors")
    for name, parameter in second.policy.named_parameters():
        published = run.policy.published_name(name)
        same = torch.equal(before[published], parameter.detach().full_tensor())
        frozen = published.startswith("visual.") and "merger" not in published
        assert same == frozen, name


@pytest.mark.slow
def test_the_example_starts(tmp_path, capsys, monkeypatch):
    """The documented config, for two steps; `plan` counts it and `inspect` shows its images."""
    assert (ROOT / EXAMPLE).is_file()
    assert cli.main(["plan", EXAMPLE, "--ranks", "2"]) == 0
    assert "activations" in capsys.readouterr().out
    assert cli.main(["inspect", EXAMPLE, "--output", str(tmp_path / "page")]) == 0
    assert list((tmp_path / "page" / "pictures").glob("*image_1*.png"))
