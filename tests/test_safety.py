"""What strangers' files must not do: run code, lead out of their folder, act on terminal or page, tell secrets."""

import contextlib
import io
import json
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distributions import ROOT, install, repository_plugins
from PIL import Image
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from rlinf_core import cli
from rlinf_core.commands.output import print_table, print_text
from rlinf_core.config.load import load_config
from rlinf_core.contract.datasets import LeRobotDatasetConfig
from rlinf_core.data.images.decoders import TorchcodecDecoder
from rlinf_core.data.images.parquet import image_batches
from rlinf_core.data.images.pictures import decode
from rlinf_core.data.images.video import torchcodec_failure
from rlinf_core.data.images.video_header import open_video, read_video_header
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.errors import Exit, UserError
from rlinf_core.inference import load_policy
from rlinf_core.testing.lerobot import CAMERAS
from rlinf_core.training.checkpoint.shards import INDEX, ShardReader
from rlinf_core.untrusted.text import is_secret, path_inside, printable
from rlinf_plugins_openpi.weights.files import open_files, shards
from rlinf_plugins_text.rows.chat import ChatTemplate
from rlinf_plugins_text.rows.confined import LimitError
from rlinf_plugins_text.rows.tokenizer import TemplateReader, TextTokenizer
from rlinf_plugins_text.weights.folder import weight_files

QUICK = ROOT / "examples" / "quickstart.toml"


class Exploit:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_run_no_code(tmp_path):
    mark = tmp_path / "ran"
    for number, write in enumerate((torch.save, lambda it, path: path.write_bytes(pickle.dumps(it)))):
        path = tmp_path / f"{number}.pt"
        write({"w": Exploit(mark)}, path)
        with pytest.raises(UserError, match=rf"{number}\.pt is no file of plain tensors"):
            _ = open_files(path).shapes
    assert not mark.exists()


@pytest.mark.parametrize("what", ["code", "bytes"])
def test_a_checkpoint_runs_no_code(what, tmp_path):
    """Bytes in a checkpoint would be unpickled without `weights_only` when they are loaded."""
    mark = tmp_path / "ran"
    entry = Exploit(mark) if what == "code" else BytesStorageMetadata()
    (tmp_path / INDEX).write_bytes(pickle.dumps(Metadata(state_dict_metadata={"w": entry}, storage_data={})))
    with pytest.raises(UserError, match="which does not belong in an index"):
        ShardReader(tmp_path).read_metadata()
    assert not mark.exists()


TOWER = b"K\1" + b"\x85" + b"2\x86" * 30  # A tuple, and 30 times one that holds the one before twice.
BOMBS = {
    "key": b"\x80\4}" + TOWER + b"K\1s.",
    "set": b"\x80\4\x8f(" + TOWER + b"\x90.",
    "call": b"\x80\4ccollections\nOrderedDict\n]" + TOWER + b"K\1\x86a\x85R.",
    "late": b"\x80\4}ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81\x942}b0K\1s.",
    "memo": b"\x80\4Nr\xff\xff\xff\x7f.",
    "frame": b"\x80\4\x95\xff\xff\xff\xff\xff\0\0\0N.",
    "marks": b"\x80\4}(0" + TOWER + b"K\1s.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_pickle_does_not_take_any_time_or_memory(name, tmp_path):
    (tmp_path / INDEX).write_bytes(BOMBS[name])
    with pytest.raises(UserError, match="unpickling it could take any time or memory"):
        ShardReader(tmp_path).read_metadata()
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/data.pkl", BOMBS[name])
        archive.writestr("weights/version", "3")
    with pytest.raises(UserError, match=r"weights\.pt is no file of plain tensors .* could take any time or memory"):
        _ = open_files(path).shapes


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_pickle_that_was_checked_is_the_one_that_is_read(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "weights.pt")
    assert open_files(tmp_path / "weights.pt").shapes == {"w": (2,)}
    with zipfile.ZipFile(tmp_path / "weights.pt", "a") as archive:
        archive.writestr("weights/data.pkl", BOMBS["key"])
    with pytest.raises(UserError, match="names occur twice"):
        _ = open_files(tmp_path / "weights.pt").shapes
    torch.save({"w": bytearray(3)}, tmp_path / "bytes.pt")
    with pytest.raises(UserError, match=r"bytes\.pt is no file of plain tensors .* it holds bytes"):
        _ = open_files(tmp_path / "bytes.pt").shapes


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    ],
)
def test_a_chat_template_sees_the_messages_alone(source):
    said = ""
    with contextlib.suppress(UserError):  # What is forbidden is refused, or is nothing.
        said = ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    assert said == ""


