"""Draw a run's console output as the image in the README.

FORCE_COLOR=1 torchrun ... -m rlinf_core.train examples/quickstart.toml | python docs/render_run.py docs/run.svg
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 104
SHOWN = 3
"""Lines of steps that are drawn at the start, and before each validation; the others become an ellipsis."""


def main() -> None:
    """Read what a run printed from standard input; write it as SVG to the path given."""
    console = Console(record=True, width=COLUMNS, file=sys.stderr, force_terminal=True, highlight=False)
    for line in shorten([Text.from_ansi(line) for line in sys.stdin.read().splitlines()]):
        console.print(line, soft_wrap=False)
    svg = console.export_svg(title="rlinf_core.train examples/quickstart.toml")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # rich's fonts come from another site
    Path(sys.argv[1]).write_text(svg + "\n", encoding="utf-8")


def shorten(lines: Sequence[Text]) -> Iterator[Text]:
    """Leave out most lines of steps: the image has to fit on a screen."""
    steps: list[Text] = []
    first = True
    for line in lines:
        if re.match(r"step +\d+/", line.plain):
            steps.append(line)
            continue
        if steps:
            yield from _ends(steps, SHOWN if first else 1)
            first = False
        steps = []
        yield line
    yield from steps  # Of a run that has not ended.


def _ends(steps: Sequence[Text], at_start: int) -> Iterator[Text]:
    yield from steps[:at_start]
    if len(steps) > at_start + 1:
        yield Text("…", style="dim")
    yield from steps[at_start:][-1:]


if __name__ == "__main__":
    main()
