"""`rlinf inspect`: what the page shows, and what becomes of what cannot be shown."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import toy_mixture
import toy_policy
from distributions import repository_plugins
from PIL import Image
from tiny_text import PLANS
from toy_data import Rows
from toy_mixture import toy_plugins

from rlinf_core import UserError, cli
from rlinf_core.data.loading.mixture import Order
from rlinf_core.data.normalize import NormStats, save_norm_stats
from rlinf_core.inspect.page import write
from rlinf_core.inspect.samples import choose, find, occurrences

EVIL = '<script>alert("1")</script> & "push" $x$'
EVIL_NAME = '<b>&$x$ "a" #24292f'
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture
def inspect(monkeypatch, capsys, tmp_path):
    """Run the command; returns (exit code, stdout, stderr, the page's folder)."""

    def inspect(config, *arguments, plugins=None):
        monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", lambda: plugins or repository_plugins())
        code = cli.main(["inspect", str(config), f"--output={tmp_path / 'page'}", *arguments])
        return code, *capsys.readouterr(), tmp_path / "page"

    return inspect


def write_config(folder, text):
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def robot(tmp_path_factory, image_dataset):
    """A config of π0.5 on a tiny dataset of two cameras, one of whose tasks is written by someone evil."""
    folder = tmp_path_factory.mktemp("robot")
    root = shutil.copytree(image_dataset.root, folder / "data")
    tasks = pq.read_table(root / "meta" / "tasks.parquet").to_pandas()
    tasks.index = [EVIL, *tasks.index[1:]]
    tasks.index.name = "task"
    tasks.to_parquet(root / "meta" / "tasks.parquet")
    info = json.loads((root / "meta" / "info.json").read_text(encoding="utf-8"))
    info["features"]["observation.state"]["names"][:2] = [EVIL_NAME, "schulter_höhe"]
    (root / "meta" / "info.json").write_text(json.dumps(info), encoding="utf-8")
    return write_config(
        folder,
        f"""
        [runner]
        name = "robot"
        max_steps = 20
        [data]
        config_name = "pi05_custom"
        repo_id = "{root}"
        images = {{ base_0_rgb = "observation.images.front", left_wrist_0_rgb = "observation.images.wrist" }}
        crops = {{ base_0_rgb = {{ top = 4, height = 20, width = 30 }} }}
        state = ["observation.state"]
        actions = ["action"]
        raw_action_is_delta = true
        validation_episodes = [3]
        [policy]
        variant = "dummy"
        action_horizon = 5
        action_dim = 4
        max_token_len = 120
        [trainer]
        device = "cpu"
        param_dtype = "fp32"
        global_batch_size = 4
        micro_batch_size = 4
        """,
    )


@pytest.fixture(scope="module")
def page(robot, tmp_path_factory):
    """The folder of the robot's page."""
    folder = tmp_path_factory.mktemp("page") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlinf_core.plugins.registry.get_plugins", repository_plugins)
        assert cli.main(["inspect", str(robot), f"--output={folder}"]) == 0
    return folder


def text_of(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


def words_of(folder):
    """What a reader sees, white space squeezed."""
    bare = re.sub(r"<(style|svg)\b.*?</\1>", " ", text_of(folder), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", bare).split())


def test_the_page_shows_run_data_samples_and_distributions(page):
    html, words = text_of(page), words_of(page)
    anchors = set(re.findall(r'\bid="([^"]+)"', html))
    links = set(re.findall(r'href="#([^"]+)"', re.search(r"<nav>.*</nav>", html, re.DOTALL)[0]))
    assert links >= {
        "findings",
        "run",
        "source-0",
        "sample1",
        "sample3",
        "source-0-state",
        "source-0-actions",
        "config",
    }
    assert links <= anchors
    assert "training rows 28" in words
    assert "From 7 to 12 frames, 9.3 on average, 28 in total" in words
    assert "recorded, 32 x 32 cropped, 30 x 20 given to the model, 224 x 224" in words
    assert re.search(r"step \d+ \(epoch 0\): crop [+-]\d", words)
    assert "right_wrist_0_rgb The data have no such camera" in words
    assert re.search(r"Task \d+ : \d+", words)  # Tokens, with their ids.
    assert "Prompt as" in words
    assert "did not fit" not in words
    assert "past the end of the episode: in the loss, too" in words
    assert "zeros up to policy.action_dim: in the loss, too" in words
    assert "actions float32 5 x 4" in words


def test_the_page_needs_nothing_else(page):
    html = text_of(page)
    assert re.findall(r"(?:src|href)=[\"']?(?!data:|#)[^\"' >]+", html) == []
    assert "url(http" not in html
    assert "@import" not in html
    assert "<script" not in html
    assert len(html) < 3e6


def test_texts_of_the_dataset_are_escaped(page):
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; &#34;push&#34; $x$" in text_of(page)


def test_dimensions_are_called_by_the_names_of_the_dataset(page):
    texts = re.findall(r"<text\b[^>]*>([^<]*)</text>", text_of(page))
    short = '&lt;b&gt;&amp;$x$ "a" #24292f'
    assert {"actions 1", "action1", short} <= set(texts)
    assert texts.count("action1") == 7  # The distribution, and of each sample the actions and the target.
    assert not any("schulter" in text for text in texts)  # The font of plots may lack it.
    words = words_of(page)
    assert "state name mean std" in words
    assert "1 schulter_höhe" in words
    assert "0 &lt;b&gt;&amp;$x$ &#34;a&#34; #24292f" in words


def test_ids_are_unique_and_references_within_plots_resolve(page):
    html = text_of(page)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert {*re.findall(r"url\(#([^)]+)\)", html), *re.findall(r'href="#([^"]+)"', html)} <= set(ids)


def test_pictures_and_plots_lie_beside_the_page(page):
    names = {path.name for path in page.glob("*/*.png")}
    assert names >= {"lengths.png", "state.png", "actions.png", "sample1-actions.png", "sample1-base_0_rgb-0.png"}
    sizes = [Image.open(page / "pictures" / f"sample1-base_0_rgb-{i}.png").size for i in range(6)]
    assert sizes == [(32, 32), (30, 20), *[(224, 224)] * 4]
    changed = np.asarray(Image.open(page / "pictures" / "sample1-base_0_rgb-3.png"))
    assert not np.array_equal(changed, np.asarray(Image.open(page / "pictures" / "sample1-base_0_rgb-2.png")))


def test_it_is_the_same_each_time_and_replaces_an_earlier_page(robot, page, inspect, tmp_path):
    write(tmp_path / "page", "earlier", {"pictures/earlier.png": b"x"})
    code, out, _, folder = inspect(robot)
    assert (code, out) == (0, f"{folder}/index.html: written\n")
    files = {path.relative_to(page): path.read_bytes() for path in page.rglob("*.*")}
    assert files == {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_of_something_else_is_left_alone(robot, inspect, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "thesis.tex").touch()
    code, _, err, folder = inspect(robot)
    assert code == 2
    assert "thesis.tex" in err
    assert "--output" in err
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


THEIRS = {
    "a photo beside the page's": ("pictures/wedding.jpg", b"x"),
    "a page that was edited": ("index.html", b"my notes"),
    "a picture that was replaced": ("pictures/sample1.png", b"y"),
    "a folder": ("plots/old/1.png", b"x"),
}


@pytest.mark.parametrize("with_page", [True, False])
@pytest.mark.parametrize(("name", "content"), THEIRS.values(), ids=THEIRS)
def test_only_files_that_an_earlier_page_wrote_are_replaced(tmp_path, name, content, with_page):
    """A folder with the names of a page's folders is not a page."""
    folder = tmp_path / "page"
    if with_page:
        write(folder, "earlier", {"pictures/sample1.png": b"x"})
        write(folder, "earlier", {"pictures/sample1.png": b"x"})
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"contains other files besides an earlier page .*{name}"):
        write(folder, "now", {})
    assert (folder / name).read_bytes() == content
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("mistake", ["optim.lrr=1", "data.repo_id=nowhere", "data.images.base_0_rgb=observation.top"])
def test_a_config_that_would_not_run_is_refused_as_validate_does(robot, inspect, mistake, capsys):
    code, _, err, folder = inspect(robot, mistake)
    assert cli.main(["validate", str(robot), mistake]) == code == 2
    assert err == capsys.readouterr().err
    assert not folder.exists()


def test_what_is_not_installed_is_said(robot, inspect, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err, _ = inspect(robot)
    assert code == 2
    assert "pip install 'rlinf-core[inspect]'" in err


def test_rows_can_be_chosen(robot, inspect):
    code, _, _, folder = inspect(robot, "--at", "2:11", "policy.augment=false")
    assert code == 0
    words = words_of(folder)
    assert "Sample 1: episode 2, frame 11 of 12" in words
    assert "Sample 2" not in words
    assert "policy.augment is off" in words
    for place, said in (
        ("3:0", "episode 3 is held out for validation"),
        ("4:0", "episode 4 is not one of the 3 training episodes"),
        ("2:12", "episode 2 has 12 frames"),
        ("x:2:1", "'x'"),
    ):
        code, _, err, _ = inspect(robot, "--at", place)
        assert code == 2
        assert said in err


def test_statistics_that_would_spoil_the_run_stand_on_the_page(robot, inspect, tmp_path):
    narrow = NormStats(*(np.arange(1.0, 2.0) for _ in range(4)))
    save_norm_stats(tmp_path / "s.json", {"state": narrow, "actions": narrow})
    code, _, err, folder = inspect(robot, f"data.norm_stats={tmp_path}/s.json")
    assert code == 2
    assert "too-narrow" in err
    words = words_of(folder)
    assert "error too-narrow: state" in words
    assert "no samples shown" in words
    assert "Episode lengths" in words


def toy_config(folder):
    return write_config(folder, toy_policy.CONFIG + "[runner]\nmax_steps = 20\n")


def test_a_row_that_cannot_be_read_is_shown_and_named(inspect, tmp_path, monkeypatch):
    # The first sample's row: a third into the middle one of 20 episodes.
    broken = Rows(200, broken=103, error=UserError("the picture is cut off"))
    monkeypatch.setattr(toy_policy, "Rows", lambda rows: broken if rows == 200 else Rows(rows))
    code, _, err, folder = inspect(toy_config(tmp_path), plugins=toy_plugins())
    said = "the picture is cut off [toy, part-0.parquet, episode 10, frame 3]"
    assert (code, said in err) == (2, True)
    assert f"cannot be shown {said}" in words_of(folder)
    assert "Sample 2: episode 11, frame 0 of 10" in words_of(folder)


def test_other_errors_of_a_row_keep_their_traceback(inspect, tmp_path, monkeypatch):
    broken = Rows(200, broken=103, error=ZeroDivisionError())
    monkeypatch.setattr(toy_policy, "Rows", lambda rows: broken if rows == 200 else Rows(rows))
    with pytest.raises(ZeroDivisionError) as error:
        inspect(toy_config(tmp_path), plugins=toy_plugins())
    assert "episode 10, frame 3" in error.value.__notes__[0]


def test_a_policy_that_shows_nothing_has_a_page_and_a_mixture_a_section_a_source(inspect, tmp_path):
    config = write_config(tmp_path, toy_mixture.CONFIG)
    code, _, _, folder = inspect(config, "--at", "toy:2:5", "--at", "narrow:0:9", plugins=toy_plugins())
    assert code == 0
    words = words_of(folder)
    assert "weight 3, 75.0% of the samples" in words
    assert "Sample 1: episode 2, frame 5 of 10" in words
    assert "Sample 1: episode 0, frame 9 of 10" in words
    assert {path.name for path in folder.glob("plots/*")} >= {"toy-state.png", "narrow-actions.png"}
    assert 'href="#toy-sample1"' in text_of(folder)


def test_text_shows_which_tokens_are_trained(inspect, tmp_path):
    config = write_config(
        tmp_path,
        f"""
        [data]
        config_name = "text"
        repo_id = "{PLANS}/plans.jsonl"
        [policy]
        weights = "random"
        tokenizer = "{PLANS}"
        chat_template = "chatml"
        max_length = 40
        config = {{ model_type = "qwen3" }}
        [trainer]
        device = "cpu"
        param_dtype = "fp32"
        global_batch_size = 4
        micro_batch_size = 4
        """,
    )
    code, out, _, folder = inspect(config)
    words = words_of(folder)
    assert code == 0
    assert re.search(r"warning: 3 texts of the 3 samples shown are truncated: up to \d+ tokens of a text never", out)
    assert re.search(r"truncated \d+ more tokens did not fit", words)
    assert "nothing found" not in words
    assert "Text as 40 tokens only read trained" in words
    assert "Episode lengths" not in words


def test_chosen_rows_are_of_several_tasks_and_parts_of_an_episode():
    tasks = {episode: "ab"[episode >= 15] for episode in range(20)}
    rows = choose(Rows(200), tasks)
    assert [tasks[row.episode] for row in rows] == ["a", "b", "a"]
    assert [row.frame for row in rows] == [3, 0, 8]
    assert len({row.episode for row in rows}) == 3
    assert [row.index for row in rows] == [row.episode * 10 + row.frame for row in rows]
    assert choose(Rows(10), {}) == [find(Rows(10), 0, frame) for frame in (3, 0, 8)]
    assert choose(Rows(1), {}) == [find(Rows(1), 0, 0)]


def test_occurrences_are_those_of_the_run():
    order = Order(7, (30, 6), (0.5, 0.5), 32)
    met = list(occurrences(order, 8, 12, 1, 4))
    assert len(met) == 3
    for _, epoch, position in met:
        sources, rows = order.epoch(epoch)
        assert (sources[position], rows[position]) == (1, 4)
    words, epoch, position = met[0]
    assert words.startswith(f"step {epoch * 8 + position // 4} (epoch {epoch}")
    assert ["after the run's end" in words for words, *_ in met] == [8 * e + p // 4 >= 12 for _, e, p in met]


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    return found or pytest.skip(f"none of {', '.join(BROWSERS)} is on PATH")


ASK = """<script>addEventListener("load", () => {
  const broken = [...document.images].filter(image => !image.complete || !image.naturalWidth).length;
  const plots = [...document.querySelectorAll("figure > svg")].map(one => one.getBoundingClientRect().height);
  const widths = [...document.querySelectorAll("main > figure > svg, .sample > figure > svg")]
    .map(one => one.getBoundingClientRect().width);
  const sections = [...document.querySelectorAll("h2, h3")].map(one => one.textContent.trim());
  const root = document.documentElement;
  const wide = root.scrollWidth - root.clientWidth;
  const found = { images: document.images.length, broken, plots, widths, sections, wide };
  document.body.innerHTML = ""; document.body.append(JSON.stringify(found)); })</script>"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [500, 700, 1400])
def test_a_browser_shows_the_page(browser, page, tmp_path, width):
    """The page itself, with a script after it that tells what the browser made of it."""
    asked = tmp_path / "asked.html"
    asked.write_text(text_of(page) + ASK, encoding="utf-8")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    quiet += "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    command = [browser, *quiet.split(), f"--user-data-dir={tmp_path}/user", f"--window-size={width},2000"]
    result = subprocess.run([*command, asked.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in result.stderr
    found = json.loads(re.search(r"<body>(\{.*\})</body>", result.stdout, re.DOTALL)[1])
    assert found["images"] == len(list((page / "pictures").iterdir())) == 3 * (6 + 5)
    assert found["broken"] == 0
    assert min(found["plots"]) > 10
    assert found["wide"] <= 0
    # Below that, labels of plots are too small to be read; the plots scroll.
    assert min(found["widths"]) >= 600
    assert {"Findings", "Run", "Data", "Episode lengths", "Tasks", "Config"} <= set(found["sections"])
    assert [section[:8] for section in found["sections"] if section.startswith("Sample")] == [
        f"Sample {i}" for i in (1, 2, 3)
    ]
    assert Path(page / "index.html").stat().st_size < 3e6
