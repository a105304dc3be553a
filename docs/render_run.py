"""Draw a run's console output as the picture of the README.

FORCE_COLOR=1 torchrun ... -m rlinf_core.train examples/quickstart.toml | python docs/render_run.py docs/run.svg
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 104


def main() -> None:
    """Read what a run printed from standard input; write it as SVG to the path given."""
    console = Console(record=True, width=COLUMNS, file=sys.stderr, force_terminal=True, highlight=False)
    for line in sys.stdin.read().splitlines():
        console.print(Text.from_ansi(line), soft_wrap=False)
    Path(sys.argv[1]).write_text(console.export_svg(title="rlinf_core.train examples/quickstart.toml") + "\n")


if __name__ == "__main__":
    main()
