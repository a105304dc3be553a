"""`policy.augmentations`: what a config may say, whose random numbers are whose, and one of another package."""

import re
import tomllib

import numpy as np
import pytest
import torch
from distributions import ROOT, install, repository_plugins

from rlinf_core import AugmentationConfig, PluginError, UserError
from rlinf_core.augmentations.random_erasing import RandomErasingConfig
from rlinf_core.config.load import dump_config, load_config
from rlinf_core.export import Choice, export_run
from rlinf_core.inference import load_policy
from rlinf_core.plugins.registry import Plugins
from rlinf_core.testing.configs import check_round_trip
from rlinf_core.testing.findings import Findings
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.resume import find_changes
from rlinf_core.training.run_folder import prepare_folder
from rlinf_plugins_openpi import Pi05Config
from rlinf_plugins_openpi.inputs.augmentation import OpenpiAugmentationConfig, draw_augmentations
from rlinf_plugins_openpi.model.augment import augment
from rlinf_plugins_openpi.model.dimensions import CAMERAS

CONFIG = f"""
[data]
config_name = "pi05_metaworld"
repo_id = "{ROOT}/examples/data/metaworld_3tasks"
validation_fraction = 0.15
num_workers = 0
[policy]
variant = "dummy"
action_dim = 4
[optim]
warmup_steps = 0
[trainer]
device = "cpu"
global_batch_size = 2
micro_batch_size = 2
param_dtype = "fp32"
"""
ERASING = RandomErasingConfig(probability=0.25)


class Wrong(AugmentationConfig):
    """Draws and applies whatever it is given."""

    type: str = "wrong"
    rows: int = len(CAMERAS)

    def draw(self, generator, cameras):
        return {"x": np.zeros((self.rows, 2))}

    def apply(self, images, draws, cameras):
        return images.movedim(-1, 2)


@pytest.fixture
def load(tmp_path):
    def load(*overrides, plugins=None):
        (tmp_path / "run.toml").write_text(CONFIG)
        given = (f"policy.{override}" if override.startswith("aug") else override for override in overrides)
        return load_config(tmp_path / "run.toml", list(given), plugins or repository_plugins())

    return load


def policy(*augmentations, **settings):
    return Pi05Config(variant="dummy", action_horizon=2, action_dim=3, augmentations=augmentations, **settings)


def philox(key):
    return np.random.Generator(np.random.Philox(key))


def encoded(config, cameras=CAMERAS):
    images = {name: np.full((20, 20, 3), 40 * i + 40, np.uint8) for i, name in enumerate(cameras)}
    sample = {"images": images, "state": np.zeros(3), "actions": np.zeros((2, 3)), "prompt": "lift"}
    for transform in config.transforms():
        sample = transform(sample)
    return sample


# --- the config -------------------------------------------------------------------------------------------------------


def test_names_and_tables_may_be_mixed_and_survive_being_written(load, tmp_path):
    run = load('augmentations=["openpi", {type = "random_erasing", probability = 0.25}, "random_erasing"]')
    assert run.policy.active_augmentations == (OpenpiAugmentationConfig(), ERASING, RandomErasingConfig())
    (tmp_path / "config.toml").write_text(dump_config(run))
    again = load_config(tmp_path / "config.toml", (), repository_plugins())
    assert again == run
    assert dump_config(again) == dump_config(run)
    findings = Findings("policy")
    check_round_trip(findings, policy(ERASING))
    assert not findings.broken


@pytest.mark.parametrize(
    ("given", "same"), [('augmentations=["openpi"]', "augment=true"), ("augmentations=[]", "augment=false")]
)
def test_a_list_that_says_what_augment_says_is_no_change(load, given, same):
    run = load(given)
    assert dump_config(run) == dump_config(load(same))
    saved = tomllib.loads(dump_config(load(same)))
    assert "augmentations" not in saved["policy"]  # So a run of an earlier version resumes.
    assert find_changes(run, saved, allow_change=False) == []


