"""Write docs/hooks.md from the hook specifications and the examples beside this file: `python docs/render_hooks.py`."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hook_examples

from rlinf_core.plugins.calls import specified_hooks

PAGE = Path(__file__).parent / "hooks.md"
HEAD = """\
# Hooks

<!-- Written by docs/render_hooks.py from rlinf_core/hookspecs.py and docs/hook_examples.py: change those. -->

A plugin is a Python module with functions of the names below, each marked with `@hookimpl` from `rlinf_core`. A package
names it in its `pyproject.toml`, under any name of its own:

```toml
[project.entry-points."rlinf.plugins"]
acme-arm = "acme_arm.plugin"
```

Dataset formats need no hook: an entry point in the group `rlinf.datasets` names a config class, which is imported only
when it is used. Nothing is found in any other way.

**Calling.** A run calls the hooks in the order of this page. Arguments come by name; an implementation names the ones
that it needs, without defaults. Later releases may add arguments and remove none. Implementations run in reverse order
of their distributions' names; `@hookimpl(tryfirst=True)` and `trylast=True` move one to the front or the back. Core's
own trainer, loggers and dataset reader go through the same hooks. Hook wrappers are refused.

**Failures.** A plugin that cannot be loaded, implements a hook that does not exist, or fails while it registers
something costs itself and nobody else. The failure is kept with distribution, version, entry point and cause. It is
printed when a run starts, listed by `rlinf plugins`, and repeated where something that this plugin might have brought
is missing. Registration hooks are called only when their results are asked for, one plugin at a time.

**Errors.** What a hook raises later ends the run and names the plugin: a `UserError`, which is for what a user can
mend, is shown as one message that ends in `[<hook> of <distribution> <version> (entry point ...)]`; any other exception
keeps its type and traceback, with a note of the same content.

| environment variable | |
|---|---|
| `RLINF_DISABLE_PLUGINS=a,b` | leave out all entry points of these distributions, in both groups |
| `RLINF_STRICT_PLUGINS=1` | raise a plugin's failure at once instead of keeping it |

**Settings.** A plugin's own table `[plugins.<name>]` is validated by the class that `rlinf_register_options` names, and
read with `run.plugin_options(cls)`. Mistakes in it are reported with all others.

**Tests.** `rlinf_core.testing` proves that policies and datasets conform (`check_policy`, `check_dataset`) and has
fixtures for a tiny dataset (written by lerobot: `pip install 'rlinf-core[lerobot]'`), a two-step run, and plugins that
are not installed.
"""
EXAMPLES = """
## The examples as one file

The functions above stand in [hook_examples.py](hook_examples.py), a plugin that the tests run.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """The whole page."""
    return HEAD + "".join(_section(name, spec) for name, spec in specified_hooks().items()) + EXAMPLES


def _section(name: str, spec: Callable[..., Any]) -> str:
    signature = inspect.signature(spec)
    arguments = ", ".join(f"{argument}: {p.annotation}" for argument, p in signature.parameters.items())
    parts = [
        f"\n## {name}\n",
        f"```python\n{name}({arguments}) -> {signature.return_annotation}\n```\n",
        *_description(inspect.getdoc(spec) or ""),
        f"```python\n{inspect.getsource(getattr(hook_examples, name)).strip()}\n```\n",
    ]
    return "\n".join(parts)


def _description(docstring: str) -> Iterator[str]:
    """A docstring of the agreed form as Markdown: arguments as a list, the last line with its heads in italics."""
    if "Returns:" not in docstring:
        docstring = docstring.replace(
            "\n\nCalled on:", "\n\nReturns:\n    Nothing; all implementations are called.\n\nCalled on:"
        )
    for paragraph in docstring.split("\n\n"):
        head, _, body = paragraph.partition("\n")
        if head == "Args:":
            items = re.split(r"\n(?=\w+: )", inspect.cleandoc(body))
            yield "\n".join(re.sub(r"^(\w+): ", r"- `\1`: ", " ".join(item.split())) for item in items) + "\n"
        elif head == "Returns:":
            yield f"*Returns:* {inspect.cleandoc(body)}\n"
        else:
            yield re.sub(r"\b(Called on|Since)\b(:?)", r"*\1\2*", paragraph) + "\n"


if __name__ == "__main__":
    main()
