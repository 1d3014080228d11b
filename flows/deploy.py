"""Make a work pool, the GPU limit and the deployments; again is harmless.

python -m flows.deploy [--gpus N]                                      processes of this checkout
python -m flows.deploy --to docker --image clouds:cpu                  a container each
python -m flows.deploy --to kubernetes --image REGISTRY/clouds:gpu     a job each
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.gpus import count_gpus

ROOT = Path(__file__).resolve().parents[1]
GPU_LIMIT = "gpu"
IMAGE_VARIABLE = "CLOUDS_IMAGE"
"""Environment variable by which the files of deployments take the image."""
_EXISTS = "already exists"


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where runs go."""

    pool: str
    type: str
    """Prefect's type of the work pool."""
    file: str
    """The deployments, in the checkout."""
    suffix: str = ""
    """Ends the deployments' names, so that several targets can stand beside each other."""
    template: str | None = None
    """What is laid over Prefect's own template of jobs, in the checkout."""


TARGETS = {
    "local": Target(pool="clouds-local", type="process", file="prefect.yaml"),
    "docker": Target(
        pool="clouds-docker", type="docker", file="docker/prefect.docker.yaml", suffix="-docker"
    ),
    "kubernetes": Target(
        pool="clouds-kubernetes",
        type="kubernetes",
        file="docker/prefect.kubernetes.yaml",
        suffix="-kubernetes",
        template="docker/kubernetes-job.yaml",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Deploy to the server of PREFECT_API_URL (or of the active Prefect profile).

    Returns:
        0, or the exit code of the Prefect command that failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m flows.deploy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--gpus",
        type=int,
        help="slots of a new GPU limit (default: this machine's GPUs, at least 1)",
    )
    parser.add_argument("--to", choices=TARGETS, default="local", help="where runs go")
    parser.add_argument(
        "--image", default="clouds:cpu", help="of docker and kubernetes (default: clouds:cpu)"
    )
    arguments = parser.parse_args(argv)
    target = TARGETS[arguments.to]
    slots = arguments.gpus or max(1, count_gpus())
    try:
        _make_pool(target)
        _prefect("global-concurrency-limit", "create", GPU_LIMIT, "--limit", str(slots))
        if arguments.gpus:
            _prefect("global-concurrency-limit", "update", GPU_LIMIT, "--limit", str(slots))
        image = {IMAGE_VARIABLE: arguments.image}
        _prefect("--no-prompt", "deploy", "--all", "--prefect-file", target.file, **image)
    except subprocess.CalledProcessError as error:
        print(_advice(error.stdout) or error.stdout, file=sys.stderr)
        return error.returncode
    names = [f"clouds/{name}{target.suffix}" for name in ("whole", "stage", "evaluate")]
    print(
        f"deployed {', '.join(names[:-1])} and {names[-1]} to the pool {target.pool}. Next:\n"
        f"  prefect worker start --pool {target.pool}\n"
        f"  prefect deployment run {names[0]} --param recipe=miniature"
    )
    return 0


def _make_pool(target: Target) -> None:
    """The work pool, by Prefect's template of its type with ours laid over it."""
    words = ("work-pool", "create", target.pool, "--type", target.type)
    if target.template is None:
        _prefect(*words)
        return
    with tempfile.TemporaryDirectory(prefix="clouds-") as folder:
        file = Path(folder) / "template.json"
        own = ("work-pool", "get-default-base-job-template", "--type", target.type)
        _prefect(*own, "--file", str(file))
        over = yaml.safe_load((ROOT / target.template).read_text(encoding="utf-8"))
        whole = laid_over(json.loads(file.read_bytes()), over)
        file.write_text(json.dumps(whole), encoding="utf-8")
        _prefect(*words, "--base-job-template", str(file), "--overwrite")


def laid_over(base: Any, over: Any) -> Any:
    """`over` laid over `base`: mappings key by key, lists entry by entry, else `over` counts."""
    if isinstance(base, Mapping) and isinstance(over, Mapping):
        added = {key: value for key, value in over.items() if key not in base}
        return {
            key: laid_over(value, over[key]) if key in over else value
            for key, value in base.items()
        } | added
    if isinstance(base, list) and isinstance(over, list):
        both = [laid_over(below, above) for below, above in zip(base, over, strict=False)]
        return both + base[len(over) :] + over[len(base) :]
    return over


def _prefect(*words: str, **env: str) -> None:
    """A Prefect command in the checkout; that something exists already is no failure.

    Raises:
        subprocess.CalledProcessError: with what it said.
    """
    command = [sys.executable, "-m", "prefect", *words]
    # never a server behind the user's back
    env = {**os.environ, "PREFECT_SERVER_EPHEMERAL_ENABLED": "false", **env}
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode and _EXISTS not in " ".join(done.stdout.split()):
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout)


def _advice(said: str) -> str | None:
    """What to do where no server answered, or none to us; None where something else is wrong."""
    if "401 Unauthorized" in said:
        return (
            "the Prefect server asks for a password: set PREFECT_API_AUTH_STRING to its "
            "user:password."
        )
    no_server = ("PREFECT_API_URL", "ConnectError", "ConnectTimeout", "Failed to reach API")
    if not any(word in said for word in no_server):
        return None
    url = os.environ.get("PREFECT_API_URL")
    found = f"no Prefect server answers at {url}" if url else "no Prefect server is set"
    return (
        f"{found}: start one with `prefect server start` and set PREFECT_API_URL to its address "
        f"(http://127.0.0.1:4200/api)."
    )


if __name__ == "__main__":
    sys.exit(main())
