"""Recipes as files: what Hydra composes and OmegaConf resolves, and everything that may be wrong with YAML."""

import builtins

import pytest
from damaging import ODD, complaint, damaged, damaged_bytes, examples
from hypothesis import given
from hypothesis import strategies as st
from rlinf_recipes import write_folder, write_recipe

from rlinf_core import UserError
from rlinf_plugins_openpi.recipes.hydra_files import RecipeFile, read_recipe
from rlinf_plugins_openpi.recipes.translate import translate


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("sft"))


@pytest.fixture
def written(tmp_path):
    def written(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def leaves(path, *arguments, **options):
    return {".".join(key): value for key, value in read_recipe(path, *arguments, **options).leaves.items()}


def wrong(path, *arguments, **options):
    with pytest.raises(UserError) as error:
        read_recipe(path, *arguments, **options)
    return str(error.value)


def test_defaults_and_interpolations_are_resolved(config):
    found = leaves(write_recipe(config, "robotwin_port"))
    assert found["actor.model.openpi_data.norm_stats_path"] == "/models/pi0/cup/norm_stats.json"
    assert found["actor.model.openpi.action_chunk"] == 50
    assert found["actor.optim.total_training_steps"] == 30000
    assert found["actor.fsdp_config.cpu_offload"] is False
    assert found["actor.fsdp_config.gradient_checkpointing"] is True
    assert found["cluster.component_placement.actor,env,rollout"] == "0-0"
    assert not any(key.startswith(("hydra", "defaults")) for key in found)


@pytest.mark.parametrize(
    "text",
    [b"\xef\xbb\xbflr: 1e-5\n", b"lr: 1e-5\r\nsteps: 3\r\n", b"# only\n\nlr: 1e-5\n", b"---\nlr: 1e-5\n"],
    ids=["byte order mark", "CRLF", "comment", "document start"],
)
def test_files_of_any_editor_are_read(written, text):
    assert leaves(written(text))["lr"] == 1e-5


def test_files_that_are_inherited_may_be_elsewhere(config, written):
    text = write_recipe(config, "elsewhere", "custom").read_text().replace("  searchpath:", "  # searchpath:")
    path = written(text)
    assert "name that folder with --config-path" in wrong(path)
    assert leaves(path, folders=[config])["actor.model.num_steps"] == 4


def test_arithmetic_of_rlinf_is_resolved(written):
    text = "a: 6\nb: ${multiply:${a},2}\nc: ${int_div:${b},5}\nd: ${subtract:${a},1}\ne: ${not:true}\n"
    assert leaves(written(text + "f: ${torch.dtype:bfloat16}")) == {
        **{"a": 6, "b": 12, "c": 2, "d": 5},
        **{"e": False, "f": "bfloat16"},
    }


def test_a_target_is_a_key_like_any_other(written, tmp_path):
    found = leaves(written(f"model: {{_target_: os.system, _args_: ['touch {tmp_path}/made']}}"))
    assert found["model._target_"] == "os.system"
    assert not (tmp_path / "made").exists()


WRONG = {
    "is empty": "",
    "holds a list or a text": "- a\n- b\n",
    "found duplicate key lr": "optim:\n  lr: 1\n  lr: 2\n",
    "is not valid YAML": "optim: {lr: 1\n",
    "refers to itself in a circle": "a: ${b}\nb: ${a}\n",
    "the environment variable NOT_THERE is not set": "a: ${oc.env:NOT_THERE}\n",
    "no interpolation ${eval:...}": "a: ${eval:'1+1'}\n",
    "Interpolation key 'b.c' not found": "a: ${b.c}\n",
    "a is ???: give it as a=...": "a: ???\n",
    "Could not load 'model/none'": "defaults:\n  - model/none@actor.model\na: 1\n",
    "name the folder with --config-path": "hydra:\n  searchpath: [pkg://os]\na: 1\n",
    "b: ": "a: 0\nb: ${int_div:1,${a}}\n",
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_files_are_one_message_that_names_the_file(written, message):
    path = written(WRONG[message])
    said = wrong(path)
    assert message in said
    assert said.startswith(str(path))


def test_all_values_that_cannot_be_resolved_are_named(written):
    said = wrong(written("a: ${b}\nb: ${a}\nc:\n  d: ???\ne: ${oc.env:NOT_THERE}\n"))
    assert [line.split()[0].rstrip(":") for line in said.splitlines()[1:]] == ["a", "b", "c.d", "e"]


def test_other_files_are_refused(written, tmp_path):
    assert "is not a .yaml file" in wrong(written("a: 1", "recipe.yml"))
    assert "cannot be read: No such file" in wrong(tmp_path / "none.yaml")
    assert "is not valid YAML" in wrong(written(b"a: \xff\xfe\n"))
    assert "has more than 1 MiB" in wrong(written("a: 1\n" + "# x\n" * 300_000))
    assert "in a circle" in wrong(written("defaults:\n  - recipe\na: 1\n"))


def test_nested_aliases_do_not_multiply(written):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    assert "has more than 20000 values, counting aliases" in wrong(written(bomb))
    written(bomb, "inherited.yaml")
    assert "inherited.yaml has more than 20000 values" in wrong(written("defaults:\n  - inherited\na: 1\n"))
    assert "counting aliases" in wrong(written("a: &a [*a]\n"))


def test_overrides_are_hydras(written):
    path = written("optim: {lr: 1}\nname: x\n")
    assert leaves(path, ["optim.lr=2", "+optim.eps=1e-8", "~name"]) == {"optim.lr": 2, "optim.eps": 1e-8}
    assert "cannot be composed: Could not override 'optim.lrr'" in wrong(path, ["optim.lrr=2"])
    assert "cannot be composed" in wrong(path, ["optim.lr={"])


def test_the_environment_is_named_and_secrets_stay_in_it(written, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/data")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert read_recipe(written("a: ${oc.env:DATA_ROOT}/x")).variables == ("DATA_ROOT",)
    said = wrong(written("a: ${oc.env:WANDB_API_KEY}"))
    assert "reads WANDB_API_KEY from the environment" in said
    assert "0123456789abcdef" not in said


def test_without_hydra_the_extra_is_named(written, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments):
        if name.partition(".")[0] == "hydra":
            raise ModuleNotFoundError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'rlinf-plugins-openpi[rlinf]'" in wrong(written("a: 1"))


@examples(12)
@given(data=st.data())
def test_damaged_files_are_one_message(config, data):
    path = config / "damaged.yaml"
    text = write_recipe(config, "whole", "custom").read_bytes()
    path.write_bytes(data.draw(damaged_bytes(text)))
    complaint(lambda: translate(read_recipe(path), {}), "damaged.yaml")


@examples(60)
@given(data=st.data())
def test_odd_values_are_one_message(base, data):
    tree = data.draw(damaged(base.leaves, [odd for odd in ODD if not isinstance(odd, dict)]))
    complaint(lambda: translate(RecipeFile(base.path, tree, ()), {}), "base.yaml")


@pytest.fixture(scope="module")
def base(config):
    return read_recipe(write_recipe(config, "base", "libero"))
