"""The files of examples/cluster: shells and Kubernetes would take them, and evennorm their options."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from evennorm.cli import main

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
MANIFESTS = sorted(FOLDER.glob("*.yaml"))

NAME = {"name": str}
SECRET = {"secretKeyRef": {"name": str, "key": str}}
CLAIM = {"name": str, "persistentVolumeClaim": {"claimName": str, "readOnly?": bool}}
CONTAINER = {
    "name": str,
    "image": str,
    "command?": [str],
    "args?": [str],
    "env?": [{"name": str, "value?": str, "valueFrom?": SECRET}],
    "ports?": [{"containerPort": int}],
    "readinessProbe?": {"exec": {"command": [str]}},
    "resources": {"requests": {"cpu": str, "memory": str}, "limits?": {"memory": str}},
    "volumeMounts?": [{"name": str, "mountPath": str, "readOnly?": bool}],
}
POD = {"restartPolicy?": str, "containers": [CONTAINER], "volumes?": [CLAIM]}
KINDS = {
    ("batch/v1", "Job"): {"parallelism?": int, "backoffLimit": int, "template": {"spec": POD}},
    ("v1", "Service"): {"selector": {"app": str}, "ports": [{"port": int}]},
    ("apps/v1", "StatefulSet"): {
        "serviceName": str,
        "replicas": int,
        "selector": {"matchLabels": {"app": str}},
        "template": {"metadata": {"labels": {"app": str}}, "spec": POD},
        "volumeClaimTemplates": [
            {"metadata": NAME, "spec": {"accessModes": [str], "resources": {"requests": {"storage": str}}}}
        ],
    },
}
"""The fields that Kubernetes has for these kinds, as far as they are used here; those with ? may be left out."""


def faults(value, schema, where="") -> list[str]:
    """What in a manifest differs from the schema."""
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{where} is {value!r}, not {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{where} is no list"]
        return [fault for i, each in enumerate(value) for fault in faults(each, schema[0], f"{where}[{i}]")]
    if not isinstance(value, dict):
        return [f"{where} is no mapping"]
    known = {name.rstrip("?"): each for name, each in schema.items()}
    found = [f"{where}.{name} is unknown" for name in value.keys() - known.keys()]
    found += [f"{where}.{name} is missing" for name in schema if not name.endswith("?") and name not in value]
    return found + [
        fault for name in value.keys() & known.keys() for fault in faults(value[name], known[name], f"{where}.{name}")
    ]


def understood(words: list[str]) -> None:
    """evennorm knows the options of a command that begins with its name."""
    assert words[:2] == ["evennorm", "compare"]
    main.commands["compare"].make_context("compare", words[2:], parent=click.Context(main))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_batch_files(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    head, _, body = text.partition("set -euo pipefail")
    options = re.findall(r"^#SBATCH (.*)$", head, re.MULTILINE)
    assert len(options) >= 4
    assert "#SBATCH" not in body, "Slurm reads no options behind the first command"
    assert all(re.fullmatch(r"--[a-z-]+=\S+", option) for option in options)
    commands = re.findall(r"exec (evennorm .*)", body)
    assert commands
    for command in commands:
        understood(shlex.split(command))


def documents():
    return [
        pytest.param(document, id=f"{path.name}-{document['kind']}-{document['metadata']['name']}")
        for path in MANIFESTS
        for document in yaml.safe_load_all(path.read_text())
    ]


@pytest.mark.parametrize("document", documents())
def test_manifests(document):
    schema = KINDS[document["apiVersion"], document["kind"]]
    assert faults(document, {"apiVersion": str, "kind": str, "metadata": NAME, "spec": schema}) == []
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", document["metadata"]["name"])
    if document["kind"] == "Service":
        return
    pod = document["spec"]["template"]["spec"]
    if document["kind"] == "Job":
        assert pod["restartPolicy"] in ("OnFailure", "Never"), "Jobs take no other"
    else:
        assert document["spec"]["selector"]["matchLabels"] == document["spec"]["template"]["metadata"]["labels"]
    there = {volume["name"] for volume in pod.get("volumes", [])}
    there |= {claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", [])}
    for container in pod["containers"]:
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= there
        named = [each["name"] for each in container.get("env", [])]
        for i, each in enumerate(container.get("env", [])):  # $(NAME) is replaced where NAME comes before
            assert set(re.findall(r"\$\((\w+)\)", each.get("value", ""))) <= set(named[:i])
        for argument in container.get("args", []):
            assert set(re.findall(r"\$\((\w+)\)", argument)) <= set(named)
        if container.get("command", [""])[0] == "evennorm":
            understood([*container["command"], *container["args"]])


def test_a_misspelt_field_is_found():
    [job, _] = yaml.safe_load_all((FOLDER / "compare.yaml").read_text())
    job["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    del job["spec"]["template"]["spec"]["containers"][0]["image"]
    assert faults(job["spec"], KINDS["batch/v1", "Job"]) == [
        ".template.spec.containers[0].volumeMount is unknown",
        ".template.spec.containers[0].image is missing",
    ]
