"""`sbatch`, `srun` and `scontrol` of a cluster whose nodes are addresses of this machine's loopback.

`install(folder)` puts the commands into a folder for `PATH`. `sbatch` only queues a job, `run_job` runs it as Slurm
would: it reads the `#SBATCH` lines, refuses unknown ones, and sets the variables that the batch file may use.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

KNOWN = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "gres", "time", "requeue", "no-requeue", "signal"),
    *("open-mode", "output", "chdir", "partition", "account", "exclusive", "cpus-per-task", "comment"),
}
JOB = "4242"


def install(folder):
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        command = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} {name} "$@"\n'
        (folder / name).write_text(command)
        (folder / name).chmod(0o755)
    return folder


def options(text):
    """Options of a batch file as sbatch reads them: up to the first line that is neither empty nor a comment."""
    found = {}
    for line in text.splitlines()[1:]:
        if line.startswith("#SBATCH "):
            [word] = shlex.split(line.removeprefix("#SBATCH "), comments=True)
            name, _, value = word.removeprefix("--").partition("=")
            if name not in KNOWN:
                raise SystemExit(f"sbatch: unrecognized option '--{name}'")
            found[name] = value
        elif line and not line.startswith("#"):
            break
    return found


def run_job(path, environment, restart=0):
    """Start the batch file on its nodes; returns the process of its shell and the file that it writes to."""
    asked = options(path.read_text())
    log = Path(re.sub("%(.)", lambda found: JOB if found[1] == "j" else found[1], asked["output"]))
    variables = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": f"fake[1-{asked['nodes']}]", "SLURM_NNODES": asked["nodes"]}
    variables |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
    with log.open("a") as file:
        shell = ["bash", str(path)]
        return subprocess.Popen(shell, env=environment | variables, cwd=asked["chdir"], stdout=file, stderr=file), log


def sbatch(parsable, path):
    assert parsable == "--parsable"
    options(Path(path).read_text())
    print(f"{JOB};fake")


def scontrol(*words):
    if words[:2] == ("show", "hostnames"):
        last = int(re.fullmatch(r"fake\[1-(\d+)\]", words[2])[1])
        print("\n".join(f"127.0.0.{node}" for node in range(1, last + 1)))
    else:
        with Path(os.environ["FAKE_SLURM"]).open("a") as file:
            file.write(json.dumps(words) + "\n")


def srun(*words):
    """Run the command once per node, and pass signals on to all, as srun does."""
    command = words[next(at for at, word in enumerate(words) if not word.startswith("--")) :]
    running = []
    for node in range(int(os.environ["SLURM_NNODES"])):
        here = {"SLURM_NODEID": str(node), "SLURMD_NODENAME": f"127.0.0.{node + 1}"}
        running.append(subprocess.Popen(command, env=os.environ | here, start_new_session=True))
    signal.signal(signal.SIGTERM, lambda number, _: [one.send_signal(number) for one in running])
    sys.exit(max(one.wait() for one in running))


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](*sys.argv[2:])
