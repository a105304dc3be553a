"""The package of docs/loggers.md, installed and used by a run; a module in the place of MLflow notes its calls."""

import json
import re

import pytest
from distributions import ROOT, install

from rlinf_core.config.load import read_toml
from rlinf_core.plugins.observers import TRACEBACKS

MLFLOW = '''
"""What the page uses of MLflow; notes every call in a file, and fails where the environment says."""
import json, os
from types import SimpleNamespace

def note(name, /, *arguments, **named):
    with open(os.environ["NOTES"], "a") as file:
        print(json.dumps([name, *arguments, named], default=str), file=file)

class RestException(Exception):
    pass

def set_experiment(name):
    note("set_experiment", name)

def start_run(run_id=None, **named):
    note("start_run", run_id, **named)
    return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "abc123"))

def log_dict(data, name):
    note("log_dict", data, name)

def log_metrics(metrics, step, synchronous):
    assert not synchronous
    note("log_metrics", {key: metrics[key] for key in ("loss", "val_loss") if key in metrics}, step)
    if str(step) == os.environ.get("FAILS_AT"):
        raise RestException("run abc123 was deleted")

def end_run(status):
    note("end_run", status)
'''


@pytest.fixture
def start(toy_site, tmp_path, start_ranks):
    text = (ROOT / "docs" / "loggers.md").read_text(encoding="utf-8")
    [package] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(package.splitlines()) < 80
    assert re.findall(r"^(?:from|import) (rlinf_core\S*)", package, re.MULTILINE) == ["rlinf_core"]
    site, notes = tmp_path / "site", tmp_path / "notes"
    install(site, "acme-mlflow", plugins={"mlflow": "acme_mlflow"}, acme_mlflow=package, mlflow=MLFLOW)

    def start(*settings, **environment):
        """Returns how the run ended, and the calls."""
        notes.write_text("")
        options = (f"runner.output_dir={tmp_path}", 'runner.loggers=["mlflow"]', *settings)
        paths, environment = (toy_site, site), {"NOTES": str(notes), **environment}
        ended = start_ranks("rlinf_core.train:main", 1, toy_site / "toy.toml", *options, paths=paths, **environment)
        return ended, [json.loads(line) for line in notes.read_text().splitlines()]

    return start


def test_a_logger_with_settings_survives_resumes_changes_and_its_own_end(start, tmp_path):
    table = ("loggers.mlflow.experiment=arms", 'loggers.mlflow.tags={ robot = "franka" }')
    ended, calls = start("runner.max_steps=2", "runner.val_check_interval=2", *table, FAILS_AT="")
    assert ended.returncode == 0, ended.stderr
    (_, experiment, _), (started, id, given), (_, config, name, _), *logged, end = calls
    assert (experiment, started, id, given["run_name"], given["tags"]) == (
        *("arms", "start_run", None, "run", {"robot": "franka"}),
    )
    assert (config["loggers"]["mlflow"]["experiment"], name) == ("arms", "config.json")
    assert [step for _, _, step, _ in logged] == [1, 2, 2]
    assert "val_loss" in logged[2][1]
    assert end == ["end_run", "FINISHED", {}]
    assert read_toml(tmp_path / "run" / "config.toml")["loggers"]["mlflow"]["experiment"] == "arms"

    # The run continues with other settings, and loses its tracker: that is one line, and it goes on.
    ended, calls = start("runner.max_steps=5", *table, 'loggers.mlflow.tags={ try = "2" }', FAILS_AT="4")
    assert ended.returncode == 0, ended.stderr
    assert (calls[1][1], calls[1][2]["tags"]["try"]) == ("abc123", "2")
    assert [call[2] for call in calls if call[0] == "log_metrics"] == [3, 4]
    assert calls[-1] == ["end_run", "FINISHED", {}]
    assert [line for line in ended.stderr.splitlines() if "mlflow" in line] == [
        "warning: logger 'mlflow' of acme-mlflow 1.0 (entry point 'mlflow = acme_mlflow') failed and is left out from "
        f"now on: RestException: run abc123 was deleted (traceback: {tmp_path / 'run' / TRACEBACKS})"
    ]
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["reason"] == "finished"
