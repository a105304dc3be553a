"""Vision-language models compute what transformers computes from the same images: tokens, pixels, loss, gradients."""

import json

import pytest
import torch
from PIL import Image
from tiny_text import with_values, write_jsonl
from tiny_vision import FAMILIES, chats, model_folder, photo, vision_policy
from transformers import AutoModelForImageTextToText, AutoProcessor

from rlinf_core import UserError
from rlinf_plugins_text.plugin import rlinf_open_dataset
from rlinf_plugins_text.weights import model_config

TWO = [{"type": "text", "text": "compare "}, {"type": "image", "image": "b.png"}, {"type": "image", "image": "a.png"}]
CHATS = [
    [("user", [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what is it?"}]), ("assistant", "a cat")],
    [("user", TWO), ("assistant", "the same"), ("user", "sure?"), ("assistant", "yes, sure")],
    [("user", "hi"), ("assistant", "hello you")],
]
PAIRS = [("what is it?", "a cat", ["a.png"]), ("two of them", "cat and dog", ["b.png", "a.png"])]


def messages(chat):
    """As transformers' processors take them."""
    return [
        {"role": role, "content": content if isinstance(content, list) else [{"type": "text", "text": content}]}
        for role, content in chat
    ]


QUICK = ("qwen2_5_vl", "paligemma")
"""Families that are compared in every run of the tests; the others take five seconds each."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in FAMILIES],
)
def case(request, tmp_path_factory):
    """Folder, policy and rows of a family."""
    folder = tmp_path_factory.mktemp(request.param)
    photo(folder / "a.png", (40, 60), 0)
    photo(folder / "b.png", (90, 50), 1)
    policy = vision_policy(model_folder(folder / "model", request.param))
    if request.param == "paligemma":
        rows = [dict(zip(("prompt", "completion", "images"), pair, strict=True)) for pair in PAIRS]
        data = chats(write_jsonl(folder / "pairs.jsonl", rows), format="prompt_completion")
    else:
        rows = [{"messages": [{"role": role, "content": said} for role, said in chat]} for chat in CHATS]
        data = chats(write_jsonl(folder / "chats.jsonl", rows))
    source = rlinf_open_dataset(data, policy, "train")
    return request.param, folder, policy, source.__getitems__(range(len(source)))


def theirs(family, folder):
    """For each row, what transformers' own processor gives the model."""
    processor = AutoProcessor.from_pretrained(folder / "model")
    if family == "paligemma":
        for prompt, completion, names in PAIRS:
            images = [Image.open(folder / name) for name in names]
            text = "<image>" * len(images) + prompt
            yield processor(images=images, text=text, suffix=completion, return_tensors="pt")
        return
    for chat in CHATS:
        text = processor.apply_chat_template(messages(chat))
        names = [part["image"] for _, said in chat if isinstance(said, list) for part in said if "image" in part]
        images = [Image.open(folder / name) for name in names] or None
        # As `apply_chat_template` does for templates that write the beginning of the text themselves.
        adds = not text.startswith(processor.tokenizer.bos_token or "\0")
        inputs = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=adds)
        if family == "gemma3" and "token_type_ids" not in inputs:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        yield inputs


def their_model(policy, module):
    model = AutoModelForImageTextToText.from_config(
        model_config(policy.model_table()), dtype=torch.float32, attn_implementation="eager"
    )
    model.load_state_dict(module.lm.model.state_dict())
    return model.train()


def test_tokens_pixels_loss_and_gradients_are_those_of_transformers(case):
    family, folder, policy, rows = case
    module = with_values(policy).train()
    if family == "gemma3":  # It begins with zeros, through which no gradient gets to the tower.
        module.lm.model.model.multi_modal_projector.mm_input_projection_weight.data.normal_()
    model = their_model(policy, module)
    expected = torch.zeros((), dtype=torch.float64)
    for row, inputs in zip(rows, theirs(family, folder), strict=True):
        ids = inputs["input_ids"][0]
        assert ids.tolist() == row["tokens"].tolist()
        labels = torch.where(torch.from_numpy(row["trained"]), ids, -100)
        if "labels" in inputs:
            assert labels.tolist() == inputs["labels"][0].tolist()
        loss = model(**{**inputs, "labels": labels[None]}).loss * int(row["trained"][1:].sum())
        loss.backward()
        expected += loss.detach().double()
    output = module(policy.collate(rows))
    output.loss_sum.backward()
    assert float(output.loss_sum.detach()) == pytest.approx(float(expected), rel=1e-6)
    found = {name.removeprefix("lm.model."): p.grad for name, p in module.named_parameters() if p.requires_grad}
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    apart = sum(float((found[name] - grad).double().square().sum()) for name, grad in wanted.items())
    assert apart <= 1e-10 * sum(float(grad.double().square().sum()) for grad in wanted.values())
    blocks = [name for name in wanted if "vis" in name and "mlp" in name and name.endswith("weight")]
    assert len(blocks) >= 4
    assert all(float(found[name].abs().max()) > 0 for name in blocks)


def test_a_sample_does_not_depend_on_the_others_of_its_batch(case):
    """Also where a batch has no image, to which a blank one is added so that all ranks call the vision tower."""
    _, _, policy, rows = case
    module = with_values(policy)
    alone = [module(policy.collate([row])) for row in rows]
    together = module(policy.collate(rows))
    torch.testing.assert_close(sum(one.loss_sum for one in alone), together.loss_sum, rtol=1e-6, atol=1e-5)
    assert float(sum(one.weight for one in alone)) == float(together.weight)
    assert all("pixel_values" in policy.collate([row])["packing"]["images"] for row in rows)


def test_a_pack_has_the_loss_of_its_texts(tmp_path):
    """Positions in time, height and width begin again with each text; images belong to their own."""
    photo(tmp_path / "a.png", (40, 60), 0)
    photo(tmp_path / "b.png", (90, 50), 1)
    rows = [{"messages": [{"role": role, "content": said} for role, said in chat]} for chat in CHATS]
    data = chats(write_jsonl(tmp_path / "chats.jsonl", rows))
    folder = model_folder(tmp_path / "model", "qwen2_5_vl")
    losses = []
    for packing in (False, True):
        policy = vision_policy(folder, packing=packing, max_length=256)
        source = rlinf_open_dataset(data, policy, "train")
        assert len(source) == (1 if packing else 3)
        batch = policy.collate(source.__getitems__(range(len(source))))
        losses.append(float(with_values(policy)(batch).loss_sum.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_models_that_look_ahead_within_images_are_not_packed(tmp_path):
    photo(tmp_path / "a.png")
    row = {"messages": [{"role": role, "content": said} for role, said in CHATS[0]]}
    policy = vision_policy(model_folder(tmp_path / "model", "gemma3"), attention="documents")
    with pytest.raises(UserError, match=r'policy.attention = "padded"'):
        rlinf_open_dataset(chats(write_jsonl(tmp_path / "chats.jsonl", [row])), policy, "train")


@pytest.mark.parametrize(
    ("parts", "kept"),
    [
        (["vision_tower"], {"model.visual.merger", "model.language_model", "lm_head.weight"}),
        (["vision_tower", "projector"], {"model.language_model", "lm_head.weight"}),
        (["language_model"], {"model.visual"}),
    ],
)
def test_freeze_names_the_parts_that_are_not_trained(tmp_path, parts, kept):
    folder = model_folder(tmp_path / "model", "qwen2_5_vl")
    policy = vision_policy(folder, weights=str(folder), config_from="", freeze=parts)
    with torch.device("meta"):
        module = policy.build()
    trained = {n.removeprefix("lm.model.") for n, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert all(any(name.startswith(begin) for begin in kept) for name in trained)
    assert all(any(name.startswith(begin) for name in trained) for begin in kept)


def test_freeze_and_image_processor_need_a_model_that_sees(tmp_path):
    folder = model_folder(tmp_path / "model", "qwen2_5_vl")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    for setting in (
        {"freeze": ["vision_tower"], "weights": str(folder), "config_from": ""},
        {"image_processor": {"size": 1}},
    ):
        with pytest.raises(UserError, match=f"policy.{next(iter(setting))}: the model \\(qwen3\\) sees no images"):
            vision_policy(folder, **setting).vision()
