"""The pages say what is there: links, names, commands, settings and every code block."""

import argparse
import re
import runpy
import shlex
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from distributions import ROOT, entry_point, repository_entry_points, repository_plugins

from rlinf_core import UserError
from rlinf_core.cli import COMMANDS, _parse
from rlinf_core.config.load import load_config
from rlinf_core.contract.run import RunConfig
from rlinf_core.contract.tables.runner import RunnerConfig
from rlinf_core.errors import Exit
from rlinf_core.plugins.calls import specified_hooks
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins
from rlinf_core.process.ending import Reason
from rlinf_core.training.config import Fsdp2TrainerConfig
from rlinf_core.training.resume import MAY_CHANGE

PATTERNS = ("*.md", "docs/*.md", "rlinf_*/README.md", "plugins/*/README.md", "examples/*/README.md")
PAGES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
CORE = ROOT / "rlinf_core" / "src" / "rlinf_core"
TRIAL = ["policy.variant=dummy", "policy.weights=random"]
"""Makes a config for the full size one that needs no files."""
FRAGMENT = ["data.config_name=pi05_metaworld", *TRIAL]
"""Makes a whole config of a few tables."""


def pages(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())(test)


def blocks(page, language):
    """The code blocks of a page in one language; "" are those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def prose(page):
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def inline_code(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def command_lines(page):
    """Commands in blocks, split as a shell does, without comments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line, comments=True)


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def modules_in(page):
    """A page's Python blocks, executed, but for those that test_hooks.py and test_tutorial.py run."""
    if page.name in ("hooks.md", "tutorial_dataset.md", "convert_data.md"):
        return
    for number, source in enumerate(blocks(page, "python")):
        module = ModuleType(f"block_{number}_of_{page.stem}")
        exec(compile(source, f"{page.name}, block {number}", "exec"), vars(module))
        yield module


def plugins_of(page):
    """The repository's plugins, the plugins in the page's Python blocks, and the datasets its pyproject.toml names."""
    entries = repository_entry_points()
    modules = list(modules_in(page))
    found = {name: item for module in modules for name, item in vars(module).items()}
    entries += [entry_point(PLUGIN_GROUP, module.__name__, module) for module in modules if implements_hooks(module)]
    for block in blocks(page, "toml"):
        offered = tomllib.loads(block).get("project", {}).get("entry-points", {}).get(DATASET_GROUP, {})
        entries += [entry_point(DATASET_GROUP, name, found[value.partition(":")[2]]) for name, value in offered.items()]
    return Plugins(entries, strict=True)


def implements_hooks(module):
    return any(name.startswith("rlinf_") for name in vars(module))


def test_there_are_pages():
    named = {path.relative_to(ROOT).as_posix() for path in PAGES}
    assert named >= {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/training.md"}


def test_the_readme_begins_with_the_two_commands_that_ci_runs():
    readme = ROOT / "README.md"
    marked = re.findall(r"^<!-- (\w+) -->\n```bash\n(.*)\n```$", readme.read_text(encoding="utf-8"), re.MULTILINE)
    assert [f"{command}\n" for _, command in marked] == blocks(readme, "bash")[:2]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert [mark for mark, _ in marked] == re.findall(r"^readme (\w+)$", ci, re.MULTILINE)


@pages
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pages
def test_named_files_exist(page):
    """Paths in backticks, from the root of the repository or from the page's folder."""
    for name in inline_code(page):
        if name.startswith(("runs/", "meta/", "~")):  # Files of a run, of a dataset, of a user.
            continue
        if re.fullmatch(r"[\w./-]+/[\w.-]+\.(py|md|toml|svg|json)", name):
            assert (ROOT / name).exists() or (page.parent / name).exists() or (CORE / name).exists(), name


@pages
def test_named_tests_exist(page):
    for path, name in re.findall(r"([\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8")):
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), f"{path}::{name}"


def completion_of(tables):
    """What makes a block a whole config that needs no files; text has no small variant, and says what it needs."""
    data = tables.get("data", {})
    name = data.get("config_name") or next((entry["config_name"] for entry in data.get("mixture", ())), None)
    return FRAGMENT if name is None else [] if name == "text" else TRIAL


@pages
def test_toml_blocks_are_configs_that_load(page, tmp_path):
    plugins = plugins_of(page)
    for block in blocks(page, "toml"):
        tables = tomllib.loads(block)
        if not tables.keys() <= RunConfig.model_fields.keys():
            assert tables.keys() & {"project", "build-system"}, tables.keys()
            continue
        path = tmp_path / "config.toml"
        path.write_text(block, encoding="utf-8")
        try:
            load_config(path, completion_of(tables), plugins)
        except UserError as error:  # Simulators are in groups of their own; `tests/simulators`.
            if "Use: pip install 'rlinf-plugins-" not in str(error):
                raise


@pages
def test_python_blocks_run_and_define_what_can_be_used(page):
    plugins = plugins_of(page)
    assert plugins.registered
    for entry in plugins.datasets():
        said = {"raw_action_is_delta": True} if entry.name.endswith("_custom") else {}  # They leave it to the user.
        assert entry.load()(**said).repack()


