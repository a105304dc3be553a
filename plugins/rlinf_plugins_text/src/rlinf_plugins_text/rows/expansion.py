"""From a text with a placeholder for each image to the one that the model's processor would write. Imports no torch.

A processor writes as many tokens as an image of that size has features, and further tokens around them; the model reads
the same from transformers. It is asked once per size, in the process with limits (`confined`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlinf_core import UserError
from rlinf_plugins_text.rows.confined import CONFINED, GIB, Limits
from rlinf_plugins_text.rows.formats import Example
from rlinf_plugins_text.rows.shapes import IMAGE
from rlinf_plugins_text.rows.tokenizer import ERRORS
from rlinf_plugins_text.rows.turns import Span
from rlinf_plugins_text.vision.processor import Vision

MEMORY = 24 * GIB
"""Address space for torch, transformers and one image beyond what the process has."""
CHARACTERS = 500_000
"""An image may take as much time as this many characters of a text: five seconds."""

Size = tuple[int, int]
"""Height and width in pixels."""


class Expander:
    """Expands the placeholders of texts.

    Args:
        vision: The model's.
    """

    def __init__(self, vision: Vision) -> None:
        self._vision = vision
        self._texts: dict[Size, tuple[str, str]] = {}

    def learn(self, sizes: Sequence[Size]) -> None:
        """Ask for images of these sizes, where they are new. Raises `UserError` if the processor cannot be used."""
        if not (new := list(dict.fromkeys(size for size in sizes if size not in self._texts))):
            return
        limits = Limits(
            f"the image processor in {self._vision.folder}",
            "it is damaged, or images are very large; lower max_pixels in policy.image_processor",
            MEMORY,
            CHARACTERS * (20 + len(new)),
        )
        arguments = {
            "folder": str(self._vision.folder),
            "changes": self._vision.changes,
            "placeholder": self._vision.placeholder,
            "sizes": new,
        }
        found, _ = CONFINED.ask("expand", arguments, limits, ERRORS)
        self._texts |= {size: (text, why) for size, (text, why) in zip(new, found, strict=True)}

    def expand(self, example: Example, sizes: Sequence[Size]) -> Example:
        """The example with its placeholders expanded; what stands for an image is never trained.

        Args:
            example: A text.
            sizes: Of its images, in order; see `learn`.

        Raises:
            UserError: The text has another number of placeholders than images, or the processor refuses an image.
        """
        # A chat template has written the placeholder itself.
        before, after = self._vision.around if example.whole else ("", "")
        mark = IMAGE if example.whole else self._vision.placeholder
        pieces = example.text.split(mark)
        if len(pieces) - 1 != len(sizes):
            raise UserError(self._other_number(len(pieces) - 1, len(sizes), mark))
        text, spans, edges = pieces[0], list[Span](), [0]
        starts = [0]
        for size, piece in zip(sizes, pieces[1:], strict=True):
            written, why = self._texts[size]
            if why:
                raise UserError(f"the image processor refuses an image of {size[1]} x {size[0]} pixels: {why}")
            first = len(text)
            starts.append(sum(len(one) + len(mark) for one in pieces[: len(starts)]))
            text += before + written + after
            spans.append((first, len(text)))
            edges.append(len(text))
            text += piece

        def moved(place: int) -> int:
            part = max(i for i, start in enumerate(starts) if start <= place)
            return edges[part] + place - starts[part]

        def all_moved(given: Sequence[Span]) -> tuple[Span, ...]:
            return tuple((moved(first), moved(last)) for first, last in given)

        return replace(
            example,
            text=text,
            trained=all_moved(example.trained),
            prompt=moved(example.prompt),
            turns=all_moved(example.turns),
            image_spans=tuple(spans),
        )

    def _other_number(self, found: int, images: int, mark: str) -> str:
        if found > images:
            return f"the text itself contains {mark!r}, which stands for an image: it has {images} images. Remove it"
        return (
            f"the chat template writes {found} placeholders ({mark}) for {images} images: set policy.chat_template to "
            "the template of the model's processor"
        )
