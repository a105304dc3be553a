"""Docstrings, comments, messages and pages use the words of the table in CONTRIBUTING.md, not their synonyms."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributions import ROOT

WORDS = {
    r"tell|tells|telling|told": "report, log, say, distinguish",
    r"anew|afresh": "again, from scratch",
    r"mend|mends|mended|mending": "fix, repair",
    r"insist|insists|insisted|insisting": "require, raise",
    r"lies|stands(?! (?:for|still|by)\b)": "is",
    r"(?<!there )(?:is|are|was|were) none": "is not, is invalid, is missing",
    r"as far as": "what, where, up to",
    r"(?<!model )(?<!dataset )cards?": "GPU",
    r"pictures?": "image",
    r"doctor|doctors": "diagnosis, `diagnose`",
    r"survey|surveys|surveyed|surveying": "compute, summarize",
    r"meetings?": "rendezvous",
    r"one's own": "custom",
    r"at hand": "available",
    r"checkpoints? (?:is|are|was|were) taken": "is saved",
}
"""Pattern, in lower case, of what to avoid -> what to write instead."""
AVOIDED = re.compile("|".join(rf"(?<![\w\"'./-])(?:{pattern})(?![\w\"'/-]|\.\w)" for pattern in WORDS))
SOURCES = ("rlinf_*/src", "plugins/*/src", "examples", "docs")
PAGES = ("*.md", "docs/*.md", "rlinf_*/README.md", "plugins/*/README.md", "examples/*/README.md")
NOT_PROSE = re.compile(r"```.*?```|``.*?``|`[^`]*`|\]\([^)]*\)|<[^>]*>", re.DOTALL)
"""Code, addresses and tags."""


def instead_of(found: str) -> str:
    return next(instead for pattern, instead in WORDS.items() if re.search(rf"\b(?:{pattern})\b", found))


def prose_of(text: str) -> str:
    """The text with code blanked out, so that positions stay."""
    return NOT_PROSE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), text)


def comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def literals(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings and strings of several words: a single word is a key, a name or a path."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Strings that are statements: those of modules, classes and functions, and those below fields and constants."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def avoided(start: int, text: str) -> Iterator[tuple[int, str]]:
    """Line and words of each hit in a text that starts at a line."""
    text = prose_of(text)
    for hit in AVOIDED.finditer(text):
        yield start + text.count("\n", 0, hit.start()), hit[0]


def hits_in(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    parts = [(1, text)] if path.suffix == ".md" else [*comments(text), *literals(text)]
    found = sorted({hit for start, part in parts for hit in avoided(start, part)})
    lines = [f"{path.relative_to(ROOT)}:{line}: {words!r}: write {instead_of(words)}" for line, words in found]
    if path.suffix == ".py":
        name = path.relative_to(ROOT)
        lines += [f"{name}:{n}: a docstring starts with 'Of'" for n, one in docstrings(text) if one.startswith("Of ")]
    return lines


def folder_of(path: Path) -> str:
    return path.parent.relative_to(ROOT).as_posix()


FILES = sorted(
    {path for pattern in SOURCES for root in ROOT.glob(pattern) for path in root.rglob("*.py")}
    | {path for pattern in PAGES for path in ROOT.glob(pattern)}
)


@pytest.mark.parametrize("folder", sorted({folder_of(path) for path in FILES}))
def test_texts_use_the_house_words(folder):
    hits = [hit for path in FILES if folder_of(path) == folder for hit in hits_in(path)]
    assert not hits, "\n" + "\n".join(hits)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A slow rank is told of.", ["told"]),
        ("numbers that are none", ["are none"]),
        ("there are none, and None is None", []),
        ("MFU stands for ...; the list stands here", ["stands"]),
        ('the key "pictures", the folder pictures/ and `pictures`', []),
        ("Two pictures. On a card", ["pictures", "card"]),
        ("the dataset card, [how](pictures.md#cards)", []),
    ],
)
def test_only_what_is_avoided_is_found(text, found):
    assert [words for _, words in avoided(1, text)] == found


def test_every_word_is_in_the_table_of_contributing():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1] for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)]
    named = {word for row in rows for word in re.findall(r"`([^`]+)`", row)}
    for pattern in WORDS:
        assert any(re.fullmatch(rf"(?:{pattern})", word) for word in named), pattern