SOME = [{"role": "user", "content": "x"}]
ENDLESS = "{% for a in r %}" * 4 + "{% endfor %}" * 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% set r = range(99999) %}" + ENDLESS, "has taken more than 1 seconds"),
        ("{{ 'a' * 10**10 }}", "needs more than 1 GiB of memory"),  # Jinja computes constants when it compiles.
        ("{{ messages[0].content | center(10**10) }}", "needs more than 1 GiB of memory"),
        ("{{ '%0999999999999d' % 1 }}", "needs more than 1 GiB of memory"),
    ],
)
def test_a_chat_template_takes_neither_any_time_nor_any_memory(source, message, monkeypatch):
    monkeypatch.setattr("rlinf_plugins_text.rows.confined.SECONDS", 1.0)
    with pytest.raises(LimitError, match=f"the chat template {message}.*set policy.chat_template to"):
        TemplateReader(source, {}, {}, "").render(SOME)
    monkeypatch.undo()
    assert TemplateReader("{{ messages[0].content }}", {}, {}, "").render(SOME) == "x"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("normalizer", r"needs more than 0\.06.* GiB of memory, or crashes the library that reads it \(SIGABRT\)"),
        ("pre_tokenizer", "cannot be read: .*retry-limit-in-match"),
    ],
)
def test_a_tokenizer_takes_neither_any_time_nor_any_memory(what, message, tmp_path, monkeypatch):
    """One that replaces a letter by millions, and one that looks for letters in too many ways."""
    if what == "normalizer":
        monkeypatch.setattr("rlinf_plugins_text.rows.tokenizer.TOKENIZER_MEMORY", 2**26)
    plans = ROOT / "examples" / "data" / "text_plans"
    table = json.loads((plans / "tokenizer.json").read_text())
    many = {"type": "Replace", "pattern": {"String": "e"}, "content": "x" * 4_000_000}
    regex = "(a|a)*(a|a)*(a|a)*b|(?:(?:x+)+)+y"
    slow = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    table[what] = {"normalizer": many, "pre_tokenizer": slow}[what]
    shutil.copytree(plans, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=rf"policy\.tokenizer: .*model/tokenizer\.json {message}"):
        TextTokenizer(tmp_path / "model").encode(["e" + "a" * 40 + "x" * 60])
    whole = TextTokenizer(plans)
    assert whole.decode(whole.encode(["Open it."])[0].ids) == "Open it."


SECRET_PICTURE = "outside.png"


@pytest.fixture
def dataset(image_dataset, tmp_path):
    """A copy of a dataset, to be made hostile, in a folder beside a picture that is none of it."""
    Image.new("RGB", (32, 32)).save(tmp_path / SECRET_PICTURE)
    return shutil.copytree(image_dataset.root, tmp_path / "dataset")


def set_info(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "pattern",
    [
        "../{chunk_index}/{file_index}",
        "/etc/{chunk_index}/{file_index}",
        "data/{chunk_index}/../../../{file_index}",
        "..\\{chunk_index}{file_index}",
        "{chunk_index.__class__}",
        "{chunk_index:999999999999d}",
        "{chunk_index!r}",
        "data/\0{file_index}",
    ],
)
def test_paths_of_a_dataset_stay_in_its_folder(pattern, dataset):
    set_info(dataset, data_path=pattern)
    with pytest.raises(UserError, match=r"meta/info\.json: the path"):
        open_lerobot(LeRobotDatasetConfig(repo_id=str(dataset)), 1, "train")


@pytest.mark.parametrize("path", [f"../{SECRET_PICTURE}", "/{outside}", "a" * 5000, "\0"])
def test_pictures_of_a_dataset_lie_in_its_folder(path, dataset, tmp_path):
    path = path.replace("/{outside}", str(tmp_path / SECRET_PICTURE))
    table = pa.table({"front": pa.array([{"bytes": None, "path": path}])})
    pq.write_table(table, dataset / "pictures.parquet")
    [batch] = image_batches(dataset / "pictures.parquet", ["front"], dataset)
    assert batch["front"].null_count == 1


@pytest.mark.parametrize("name", ["../part.safetensors", "{outside}", "sub/../../part.safetensors"])
def test_shards_lie_beside_their_index(name, tmp_path):
    (tmp_path / "part.safetensors").write_bytes(b"")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name.format(outside=tmp_path / "part.safetensors")}}))
    with pytest.raises(UserError, match="is outside the folder"):
        shards(index)
    with pytest.raises(UserError, match="is outside the folder"):
        weight_files(folder, str(folder))


