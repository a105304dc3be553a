"""A template that writes the date: one date per run, whatever day it continues on."""

from datetime import datetime

import pytest
from tiny_text import dataset, tiny_policy, tokenizer_folder, write_jsonl

from rlinf_core.config.load import dump_config, load_config, with_begun
from rlinf_core.plugins.registry import get_plugins
from rlinf_core.preflight import check_run
from rlinf_core.rows import open_rows
from rlinf_core.training.data import RunData
from rlinf_core.training.distributed.processes import processes
from rlinf_core.training.run_folder import RunFolder, prepare_folder
from rlinf_plugins_text.plugin import rlinf_open_dataset as open_text
from rlinf_plugins_text.rows import chat, tokenizer

# Llama 3.2 and Granite write it so.
TEMPLATE = """{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
<|im_start|>system
Today Date: {{ date_string }}<|im_end|>
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHAT = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Sunny."}]


class Clock:
    """A day that tests change."""

    today = datetime(2026, 1, 31, 23, 59)
    fromisoformat = datetime.fromisoformat

    @classmethod
    def now(cls):
        return cls.today


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "datetime", Clock)
    monkeypatch.setattr(tokenizer, "datetime", Clock)
    folder = tokenizer_folder(
        tmp_path / "tokenizer", ["<|im_start|>", "<|im_end|>"], eos="<|im_end|>", template=TEMPLATE
    )
    rows = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}] * 8)
    given = [f"policy.tokenizer={folder}", 'policy.chat_template=""', f"data.repo_id={rows}"]
    given += [f"runner.output_dir={tmp_path}", "data.validation_fraction=0.0", "runner.val_check_interval=0"]
    given += ["policy.packing=false"]
    return lambda *more: load_config("examples/text_sft.toml", [*given, *more])


def text_of(run):
    (row,) = open_rows(run)[:1]
    return run.policy.text_tokenizer().decode(row["tokens"].tolist())


def test_a_run_keeps_the_date_of_its_first_day(written, monkeypatch):
    run = with_begun(written())
    assert run.policy.template_date == "2026-01-31"
    prepare_folder(run)
    assert load_config(run.folder / "config.toml") == run
    monkeypatch.setattr(Clock, "today", datetime(2026, 2, 1))
    again = with_begun(written())
    assert again == run
    assert "Today Date: 31 Jan 2026" in text_of(again)
    source = open_text(dataset(again.data.repo_id), again.policy, "train")
    assert source.facts()["date"].startswith("the chat template writes 2026-01-31, the same as long as the run lasts")
    assert with_begun(written(), replacing=True).policy.template_date == "2026-02-01"
    # Without a run, a text is of its day; texts of another day are not taken from the cache.
    assert "Today Date: 01 Feb 2026" in text_of(written())


def test_validate_and_a_run_say_the_date_and_how_turns_end(written, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    run, plugins = written(), get_plugins()
    report = check_run(run, plugins)
    assert report.findings == []
    assert report.facts["turns end in"] == "<|im_end|> (8)"
    assert "2026-01-31" in report.facts["date"]
    with processes("cpu") as group, RunFolder(run, group) as folder:
        start = folder.start()
        assert folder.run.policy.template_date == "2026-01-31"
        with folder.transaction(start):
            data = RunData.open(folder.run, plugins)
    assert {"turns end in: <|im_end|> (8)", *data.facts()} == set(data.facts())
    assert load_config(run.folder / "config.toml").policy.template_date == "2026-01-31"
    monkeypatch.setattr(Clock, "today", datetime(2026, 2, 1))
    with processes("cpu") as group, RunFolder(run, group) as folder:
        folder.start()
        assert folder.run.policy.template_date == "2026-01-31"


def test_a_date_may_be_given(written):
    run = with_begun(written('policy.template_date="2024-07-26"'))
    assert run.policy.template_date == "2024-07-26"
    assert "Today Date: 26 Jul 2024" in text_of(run)
    given = with_begun(written('policy.chat_template_kwargs={date_string="1 May"}'))
    assert "Today Date: 1 May" in text_of(given)
    with pytest.raises(Exception, match="template_date must be a date such as 2026-01-31"):
        tiny_policy(template_date="31.1.2026")


def test_runs_of_earlier_versions_stay_as_they_are(written):
    """Their config has no such key: nothing is added that would count as a change."""
    run = written()
    prepare_folder(run)
    file = run.folder / "config.toml"
    new = ("template_date", "chat_template_kwargs", "stop_tokens")
    file.write_text("\n".join(line for line in dump_config(run).splitlines() if not line.startswith(new)))
    assert "template_date" not in file.read_text()
    assert with_begun(written()).policy.template_date == ""


def test_a_template_without_a_date_has_none():
    assert tiny_policy().begun(None).template_date == ""
