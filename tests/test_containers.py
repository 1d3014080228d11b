"""Images, compose file and pools of docker and kubernetes.

What can be told from the files; test_containers_built.py builds and runs them.
"""

import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from flows.deploy import TARGETS, laid_over
from tests.prefect_server import free_port

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
OURS = [name for name, service in SERVICES.items() if service["image"].startswith("clouds:")]


def instructions() -> list[list[str]]:
    """The Dockerfile's instructions as words, continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [line.split() for line in lines.splitlines() if line.strip()]


# The Dockerfile


def test_the_heavy_pins_are_those_of_the_lock():
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = re.findall(r"\b(torch|torchvision)==([\d.]+)", DOCKERFILE)
    assert [f"{name}=={version}" for name, version in pinned if f"{name}=={version}" in locked] == [
        f"{name}=={version}" for name, version in pinned
    ]
    assert {name for name, _ in pinned} == {"torch", "torchvision"}
    order = [DOCKERFILE.index(what) for what in ("torch==", "COPY requirements.lock", "COPY flows")]
    assert order == sorted(order), "what changes often must not stand above what is heavy"


def test_both_targets_run_as_an_ordinary_user_with_volumes_and_a_health_check():
    words = instructions()
    assert {line[3] for line in words if line[0] == "FROM" and len(line) > 3} >= {"cpu", "gpu"}
    users = [line for line in words if line[0] == "USER"]
    assert users == [["USER", "10001"]]
    assert words.index(users[0]) < words.index(["FROM", "app", "AS", "gpu"])
    assert "useradd --uid 10001 " in DOCKERFILE
    (volumes,) = [line for line in words if line[0] == "VOLUME"]
    assert json.loads("".join(volumes[1:])) == ["/opt/clouds/artifacts", "/data", "/cache"]
    assert any(line[0] == "HEALTHCHECK" for line in words)


def test_everything_that_is_copied_is_there_and_not_ignored():
    allowed = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    copies = [
        line[1:-1] for line in instructions() if line[0] == "COPY" and "--from" not in line[1]
    ]
    for source in (source for sources in copies for source in sources):
        assert (ROOT / source).exists(), source
        assert f"!{source.split('/')[0]}" in allowed, source
    assert "docker/.env" in allowed
    assert "docker/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_image_gets_what_the_project_needs_and_no_test_tools():
    done = subprocess.run(
        [sys.executable, "docker/wanted.py", "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*about["project"]["dependencies"], *about["build-system"]["requires"]]
    assert done.stdout.splitlines() == wanted
    assert "pytest" not in done.stdout


@pytest.mark.parametrize(
    ("words", "well"),
    [
        (("/opt/venv/bin/python", "/opt/venv/bin/clouds", "--recipe", "tiny"), True),
        (("/opt/venv/bin/python", "/opt/venv/bin/prefect", "worker", "start"), False),
    ],
)
def test_health_is_the_workers_page_where_there_is_a_worker(tmp_path, monkeypatch, words, well):
    monkeypatch.setenv("PREFECT_WORKER_WEBSERVER_PORT", str(free_port()))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "cmdline").write_bytes("\0".join(words).encode())
    health = runpy.run_path(str(DOCKER / "health.py"))
    assert (health["problem"](tmp_path) is None) == well


# The compose file


def test_every_setting_of_the_compose_file_is_explained_in_the_example():
    text = (DOCKER / "compose.yaml").read_text()
    used = set(re.findall(r"\$\{([A-Z_]+)", text))
    example = (DOCKER / ".env.example").read_text()
    offered = dict(re.findall(r"^([A-Z_]+)=(.*)$", example, flags=re.MULTILINE))
    assert used == offered.keys() - {"COMPOSE_PROFILES"}
    secret = {"POSTGRES_PASSWORD", "CLOUDS_AUTH"}
    assert not any(offered[name] for name in secret), "no password is proposed"
    assert all(f"${{{name}:?" in text for name in secret), "none is taken for granted"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_limits(name):
    limits = SERVICES[name]["deploy"]["resources"]["limits"]
    assert limits.keys() == {"cpus", "memory", "pids"}


@pytest.mark.parametrize("name", OURS)
def test_our_services_have_no_rights_they_do_not_need(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service


def test_only_the_pages_leave_the_containers_and_only_for_this_machine():
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert list(ports) == ["server"]
    assert all(port.startswith("127.0.0.1:") for port in ports["server"])
    assert COMPOSE["networks"]["storage"]["internal"] is True
    assert [name for name, service in SERVICES.items() if "storage" in service["networks"]] == [
        "database",
        "server",
    ]


def test_one_worker_per_profile_waits_for_the_deployments():
    workers = {name: service for name, service in SERVICES.items() if "profiles" in service}
    assert {service["profiles"][0]: service["image"] for service in workers.values()} == {
        "cpu": "clouds:cpu",
        "gpu": "clouds:gpu",
    }
    waits = {"deploy": {"condition": "service_completed_successfully"}}
    assert all(service["depends_on"] == waits for service in workers.values())


# Pools of docker and kubernetes


def shipped_template(kind: str) -> dict:
    """The job template of a pool's type that comes with Prefect."""
    from prefect.server.api import collections_data

    folder = Path(next(iter(collections_data.__path__)))
    known = json.loads((folder / "views" / "aggregate-worker-metadata.json").read_text())
    (found,) = [workers[kind] for workers in known.values() if kind in workers]
    return found["default_base_job_configuration"]


