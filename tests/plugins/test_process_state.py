"""Plugins that change settings of the whole process change nothing for the rest of a run."""

import os
import subprocess
import sys

import pytest
import torch

from rlinf_core.errors import PluginError, UserError
from rlinf_core.plugins.calls import naming
from rlinf_core.plugins.owners import Owner

OWNER = Owner("acme", "1.0", "acme = acme")
CHANGES = {
    "the current folder": (os.getcwd, lambda: os.chdir("/")),
    "torch's default dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.bfloat16)),
    "torch's default device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "whether torch records gradients": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(False)),
}


@pytest.mark.parametrize("setting", CHANGES)
def test_what_a_hook_changes_of_the_process_is_put_back(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    read, change = CHANGES[setting]
    before = read()
    assert naming("rlinf_configure", OWNER, lambda: (change(), 7)[1])() == 7
    assert read() == before
    assert f"warning: rlinf_configure of {OWNER} changed {setting} from {before} to " in capsys.readouterr().err


def test_it_is_put_back_after_an_error_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail():
        os.chdir("/")
        raise UserError("no such robot")

    with pytest.raises(PluginError, match="no such robot"):
        naming("rlinf_configure", OWNER, fail)()
    assert os.getcwd() == str(tmp_path)


def test_a_hook_that_changes_nothing_says_nothing(capsys):
    naming("rlinf_configure", OWNER, lambda: None)()
    assert capsys.readouterr().err == ""


def test_a_current_folder_that_is_gone_is_no_error(tmp_path, monkeypatch):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    naming("rlinf_configure", OWNER, lambda: os.chdir("/"))()


def test_a_hook_that_loads_torch_leaves_its_defaults():
    program = (
        "import sys\n"
        "from rlinf_core.plugins.process_state import kept\n"
        "assert 'torch' not in sys.modules\n"
        "with kept(lambda: 'a hook'):\n"
        "    import torch\n"
        "    torch.set_default_dtype(torch.float64)\n"
        "assert torch.get_default_dtype() == torch.float32\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (
        done.stderr
        == "warning: a hook changed torch's default dtype from torch.float32 to torch.float64; it is put back\n"
    )
