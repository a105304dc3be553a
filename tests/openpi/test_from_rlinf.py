"""The page docs/from_rlinf.md, executed: its commands in their order, on a recipe and data made for it."""

import json
import re
import shlex
import tomllib

import pytest
from distributions import ROOT, repository_plugins
from rlinf_recipes import write_folder, write_recipe

from rlinf_core import cli
from rlinf_core.testing import write_tiny_dataset
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import prepare_folder
from rlinf_plugins_openpi.recipes.keys import MAPPED, NOT_HERE, NOT_NEEDED, reason

PAGE = ROOT / "docs" / "from_rlinf.md"
SMALL = [
    *("policy.variant=dummy", "policy.weights=random", "policy.tokenizer=", "data.repo_id=data", "data.num_workers=0"),
    *("runner.max_steps=2", "runner.output_dir=runs", "runner.name=libero_sft_openpi", "policy.num_sampling_steps=1"),
    *("trainer.device=cpu", "trainer.param_dtype=fp32", "trainer.global_batch_size=2", "trainer.micro_batch_size=2"),
]
TAKES_SETTINGS = ("validate", "launch", "norm-stats", "plan")


def commands():
    """The page's commands, each split as a shell does."""
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.fixture
def rlinf(tmp_path, monkeypatch, capsys):
    """Run `rlinf` in a folder with a recipe and a dataset; training runs in this process."""
    recipes = write_folder(tmp_path / "RLinf" / "examples" / "sft")
    write_recipe(recipes, "libero_sft_openpi", "libero")
    cameras = ("image", "wrist_image")
    write_tiny_dataset(tmp_path / "data", cameras=cameras, vectors={"state": 8, "actions": 7}, lengths=(6, 5))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", repository_plugins)

    def launch(run, arguments):
        with processes("cpu") as group:
            start = prepare_folder(run, overwrite=False)
            run.trainer.build(run, start=start, group=group, plugins=repository_plugins()).train()
        return 0

    monkeypatch.setattr("rlinf_core.torchrun.launch", launch)

    def rlinf(*words):
        code = cli.main(words)
        return code, *capsys.readouterr()

    return rlinf


def test_the_pages_commands_work_in_their_order(rlinf, tmp_path):
    done = []
    for name, *words in commands():
        if name != "rlinf":
            assert [name, *words] == ["pip", "install", "rlinf-plugins-openpi[rlinf]"]
            continue
        command, *given = words
        if (
            command == "plan"
        ):  # It counts the full size, which takes half a minute; the examples' heads have its result.
            continue
        settings = SMALL if command in TAKES_SETTINGS else []
        given = [word.replace("my-lab/pick", "data") for word in given]
        # The recipe names statistics below its weights, which are not here.
        imported = given[0] == "libero.toml" and command in TAKES_SETTINGS
        if imported:
            text = (tmp_path / "libero.toml").read_text()
            (tmp_path / "libero.toml").write_text(re.sub(r"\n\[data\.assets\]\n(.+\n)+", "\n", text))
            settings = [*settings, "runner.name=libero"]
        code, out, err = rlinf(command, *given, *settings)
        assert code == 0, (command, given, err)
        done.append(command)
        if "--dry-run" in given:
            assert out.startswith("torchrun --nproc-per-node 1 --standalone -m rlinf_core.train examples/sft/")
    assert {"import-rlinf", "validate", "launch", "norm-stats", "new-plugin", "export"} == {*done}
    for run in ("libero", "libero_sft_openpi"):
        rows = [json.loads(line) for line in (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        assert sum("loss" in row for row in rows) == 2
    assert (tmp_path / "policy" / "rlinf.json").exists()
    assert (tmp_path / "norm_stats.json").exists()


def test_the_table_of_what_is_intended_is_what_the_command_does(rlinf, tmp_path):
    recipe = "RLinf/examples/sft/config/libero_sft_openpi.yaml"
    more = ["actor.fsdp_config.gradient_checkpointing=True", "+actor.model.openpi.max_token_len=99"]
    faithful, intended = (
        tomllib.loads(rlinf("import-rlinf", recipe, *more, *flags)[1]) for flags in ([], ["--as-intended"])
    )
    found = [
        (table["optim"]["schedule"], table["trainer"]["activation_checkpointing"], table["policy"]["max_token_len"])
        for table in (faithful, intended)
    ]
    assert found == [("constant", "none", 48), ("hf_cosine", "full", 99)]
    port = write_recipe(tmp_path / "RLinf/examples/sft/config", "port", "robotwin_port")
    frozen = [
        tomllib.loads(rlinf("import-rlinf", str(port), "+actor.model.openpi.train_expert_only=True", *flags)[1])
        for flags in ([], ["--as-intended"])
    ]
    assert [table["policy"].get("freeze") for table in frozen] == [None, "vlm"]


def test_keys_of_rlinf_on_the_page_are_keys_of_rlinf():
    for key in re.findall(r"`(actor\.[a-z_.0-9]+)", PAGE.read_text(encoding="utf-8")):
        assert reason(key, MAPPED) or reason(key, NOT_NEEDED) or reason(key, NOT_HERE), key
