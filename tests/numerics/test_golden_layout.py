"""Nothing in the golden folder goes unnoticed."""

import json

import pytest
from golden import AREAS, GOLDEN, cases, name_of


def test_every_folder_is_known():
    unknown = {path.name for path in GOLDEN.iterdir() if path.is_dir()} - set(AREAS)
    assert not unknown, f"{GOLDEN} has folders that no test knows: {sorted(unknown)}"


def test_there_are_models():
    assert cases("model"), f"{GOLDEN} holds no case in model/"


@pytest.mark.skipif(not (GOLDEN / "transforms" / "index.json").is_file(), reason="this golden set has no index")
def test_every_case_that_the_set_lists_is_there():
    listed = {case["dir"] for case in json.loads((GOLDEN / "transforms" / "index.json").read_text())["configs"]}
    assert listed == {case.name for case in cases("transforms")}


def test_every_trained_model_is_a_case():
    trained = {name_of(folder): json.loads((folder / "curve.json").read_text())["init"] for folder in cases("train")}
    models = {case.name for case in cases("model")}
    missing = {name: init for name, init in trained.items() if init.split("/")[-2] not in models}
    assert not missing, f"{GOLDEN}: runs that start from models that are not there: {missing}"
