"""A hook of MkDocs: the site has the repository's paths, so that a link that works on GitHub works on the site.

MkDocs takes pages from docs/ only, under paths relative to it. Here they keep `docs/`, and pages elsewhere join them.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/**/*.md", "*/README.md", "plugins/*/README.md", "examples/*/README.md")
STYLE = ROOT / "docs" / "site.css"
LINK = re.compile(r"\[([^\]\[]*)\]\((?!\w+:|#)([^)#\s]+)([^)\s]*)\)")
"""A link or an image that leads to a file: its text, the path and the anchor."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the repository's pages and the files that they link to in place of the files of docs/."""
    of_theme_and_plugins = [file for file in files if file.src_dir != config.docs_dir]
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    linked = sorted({path for page in pages for path in _linked_files(page)})
    ours = dict.fromkeys([*pages, *linked, STYLE])
    return Files([*of_theme_and_plugins, *(_file(path, config) for path in ours)])


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to folders, which GitHub lists, lead to the folder's README; without one, keep their text alone."""
    here = (ROOT / page.file.src_uri).parent
    return LINK.sub(lambda link: _without_folder(here, link), markdown)


def _without_folder(here: Path, link: re.Match[str]) -> str:
    text, path, _ = link.groups()
    if not (here / path).is_dir():
        return link[0]
    return f"[{text}]({path.rstrip('/')}/README.md)" if (here / path / "README.md").is_file() else text


def _linked_files(page: Path) -> Iterator[Path]:
    for _, link, _ in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / link).resolve()
        if path.is_file() and path.is_relative_to(ROOT):
            yield path


def _file(path: Path, config: MkDocsConfig) -> File:
    return File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
