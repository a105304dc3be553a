"""The card of an exported folder: read by the hub's own client, true, and without what is private."""

import json
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from rlinf_core import UserError
from rlinf_core.config.load import load_config
from rlinf_core.contract.policy import TrainedOn
from rlinf_core.publish.card import is_edited, render, write_card
from rlinf_core.publish.exported import Exported
from rlinf_core.publish.measured import Measured, measured_of
from rlinf_core.publish.origins import origin_of
from rlinf_core.results import ResultTable, wilson_interval

NOTHING = Measured({}, ())
METRICS = {"val_loss": 0.5, "ema_val_loss": 0.4, "val_action_mse_mean": 0.9, "val_x": float("nan"), "success": 0.75}


def exported(tmp_path, *overrides, config="examples/quickstart.toml", **changes):
    run = load_config(config, [f"runner.output_dir={tmp_path / 'runs'}", *overrides])
    run.folder.mkdir(parents=True, exist_ok=True)
    sources = [TrainedOn(one.name, one.run.data, None) for one in run.sources]
    made = Exported(run, run.folder, sources, {}, "rlinf", 30, 1607, False, "fp32", False, NOTHING)
    return replace(made, **changes)


def success(value=15, episodes=20):
    rows = [("reach-v3", wilson_interval(value, episodes), episodes)]
    return ResultTable(title="Success in metaworld", columns=("task", "success", "episodes"), rows=rows)


