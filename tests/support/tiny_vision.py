"""Vision-language models with a few thousand parameters, their processors, and chats with images, all made here."""

import json

import numpy as np
from PIL import Image
from tiny_text import tokenizer_folder

from rlinf_plugins_text import TextDatasetConfig, TextPolicyConfig

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
}
M_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN_VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
QWEN_IDS = {"image_token_id": 261, "vision_start_token_id": 259, "vision_end_token_id": 260, "video_token_id": 262}
QWEN_TEMPLATE = """\
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- endif %}
{%- if part.type == 'text' %}{{- part.text }}{%- endif %}
{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
GEMMA_TEMPLATE = """\
{{- bos_token }}{%- for message in messages %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}{{- '<start_of_turn>' + role + '\\n' }}
{%- if message.content is string %}{{- message.content | trim }}{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<start_of_image>' }}{%- else %}{{- part.text | trim }}{%- endif %}
{%- endfor %}{%- endif %}{{- '<end_of_turn>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
PARTS_TEMPLATE = """\
{{- '<s>' }}{%- for message in messages %}{{- message.role + ': ' }}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<image>' }}{%- elif part.type == 'text' %}{{- part.text }}{%- endif %}
{%- endfor %}{{- '<end>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""
PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _qwen(vision, processor, **more):
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "merge_size": 2,
        "temporal_patch_size": 2,
        **processor,
    }
    return {
        "config": {"text_config": TEXT | {"rope_parameters": M_ROPE} | more, "vision_config": vision, **QWEN_IDS},
        "tokens": (*QWEN_TOKENS, "<|video_pad|>"),
        "eos": "<|im_end|>",
        "template": QWEN_TEMPLATE,
        "processor": processor | {"min_pixels": 56 * 56, "max_pixels": 112 * 112},
    }


FAMILIES = {
    "qwen2_vl": _qwen(
        {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
        {"processor_class": "Qwen2VLProcessor", "patch_size": 14},
    ),
    "qwen2_5_vl": _qwen(
        QWEN_VISION | {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        {"processor_class": "Qwen2_5_VLProcessor", "patch_size": 14},
    ),
    "qwen3_vl": _qwen(
        QWEN_VISION | {"patch_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        {"processor_class": "Qwen3VLProcessor", "patch_size": 16, **PIXELS},
        head_dim=8,
    ),
    "gemma3": {
        "config": {
            "text_config": TEXT | {"head_dim": 8, "sliding_window": 512},
            "vision_config": SIGLIP | {"image_size": 56},
            "mm_tokens_per_image": 4,
            "image_token_index": 261,
            "boi_token_index": 259,
            "eoi_token_index": 260,
        },
        "tokens": ("<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<soft>"),
        "bos": "<bos>",
        "eos": "<end_of_turn>",
        "special": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<soft>"},
        "template": GEMMA_TEMPLATE,
        "processor": PIXELS
        | {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor"}
        | {"size": {"height": 56, "width": 56}},
        "all": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        "attention": "padded",
    },
    "paligemma": {
        "config": {
            "text_config": TEXT | {"model_type": "gemma", "head_dim": 8},
            "vision_config": SIGLIP | {"projection_dim": 32},
            "image_token_index": 259,
            "projection_dim": 32,
            "hidden_size": 32,
        },
        "tokens": ("<pad>", "<eos>", "<bos>", "<image>"),
        "bos": "<bos>",
        "eos": "<eos>",
        "processor": PIXELS
        | {"image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor"}
        | {"size": {"height": 28, "width": 28}, "image_seq_length": 4},
        "attention": "padded",
    },
    "llava": {
        "config": {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 32},
            "image_token_index": 259,
            "image_seq_length": 4,
        },
        "tokens": ("<s>", "<end>", "<pad>", "<image>"),
        "bos": "<s>",
        "eos": "<end>",
        "template": PARTS_TEMPLATE,
        "processor": PIXELS
        | {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
        | {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
        "all": {
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    },
    "idefics3": {
        "config": {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": SIGLIP | {"model_type": "idefics3_vision", "image_size": 56},
            "image_token_id": 259,
            "scale_factor": 2,
        },
        "tokens": (
            *("<s>", "<end>", "<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"),
            *(f"<row_{row}_col_{column}>" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4)),
        ),
        "bos": "<s>",
        "eos": "<end>",
        "special": {
            "fake_image_token": "<fake_token_around_image>",
            "image_token": "<image>",
            "global_image_token": "<global-img>",
        },
        "template": PARTS_TEMPLATE,
        "processor": PIXELS
        | {"image_processor_type": "Idefics3ImageProcessor", "processor_class": "Idefics3Processor"}
        | {"do_image_splitting": True, "size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}},
        "all": {"processor_class": "Idefics3Processor", "image_seq_len": 4},
    },
}


def model_folder(folder, family):
    """A folder with config, tokenizer and processor of a tiny model; without weights."""
    facts = FAMILIES[family]
    tokenizer_folder(
        folder, facts["tokens"], eos=facts["eos"], bos=facts.get("bos", ""), template=facts.get("template", "")
    )
    table = json.loads((folder / "tokenizer_config.json").read_text())
    table |= {"pad_token": facts["tokens"][0]}
    if special := facts.get("special"):
        table |= {"extra_special_tokens": special}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    (folder / "config.json").write_text(json.dumps({"model_type": family, **facts["config"]}))
    (folder / "preprocessor_config.json").write_text(json.dumps(facts["processor"]))
    if "all" in facts:
        (folder / "processor_config.json").write_text(json.dumps(facts["all"]))
    return folder


def vision_policy(folder, **settings):
    """The policy of a model folder, from random weights."""
    family = FAMILIES.get(json.loads((folder / "config.json").read_text())["model_type"], {})
    attention = family.get("attention", "documents")
    table = {"weights": "random", "config_from": str(folder), "tokenizer": str(folder), "attention": attention}
    return TextPolicyConfig(**(table | {"shown_samples": 0, "max_length": 512} | settings))


def photo(path, size=(40, 60), seed=0):
    """A file with random pixels of [height, width]; returns its path."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def chats(path, **settings):
    return TextDatasetConfig(config_name="text", repo_id=str(path), **settings)
