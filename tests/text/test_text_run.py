"""Runs of the text policy: any number of ranks, resumed, exported for transformers, started from its folders."""

import json
import math
import re
import runpy
import shutil

import pytest
import torch
from distributions import ROOT
from safetensors.torch import load_file, save_file
from tiny_text import PLANS, dataset, tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlinf_core import Metric, UserError, cli, open_rows
from rlinf_core.config.load import dump_config, load_config
from rlinf_core.inference import load_policy
from rlinf_core.loggers.jsonl import read_rows
from rlinf_core.plugins.registry import get_plugins
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder
from rlinf_core.training.stopping import compared_metric
from rlinf_plugins_text.plugin import rlinf_open_dataset as open_text
from rlinf_plugins_text.weights import model_config

SMALL = [
    *("policy.config.num_hidden_layers=2", "policy.config.hidden_size=32", "policy.config.head_dim=8"),
    *("policy.config.intermediate_size=48", "trainer.global_batch_size=8", "optim.warmup_steps=0"),
    *("runner.max_steps=4", "policy.shown_tokens=4", "policy.shown_samples=1", "optim.lr=2e-3"),
]
RESULTS = {"loss", "token_accuracy", "val_loss", "val_perplexity", "ema_val_perplexity", "val_token_accuracy"}
MODEL = ("rlinf_plugins_text.model.policy", "transformers.models.qwen3.modeling_qwen3")
RUNS = {
    2: [
        "two:trainer.micro_batch_size=4,trainer.activation_checkpointing=full",
        "accumulated:trainer.micro_batch_size=2,trainer.activation_checkpointing=selective",
    ],
    1: ["one:trainer.micro_batch_size=8,trainer.activation_checkpointing=selective"],
}


def shared(settings):
    return ",".join([*SMALL, "runner.val_check_interval=2", "runner.val_samples=6", "optim.ema_decay=0.5", settings])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, start_ranks):
    """The same run on two ranks, in several ways, and on one."""
    folder = tmp_path_factory.mktemp("text")
    for ranks, named in RUNS.items():
        words = [f"{name}:{shared(settings)}" for name, _, settings in (one.partition(":") for one in named)]
        result = start_ranks("option_runs:main", ranks, folder, "examples/text_sft.toml", *words, imports=MODEL)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["two", "accumulated"])
