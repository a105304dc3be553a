"""The package of docs/loggers.md, installed and used by a run; a module in the place of wandb notes its calls."""

import json
import re

import pytest
from distributions import ROOT, install

from rlinf_core.config.load import read_toml
from rlinf_core.plugins.observers import TRACEBACKS

WANDB = '''
"""What the page uses of wandb; notes every call in a file, and fails where the environment says."""
import json, os

def note(name, /, *arguments, **named):
    with open(os.environ["NOTES"], "a") as file:
        print(json.dumps([name, *arguments, named], default=str), file=file)

class CommError(Exception):
    pass

class Run:
    def __init__(self, id):
        self.id = id

    def define_metric(self, *arguments, **named):
        note("define_metric", *arguments, **named)

    def log(self, data):
        note("log", {key: data[key] for key in ("step", "loss", "val_loss") if key in data})
        if str(data["step"]) == os.environ.get("FAILS_AT"):
            raise CommError("run abc123 was deleted")

    def finish(self, exit_code):
        note("finish", exit_code)

def init(id=None, **named):
    note("init", id, **named)
    return Run(id or "abc123")
'''


@pytest.fixture
def start(toy_site, tmp_path, start_ranks):
    text = (ROOT / "docs" / "loggers.md").read_text(encoding="utf-8")
    [package] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(package.splitlines()) < 80
    assert re.findall(r"^(?:from|import) (rlinf_core\S*)", package, re.MULTILINE) == ["rlinf_core"]
    site, notes = tmp_path / "site", tmp_path / "notes"
    install(site, "acme-wandb", plugins={"wandb": "acme_wandb"}, acme_wandb=package, wandb=WANDB)

    def start(*settings, **environment):
        """Returns how the run ended, and the calls."""
        notes.write_text("")
        options = (f"runner.output_dir={tmp_path}", 'runner.loggers=["wandb"]', *settings)
        paths, environment = (toy_site, site), {"NOTES": str(notes), **environment}
        ended = start_ranks("rlinf_core.train:main", 1, toy_site / "toy.toml", *options, paths=paths, **environment)
        return ended, [json.loads(line) for line in notes.read_text().splitlines()]

    return start


def test_a_logger_with_settings_survives_resumes_changes_and_its_own_end(start, tmp_path):
    table = ("loggers.wandb.project=arms", 'loggers.wandb.tags=["franka"]')
    ended, calls = start("runner.max_steps=2", "runner.val_check_interval=2", *table, FAILS_AT="")
    assert ended.returncode == 0, ended.stderr
    (init, id, given), define, *logged, finish = calls
    assert (init, id, given["project"], given["tags"], given["entity"]) == ("init", None, "arms", ["franka"], None)
    assert given["config"]["loggers"]["wandb"]["project"] == "arms"
    assert define == ["define_metric", "*", {"step_metric": "step"}]
    assert [data["step"] for _, data, _ in logged] == [1, 2, 2]
    assert "val_loss" in logged[2][1]
    assert finish == ["finish", 0, {}]
    assert read_toml(tmp_path / "run" / "config.toml")["loggers"]["wandb"]["project"] == "arms"

    # The run continues with other settings, and loses its tracker: that is one line, and it goes on.
    ended, calls = start("runner.max_steps=5", *table, "loggers.wandb.group=second", FAILS_AT="4")
    assert ended.returncode == 0, ended.stderr
    assert (calls[0][1], calls[0][2]["resume"], calls[0][2]["group"]) == ("abc123", "allow", "second")
    assert [call[1]["step"] for call in calls if call[0] == "log"] == [3, 4]
    assert calls[-1] == ["finish", 0, {}]
    assert [line for line in ended.stderr.splitlines() if "wandb" in line] == [
        "warning: logger 'wandb' of acme-wandb 1.0 (entry point 'wandb = acme_wandb') failed and is left out from now "
        f"on: CommError: run abc123 was deleted (traceback: {tmp_path / 'run' / TRACEBACKS})"
    ]
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["reason"] == "finished"
