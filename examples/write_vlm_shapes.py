"""Write examples/data/vlm_shapes: images of shapes, questions about them, and the tokenizer and processor of a tiny
Qwen2.5-VL.

    python examples/write_vlm_shapes.py

This script generates all of it: images, questions, tokenizer and chat template. Nothing is downloaded.
"""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).parent / "data" / "vlm_shapes"
COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 210, 60)}
SHAPES = ("circle", "square", "triangle")
IMAGES = 96
SIDE = 56
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}
{%- if message.content is string %}{{- message.content }}{%- else %}{{- message.content[0].text }}{%- endif %}
{{- '<|im_end|>' }}{% endgeneration %}
{%- elif message.content is string %}{{- message.content + '<|im_end|>' }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}{%- endif %}
{%- if part.type == 'text' %}{{- part.text }}{%- endif %}
{%- endfor %}
{{- '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def draw(color, shape, rng):
    """A shape of some size, somewhere on a grey ground."""
    image = Image.new("RGB", (SIDE, SIDE), (225, 225, 225))
    size = rng.randint(22, 34)
    x, y = (rng.randint(2, SIDE - size - 2) for _ in range(2))
    pencil, box = ImageDraw.Draw(image), (x, y, x + size, y + size)
    if shape == "circle":
        pencil.ellipse(box, fill=COLORS[color])
    elif shape == "square":
        pencil.rectangle(box, fill=COLORS[color])
    else:
        pencil.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=COLORS[color])
    return image


def rows(rng):
    """Questions with an image each, and one in eight without."""
    names = [(color, shape) for color in COLORS for shape in SHAPES]
    for number in range(IMAGES):
        color, shape = names[number % len(names)]
        name = f"images/{number:03}.png"
        draw(color, shape, rng).save(FOLDER / name, optimize=True)
        part = {"type": "image", "image": name}
        question, answer = rng.choice(
            [
                ("What do you see?", f"A {color} {shape}."),
                ("Which color is it?", f"It is {color}."),
                ("Which shape is it?", f"It is a {shape}."),
            ]
        )
        yield [part, {"type": "text", "text": question}], answer
        if number % 8 == 0:
            yield "Which shapes do you know?", "Circles, squares and triangles."


def tokenizer(texts):
    """A small tokenizer with Qwen's special tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(texts, trainer)
    return made


def main():
    """Write the folder."""
    (FOLDER / "images").mkdir(parents=True, exist_ok=True)
    data = list(rows(random.Random(0)))
    with (FOLDER / "shapes.jsonl").open("w", encoding="utf-8") as file:
        for asked, answer in data:
            chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": chat}) + "\n")
    texts = [said if isinstance(said, str) else said[1]["text"] for row in data for said in row]
    made = tokenizer([*texts, "user\nassistant\n"])
    made.save(str(FOLDER / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    processor = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": SIDE * SIDE,
        "max_pixels": 4 * SIDE * SIDE,
    }
    for name, table in (("tokenizer_config.json", settings), ("preprocessor_config.json", processor)):
        (FOLDER / name).write_text(json.dumps(table, indent=2) + "\n")
    (FOLDER / "chat_template.jinja").write_text(TEMPLATE)
    print(f"{FOLDER}: {len(data)} chats, {made.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