def test_files_of_an_exported_folder_lie_in_it(tmp_path):
    described = {"format": 1, "policy": {"type": "pi05"}, "data": {"config_name": "pi05_libero"}}
    (tmp_path / "rlinf.json").write_text(json.dumps(described | {"files": {"tokenizer": "../../tokenizer.model"}}))
    with pytest.raises(UserError, match=r"rlinf\.json: .* is outside the folder"):
        load_policy(tmp_path, plugins=repository_plugins())
    described["data"] = {"mixture": [{"name": "../x", "config_name": "pi05_libero"}]}
    (tmp_path / "rlinf.json").write_text(json.dumps(described | {"files": {}}))
    with pytest.raises(UserError, match=r"rlinf\.json: .* is outside the folder"):
        load_policy(tmp_path, plugins=repository_plugins())


def test_links_are_followed(tmp_path):
    """The hub's cache consists of them."""
    (tmp_path / "blob").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/link").symlink_to("../blob")
    assert path_inside(tmp_path / "folder", "link").read_text() == "x"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_claims_any_size_is_refused_before_it_is_unpacked():
    out = io.BytesIO()
    Image.new("1", (12_000, 8_000)).save(out, "PNG")
    assert len(out.getvalue()) < 100_000
    with pytest.raises(UserError, match="row 3 claims an image of 12000 x 8000 pixels"):
        decode(out.getvalue(), "row 3")


def test_a_small_image_of_huge_tiles_is_refused_before_it_is_unpacked():
    """libtiff unpacks a tile whole: 1 MB of zeros became 1 GB, of which the image shows 16 x 16 pixels."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 32_768, 323: 32_000, 324: 8, 325: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    with pytest.raises(UserError, match="row 3 claims an image of 32768 x 32000 pixels"):
        decode(data, "row 3")


def test_pictures_are_of_formats_that_cameras_record():
    with pytest.raises(UserError, match="it is not PNG, JPEG, WEBP, BMP or TIFF"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "row 3")


def write_video(path, codec="mpeg4", rate=1):
    """A video of one black frame of 64 x 32 pixels."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, width=64, height=32)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), "rgb24")))
        file.mux(stream.encode(None))
    return path


def read_with_torchcodec(path):
    if torchcodec_failure():  # It loads with the FFmpeg libraries that this lends.
        pytest.skip(torchcodec_failure())
    return TorchcodecDecoder(path, read_video_header(path))


def test_a_video_that_claims_any_size_is_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "huge.mp4")
    open_video(path).close()
    monkeypatch.setattr("rlinf_core.data.images.video_header.MOST_PIXELS", 64 * 32 - 1)
    with pytest.raises(UserError, match="its frames have 64 x 32 pixels"):
        open_video(path)


