"""Pages that are one HTML file, load nothing from elsewhere and run no script: what `rlinf` commands share of them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_core.errors import UserError
from rlinf_core.files import check_writable, write_text, writing
from rlinf_core.results import Cell, Estimate, cell_text
from rlinf_core.untrusted.text import without_controls

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent
NAME_OUTPUT = "Name another file with --output"


def check_libraries(command: str, *libraries: str) -> None:
    """Raise `UserError` if a library that a command's page needs is not installed."""
    if missing := [name for name in libraries if find_spec(name) is None]:
        raise UserError(
            f"{command} needs {' and '.join(libraries)}, but {missing[0]} is not installed: "
            "pip install 'rlinf-core[inspect]'"
        )


class OneFile:
    """The page of a command, which is replaced by that command only.

    Args:
        command: The command, such as `rlinf report`.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        self._mark = f"<!-- written by {command} -->"

    def check_output(self, path: Path) -> None:
        """Raise `UserError` unless the file can be written, and is missing or an earlier page of the command."""
        check_writable(path, NAME_OUTPUT, file=True)
        if path.is_dir():
            raise UserError(f"{path} is a folder. {NAME_OUTPUT}")
        if path.exists():
            with path.open("rb") as file:
                if self._mark.encode() not in file.read(200):
                    raise UserError(
                        f"{path} is not an earlier page of {self._command}, and would be replaced: name another file "
                        "with --output"
                    )

    def write(self, path: Path, html: str) -> None:
        """Write the page; an earlier one is replaced."""
        self.check_output(path)
        with writing(path, NAME_OUTPUT):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, html)

    def render(self, template: Path, filters: dict[str, Any] | None = None, **contents: Any) -> str:
        """The page.

        Args:
            template: A file of Jinja2, which may include `page.css` and import `tables.html`. Everything is escaped.
            filters: Filters besides `cell`, the text of a table's cell.
            contents: Its variables, besides `mark`, which has to be the first line after the doctype.
        """
        from markupsafe import Markup

        environment = templates(template.parent)
        environment.filters |= {"cell": _cell} | (filters or {})
        return without_controls(environment.get_template(template.name).render(mark=Markup(self._mark), **contents))


def templates(folder: Path, **options: Any) -> Environment:
    """Jinja2 for the templates of a folder and of this one. Everything is escaped, and unknown names are errors."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )


def _cell(value: Cell) -> str:
    if isinstance(value, float | Estimate):
        return cell_text(value).replace("-", "\N{MINUS SIGN}")
    return cell_text(value)