def test_another_list_changes_what_a_step_computes(load):
    saved = tomllib.loads(dump_config(load()))
    with pytest.raises(UserError, match=r"policy\.augmentations\[1\]\.probability: .*changes what a step computes"):
        find_changes(load('augmentations=["openpi", "random_erasing"]'), saved, allow_change=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            'augmentations=["random_erasin"]',
            "policy.augmentations[0]: unknown augmentation 'random_erasin'; did you mean 'random_erasing'? "
            "[command line]\n    available: openpi, random_erasing",
        ),
        (
            'augmentations=["openpi", {type = "random_erasing", probabilty = 0.5}]',
            "policy.augmentations[1].probabilty: unknown key; did you mean 'probability'? "
            "(its keys are probability, area, aspect, value, per_camera) [command line; table of rlinf-core ",
        ),
        (
            'augmentations=[{type = "openpi", strength = 2}]',
            "policy.augmentations[0].strength: unknown key (it has no keys) [command line; table of rlinf-plugins-",
        ),
        (
            'augmentations=[{type = "random_erasing", probability = 2}]',
            "policy.augmentations[0].probability: Input should be less than or equal to 1 (got 2) [command line; ",
        ),
        (
            'augmentations=[{type = "random_erasing", area = [0.5, 0.1]}]',
            "policy.augmentations[0]: area = [0.5, 0.1] must be two fractions above 0 and up to 1, in order [",
        ),
        (
            "augmentations=[{probability = 1}]",
            "policy.augmentations[0]: must be the name of an augmentation, or a table with its name as `type` [",
        ),
        ("augmentations=[3]", "or a table with its name as `type` (got 3) ["),
        ('augmentations="openpi"', "policy.augmentations: Input should be a valid list (got 'openpi') ["),
    ],
)
def test_a_mistake_names_the_entry_the_owner_and_what_was_meant(load, given, said):
    with pytest.raises(UserError) as caught:
        load(given)
    assert "1 mistake in the config" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["augment=false", 'augmentations=["openpi"]'], "augment = false contradicts augmentations, which has entries"),
        (["augment=true", "augmentations=[]"], "augment = true contradicts augmentations, which is empty"),
    ],
)
def test_contradictions_are_refused(load, given, said):
    with pytest.raises(UserError, match=said):
        load(*given)


def test_names_need_a_config_file():
    with pytest.raises(ValueError, match="'openpi' is a name, which only a config file can use: pass an instance"):
        policy("openpi")


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_an_augmentation_that_is_added_changes_no_other_number():
    alone, both = (config.draw(philox(3)) for config in (policy(), policy(OpenpiAugmentationConfig(), ERASING)))
    plain = Pi05Config(variant="dummy", action_horizon=2, action_dim=3).draw(philox(3))
    for drawn in (alone, both):
        assert np.array_equal(drawn["noise"], plain["noise"])
        assert drawn["time"] == plain["time"]
    assert "augmentation" not in alone
    for key, value in plain["augmentation"].items():
        assert np.array_equal(both["augmentation"][key], value)
    assert both["augmentation"].keys() - plain["augmentation"].keys() == {
        "random_erasing.rectangle",
        "random_erasing.seed",
    }


def test_numbers_do_not_depend_on_the_settings_of_others_and_differ_for_two_of_one_type():
    many, few = (
        draw_augmentations((RandomErasingConfig(value=value), ERASING, ERASING), philox(3))
        for value in ("mean", "random")
    )
    second = [key for key in many if "-2" in key]
    assert second == ["random_erasing-2.rectangle", "random_erasing-2.seed"]
    assert all(np.array_equal(many[key], few[key]) for key in second)
    assert not np.array_equal(many["random_erasing-2.rectangle"], many["random_erasing-3.rectangle"])


