"""`rlinf import-rlinf`: turn a recipe of RLinf into a config of this project."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlinf_core import UserError
from rlinf_core.files import check_writable, write_text, writing
from rlinf_core.untrusted.text import printable
from rlinf_plugins_openpi.recipes.hydra_files import RecipeFile, read_recipe
from rlinf_plugins_openpi.recipes.toml_text import comment, toml_tables
from rlinf_plugins_openpi.recipes.translate import Imported, translate

EPILOG = """\
RECIPE is a file such as RLinf's examples/sft/config/libero_sft_openpi.yaml; what it inherits from other files and
refers to is resolved as RLinf's start script does. The config goes to standard output. It does what RLinf's code does
with the recipe; what differs from what the recipe seems to say is on standard error, and in the config's comments, with
the keys that have no counterpart and why.

--json prints an object: "config" (the tables), "toml" (the text), "warnings" (a list of texts), "unused" (key ->
reason) and "variables" (environment variables that were read). Exit codes: 0, or 2 if the recipe cannot be imported.
"""
NAME_OUTPUT = "Name another file with --output"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("recipe", metavar="RECIPE", help="a .yaml file of RLinf's schema")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="Hydra's overrides of the recipe: actor.optim.lr=1e-5, +runner.max_epochs=3; ~runner.resume_dir removes",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="the TOML file to write, which must not exist")
    parser.add_argument(
        "--as-intended",
        action="store_true",
        help="write what the recipe's author meant where RLinf's code does not do it, such as warmup_style: cosine",
    )
    parser.add_argument(
        "--config-path",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder with the files that `defaults` names, if they are not beside the recipe",
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(options: argparse.Namespace) -> None:
    """Import a recipe."""
    output = Path(options.output).expanduser() if options.output else None
    if output is not None:
        if output.exists():
            raise UserError(f"{output} exists already: {NAME_OUTPUT[0].lower()}{NAME_OUTPUT[1:]}, or delete it")
        check_writable(output, NAME_OUTPUT, file=True)
    folders = [Path(folder).expanduser() for folder in options.config_path]
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise UserError(f"--config-path: there is no folder {', '.join(missing)}")
    recipe = read_recipe(Path(options.recipe).expanduser(), options.overrides, folders)
    imported = translate(recipe, _loggers(options), as_intended=options.as_intended)
    text = render(recipe, imported)
    if output is not None:
        with writing(output, NAME_OUTPUT):
            write_text(output, text)
    if options.json:
        print(json.dumps(_document(recipe, imported, text), indent=2))
        return
    if output is None:
        sys.stdout.write(text)
    for warning in imported.warnings:
        print(printable(f"warning: {warning}"), file=sys.stderr)
    where = f"{output} was written" if output else "done"
    print(
        printable(
            f"{where}: {len(imported.unused)} keys of the recipe have no counterpart; comments at the end say why"
        ),
        file=sys.stderr,
    )


def _loggers(options: argparse.Namespace) -> dict[str, Any]:
    """The loggers that are installed -> their fields."""
    plugins = getattr(options, "plugins", None)
    registered = plugins.registered_as("logger") if plugins is not None else ()
    return {one.name: tuple(one.item.model_fields) for one in registered}


def _document(recipe: RecipeFile, imported: Imported, text: str) -> Mapping[str, Any]:
    return {
        "config": imported.tables,
        "toml": text,
        "warnings": imported.warnings,
        "unused": imported.unused,
        "variables": recipe.variables,
    }


def render(recipe: RecipeFile, imported: Imported) -> str:
    """The text of the config."""
    return "\n".join(_lines(recipe, imported)) + "\n"


def _lines(recipe: RecipeFile, imported: Imported) -> Iterator[str]:
    yield from comment(f"Imported from RLinf's {recipe.path.name} by `rlinf import-rlinf`. Validate it, then start it:")
    yield from ("#", "#   rlinf validate CONFIG", "#   rlinf launch CONFIG", "#")
    if recipe.variables:
        yield from comment(f"Values of these environment variables are in it: {', '.join(recipe.variables)}.")
        yield "#"
    yield "# What differs from RLinf, or from what the recipe seems to say:"
    for warning in imported.warnings:
        yield from comment(warning, bullet=True)
    yield ""
    yield from toml_tables(imported.tables)
    if imported.unused:
        yield ""
        yield "# Keys of the recipe without a counterpart:"
        by_reason: dict[str, list[str]] = {}
        for key, why in imported.unused.items():
            by_reason.setdefault(why, []).append(key)
        for why, keys in by_reason.items():
            yield from comment(f"{', '.join(sorted(keys))}: {why}", bullet=True)
