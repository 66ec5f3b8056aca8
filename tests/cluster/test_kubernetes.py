"""``launch/kubernetes.yaml`` without a cluster: Kubernetes' schema, and agreement with itself, image and compose.

``make test-hosts`` installs the schemas (100 MB), which read YAML, too; nothing is imported where others are collected.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.cluster]


def documents(path: str) -> list[Any]:
    import yaml

    return list(yaml.safe_load_all((ROOT / path).read_text()))


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    return documents("launch/kubernetes.yaml")[0]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return documents("launch/kubernetes.yaml")[1]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return documents("docker/compose.yaml")[0]["x-node"]


def container(job: dict[str, Any]) -> dict[str, Any]:
    (found,) = job["spec"]["template"]["spec"]["containers"]
    return found


def options(command: list[str]) -> dict[str, str]:
    """Return torchrun's options and the script's, which are all written "--name=value"."""
    pairs = (word.partition("=") for word in command if word.startswith("--"))
    return {name: value for name, _, value in pairs}


def test_every_field_is_in_kubernetes_schema(service: dict[str, Any], job: dict[str, Any]) -> None:
    import kubernetes_validate

    version = kubernetes_validate.latest_version()
    for resource in (service, job):
        kubernetes_validate.validate(resource, version, strict=True)
    wrong = copy.deepcopy(job)
    container(wrong)["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_pods_find_the_first_one_by_the_service(service: dict[str, Any], job: dict[str, Any]) -> None:
    pod, asked = job["spec"]["template"], options(container(job)["command"])
    name, port = job["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert asked["--rdzv-endpoint"] == f"{name}-0.{service['metadata']['name']}:{port}"
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert port in [entry["containerPort"] for entry in container(job)["ports"]]
    assert {job["spec"]["completions"], job["spec"]["parallelism"], int(asked["--nnodes"])} == {2}


def test_pods_are_nodes_of_compose(job: dict[str, Any], compose: dict[str, Any]) -> None:
    """One program, one way to meet; where a node that is lost comes back, both need what torchrun needs for it."""
    pod, node = container(job)["command"], compose["command"]
    assert [word for word in pod if not word.startswith("--")] == [word for word in node if not word.startswith("--")]
    asked, known = options(pod), options(node)
    assert asked.keys() <= known.keys()
    for name in ("--rdzv-backend", "--rdzv-id", "--resume", "--out"):
        assert asked[name] == known[name]
    environment = {entry["name"]: entry["value"] for entry in container(job)["env"]}
    own_store = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
    assert environment[own_store] == compose["environment"][own_store] == "1"
    patience = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # of torchrun, which ends before it is killed
    assert int(environment[patience]) < job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(compose["environment"][patience]) < int(compose["stop_grace_period"].removesuffix("s"))


def test_pods_suit_the_image(job: dict[str, Any]) -> None:
    for kind in ("cpu", "cuda"):
        image = (ROOT / f"docker/{kind}.Dockerfile").read_text()
        user = job["spec"]["template"]["spec"]["securityContext"]
        assert f"useradd --uid {user['runAsUser']} " in image
        (volume,) = re.findall(r"^VOLUME (\S+)$", image, re.M)
        mounts = {entry["name"]: entry["mountPath"] for entry in container(job)["volumeMounts"]}
        assert mounts["checkpoints"] == volume
        for name in ("--resume", "--out"):
            assert options(container(job)["command"])[name].startswith(f"{volume}/")
        (folder,) = re.findall(r"^COPY --chown=\S+ examples (\S+)$", image, re.M)
        (script,) = (word for word in container(job)["command"] if word.endswith(".py"))
        assert (ROOT / "examples" / script.removeprefix(f"{folder}/")).exists()