def test_a_batch_has_the_rows_of_its_cameras_and_the_model_applies_all_in_order():
    config = policy(OpenpiAugmentationConfig(), RandomErasingConfig(probability=1.0, value="black"))
    samples = [
        {**encoded(config, cameras), **config.draw(philox(key))}
        for key, cameras in enumerate([(CAMERAS[2],), (CAMERAS[0], CAMERAS[2])])
    ]
    batch = config.collate(samples)
    assert tuple(batch["augmentation"]) == (CAMERAS[0], CAMERAS[2])
    model = config.build()
    whole = augment(batch["images"], batch["augmentation"], model.augmentations)
    first = augment(batch["images"], batch["augmentation"], {"openpi": OpenpiAugmentationConfig()})
    erased = (whole == -1.0).all(-1) & (first != -1.0).any(-1)
    assert torch.equal(whole[~erased], first[~erased])
    assert 0.02 < erased[1].float().mean() < 0.33


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Wrong(rows=2), r"augmentation 'wrong' .*Wrong.*: draw\(\) gave 'x' as float64 \[2, 2\], .* one row for each"),
        (Wrong(), r"augmentation 'wrong' .*Wrong.*: apply\(\) gave images torch.float32 \[1, 3, 3, 224, 224\]"),
    ],
)
def test_an_augmentation_that_breaks_the_contract_is_named(wrong, said):
    config = policy(wrong)

    def use():
        batch = config.collate([{**encoded(config), **config.draw(philox(1))}])
        augment(batch["images"], batch["augmentation"], {"wrong": wrong})

    with pytest.raises(PluginError, match=said):
        use()


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_page_shows_the_images_after_each_augmentation():
    config = policy(OpenpiAugmentationConfig(), RandomErasingConfig(probability=1.0, value="black"))
    draws = {"step 1": config.draw(philox(1)), "step 2": config.draw(philox(2))}
    base, wrist, absent = config.illustrate(encoded(config, CAMERAS[:2]), draws).cameras
    assert [re.sub(r"[-+]?\d+(\.\d+)?", "#", picture.caption) for picture in wrist.pictures[1::2]] == [
        "step #, random_erasing: #% of the height x #% of the width erased"
    ] * 2
    assert base.pictures[0].caption.startswith("step 1, openpi: crop ")
    assert len(base.pictures) == 4
    black = [(picture.pixels == 0).all(-1).mean() for picture in wrist.pictures]
    assert black[0] == black[2] == 0
    assert min(black[1], black[3]) > 0.02
    assert absent.pictures == ()


# --- another package --------------------------------------------------------------------------------------------------


@pytest.fixture
def saturation(tmp_path, monkeypatch):
    """The package of docs/augmentation.md, installed; the environment's plugins with it."""
    page = (ROOT / "docs" / "augmentation.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert source.count("\n") < 60
    (declared,) = [tomllib.loads(text) for text in re.findall(r"```toml\n(\[project.*?)```", page, re.DOTALL)]
    plugins = declared["project"]["entry-points"]["rlinf.plugins"]
    install(tmp_path / "site", "acme-saturation", plugins=plugins, saturation=source)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return Plugins.load()


def test_a_run_with_the_augmentation_of_another_package(saturation, load, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    overrides = ["runner.max_steps=1", "runner.val_check_interval=1", "runner.val_samples=2"]
    run = load('augmentations=["saturation"]', f"runner.output_dir={tmp_path}", *overrides, plugins=saturation)
    factors, seen = [], []
    with processes("cpu") as group:
        trainer = run.trainer.build(run, start=prepare_folder(run, overwrite=False), group=group, plugins=saturation)
        trainer.policy.register_forward_pre_hook(lambda _, args: factors.append(args[0]))
        trainer.policy.vision.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        trainer.train()
    batch, images = factors[0], seen[0]
    assert tuple(batch["augmentation"]) == ("base_0_rgb",)
    factor = batch["augmentation"]["base_0_rgb"]["saturation.factor"]
    assert factor.shape == (2,)
    assert ((factor >= 0.5) & (factor <= 1.5)).all()
    before = batch["images"].flatten(0, 1).float() / 255
    grey = before @ torch.tensor([0.299, 0.587, 0.114])
    expected = (grey[..., None] + factor[:, None, None, None] * (before - grey[..., None])).clamp(0, 1)
    assert torch.allclose(images / 2 + 0.5, expected, atol=1e-5)
    assert not torch.allclose(images / 2 + 0.5, before, atol=0.02)
    assert len(seen) > 1
    assert all(later.dtype == torch.uint8 for later in seen[1:])  # Validation: images as they are.

    with pytest.raises(UserError, match="unknown augmentation 'saturation'"):  # The run needs the package,
        load_config(run.folder / "config.toml", (), repository_plugins())
    export_run(run.folder, tmp_path / "policy", Choice(), saturation)
    loaded = load_policy(tmp_path / "policy", plugins=repository_plugins())  # its policy does not.
    assert loaded.config.active_augmentations == ()
    row = {name: np.zeros((48, 48, 3), np.uint8) for name in run.data.images.values()}
    actions = loaded.infer({**row, "task": "push", run.data.state[0]: np.zeros(4, np.float32)})
    assert np.isfinite(actions).all()