def template_of(target: str) -> dict:
    """The template as `python -m flows.deploy` makes it."""
    about, template = TARGETS[target], shipped_template(TARGETS[target].type)
    if about.template is None:
        return template
    return laid_over(template, yaml.safe_load((ROOT / about.template).read_text()))


def deployments_of(target: str) -> list[dict]:
    text = (ROOT / TARGETS[target].file).read_text().replace("{{ $CLOUDS_IMAGE }}", "clouds:cpu")
    return yaml.safe_load(text)["deployments"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_settings_of_deployments_are_those_of_their_pools_template(target):
    schema = template_of(target)["variables"]
    jsonschema.Draft202012Validator.check_schema(schema)
    for deployment in deployments_of(target):
        settings = deployment["work_pool"]["job_variables"]
        jsonschema.validate(settings, schema)
        assert settings.keys() <= schema["properties"].keys()


@pytest.mark.parametrize("target", ["docker", "kubernetes"])
def test_the_variants_deploy_the_same_as_the_checkout(target):
    about, plain = TARGETS[target], deployments_of("local")
    assert [deployment["name"] for deployment in deployments_of(target)] == [
        deployment["name"] + about.suffix for deployment in plain
    ]
    for variant, original in zip(deployments_of(target), plain, strict=True):
        for field in ("entrypoint", "parameters", "tags", "concurrency_limit"):
            assert variant.get(field) == original.get(field), field
        assert variant["work_pool"]["name"] == about.pool
        env = variant["work_pool"]["job_variables"]["env"]
        assert env == original["work_pool"]["job_variables"]["env"]


def job_of(target: str, **settings) -> dict:
    """The job of a target's first deployment, as a worker fills the template in."""
    from prefect.utilities.templating import apply_values

    template = template_of(target)
    defaults = {
        name: about["default"]
        for name, about in template["variables"]["properties"].items()
        if "default" in about
    }
    given = deployments_of(target)[0]["work_pool"]["job_variables"]
    return apply_values(template["job_configuration"], defaults | given | settings)


def test_a_kubernetes_job_has_its_volumes_gpus_and_no_rights():
    pod = job_of("kubernetes", gpu_count=2)["job_manifest"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "clouds:cpu"
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 2}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["artifacts"] == "/opt/clouds/artifacts"
    assert {volume["name"] for volume in pod["volumes"]} == mounts.keys()
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"][:3]]
    assert claims == ["clouds-artifacts", "clouds-cache", "clouds-data"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert pod["restartPolicy"] == "Never", "Prefect's own settings stand beside ours"


def test_laying_over_merges_mappings_and_lists():
    base = {"a": 1, "b": {"c": [{"d": 1}, 5], "e": 2}}
    over = {"b": {"c": [{"f": 2}, 6, 7], "e": 3}, "g": 4}
    assert laid_over(base, over) == {
        "a": 1,
        "b": {"c": [{"d": 1, "f": 2}, 6, 7], "e": 3},
        "g": 4,
    }
    assert laid_over({"a": [1, 2]}, {"a": [3]}) == {"a": [3, 2]}


def test_prefects_own_kubernetes_worker_takes_the_job():
    worker = pytest.importorskip(
        "prefect_kubernetes.worker", reason="no prefect-kubernetes: pip install '.[kubernetes]'"
    )
    made = worker.KubernetesWorkerJobConfiguration(**job_of("kubernetes"))
    assert len(made.job_manifest["spec"]["template"]["spec"]["volumes"]) == 4


def test_kubernetes_own_schema_takes_the_job_as_the_worker_submits_it():
    validator = pytest.importorskip("kubernetes_validate", reason="make test-containers has it")
    worker = pytest.importorskip(
        "prefect_kubernetes.worker", reason="no prefect-kubernetes: pip install '.[kubernetes]'"
    )
    from prefect.client.schemas.objects import Flow, FlowRun

    made = worker.KubernetesWorkerJobConfiguration(**job_of("kubernetes", gpu_count=1))
    flow = Flow(name="clouds")
    made.prepare_for_flow_run(FlowRun(name="tiny: all", flow_id=flow.id), flow=flow)
    pod = made.job_manifest["spec"]["template"]["spec"]
    for name in ("parallelism", "completions"):  # misplaced by Prefect's template; servers drop it
        assert pod.pop(name) == 1
    validator.validate(made.job_manifest, validator.latest_version(), strict=True)
    pod["containers"][0]["volumeMounts"][0]["mountPat"] = "/elsewhere"
    with pytest.raises(validator.ValidationError, match="mountPat"):
        validator.validate(made.job_manifest, validator.latest_version(), strict=True)


def test_prefects_own_docker_worker_takes_the_job():
    worker = pytest.importorskip(
        "prefect_docker.worker", reason="no prefect-docker: pip install '.[docker]'"
    )
    made = worker.DockerWorkerJobConfiguration(**job_of("docker"))
    assert (made.image, made.mem_limit) == ("clouds:cpu", "8g")
    assert "clouds-artifacts:/opt/clouds/artifacts" in made.volumes
