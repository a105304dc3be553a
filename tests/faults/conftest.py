"""Fixtures of the fault tests: runs on real LeRobot data that fail, and the same runs undisturbed."""

import pytest
from distributions import install
from faulty import CONFIG, Runs


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="many more faults: `pytest tests/faults --long`")


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        is_long = metafunc.config.getoption("--long", default=False)  # Unknown where only a folder above is named.
        metafunc.parametrize("seed", range(10 if is_long else 1))


@pytest.fixture(scope="session")
def faulty_site(tmp_path_factory, image_dataset):
    """A folder for `sys.path` with the plugin that breaks runs, and their config."""
    site = tmp_path_factory.mktemp("faulty")
    install(site, "faulty", plugins={"faulty": "faulty"}, datasets={"faulty": "faulty:FaultyData"})
    (site / "faulty.toml").write_text(CONFIG.format(root=image_dataset.root))
    return site


@pytest.fixture
def runs(faulty_site, tmp_path, start_ranks):
    """`Runs` in a temporary folder."""
    return Runs(faulty_site, tmp_path, start_ranks)


@pytest.fixture(scope="session")
def left_alone(faulty_site, tmp_path_factory, start_ranks):
    """`left_alone(steps, ranks)`: the folder of an undisturbed run, made once."""
    made = {}

    def left_alone(steps, ranks=2):
        if (steps, ranks) not in made:
            runs = Runs(faulty_site, tmp_path_factory.mktemp("alone"), start_ranks)
            ended = runs.start(steps, ranks=ranks)
            assert ended.returncode == 0, ended.stderr
            made[steps, ranks] = runs.folder
        return made[steps, ranks]

    return left_alone
