"""Machines of a cluster: network namespaces of this one, each with an address, a host name and processes of its own.

All are joined by one switch, a bridge in a namespace of its own, so that nothing of this machine's network changes.
They share its file system, as machines share a folder. Needs root and `ip`.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path

ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
"""What a process does first on its machine; the mount and the name are its own."""


def why_not():
    """Why there can be no machines here; empty: there can."""
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "there is no `ip` or no `unshare`"
    if os.geteuid():
        return "only root may create network namespaces"
    name = f"rl{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return made.stderr.strip()


class Machines:
    """A context of `count` machines: node0 at 10.83.0.1, node1 at 10.83.0.2, ...

    As on Debian and Ubuntu, `/etc/hosts` of each names its own loopback address 127.0.1.1, and knows all of them.
    """

    def __init__(self, count, folder):
        self.count, self.folder = count, Path(folder)
        self._name = f"rl{secrets.token_hex(3)}"
        self._processes = []

    def __enter__(self):
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _connect(self):
        switch = f"{self._name}s"
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for node in range(self.count):
            there = self._namespace(node)
            ip("netns", "add", there)
            ip("-n", there, "link", "add", "eth7", "type", "veth", "peer", "name", f"port{node}", "netns", switch)
            ip("-n", switch, "link", "set", f"port{node}", "master", "bridge", "up")
            ip("-n", there, "addr", "add", f"{self.address(node)}/24", "dev", "eth7")
            for link in ("lo", "eth7"):
                ip("-n", there, "link", "set", link, "up")
            own = [f"127.0.0.1 localhost\n127.0.1.1 node{node}\n"]
            own += [f"{self.address(other)} node{other}\n" for other in range(self.count) if other != node]
            (self.folder / f"hosts{node}").write_text("".join(own))

    def __exit__(self, *_):
        for node in range(self.count):
            self.lose(node)
        for process in self._processes:
            process.wait()
        for name in [*map(self._namespace, range(self.count)), f"{self._name}s"]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def _namespace(self, node):
        return f"{self._name}n{node}"

    def address(self, node):
        """Address of a machine, as the others reach it."""
        return f"10.83.0.{node + 1}"

    def start(self, node, command, **options):
        """Start a process on a machine, as `subprocess.Popen` does; it and its children end with the context."""
        inside = ["ip", "netns", "exec", self._namespace(node), "unshare", "--uts", "--mount", "sh", "-c", ENTER, "sh"]
        inside += [f"node{node}", self.folder / f"hosts{node}", *command]
        self._processes.append(subprocess.Popen([*map(str, inside)], **options))
        return self._processes[-1]

    def lose(self, node):
        """End every process of a machine at once, as a power failure would."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self._namespace(node)], capture_output=True, text=True, check=False
        )
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self, node):
        """Pull the machine's cable: what it sends is lost, and no connection is closed."""
        ip("-n", f"{self._name}s", "link", "set", f"port{node}", "down")

    def restore(self, node):
        """Put the cable back."""
        ip("-n", f"{self._name}s", "link", "set", f"port{node}", "up")

    def slow_down(self, node, milliseconds):
        """Delay everything that a machine sends."""
        tc = ["tc", "-n", self._namespace(node), "qdisc", "add", "dev", "eth7", "root", "netem"]
        done = subprocess.run([*tc, "delay", f"{milliseconds}ms"], capture_output=True, text=True, check=False)
        return done.stderr.strip()


def ip(*words):
    """Run `ip`."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert not done.returncode, f"ip {' '.join(words)}: {done.stderr}"
