"""Environments in which commands are started, drawn at random: folders, limits, locales, terminals and mounts.

A seed always gives the same environment. Half of what is drawn is as usual, so that each environment has a few
peculiarities and a failure can be traced to one.
"""

import json
import os
import random
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

UNWRITABLE = ("/dev/null", "/dev/null/below", "/proc/rlinf")
"""Where not even root can create a folder."""
LONG = 255
"""Bytes that a file's name may have."""
FOLDERS = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "RLINF_CACHE")
LOCALES = ("C", "POSIX", "C.UTF-8", "xx_XX.UTF-8", "en_US.ISO-8859-1", "")
VARIABLES = {
    **dict.fromkeys(("LC_ALL", "LANG"), LOCALES),
    "PYTHONUTF8": ("0", "1"),
    "PYTHONIOENCODING": ("ascii", "latin-1", "utf-8"),
    "TERM": ("dumb", "", "nonsense"),
    "COLUMNS": ("0", "1", "x", "10000"),
    "TZ": ("", "Nowhere/Nothing", ":/dev/null"),
    "PATH": ("", "/dev/null"),
    "USER": ("", "no body"),
}
LIMITS = {
    "NOFILE": (48, 128, 1024),
    "CORE": (0,),
    "STACK": (2**20, 2**26),
    "FSIZE": (2**26,),
    "MEMLOCK": (0,),
}
MOUNTING = ("unshare", "-rm", "sh", "-c", 'mount --bind "$0" "$0" && mount -o remount,bind,ro / && exec "$@"')
"""Starts a command for which nothing but a folder can be written to, as with Kubernetes' readOnlyRootFilesystem."""
STREAMS = ("closed stdin", "closed stdout", "full stdout")


def draw(seed, folder, *, mounts=True):
    """The environment of a seed.

    Args:
        seed: Any.
        folder: An empty folder for what the environment needs.
        mounts: Whether file systems may be read-only, which `command` needs.

    Returns:
        A dict: `variables` (None: not set), `umask`, `limits`, `stream`, `read_only` (nothing but the folder can be
        written to), and `output`, the folder for the run.
    """
    dice = random.Random(seed)
    some = {name: dice.choice(values) for name, values in VARIABLES.items() if dice.random() < 0.3}
    for name in FOLDERS:
        if dice.random() < 0.5:
            some[name] = dice.choice((None, *UNWRITABLE, str(folder / name), str(folder / ("x" * 200) / name)))
        if name == "HOME" and "HOME" not in some:
            some[name] = str(folder / name)
    for name in ("TMPDIR", "HOME"):
        if (some.get(name) or "").startswith(str(folder)) and dice.random() < 0.7:
            Path(some[name]).mkdir(parents=True)
    return {
        "variables": some,
        "umask": dice.choice((0o022, 0o022, 0, 0o077, 0o027)),
        "limits": {name: dice.choice(values) for name, values in LIMITS.items() if dice.random() < 0.3},
        "stream": dice.choice(STREAMS) if dice.random() < 0.2 else "",
        "read_only": dice.random() < 0.2 and mounts and can_mount(),
        "output": str(_output(dice, folder)),
    }


def _output(dice, folder):
    (folder / "real").mkdir()
    (folder / "file").touch()
    (folder / "link").symlink_to("real")
    (folder / "dangling").symlink_to("missing")
    (folder / "loop").symlink_to("loop")
    deep = folder.joinpath(*["d" * 200] * 25)
    names = ("real", "link", "dangling", "loop", "file", "file/below", "new/er", " ", "a b", "größe", "new\nline", "-x")
    return dice.choice(
        ("real", *(folder / name for name in (*names, "n" * LONG, "n" * (LONG + 1))), deep, "/proc/rlinf")
    )


@cache
def can_mount():
    """Whether this user may make mounts that only a process and its children see."""
    try:
        return subprocess.run([*MOUNTING, "/tmp", "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def command(environment, folder, *words):
    """The command line that starts a command in an environment."""
    start = [sys.executable, __file__, json.dumps(environment), str(folder), *map(str, words)]
    return [*MOUNTING, str(folder), *start] if environment["read_only"] else start


def enter(environment, folder):
    """Give this process an environment; the folder is its working directory and the only one that stays writable."""
    os.chdir(folder)
    for name, value in environment["variables"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    os.umask(environment["umask"])
    for name, value in environment["limits"].items():
        which = getattr(resource, f"RLIMIT_{name}")
        _, most = resource.getrlimit(which)
        resource.setrlimit(which, (value if most == resource.RLIM_INFINITY else min(value, most), most))
    if environment["stream"] == "closed stdin":
        os.close(0)
    if environment["stream"] == "closed stdout":
        os.close(1)
    if environment["stream"] == "full stdout":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def train(arguments):
    """Train in an environment, in a process forked for it; the arguments are it, its folder, and the command's own."""
    environment, folder, *rest = arguments
    enter(json.loads(environment), folder)
    from rlinf_core.train import main

    return main(rest)


if __name__ == "__main__":
    enter(json.loads(sys.argv[1]), sys.argv[2])
    os.execv(sys.argv[3], sys.argv[3:])
