"""`rlinf push`: upload an exported policy to the hub, after showing what would become public."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf_core.commands.output import print_table, print_text
from rlinf_core.errors import UserError

if TYPE_CHECKING:
    from rlinf_core.publish.folder import Checked
    from rlinf_core.publish.repository import Changes, Repository

EPILOG = """\
Without --yes nothing is uploaded or created: the command checks the folder (digests, files that do not belong, secrets,
the model card), asks the hub what is in the repository, and prints what would happen.

A new repository is private unless you say --public. The token is the hub's own: `hf auth login` or HF_TOKEN. The upload
is one commit; after a failure the same command goes on.

Exit codes: 0; 2 for something the user can fix, and nothing is uploaded.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = EPILOG
    parser.add_argument("folder", help="a folder that `rlinf export` wrote")
    parser.add_argument("repository", metavar="OWNER/NAME", help="the repository on the hub; created if there is none")
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--private", action="store_true", help="a new repository is private: the default")
    seen.add_argument(
        "--public", action="store_true", help="everybody sees it: a new repository, or one that is public"
    )
    parser.add_argument("--revision", default="", metavar="BRANCH", help="upload to this branch; default: the main one")
    parser.add_argument("--replace", action="store_true", help="delete the repository's other files in the same commit")
    parser.add_argument("--keep-card", action="store_true", help="leave the repository's README.md as it is")
    parser.add_argument("--message", default="", metavar="TEXT", help="the commit's message")
    parser.add_argument("--yes", action="store_true", help="upload; without it nothing is changed")


def run(options: argparse.Namespace) -> None:
    """Check, show, and with --yes upload."""
    from rlinf_core.publish.folder import check_folder
    from rlinf_core.publish.repository import account, open_repository, plan_changes, push
    from rlinf_core.terminal import print_progress

    with print_progress(f"checking {options.folder}", "bytes") as progress:
        checked = check_folder(Path(options.folder), progress)
    unreachable, there, changes = "", None, None
    try:
        name = account()
        there = open_repository(options.repository, options.revision)
        changes = plan_changes(
            checked, there, public=options.public, replace=options.replace, keep_card=options.keep_card
        )
    except UserError as error:
        if options.yes:
            raise _with_problems(checked.problems, error) from error
        name, unreachable = "", str(error)
    _show(checked, there, changes, options)
    problems = [*checked.problems, *(changes.problems if changes else ())]
    if unreachable:
        print_text(f"not compared with the hub: {unreachable}")
    elif not name:
        problems.append("there is no token for the hub: log in with `hf auth login`, or set HF_TOKEN")
    if problems:
        raise UserError(f"{options.folder} is not ready to be pushed:\n" + "\n".join(f"- {one}" for one in problems))
    if not options.yes or there is None or changes is None:
        print_text("nothing was uploaded: add --yes")
        return
    if not changes.uploaded and not changes.deleted:
        print_text(f"{options.repository} has all of it already")
        return
    address = push(checked, there, changes, public=options.public, message=options.message or _message(options))
    print_text(f"{options.repository}: uploaded as {name}, {address}")


def _message(options: argparse.Namespace) -> str:
    return f"Upload {Path(options.folder).resolve().name}"


def _with_problems(problems: Sequence[str], error: UserError) -> UserError:
    return UserError("\n".join([str(error), *(f"- {one}" for one in problems)]))


def _show(checked: Checked, there: Repository | None, changes: Changes | None, options: argparse.Namespace) -> None:
    """Print files with sizes, what would be public, and notes."""
    kinds: dict[str, str] = {}
    if changes is not None:
        kinds |= dict.fromkeys(changes.new, "new") | dict.fromkeys(changes.replaced, "replaces the repository's")
        kinds |= dict.fromkeys(changes.same, "the same there already")
    rows = [
        [name, _size(size), kinds.get(name, "" if changes is None else "left as it is there")]
        for name, size in checked.files.items()
    ]
    rows += [[name, "", "deleted"] for name in (changes.deleted if changes else ())]
    print_table(["file", "size", ""], rows)
    print_text(f"{len(checked.files)} files, {_size(sum(checked.files.values()))}")
    whose = "everybody sees it" if options.public else "private: only you and your organization see it"
    what = "a new repository" if there is None or not there.exists else "the repository"
    branch = f", branch {options.revision}" if options.revision else ""
    print_text(f"{what} {options.repository}{branch}; {whose}")
    for note in checked.notes:
        print_text(f"note: {note}")


def _size(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.4g} {unit}"