def test_ranks_and_micro_batches_change_nothing_beyond_rounding(runs, name):
    """Packs, a tied head and the average included (contract 1)."""
    for one, other in zip(
        read_rows(runs / "one" / "metrics.jsonl"), read_rows(runs / name / "metrics.jsonl"), strict=True
    ):
        for key in RESULTS & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-4)
    start = load_file(runs / "one" / "start.safetensors")
    assert not any("lm_head" in key for key in start)  # The head is the embedding.
    for part in ("end", "ema"):
        ours, theirs = (load_file(runs / run / f"{part}.safetensors") for run in (name, "one"))
        moved = math.sqrt(sum(float((theirs[key] - start[key]).square().sum()) for key in start))
        apart = math.sqrt(sum(float((theirs[key] - ours[key]).square().sum()) for key in start))
        assert apart <= 5e-3 * moved
    assert all(torch.equal(load_file(runs / name / "start.safetensors")[key], start[key]) for key in start)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run in this process: stopped after two steps, continued to four."""
    folder = tmp_path_factory.mktemp("runs")
    losses = {}
    for name, stops in {"whole": [4], "resumed": [2, 4]}.items():
        for stop in stops:
            with pytest.MonkeyPatch.context() as patch, processes("cpu") as group:
                patch.delenv("RANK", raising=False)
                given = [f"runner.output_dir={folder}", f"runner.name={name}", *SMALL, "trainer.micro_batch_size=4"]
                given += [f"runner.max_steps={stop}", "runner.val_check_interval=2", "runner.val_samples=6"]
                run = load_config("examples/text_sft.toml", given)
                start = prepare_folder(run, overwrite=False)
                trainer = run.trainer.build(run, start=start, group=group, plugins=get_plugins())
                trainer.train()
        losses[name] = [row["loss"] for row in read_rows(run.folder / "metrics.jsonl") if "loss" in row]
    return trainer, losses


def test_a_resumed_run_is_the_same_to_the_bit(trained):
    _, losses = trained
    assert len(losses["whole"]) == 4
    assert losses["resumed"] == losses["whole"]


def test_a_run_does_not_continue_on_other_texts(tmp_path, monkeypatch):
    """As many rows, one word changed: positions of the old rows would mean nothing."""
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "chats.jsonl"
    lines = (PLANS / "plans.jsonl").read_text().splitlines()[:24]
    path.write_text("\n".join(lines))
    given = [f"runner.output_dir={tmp_path}", *SMALL, "trainer.micro_batch_size=8", "policy.packing=false"]
    given += [f"data.repo_id={path}", "data.validation_fraction=0.0", "runner.val_check_interval=0"]

    def run_to(stop):
        run = load_config("examples/text_sft.toml", [*given, f"runner.max_steps={stop}"])
        with processes("cpu") as group:
            start = prepare_folder(run, overwrite=False)
            run.trainer.build(run, start=start, group=group, plugins=get_plugins()).train()

    run_to(1)
    path.write_text("\n".join(lines).replace("cup", "pot"))
    with pytest.raises(UserError, match="on other rows than the training split now has"):
        run_to(2)
    path.write_text("\n".join(lines))  # Written anew, but the same.
    run_to(2)


def test_perplexity_is_that_of_the_loss(trained):
    trainer, _ = trained
    validations = [row for row in read_rows(trainer.run.folder / "metrics.jsonl") if "val_loss" in row]
    assert [row["step"] for row in validations] == [2, 4]
    for row in validations:
        assert row["val_perplexity"] == pytest.approx(math.exp(row["val_loss"]), rel=1e-6)
        assert 0 <= row["val_token_accuracy"] <= 1


def held_out_loss(run, loss_of):
    """The mean over held-out tokens of `loss_of`(tokens, labels), summed losses of single texts."""
    total, words = 0.0, 0
    for row in open_rows(run, split="validation")[:4]:
        begin = 0
        for length in row["document_lengths"]:
            part = slice(begin, begin + length)
            tokens, counts = (torch.from_numpy(row[key][part].copy()) for key in ("tokens", "trained"))
            labels = tokens.long().masked_fill(~counts, -100)
            total += loss_of(tokens.long()[None], labels[None]) * int(counts.sum())
            words += int(counts.sum())
            begin += length
    return total / words


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_exported_run_is_a_folder_of_transformers(trained, tmp_path, capsys, dtype):
    trainer, _ = trained
    folder = tmp_path / "model"
    assert cli.main(["export", str(trainer.run.folder), "--output", str(folder), "--dtype", dtype]) == 0, (
        capsys.readouterr()
    )
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Grasp the red cup."}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert asked == trainer.run.policy.text_tokenizer().chat.render(chat, ask=True)
    loaded = load_policy(folder).module

    def ours(tokens, labels):
        length = tokens.shape[1]
        sizes = torch.tensor([[length, 0]], dtype=torch.int32)
        batch = {"tokens": tokens, "positions": torch.arange(length)[None], "trained": labels >= 0}
        predicting = (labels[0, 1:] >= 0).nonzero().flatten()
        out = loaded(batch | {"document_lengths": sizes, "packing": {"predicting": predicting}})
        return float(out.loss_sum.detach() / out.weight)

    with torch.no_grad():
        expected = held_out_loss(trainer.run, lambda tokens, labels: float(theirs.float()(tokens, labels=labels).loss))
        assert held_out_loss(trainer.run, ours) == pytest.approx(expected, rel=1e-6)


def test_transformers_alone_finds_the_same_loss(trained, tmp_path):
    """By the script that docs/text.md names, on chats that are not packed."""
    folder, chats = tmp_path / "model", tmp_path / "chats.jsonl"
    assert cli.main(["export", str(trained[0].run.folder), "--output", str(folder)]) == 0
    chats.write_text("".join((PLANS / "plans.jsonl").read_text().splitlines(keepends=True)[:20]))
    loaded = load_policy(folder)
    source = open_text(dataset(chats), loaded.config.model_copy(update={"packing": False}), "train")
    with torch.no_grad():
        out = loaded.module(loaded.config.collate(source.__getitems__(range(20))))
    expected = runpy.run_path(str(ROOT / "examples" / "text_loss.py"))["loss_of"](folder, chats)
    assert float(out.loss_sum / out.weight) == pytest.approx(expected, rel=1e-6)


def test_an_exported_folder_is_whole_by_itself(trained, tmp_path):
    """Trained with the tokenizer of another folder and `config_from`, exported, moved: both are gone."""
    trainer, _ = trained
    first, elsewhere, moved = tmp_path / "first", tmp_path / "elsewhere", tmp_path / "moved"
    assert cli.main(["export", str(trainer.run.folder), "--output", str(first)]) == 0
    shutil.copytree(trainer.run.folder, tmp_path / "run")
    shutil.copytree(first, elsewhere)
    given = [f"policy.{key}={elsewhere}" for key in ("tokenizer", "config_from")]
    run = load_config(tmp_path / "run" / "config.toml", given)
    (tmp_path / "run" / "config.toml").write_text(dump_config(run))
    assert cli.main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "model")]) == 0
    shutil.rmtree(elsewhere)
    (tmp_path / "model").rename(moved)
    loaded = load_policy(moved)
    assert loaded.config.text_tokenizer().folder == moved
    assert loaded.config.text_tokenizer().template_source == trainer.run.policy.text_tokenizer().template_source
    again = tiny_policy(weights=str(moved), config={}, tokenizer="", chat_template="")
    again.check_files()
    assert again.model_table()["hidden_size"] == 32


def theirs():
    return model_config(tiny_policy().model_table())


def test_a_run_starts_from_weights_that_transformers_wrote(tmp_path):
    """In several files, as large models have them."""
    model = AutoModelForCausalLM.from_config(theirs())
    folder = tmp_path / "theirs"
    model.save_pretrained(folder, max_shard_size="60kB")
    AutoTokenizer.from_pretrained(PLANS).save_pretrained(folder)
    policy = tiny_policy(weights=str(folder), tokenizer="", config={})
    policy.check_files()
    with torch.device("meta"):
        module = policy.build()
    weights = policy.open_weights()
    weights.check({name: tuple(p.shape) for name, p in module.named_parameters()})
    state = model.state_dict()
    for name, _ in module.named_parameters():
        assert torch.equal(weights.tensor(name), state[policy.published_name(name)])
    assert len(list(folder.glob("*.safetensors"))) > 1


def test_weights_that_do_not_fit_are_named(tmp_path):
    model = AutoModelForCausalLM.from_config(theirs())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.9.extra.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    policy = tiny_policy(weights=str(tmp_path), tokenizer=str(PLANS), config={})
    with torch.device("meta"):
        module = policy.build()
    with pytest.raises(
        UserError, match=r"lacks model\.norm\.weight; it has unexpected model\.layers\.9\.extra\.weight"
    ):
        policy.open_weights().check({name: tuple(p.shape) for name, p in module.named_parameters()})


def test_a_folder_without_weights_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        tiny_policy(weights=str(tmp_path), config={}).check_files()


def test_a_tokenizer_with_too_many_entries_is_refused():
    with pytest.raises(UserError, match="the model embeds only 7: they belong to different models"):
        tiny_policy(config=tiny_policy().config | {"vocab_size": 7}).check_files()


def test_of_accuracy_larger_is_better():
    run = load_config("examples/text_sft.toml", ["runner.best_metric=val_token_accuracy", "runner.save_best=true"])
    assert compared_metric(run, get_plugins()) == Metric("val_token_accuracy", larger_is_better=True)


def test_answers_of_the_current_weights_are_shown_at_each_validation(trained, capsys):
    """The texts are held out; the keys of `[policy]` say how many and how long."""
    trainer, _ = trained
    held_out, answers = trainer._evaluations.running
    assert (held_out.type, answers.type, answers.chosen.config.weights) == ("held_out", "text_answers", "current")
    [line] = answers.evaluator.evaluate(trainer.policy, step=4, interrupted=lambda: False).messages
    assert re.fullmatch(r".*⟦.*⟧ \(data: .*\)", line)
    assert answers.evaluator.evaluate(trainer.policy, step=4, interrupted=lambda: True) is None


def test_answers_need_held_out_texts_and_the_text_policy():
    nothing = ["data.validation_fraction=0.0", "runner.val_check_interval=1"]
    with pytest.raises(UserError, match=r"no episode is held out: .*, or leave \"text_answers\" out of runner.evaluat"):
        load_config("examples/text_sft.toml", nothing)
    assert load_config("examples/text_sft.toml", [*nothing[:1], "runner.val_check_interval=0"])
    with pytest.raises(UserError, match=r"evaluators.text_answers: is for the policy 'text', not 'pi05'"):
        load_config("examples/quickstart.toml", ["runner.evaluators=['text_answers']"])


def test_an_exported_config_keeps_what_older_readers_need(tmp_path):
    """transformers 4 takes 10000 for the base of rotary frequencies, unless it finds `rope_theta`."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    policy = tiny_policy(config=tiny_policy().config | {"rope_theta": 1e6, "rope_scaling": scaling})
    policy.save_weights({"lm.model.model.norm.weight": torch.zeros(32, dtype=torch.bfloat16)}, tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())
    older = scaling | {"type": "linear"}  # What transformers before 4.43 reads.
    assert (table["rope_theta"], table["rope_scaling"], table["torch_dtype"]) == (1e6, older, "bfloat16")
    again = model_config(table)
    assert again.rope_parameters == model_config(policy.model_table()).rope_parameters | {"type": "linear"}
    assert again.rope_parameters["rope_theta"] == 1e6
