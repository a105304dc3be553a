"""`rlinf new-plugin`: write a package with a dataset format, from the dataset's metadata.

The package is complete: it installs, its test passes, its config trains. Whatever metadata cannot determine is proposed
(see `proposal`) and marked CHECK in the file.
"""

from __future__ import annotations

import argparse
import keyword
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rlinf_core import UserError
from rlinf_core.data.lerobot.files import find_root
from rlinf_core.data.lerobot.metadata import load_metadata
from rlinf_core.data.lerobot.modality import with_part_names
from rlinf_core.files import check_writable, writing
from rlinf_plugins_openpi.scaffold.package_files import Format, package_files
from rlinf_plugins_openpi.scaffold.proposal import propose

WHAT = """\
NAME is the name of the package, such as franka-pick. DATASET is a folder with a LeRobot dataset, or its id on the hub;
its cameras, state and action are proposed from column names, and every proposal is marked CHECK in the file.
"""


NAME_OUTPUT = "Name another folder with --output"


class Names(NamedTuple):
    """The names in a package."""

    distribution: str
    """The name for pip: `franka-pick`."""
    module: str
    """`franka_pick`"""
    class_name: str
    """`FrankaPick`"""
    config_name: str
    """`pi05_franka_pick`"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = WHAT
    parser.add_argument("name", metavar="NAME", help="of the package; the format's name has the policy in front")
    parser.add_argument("--from", dest="dataset", metavar="DATASET", required=True, help="a folder or a hub id")
    parser.add_argument("--policy", choices=["pi05", "pi0"], default="pi05", help="what the format trains (pi05)")
    parser.add_argument("--output", metavar="DIR", help="the folder to write; default: NAME in the current folder")


def run(options: argparse.Namespace) -> None:
    """Write the package, and print the next steps."""
    folder = Path(options.output or options.name).expanduser()
    names = write_package(options.name, options.dataset, options.policy, folder)
    checks = (folder / f"{names.module}.py").read_text(encoding="utf-8").count("# CHECK")
    print(f"{folder}: a package with the dataset format {names.config_name}. Next:")
    print(f"  1. read {folder / names.module}.py: {checks} proposals are marked CHECK")
    print(f"  2. pip install -e {folder}   (with uv: uv pip install -e {folder})")
    print(f"  3. pytest {folder}")
    print(f"  4. rlinf launch {folder / 'train.toml'}   (two steps on the CPU; the file says how to do a real run)")


def write_package(name: str, dataset: str, policy: str, folder: Path) -> Names:
    """Write a package for a dataset, atomically.

    Args:
        name: The name of the package.
        dataset: A folder, or an id on the hub.
        policy: `"pi05"` or `"pi0"`.
        folder: The folder to write; it must not exist.

    Raises:
        UserError: The name is invalid or taken, the folder exists or cannot be written, or the dataset is not available
            or lacks cameras, state or action.
    """
    names = package_names(name, policy)
    if folder.exists():
        raise UserError(f"{folder} is already there: name another folder with --output, or delete it")
    check_writable(folder, NAME_OUTPUT)
    _check_free(names)
    try:
        root = find_root(dataset)
        metadata = load_metadata(dataset, root)
    except UserError as error:  # The message names the setting of a run.
        raise UserError(str(error).replace("data.repo_id", "--from")) from error
    local = Path(dataset).expanduser().is_dir()
    files = package_files(
        Format(
            **names._asdict(),
            policy=policy,
            dataset=str(root.resolve()) if local else dataset,
            hub_id="" if local else dataset,
            fps=metadata.fps,
            proposal=propose(dataset, with_part_names(root, metadata.features)),
        )
    )
    with writing(folder, NAME_OUTPUT):
        _write(folder, files)
    return names


def _write(folder: Path, files: Mapping[str, str]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for file, text in files.items():
            (aside / file).write_text(text, encoding="utf-8")
        aside.chmod(0o755)  # mkdtemp's folders are private to the user.
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside)
        raise


def package_names(name: str, policy: str) -> Names:
    """Derive all names from that of the package.

    Raises:
        UserError: The name is invalid for a package or a module.
    """
    module = re.sub(r"[-_.]+", "_", name).lower()
    can_be_a_package = re.fullmatch(r"[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?", name)
    if not can_be_a_package or keyword.iskeyword(module):
        raise UserError(
            f"{name!r} cannot be the name of a package and of a module: start with a letter, continue with letters, "
            "digits and dashes, and avoid Python keywords, as in franka-pick"
        )
    class_name = "".join(part[:1].upper() + part[1:] for part in module.split("_"))
    return Names(name, module, class_name, f"{policy}_{module.removeprefix(f'{policy}_')}")


def _check_free(names: Names) -> None:
    """Raise `UserError` if a name is taken in this environment."""
    way_out = "choose another NAME, or uninstall that package first"
    for entry in entry_points(group="rlinf.datasets", name=names.config_name):
        owner = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        raise UserError(f"the name {entry.name} is taken: {owner} offers such a format; {way_out}")
    try:
        version = distribution(names.distribution).version
    except PackageNotFoundError:
        pass
    else:
        raise UserError(f"the name {names.distribution} is taken: its version {version} is installed; {way_out}")
    spec = None if names.module in sys.stdlib_module_names else find_spec(names.module)
    # A folder of that name in the current folder also looks like a module, but has no origin.
    if names.module in sys.stdlib_module_names or (spec and spec.origin):
        where = spec.origin if spec else "Python's standard library"
        raise UserError(f"the name {names.module} is taken: there is such a module in {where}; {way_out}")