@pages
def test_commands_take_their_arguments(page, tmp_path):
    """`rlinf COMMAND ARGUMENTS` in blocks is what the command's parser takes; settings are settings."""
    (tmp_path / "config.toml").touch()
    known = {command.name: command for command in (*COMMANDS, *(one.item for one in repository_plugins().commands()))}
    for name in inline_code(page):
        if match := re.match(r"rlinf ([a-z][a-z-]*)", name):
            assert match[1] in known, name
    for words in command_lines(page):
        settings = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
        if words[:1] == ["rlinf"]:
            parser = argparse.ArgumentParser(prog=words[1])
            import_module(known[words[1]].module).add_arguments(parser)
            _parse(parser, words[2:])
        elif "rlinf_core.train" not in words:
            continue
        if "optim.lrr=1" not in settings:  # The one that shows what mistakes look like.
            load_config(tmp_path / "config.toml", [*FRAGMENT, *settings], repository_plugins())


@pages
def test_settings_exist(page):
    """`runner.max_steps` in backticks is a key of the config, or a module of core."""
    models = runpy.run_path(str(ROOT / "docs" / "render_settings.py"))["PARTS"]
    keys = {f"{key}." + name for key, fields in settings_by_table(models).items() for name in fields}
    keys.add("data.mixture")  # A list of tables: `[[data.mixture]]`.
    for name in inline_code(page):
        name = name.partition("=")[0].strip()
        if re.fullmatch(r"(cluster|runner|data|policy|optim|trainer)(\.[a-z_]+)+", name):
            assert name in keys or is_name_of_core(name), name


def settings_by_table(parts):
    tables = {}
    for part in parts:
        table = re.match(r"`\[(\w+)\]`", part.heading)
        if table:
            tables.setdefault(table[1], set()).update(part.models[-1].model_fields)
    return tables


def is_name_of_core(dotted):
    """Whether `training.state.ema.Ema.update` is a module of core, or what one defines."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        path = CORE.joinpath(*parts[:count])
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if file.exists():
            source = file.read_text(encoding="utf-8")
            return all(
                re.search(rf"^\s*((def|class) {part}\b|{part}: )", source, re.MULTILINE) for part in parts[count:]
            )
    return False


ARCHITECTURE = ROOT / "docs" / "architecture.md"


def test_the_data_flow_names_functions_of_core():
    rows = [line for line in ARCHITECTURE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    functions = [name for row in rows[2:] for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", row.split("|")[3])]
    assert len(functions) > 15
    assert [name for name in functions if not is_name_of_core(name)] == []


def test_hooks_that_pages_name_exist():
    for page in PAGES:
        named = set(re.findall(r"`(rlinf_[a-z_]+)`", prose(page))) - {"rlinf_core", "rlinf_plugins_openpi"}
        assert named <= specified_hooks().keys(), page


def test_the_tree_has_every_folder_and_no_file_that_is_not():
    tree = blocks(ARCHITECTURE, "")[0]
    named = set(re.findall(r"(?:^|\s)(\w+\.py|\w+/)(?=\s)", tree))
    for path in sorted(ROOT.glob("**/src/*/**/__init__.py")):
        if ".venv" in path.parts:  # Ray's wheel has a folder named src.
            continue
        folder = path.parent.name
        assert path.parents[1].name == "src" or f"{folder}/" in named, f"say in the tree what {folder}/ is for"
    for path in sorted(CORE.glob("[a-z]*.py")):
        assert path.name in named, f"say in the tree what {path.name} is for"
    there = {path.name for path in ROOT.glob("**/src/**/*.py")}
    assert [name for name in named if name.endswith(".py") and name not in there] == []


def test_the_settings_are_up_to_date():
    render = runpy.run_path(str(ROOT / "docs" / "render_settings.py"))["render"]
    page = ROOT / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == render(), "run: python docs/render_settings.py"


def test_the_datasets_are_up_to_date():
    render = runpy.run_path(str(ROOT / "docs" / "render_datasets.py"))["render"]
    page = ROOT / "docs" / "datasets.md"
    assert page.read_text(encoding="utf-8") == render(), "run: python docs/render_datasets.py"


def test_the_message_shown_is_the_message():
    page = ROOT / "docs" / "training.md"
    (shown,) = [block for block in blocks(page, "") if block.startswith("error: ")]
    (words,) = [words for words in command_lines(page) if "optim.lrr=1" in words]
    with pytest.raises(UserError) as error:
        load_config(words[2], words[3:], repository_plugins())
    assert shown == f"error: {error.value}\n"


def test_what_may_change_is_what_the_page_says():
    may = {f"runner.{name}" for name in RunnerConfig.model_fields} - {"runner.name"}
    may |= {f"trainer.{name}" for name in Fsdp2TrainerConfig.model_fields}
    may -= {"trainer.type", "trainer.global_batch_size", "trainer.param_dtype"}
    may |= {f"data.{name}" for name in ("num_workers", "cache_dir", "download_limit_gb")}
    may |= {f"data.{name}" for name in ("on_bad_sample", "max_bad_samples")}
    assert may | {"cluster", "loggers", "evaluators"} == MAY_CHANGE


def test_the_table_of_exit_codes_has_every_reason_and_code():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    codes = dict(re.findall(r"^\| [^|]+ \| `(\w+)` \| (\d+) \|", text, re.MULTILINE))
    assert codes.keys() == set(get_args(Reason))
    assert {int(code) for code in codes.values()} == set(Exit)


def test_the_version_is_in_the_changelog():
    version = tomllib.loads((ROOT / "rlinf_core" / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_contracts_are_numbered_as_comments_refer_to_them():
    text = ARCHITECTURE.read_text(encoding="utf-8").partition("## Contracts")[2]
    numbered = {int(number) for number in re.findall(r"^(\d+)\. \*\*", text, re.MULTILINE)}
    for source in (*CORE.rglob("*.py"), *(ROOT / "tests").glob("*.py")):
        for number in re.findall(r"contract (\d+)", Path(source).read_text(encoding="utf-8")):
            assert int(number) in numbered, source