@pytest.fixture
def served():
    """A listening port, and the connections to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


@pytest.mark.parametrize("opens", [open_video, read_with_torchcodec])
@pytest.mark.parametrize(
    "name",
    ["http:/127.0.0.1:{port}/a.mp4", "tcp:/127.0.0.1:{port}", "concat:{path}", "subfile,,start,0,end,0,,:{path}"],
)
def test_no_file_name_is_an_address(name, opens, served, tmp_path, monkeypatch):
    """A dataset may hold a file of such a name, and is often opened by a relative path."""
    monkeypatch.chdir(tmp_path)
    outside = write_video(tmp_path / "outside.avi")
    path = Path(name.format(port=served.getsockname()[1], path=outside))
    path.parent.mkdir(parents=True)
    write_video(Path("own.mp4"), rate=7).rename(path)
    with contextlib.closing(opens(path)):
        assert read_video_header(path).average_rate == 7  # Of the file itself, not of the one outside.
    with pytest.raises(TimeoutError):
        served.accept()


@pytest.mark.parametrize("opens", [open_video, read_with_torchcodec])
@pytest.mark.parametrize("name", ["0.mp4", "0.m3u8", "0.txt"])
@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXTINF:10,\n{path}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {path}\n"]
)
def test_a_video_does_not_name_other_files(text, name, opens, tmp_path):
    (tmp_path / "data").mkdir()
    listing = tmp_path / "data" / name
    listing.write_text(text.format(path=write_video(tmp_path / "outside.mp4")))
    with pytest.raises(UserError, match="cannot be opened as a video"):
        opens(listing)


def test_rare_codecs_are_refused_with_a_way_out(tmp_path):
    path = write_video(tmp_path / "rare.avi", codec="flv")
    with pytest.raises(UserError, match=r"its codec is flv, .*ffmpeg -i old\.mp4"):
        open_video(path)


HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\r\u202etxt \ud800"


def test_escape_sequences_are_shown_and_not_sent(capsys):
    print_table([HOSTILE.replace("\x1b", "")[:1], "b"], [[HOSTILE, "x"]])
    print_text(HOSTILE)
    cli.main([f"nothing{HOSTILE}"])
    told = capsys.readouterr()
    assert not set(told.out[2:] + told.err) & set("\x1b\x07\x9b\r\u202e\ud800")
    assert told.out.count(r"\x1b]0;title\x07\x1b[2J\x9b31m\r\u202etxt \ud800") == 2


def columns(front=CAMERAS[0]):
    """Settings of a run on the tiny dataset."""
    columns = [f"data.images={{base_0_rgb='{front}'}}", 'data.state=["observation.state"]', 'data.actions=["action"]']
    return [*columns, "policy.variant=dummy", "policy.weights=random"]


def set_tasks(root, text):
    """Give the tasks other texts."""
    table = pq.read_table(root / "meta/tasks.parquet")
    name = next(name for name in table.column_names if name != "task_index")
    texts = pa.array([f"{text}{i}" for i in range(len(table))])
    pq.write_table(table.set_column(table.column_names.index(name), name, texts), root / "meta/tasks.parquet")


def test_task_texts_reach_the_terminal_without_escape_sequences(dataset, tiny_run, capsys):
    set_tasks(dataset, "\x1b[31mtask " + "b" * 300_000)
    path = tiny_run("pi05_metaworld", dataset, *columns(), 'data.tasks=["no"]')
    assert cli.main(["validate", str(path)]) == Exit.USER_ERROR
    told = capsys.readouterr()
    assert r"\x1b[31mtask bbb" in told.err
    assert len(told.out + told.err) < 50_000
    assert "characters are left out ...]" in told.err
    assert "\x1b" not in told.out + told.err


def test_passwords_and_tokens_are_not_repeated(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SOME_TOKEN", "short")
    token = "hf_" + "a1" * 16
    said = str(UserError(f"no https://me:word@host/x, {token} and 0123456789abcdef, short; http://host:80/a@b"))
    assert said == "no https://***@host/x, *** and ***, short; http://host:80/a@b"


SECRETS = [
    "https://me:pa55word@host/data",
    "https://host/data?rev=1&access_token=pa55word",
    "hf_" + "a1" * 16,
    "glpat-" + "a1" * 10,
    "xoxb-12345678901-abc",
    "AKIA" + "A1" * 8,
    "environment-secret",
]
KEYS_OF_SECRETS = ["db_password", "DB_PASS", "Token", "my_token", "wandb-api-key", "AWS_SECRET_ACCESS_KEY", "secret"]
WORDS = {
    "eos_token": "<|im_end|>",
    "stop_token": "END_OF_TURN",
    "mask_token": "reserved_0",
    "credentials": "key.json",
    "pad_token": "[PAD]",
    "bypass": "on",
    "tokens": "hello",
    "secretary": "Ann",
}


def test_keys_that_are_named_after_secrets():
    assert [key for key in KEYS_OF_SECRETS if not is_secret(key, "hunter2hunter2")] == []
    assert [key for key, value in WORDS.items() if is_secret(key, value)] == []
    assert not is_secret("password", "")


@pytest.mark.parametrize("key", KEYS_OF_SECRETS)
def test_a_config_with_a_named_secret_is_refused(key):
    with pytest.raises(UserError, match="contains a password or a token") as refused:
        load_config(QUICK, [f'policy.{key}="hunter2hunter2"'], repository_plugins())
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("setting", ["data.repo_id={}", "runner.name={}", 'data.images={{base_0_rgb="{}"}}'])
def test_a_config_with_a_secret_is_refused_and_does_not_repeat_it(setting, secret, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_TOKEN", "environment-secret")
    overrides = [setting.format(secret), f"runner.output_dir={tmp_path / 'runs'}"]
    with pytest.raises(UserError, match="contains a password or a token") as refused:
        load_config(QUICK, overrides, repository_plugins())
    assert cli.main(["validate", str(QUICK), *overrides]) == Exit.USER_ERROR
    told = capsys.readouterr()
    for part in ("pa55word", "hf_a1", "glpat-a1", "xoxb-123", "AKIAA1", "environment-secret"):
        assert part not in str(refused.value) + told.out + told.err
    assert not (tmp_path / "runs").exists()


def test_the_page_shows_what_data_say_as_text(dataset, tiny_run, tmp_path, monkeypatch):
    script, image = "<script>alert(1)</script><!-- ", '<img src="x" onerror="alert(2)">$x^{'
    monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", repository_plugins)
    set_tasks(dataset, f"{script}\x1b[2J\u202e{'b' * 300_000}")
    info = json.loads((dataset / "meta/info.json").read_text())
    info["features"] = {{CAMERAS[0]: image}.get(name, name): value for name, value in info["features"].items()}
    (dataset / "meta/info.json").write_text(json.dumps(info))
    for path in dataset.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.rename_columns([image if n == CAMERAS[0] else n for n in table.column_names]), path)
    path = tiny_run("pi05_metaworld", dataset, *columns(image), "data.state_width=3", "data.action_width=2")
    assert cli.main(["inspect", str(path), f"--output={tmp_path / 'page'}"]) == Exit.OK
    html = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert html.count("alert(1)") == html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 0
    assert "alert(2)" in html
    assert '<img src="x"' not in html
    assert r"\x1b[2J\u202e" in html
    assert not set(html) & set("\x1b\u202e\ud800")
    assert "characters are left out ...]" in html
    assert len(html) < 2_000_000


def test_what_is_left_out_of_a_text_is_said():
    said = printable(f"begin {'x' * 10_000} end\nnext")
    assert said == f"begin {'x' * 1944} [... 6,110 characters are left out ...] {'x' * 1946} end\nnext"
    assert printable(said) == said
    many = printable("line\n" * 100_000)
    assert len(many) <= 100_000
    assert many.startswith("line\nline\n")
    assert "[... 400,100 characters are left out ...]" in many


def test_a_mistake_shows_its_traceback_only_when_asked(tmp_path):
    """The real command lines, in processes of their own."""
    config = tmp_path / "run.toml"
    config.write_text("data = [")
    rlinf = [str(Path(sys.executable).with_name("rlinf"))]
    train = [sys.executable, "-m", "rlinf_core.train", str(config)]
    commands = [
        ([*rlinf, "validate", config], [*rlinf, "--debug", "validate", config]),
        (train, [*train, "--debug"]),
    ]
    for plain, debug in commands:
        told = subprocess.run(plain, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert told.returncode == Exit.USER_ERROR
        assert told.stderr.startswith(f"error: {config}: not valid TOML")
        assert told.stderr.count("\n") == 1
        asked = subprocess.run(debug, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert asked.returncode == Exit.USER_ERROR
        assert "Traceback (most recent call last)" in asked.stderr
        assert "TOMLDecodeError" in asked.stderr


def test_plugins_come_from_installed_packages_alone(tmp_path):
    """A folder that looks like a package's does nothing where one stands; as an installed one it would."""
    install(tmp_path, "intruder", plugins={"intruder": "intruder"}, intruder="open('ran', 'w').close()")
    command = [str(Path(sys.executable).with_name("rlinf")), "plugins"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "intruder" not in told.stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow  # 11 s: it starts torchrun.
def test_launch_does_not_import_modules_of_the_folder_where_it_starts(tmp_path):
    for name in ("tomli_w", "pydantic", "torch"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\nraise SystemExit(1)\n")
    overrides = [
        "runner.max_steps=1",
        f"runner.output_dir={tmp_path / 'runs'}",
        f"data.repo_id={ROOT / 'examples/data/metaworld_3tasks'}",
    ]
    command = [str(Path(sys.executable).with_name("rlinf")), "launch", str(QUICK), *overrides]
    subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert not (tmp_path / "ran").exists()
    assert list((tmp_path / "runs").rglob("metrics.jsonl"))


def test_no_code_reads_pickles_or_runs_texts():
    """What remains is read with `weights_only` or by an unpickler that knows a list of names."""
    wrong = re.compile(
        r"pickle\.loads?\(|allow_pickle=True|yaml\.(unsafe_)?load\(|(?<![\w.])(eval|exec)\(|trust_remote_code=True|"
        r"weights_only=False|shell=True|os\.system"
    )
    folders = [*ROOT.glob("rlinf_*/src"), *ROOT.glob("plugins/*/src")]
    sources = [path for folder in folders for path in folder.rglob("*.py") if path.parent.name != "testing"]
    assert len(sources) > 100
    found = {path.name for path in sources if wrong.search(path.read_text(encoding="utf-8"))}
    assert found <= {"chunked_batches.py"}  # What its own worker processes send.


def test_printable_leaves_ordinary_text_alone():
    text = "π0.5: „Öffne die Lade“ → 引き出し\n\tC:\\data, a@b.c, https://host/x?y=1@2 sk-learn"
    assert printable(text) == text
