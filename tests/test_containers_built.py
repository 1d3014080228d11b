"""The Dockerfile and the compose file linted, and the image built and run.

make test-containers        installs the tools where it can

Where there is no Docker engine, the Dockerfile is built by buildah (isolation by chroot) on a base
that debootstrap makes, and the image's commands run in it. What this does not show: the engine
itself (health checks on time, limits, volumes, networks), the database's image, GPUs in containers.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.deploy import TARGETS
from flows.store import Store
from tests.prefect_server import Prefect

pytestmark = pytest.mark.containers

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
BASE = "localhost/clouds-test-base"
IMAGE = "localhost/clouds-test:cpu"
BUILD_BYTES = 25 * 2**30
"""Room that a build needs: torch's libraries, unpacked in two layers."""


def tool(name: str) -> str:
    """A program beside this Python or on the PATH; the test is skipped without it."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here: make test-containers installs it where it can")
    return found


def run(*words: str | Path, **options) -> str:
    """Run a program; its output, or a failure with it."""
    done = subprocess.run(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_the_dockerfile_passes_the_linter():
    run(tool("hadolint"), DOCKER / "Dockerfile")


def test_the_compose_file_is_valid_by_the_schema_of_compose_files():
    # building an image and naming it is what we mean; the other rules are of taste
    of_taste = ("--disable-rule", "no-build-and-image")
    run(tool("dclint"), DOCKER / "compose.yaml", "--quiet", *of_taste)


def test_the_linter_of_compose_files_finds_what_it_is_for(tmp_path):
    broken = tmp_path / "compose.yaml"
    broken.write_text("services:\n  a:\n    image: b\n    memory_limits: 1g\n")
    done = subprocess.run([tool("dclint"), broken], capture_output=True, text=True)
    assert done.returncode != 0
    assert "/services/a" in done.stdout, "where"
    assert "must NOT have additional properties" in done.stdout, "what"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Prefect(tmp_path_factory.mktemp("prefect"))
    try:
        made.serve()
        yield made
    finally:
        made.stop()


@pytest.mark.parametrize("target", ["docker", "kubernetes"])
def test_a_real_server_takes_pool_and_deployments_twice(server, target):
    for _ in range(2):
        done = server.command("-m", "flows.deploy", "--to", target, "--image", "clouds:test")
        assert done.returncode == 0, done.stdout
    pool = server.ask(f"work_pools/{TARGETS[target].pool}")
    assert pool["type"] == target
    deployed = server.ask("deployments/filter", work_pools={"name": {"any_": [pool["name"]]}})
    assert {entry["name"] for entry in deployed} == {
        name + TARGETS[target].suffix for name in ("whole", "stage", "evaluate")
    }
    assert {entry["job_variables"]["image"] for entry in deployed} == {"clouds:test"}
    if target == "kubernetes":
        pod = pool["base_job_template"]["job_configuration"]["job_manifest"]["spec"]["template"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The cpu image, built by buildah on a base that debootstrap makes: its name.

    CLOUDS_BUILD_OPTIONS adds options to the build, for example mounts and variables by which pip
    reaches its packages here.
    """
    buildah, debootstrap = tool("buildah"), tool("debootstrap")
    if os.geteuid() != 0:
        pytest.skip("debootstrap and buildah's isolation by chroot need root")
    if shutil.disk_usage("/var/lib").free < BUILD_BYTES:
        pytest.skip(f"the build takes {BUILD_BYTES / 2**30:.0f} GiB of disk")
    folder = tmp_path_factory.mktemp("base")
    if not run(buildah, "images", "--quiet", "--filter", f"reference={BASE}"):
        run(debootstrap, "--variant=minbase", "bookworm", folder / "root")
        run("tar", "-C", folder / "root", "-cf", folder / "root.tar", ".")
        (folder / "Dockerfile").write_text("FROM scratch\nADD root.tar /\n")
        run(buildah, "build", "--isolation=chroot", "-f", folder / "Dockerfile", "-t", BASE, folder)
    run(
        *(buildah, "build", "--isolation=chroot", "--network=host", "--layers", "--format=docker"),
        *("-f", DOCKER / "Dockerfile", "--ignorefile", DOCKER / "Dockerfile.dockerignore"),
        *("--target=cpu", f"--build-arg=BASE={BASE}", "--build-arg=REVISION=0123456789ab"),
        *shlex.split(os.environ.get("CLOUDS_BUILD_OPTIONS", "")),
        *("-t", IMAGE, ROOT),
    )
    return IMAGE


@pytest.fixture
def in_container(image, tmp_path):
    """Runs a command in a fresh container, with the artifacts' volume in a folder of the test."""
    buildah = tool("buildah")
    container = run(buildah, "from", image).strip()
    volume = tmp_path / "artifacts"
    volume.mkdir()
    os.chown(volume, 10001, 10001)

    def in_it(*words: str) -> str:
        mount = f"{volume}:/opt/clouds/artifacts"
        options = ("--isolation=chroot", "--network=host", "--volume", mount)
        return run(buildah, "run", *options, container, "--", *words)

    yield in_it
    run(buildah, "rm", container)


def test_the_image_runs_a_recipe_as_an_ordinary_user(in_container, tmp_path):
    assert in_container("id", "-u").strip() == "10001"
    small = ("--set", "legs={}", "--set", "world.num_source=12", "--set", "world.num_target=2")
    said = in_container("clouds", "--recipe", "tiny", *small)
    assert "report:" in said
    store = Store(tmp_path / "artifacts")
    made = store.newest("report")
    assert made["git_revision"] == "0123456789ab"
    assert {path.stat().st_uid for path in store.artifacts()} == {10001}
    assert "nothing to do: all 12 instances are done." in in_container(
        "clouds", "--recipe", "tiny", *small
    )
    in_container("python", "docker/health.py")


def test_the_image_describes_itself(image):
    inspected = json.loads(run(tool("buildah"), "inspect", "--type", "image", image))
    about = inspected["Docker"]["config"]
    assert about["User"] == "10001"
    assert about["Volumes"].keys() == {"/opt/clouds/artifacts", "/data", "/cache"}
    assert about["Healthcheck"]["Test"] == ["CMD", "python", "docker/health.py"]
    assert about["Entrypoint"] == ["tini", "--"]
    assert "PREFECT_WORKER_WEBSERVER_HOST=127.0.0.1" in about["Env"]
