"""Ranks of a run, forked from one process that has imported torch and this project.

To import them costs each rank four seconds of CPU time, and torchrun two more. Tests start runs this way; where
torchrun itself matters (restarts, the end of the other ranks when one fails, signals), they start torchrun.
"""

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from importlib import import_module
from subprocess import CompletedProcess

NOTICED = 0.3
"""Seconds until the others are ended once a rank has failed: torchrun, too, only polls."""
LIMIT = 900
"""Most seconds that a rank may run, so that none outlives its test for long."""
PRELOAD = (
    "torch._inductor.compile_fx",
    "safetensors.torch",
    "rlinf_core.plugins.builtin",
    "rlinf_core.train",
    "rlinf_core.training.trainer",
    "rlinf_plugins_openpi.model.pi0",
    "rlinf_plugins_openpi.plugin",
)
"""What runs import, except pyarrow, which starts a thread: a fork with threads may hang."""


class Ranks:
    """A process that forks ranks, started on first use."""

    def __init__(self):
        self._server = None

    def start(self, main, ranks, *arguments, paths=(), imports=(), signals=(), **environment):
        """Start ranks with the environment of torchrun, and wait for them.

        Args:
            main: `module:function`, which gets the list of arguments and returns the exit code.
            ranks: How many.
            arguments: For `main`.
            paths: Folders that go in front of `sys.path`.
            imports: Modules besides `PRELOAD` that all ranks need, imported once for them and those started later.
            signals: What to send to which ranks from outside, each `{"file", "delay", "ranks", "signal"}`: so many
                seconds after a file has appeared.
            environment: Variables over those that this process had at the first start.

        Returns:
            What `subprocess.run` gives, with the first exit code that is not 0.
        """
        from torch.distributed import TCPStore

        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        environment |= {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        job = {"main": main, "ranks": ranks, "arguments": [str(one) for one in arguments]}
        job |= {"paths": [str(one) for one in paths], "imports": imports, "environment": environment}
        job["signals"] = [one | {"file": str(one["file"])} for one in signals]
        self._server = self._server or serving()
        try:
            print(json.dumps(job), file=self._server.stdin, flush=True)
            answer = json.loads(self._server.stdout.readline())
        except BaseException:
            self.close()  # A test that was cut short leaves no ranks behind, and no answer for the next.
            raise
        return CompletedProcess((main, *arguments), answer["code"], answer["out"], answer["err"])

    def close(self):
        if self._server:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
            self._server = None


def serving():
    command, environment = [sys.executable, __file__], os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def serve():
    for name in PRELOAD:
        import_module(name)
    for line in sys.stdin:
        print(json.dumps(launch(**json.loads(line))), flush=True)


def launch(main, ranks, arguments, paths, imports, signals, environment):
    """Fork the ranks and wait for them; once one has failed the others are ended, as torchrun does."""
    for name in imports:
        import_module(name)
    gc.freeze()  # What is imported is shared, until somebody counts its references anew.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        running, code = {}, 0
        for rank in range(ranks):
            pid = os.fork()
            if not pid:
                become(rank, ranks, out, err, environment)
                sys.path[:0] = paths
                leave(main, arguments)
            running[rank] = pid
        senders = [threading.Thread(target=send, args=(running,), kwargs=one, daemon=True) for one in signals]
        for sender in senders:
            sender.start()
        while running:
            pid, status = os.wait()
            del running[next(rank for rank, of in running.items() if of == pid)]
            if status and not code:
                code = os.waitstatus_to_exitcode(status)
                time.sleep(NOTICED)
                for other in running.values():
                    os.kill(other, signal.SIGKILL if is_stopped(other) else signal.SIGTERM)  # torchrun: 30 s later.
        for sender in senders:
            sender.join()
        return {"code": code} | {name: file.seek(0) or file.read() for name, file in (("out", out), ("err", err))}


def is_stopped(pid):
    """Whether a process was stopped by SIGSTOP, and so obeys SIGKILL only."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


def send(running, file, delay, ranks, signal):
    """Wait for the file, and send the signal to the ranks that are still alive."""
    while not os.path.exists(file):
        if not running:
            return
        time.sleep(0.001)
    time.sleep(delay)
    for rank in ranks:
        if pid := running.get(rank):
            os.kill(pid, signal)


def become(rank, ranks, out, err, environment):
    """Make this process a rank: set torchrun's variables and redirect its output."""
    signal.alarm(LIMIT)
    with open(os.devnull) as nothing:
        for file, descriptor in ((nothing, 0), (out, 1), (err, 2)):
            os.dup2(file.fileno(), descriptor)
    same = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(environment)
    os.environ.update({name: str(number) for names, number in zip(same, (rank, ranks), strict=True) for name in names})


def leave(main, arguments):
    """Run the target and exit as Python would, but without tearing down imported modules.

    That touches all the memory that ranks share, which is then copied: it would take longer than most runs.
    """
    module, _, function = main.partition(":")
    try:
        code = getattr(import_module(module), function)(arguments)
    except SystemExit as end:  # The parser's, of arguments that are wrong.
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # Waits for threads, as Python does before the rest.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    serve()
