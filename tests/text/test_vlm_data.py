"""Images in chats as people have them: where they are, how rows name them, and what is refused with a way out."""

import base64
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from tiny_text import trained_parts, write_jsonl
from tiny_vision import chats, model_folder, photo, vision_policy

from rlinf_core import UserError
from rlinf_core.illustration import Illustration
from rlinf_plugins_text.plugin import rlinf_open_dataset


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return vision_policy(model_folder(tmp_path_factory.mktemp("model") / "qwen", "qwen2_5_vl"))


@pytest.fixture
def folder(tmp_path):
    photo(tmp_path / "images" / "a.png", (40, 60), 0)
    photo(tmp_path / "images" / "b.png", (90, 50), 1)
    return tmp_path


def turns(content, answer="a cat"):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def rows_of(policy, data, *, images=True):
    source = rlinf_open_dataset(data, policy, "train")
    every = range(len(source))
    return source.__getitems__(every) if images else source.without_images(every)


def text(policy, row):
    return policy.text_tokenizer().decode(row["tokens"].tolist())


def pixels(path):
    return np.array(Image.open(path).convert("RGB"))


def encoded(path):
    return base64.b64encode(path.read_bytes()).decode()


WHAT = {"type": "text", "text": "what?"}


def ways(folder):
    """The same chat about a.png as people write it: format, row."""
    file = folder / "images" / "a.png"
    data_url = f"data:image/png;base64,{encoded(file)}"
    yield "a path", {"messages": turns([{"type": "image", "image": "images/a.png"}, WHAT])}
    yield "a key path", {"messages": turns([{"type": "image", "path": "images/a.png"}, WHAT])}
    yield "a file URL", {"messages": turns([{"type": "image", "url": file.as_uri()}, WHAT])}
    yield "an absolute path", {"messages": turns([{"type": "image", "image": str(file)}, WHAT])}
    yield "OpenAI", {"messages": turns([{"type": "image_url", "image_url": {"url": data_url, "detail": "low"}}, WHAT])}
    yield (
        "Responses",
        {"messages": turns([{"type": "input_image", "image_url": data_url}, {"type": "input_text", "text": "what?"}])},
    )
    yield "base64", {"messages": turns([{"type": "image", "base64": encoded(file)}, WHAT])}
    yield "no type", {"messages": turns([{"image": "images/a.png"}, {"text": "what?"}])}
    yield "a column", {"messages": turns([{"type": "image"}, WHAT]), "images": ["images/a.png"]}
    yield "a placeholder", {"messages": turns("<image>what?"), "images": ["images/a.png"]}
    yield "no placeholder", {"messages": turns("what?"), "images": ["images/a.png"]}
    yield "one image", {"messages": turns("<image>what?"), "image": "images/a.png"}
    yield "JSON text", {"messages": json.dumps(turns([{"type": "image", "image": "images/a.png"}, WHAT]))}


def test_the_ways_to_name_an_image_give_the_same_sample(folder, qwen):
    rows = [row for _, row in ways(folder)]
    found = rows_of(qwen, chats(write_jsonl(folder / "chats.jsonl", rows)))
    for (name, _), row in zip(ways(folder), found, strict=True):
        assert row["tokens"].tolist() == found[0]["tokens"].tolist(), name
        assert np.array_equal(row["images"]["image 1"], pixels(folder / "images" / "a.png")), name
    assert trained_parts(found[0], qwen) == ["a cat<|im_end|>"]
    assert text(qwen, found[0]).count("<|image_pad|>") == 6


