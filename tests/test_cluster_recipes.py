"""The recipes for Kubernetes and SkyPilot in `examples/cluster/`: their fields, and the commands in them."""

import argparse
import re
import subprocess

import pytest
from distributions import ROOT, repository_plugins

from rlinf_core.commands.launch import add_arguments
from rlinf_core.config.load import load_config

yaml = pytest.importorskip("yaml")
FOLDER = ROOT / "examples" / "cluster"
SURROUNDINGS = {
    "MASTER_ADDR": "pi05-master-0",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}
"""Variables that the engines set."""


def read(name):
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def launched(script, folder):
    """The words of `rlinf launch` in a script, as the shell makes them of it."""
    fake = folder / "rlinf"
    fake.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    fake.chmod(0o755)
    script = script.replace(". .venv/bin/activate", ":")
    done = subprocess.run(
        ["/bin/sh", "-euc", script],
        env={"PATH": f"{folder}:/usr/bin:/bin", **SURROUNDINGS},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.splitlines()


def run_of(words):
    """The config that a command loads, with an example's file."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    command, *arguments = words
    parsed = parser.parse_intermixed_args(arguments)
    assert (command, parsed.config) == ("launch", "/shared/pi05.toml")
    return load_config(ROOT / "examples/quickstart.toml", parsed.overrides, repository_plugins())


def container_of(template):
    (container,) = template["spec"]["containers"]
    return container


def scripts():
    job = container_of(read("kubernetes_job.yaml")[1]["spec"]["template"])["args"][0]
    replicas = read("pytorchjob.yaml")[0]["spec"]["pytorchReplicaSpecs"]
    operator = {container_of(one["template"])["args"][0] for one in replicas.values()}
    return [job, *operator, read("skypilot.yaml")[0]["run"]]


@pytest.mark.parametrize("script", scripts())
def test_each_machine_gets_one_command_of_ours_that_the_config_accepts(script, tmp_path):
    cluster = run_of(launched(script, tmp_path)).cluster
    assert (cluster.num_nodes, cluster.max_restarts, cluster.join_timeout_seconds) == (2, 20, 1800)
    assert cluster.rdzv_endpoint in ("pi05-0.pi05:29400", "pi05-master-0:29400", "10.0.0.1:29400")
    assert set(re.findall(r"\$(\w+)", script)) <= {*SURROUNDINGS, "head"}


def test_pods_of_the_job_resolve_the_machine_of_the_rendezvous():
    service, job = read("kubernetes_job.yaml")
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 2
    # The pod of index 0 is <job>-0.<subdomain>, if a headless service of that name selects the job's pods.
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert f"rdzv_endpoint={job['metadata']['name']}-0.{pod['subdomain']}:" in container_of(spec["template"])["args"][0]
    (mistake, _) = spec["podFailurePolicy"]["rules"]
    assert mistake == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container_of(spec["template"])["name"], "operator": "In", "values": [2]},
    }
    assert pod["restartPolicy"] == "Never"  # Else Kubernetes refuses a podFailurePolicy.


def test_the_operator_has_as_many_pods_as_the_run_has_machines():
    (job,) = read("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sorted(replicas) == ["Master", "Worker"]
    assert sum(one["replicas"] for one in replicas.values()) == 2
    assert {container_of(one["template"])["name"] for one in replicas.values()} == {"pytorch"}


@pytest.mark.parametrize("name", ["kubernetes_job.yaml", "pytorchjob.yaml"])
def test_pods_have_shared_memory_a_shared_folder_and_time_to_save(name):
    *_, job = read(name)
    spec = job["spec"]
    templates = (
        [spec["template"]] if "template" in spec else [one["template"] for one in spec["pytorchReplicaSpecs"].values()]
    )
    for template in templates:
        pod, container = template["spec"], container_of(template)
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in volumes[mounts["/shared"]]
        assert pod["terminationGracePeriodSeconds"] > 30
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_skypilots_machines_are_those_of_the_run():
    (task,) = read("skypilot.yaml")
    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["file_mounts"]["/shared"]["mode"] == "MOUNT"
    assert "runner.checkpoint_rename=false" in task["run"]