def in_cache(tmp_path, monkeypatch, kind, name, card):
    """A repository of which the cache of the hub's client has the card."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "cache" / f"{kind}s--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    (snapshot / "README.md").write_text(card)
    return snapshot


def test_the_hubs_client_reads_the_card_and_no_value_is_null(tmp_path):
    write_card(tmp_path, exported(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "library_name": "rlinf",
        "license": "unknown",
        "pipeline_tag": "robotics",
        "tags": ["rlinf", "robotics", "pi05", "vision-language-action"],
    }
    assert "108" in card.text
    assert "- Reach a goal position" in card.text
    assert "No success rate was measured." in card.text


def test_rates_are_in_the_hubs_metadata_with_their_intervals(tmp_path):
    table = success()
    run = exported(tmp_path).run.folder
    step = run / "evaluations" / "simulator" / "step_000000030"
    for folder in (step, step.with_name("ema_step_000000030"), step.with_name("step_000000020")):
        folder.mkdir(parents=True)
        (folder / "success.table.json").write_bytes((table if folder == step else success(1)).to_json())
    (step / "damaged.table.json").write_text("{")
    measured = measured_of(run, 30, False, METRICS, ())
    assert measured.validation == {"val_loss": 0.5, "val_action_mse_mean": 0.9}
    averaged = measured_of(run, 30, True, METRICS, ())
    assert averaged.validation == {"val_loss": 0.4, "val_action_mse_mean": 0.9}
    [result] = ModelCard(render(exported(tmp_path, measured=measured))).data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("metaworld", "success_rate", 0.75)
    assert result.metric_name == "success rate, 20 episodes, 95 % interval 0.531 to 0.888"
    text = render(exported(tmp_path, measured=measured))
    assert "| reach-v3 | 0.75 (0.5313 to 0.8881) | 20 |" in text
    assert "0.05" not in text  # Neither of other weights, nor of another step.


def test_files_that_are_not_results_are_named_together(tmp_path):
    texts = ["", "[]", '{"step": 1}', '{"step": 1, "weights": "live", "tables": {"a": {"title": 1}}}']
    files = [tmp_path / f"{number}.json" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    with pytest.raises(UserError) as caught:
        measured_of(tmp_path, 1, False, {}, [*files, tmp_path / "none.json"])
    assert str(caught.value).count("is not a file that `rlinf eval --output` wrote") == 5


def test_ids_and_licences_are_those_of_the_cards_beside_weights_and_data(tmp_path, monkeypatch):
    in_cache(tmp_path, monkeypatch, "model", "lab/base", "---\nlicense: gemma\n---\nText")
    in_cache(tmp_path, monkeypatch, "dataset", "lab/pick", "---\nlicense: other\nlicense_name: our terms\n---\n")
    made = exported(tmp_path, "policy.weights=lab/base", "data.repo_id=lab/pick")
    card = ModelCard(render(made))
    assert (card.data.base_model, card.data.datasets) == ("lab/base", ["lab/pick"])
    assert card.data.base_model_relation == "finetune"
    assert card.data.license == "unknown"  # The card does not choose one.
    assert "| base weights, `lab/base` | gemma |" in card.text
    assert "| dataset `lab/pick` | our terms |" in card.text
    assert "| episodes | unknown |" in card.text
    assert ModelCard(render(replace(made, licence="gemma"))).data.license == "gemma"


def test_a_path_into_the_hubs_cache_is_the_repository(tmp_path, monkeypatch):
    snapshot = in_cache(tmp_path, monkeypatch, "model", "lerobot/pi05_base", "---\nlicense: apache-2.0\n---\n")
    (snapshot / "model.safetensors").write_bytes(b"x")
    for path in (snapshot, snapshot / "model.safetensors"):
        found = origin_of(str(path), "model")
        assert (found.hub_id, found.revision, found.licence) == ("lerobot/pi05_base", "a" * 40, "apache-2.0")


@pytest.mark.parametrize(
    "card",
    [
        "",
        "no head",
        "---\n[\n---\n",
        "---\nlicense: [1, null]\n---\n",
        "---\nlicense: '<script>'\n---\n",
        "---\n&a [*a]\n---\n",
        "---\na: &a [x, x]\nb: &b [*a, *a]\nlicense: *b\n---\n",
        "---\nlicense: " + "x" * 5000 + "\n---\n",
    ],
)
def test_without_a_readable_licence_it_is_unknown(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    assert origin_of(str(tmp_path), "model").licence == "unknown"


def test_nothing_of_this_machine_and_no_secret_is_in_the_card(tmp_path, monkeypatch):
    private = tmp_path / "home" / "alice"
    (private / "pick").mkdir(parents=True)
    (private / "base").mkdir()
    made = exported(
        private,
        f"data.repo_id={private / 'pick'}",
        f"policy.weights={private / 'base'}",
        f"runner.checkpoint_dir={private / 'scratch'}",
        'runner.loggers=["console"]',
    )
    (made.folder / "environment.json").write_text(
        json.dumps({"device": "NVIDIA H200", "ranks": 8, "commit": "abc", "python": "3.12", "platform": "host"})
    )
    table = ResultTable(title=f"of {private}/x", columns=("where",), rows=[("hf_" + "Ab1" * 11,), ("a\x1b[2Jb",)])
    measured = Measured({}, [replace_table(table)])
    text = render(replace(made, measured=measured))
    assert str(tmp_path) not in text
    assert "alice" not in text
    assert "hf_Ab1" not in text
    assert "\x1b" not in text
    assert "`pick` (a local folder, not known to be on the hub)" in text
    assert "8 x NVIDIA H200" in text


def replace_table(table):
    from rlinf_core.publish.measured import Table

    return Table("somebody", table, {})


def test_texts_of_data_are_no_markup(tmp_path):
    made = exported(tmp_path, 'data.default_prompt="x"')
    name = "a|b <script>alert(1)</script> [x](http://y)"
    table = ResultTable(title=name, columns=("task",), rows=[(name,)])
    text = render(replace(made, measured=Measured({name: 1.0}, [replace_table(table)])))
    assert "<script>" not in text
    head = text.split("---\n")[1]
    assert "script" not in str(yaml.safe_load(head))


def test_an_edit_is_noticed(tmp_path):
    write_card(tmp_path, exported(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert not is_edited(text)
    for changed in (text.replace("π0.5", "our π0.5"), text + "more\n", text[: text.rindex("<!--")], ""):
        assert is_edited(changed)


def test_a_mixture_names_each_dataset(tmp_path):
    made = exported(tmp_path, config="examples/sft/maniskill_sim_real_co_training.toml")
    text = render(made)
    assert all(f"| dataset | {source.name}: " in text for source in made.sources)
    assert f'source="{made.sources[0].name}"' in text


def test_adapters_say_that_they_need_their_weights(tmp_path, monkeypatch):
    in_cache(tmp_path, monkeypatch, "model", "lab/base", "---\nlicense: gemma\n---\n")
    card = ModelCard(render(exported(tmp_path, "policy.weights=lab/base", adapters=True)))
    assert card.data.base_model_relation == "adapter"
    assert "lora" in card.data.tags
    assert 'base="THE WEIGHTS THEY BELONG TO"' in card.text