def test_images_in_parquet_are_read_from_their_structs(folder, qwen):
    """As `datasets` and the hub have them: bytes beside the path that they came from."""
    data = (folder / "images" / "a.png").read_bytes()
    image = {"bytes": data, "path": "elsewhere/a.png"}
    rows = [
        {"messages": turns("<image>what?"), "images": [image]},
        {"messages": turns("<image><image>both?"), "images": [image, {"bytes": data, "path": None}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "chats.parquet")
    data = chats(folder / "chats.parquet")
    found = rows_of(qwen, data)
    assert [len(row["images"]) for row in found] == [1, 2]
    assert np.array_equal(found[1]["images"]["image 2"], pixels(folder / "images" / "a.png"))
    source = rlinf_open_dataset(data, qwen, "train")
    assert len(source.images.entry.file("image_bytes").read_bytes()) == len(rows[0]["images"][0]["bytes"])  # Once.


def test_sharegpt_prompts_and_choices_have_images_too(folder, qwen):
    chat = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    shared = rows_of(
        qwen,
        chats(
            write_jsonl(folder / "shared.jsonl", [{"conversations": chat, "image": "images/a.png"}]), format="sharegpt"
        ),
    )
    assert "<|vision_end|>\nwhat?<|im_end|>" in text(qwen, shared[0])
    pair = {"prompt": "what? ", "completion": "a cat", "images": ["images/a.png"]}
    bare = rows_of(qwen, chats(write_jsonl(folder / "pairs.jsonl", [pair]), format="prompt_completion"))
    assert text(qwen, bare[0]) == f"<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>what? a cat<|im_end|>"
    assert trained_parts(bare[0], qwen) == ["a cat<|im_end|>"]


@pytest.mark.parametrize("answer", ["B", 1, "1", "a dog"])
def test_a_multiple_choice_question_is_written_as_rlinf_writes_it(folder, qwen, answer):
    row = {
        "question": "What is it?",
        "choices": "['a cat', 'a dog']",
        "correct_answer": answer,
        "image": "images/a.png",
    }
    data = chats(
        write_jsonl(folder / "asked.jsonl", [row]), format="multiple_choice", keys={"answer": "correct_answer"}
    )
    (found,) = rows_of(qwen, data)
    assert "<|vision_end|>What is it?\nChoices:\nA. a cat\nB. a dog\n<|im_end|>" in text(qwen, found)
    assert trained_parts(found, qwen) == ["B. a dog<|im_end|>"]


REFUSED = {
    "an address": ({"type": "image", "url": "https://cats.org/a.png"}, "nothing is fetched while training. Download"),
    "outside": ({"type": "image", "image": "../secret.png"}, "is outside of .*data.image_folder"),
    "outside, absolute": ({"type": "image", "image": "/etc/passwd"}, "is outside of .*data.image_folder"),
    "missing": ({"type": "image", "image": "images/c.png"}, "there is no image .*images/c.png"),
    "no image": ({"type": "image", "image": "notes.txt"}, "notes.txt is damaged: it is not one of PNG, JPEG"),
    "damaged": ({"type": "image", "base64": "%%%"}, "is not valid base64"),
    "empty": ({"type": "image"}, "there is no image for it: the column 'images' has no images"),
    "video": ({"type": "video", "video": "a.mp4"}, "part of type 'video': only text and images is read"),
    "another machine": ({"type": "image", "url": "file://server/a.png"}, "a file of another machine"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_line_and_a_way_out(folder, qwen, name):
    part, message = REFUSED[name]
    (folder / "notes.txt").write_text("no image")
    rows = [{"messages": turns("fine")}, {"messages": turns([part, WHAT])}]
    data = chats(write_jsonl(folder / "chats.jsonl", rows))
    with pytest.raises(UserError, match=f"chats.jsonl, line 2: .*{message}"):
        rows_of(qwen, data)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": turns("<image><image>?"), "images": ["images/a.png"]}, "there is no image for it: .* 1 images"),
        ({"messages": turns("<image>?"), "images": ["images/a.png"] * 2}, "has a place for only 1: write <image>"),
        ({"messages": turns("a <|image_pad|> token")}, r"the text itself contains '<\|image_pad\|>'"),
    ],
)
def test_texts_and_images_have_to_agree(folder, qwen, row, message):
    with pytest.raises(UserError, match=f"line 1: .*{message}"):
        rows_of(qwen, chats(write_jsonl(folder / "chats.jsonl", [row])))


def test_an_image_folder_is_where_files_are(folder, qwen):
    row = {"messages": turns("<image>what?"), "images": ["a.png"]}
    path = write_jsonl(folder / "rows" / "chats.jsonl", [row]) if (folder / "rows").mkdir() is None else None
    with pytest.raises(UserError, match="there is no image"):
        rows_of(qwen, chats(path))
    (found,) = rows_of(qwen, chats(path, image_folder=str(folder / "images")))
    assert found["images"]["image 1"].shape == (40, 60, 3)
    with pytest.raises(UserError, match=r"is outside of .*images: see data.image_folder"):
        rows_of(qwen, chats(write_jsonl(path, [{**row, "images": [str(path)]}]), image_folder=str(folder / "images")))


def test_a_bomb_is_refused_before_its_pixels_exist(folder, qwen):
    head = bytearray((folder / "images" / "a.png").read_bytes())
    head[16:24] = (2**20).to_bytes(4, "big") * 2
    import zlib

    head[29:33] = zlib.crc32(bytes(head[12:29])).to_bytes(4, "big")
    (folder / "images" / "a.png").write_bytes(bytes(head))
    with pytest.raises(UserError, match=r"a.png claims too many pixels: .*make it smaller"):
        rows_of(
            qwen, chats(write_jsonl(folder / "chats.jsonl", [{"messages": turns([{"image": "images/a.png"}, WHAT])}]))
        )


def test_images_are_upright_and_transparency_is_dropped_as_in_transformers(folder, qwen):
    turned = Image.fromarray(pixels(folder / "images" / "a.png"))
    exif = Image.Exif()
    exif[274] = 6
    turned.save(folder / "images" / "turned.jpg", exif=exif)
    glass = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8))
    glass.save(folder / "images" / "glass.png")
    rows = [{"messages": turns("<image>?"), "images": [f"images/{name}"]} for name in ("turned.jpg", "glass.png")]
    found = rows_of(qwen, chats(write_jsonl(folder / "chats.jsonl", rows)))
    assert found[0]["images"]["image 1"].shape == (60, 40, 3)
    assert np.array_equal(found[1]["images"]["image 1"], np.array(glass.convert("RGB")))


@pytest.mark.parametrize(("overlong", "kept"), [("cut", [1]), ("split", [1, 1]), ("drop", [])])
def test_an_image_is_seen_whole_or_not_at_all(folder, overlong, kept):
    """The first image and turn fit; the second image would be cut."""
    policy = vision_policy(
        model_folder(folder / "model", "qwen2_5_vl"),
        max_length=70,
        overlong=overlong,
        image_processor={"min_pixels": 12544},
    )
    long = [*turns([{"image": "images/a.png"}, WHAT]), *turns([{"image": "images/b.png"}, WHAT])]
    data = chats(write_jsonl(folder / "chats.jsonl", [{"messages": long}, {"messages": turns("hi")}]))
    found = [row for row in rows_of(policy, data) if row["images"]]
    assert [len(row["images"]) for row in found] == kept
    token = policy.vision().token
    batch = policy.collate(found or rows_of(policy, data))  # Checks that tokens and images agree.
    counts = [int((row["tokens"] == token).sum()) for row in found]
    assert int((batch["tokens"] == token).sum()) == sum(counts) or not found
    assert all(count >= 16 for count in counts)


def test_max_pixels_limit_the_tokens_and_unknown_settings_are_refused(folder):
    model = model_folder(folder / "model", "qwen2_5_vl")
    data = chats(write_jsonl(folder / "chats.jsonl", [{"messages": turns([{"image": "images/b.png"}, WHAT])}]))
    lengths = []
    for limit in (12544, 3136):
        policy = vision_policy(model, image_processor={"max_pixels": limit})
        (row,) = rows_of(policy, data)
        lengths.append(int((row["tokens"] == policy.vision().token).sum()))
        policy.collate([row])
    assert lengths == [6, 4] or lengths[0] > lengths[1]
    with pytest.raises(UserError, match=r"policy.image_processor: .* has no 'max_pixel'; did you mean .*max_pixels"):
        rows_of(vision_policy(model, image_processor={"max_pixel": 1}), data)


def test_an_image_that_changes_is_noticed(folder, qwen):
    data = chats(write_jsonl(folder / "chats.jsonl", [{"messages": turns([{"image": "images/a.png"}, WHAT])}]))
    rows_of(qwen, data)
    photo(folder / "images" / "a.png", (80, 60), 5)
    with pytest.raises(UserError, match=r"a.png has changed since its text was tokenized .*60 x 80 now\): delete"):
        rows_of(qwen, data)


def test_a_model_that_reads_only_text_says_what_images_need(folder):
    from tiny_text import tiny_policy

    data = chats(write_jsonl(folder / "chats.jsonl", [{"messages": turns([{"image": "images/a.png"}, WHAT])}]))
    with pytest.raises(UserError, match=r"only text is read; .*images need a vision-language model: docs/vlm.md"):
        rows_of(tiny_policy(), data)


def test_the_page_of_inspect_shows_images_and_their_tokens_once(folder, qwen):
    (row,) = rows_of(
        qwen, chats(write_jsonl(folder / "c.jsonl", [{"messages": turns([{"image": "images/a.png"}, WHAT])}]))
    )
    shown = qwen.illustrate(row, {})
    assert isinstance(shown, Illustration)
    assert "<|image_pad|> x6" in [token.piece for token in shown.texts[0].tokens]
    facts = qwen.describe([row])
    assert facts["images"] == "1 in these samples"
    assert "<|vision_start|><|image_pad|> x6 <|vision_end|>what?" in facts["a sample"]


def test_pictures_that_datasets_decoded_are_read(folder, qwen):
    from rlinf_plugins_text.vision.images import ImageFolders, pixels_of

    image = Image.open(folder / "images" / "a.png")
    reference = ImageFolders(()).find(image, "x")
    assert np.array_equal(pixels_of(reference.read(), reference), pixels(folder / "images" / "a.png"))
    out = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(out, "PNG")
    with pytest.raises(UserError, match="16 or more bits, such as a depth map: convert"):
        pixels_of(out.getvalue(), "x")
