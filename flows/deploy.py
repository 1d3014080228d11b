"""Make the local work pool, the GPU limit and the deployments of prefect.yaml; again is harmless.

python -m flows.deploy [--gpus N]
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.gpus import count_gpus

ROOT = Path(__file__).resolve().parents[1]
POOL = "clouds-local"
GPU_LIMIT = "gpu"
_EXISTS = "already exists"


def main(argv: Sequence[str] | None = None) -> int:
    """Deploy to the server of PREFECT_API_URL (or of the active Prefect profile).

    Returns:
        0, or the exit code of the Prefect command that failed.
    """
    parser = argparse.ArgumentParser(prog="python -m flows.deploy", description=__doc__)
    parser.add_argument(
        "--gpus",
        type=int,
        help="slots of a new GPU limit (default: this machine's GPUs, at least 1)",
    )
    arguments = parser.parse_args(argv)
    slots = arguments.gpus or max(1, count_gpus())
    try:
        _prefect("work-pool", "create", POOL, "--type", "process")
        _prefect("global-concurrency-limit", "create", GPU_LIMIT, "--limit", str(slots))
        if arguments.gpus:
            _prefect("global-concurrency-limit", "update", GPU_LIMIT, "--limit", str(slots))
        _prefect("--no-prompt", "deploy", "--all")
    except subprocess.CalledProcessError as error:
        print(_advice(error.stdout) or error.stdout, file=sys.stderr)
        return error.returncode
    print(
        f"deployed clouds/whole, clouds/stage and clouds/evaluate to the pool {POOL}. Next:\n"
        f"  prefect worker start --pool {POOL}\n"
        f"  prefect deployment run clouds/whole --param recipe=miniature"
    )
    return 0


def _prefect(*words: str) -> None:
    """A Prefect command in the checkout; that something exists already is no failure.

    Raises:
        subprocess.CalledProcessError: with what it said.
    """
    command = [sys.executable, "-m", "prefect", *words]
    # never a server behind the user's back
    env = {**os.environ, "PREFECT_SERVER_EPHEMERAL_ENABLED": "false"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode and _EXISTS not in " ".join(done.stdout.split()):
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout)


def _advice(said: str) -> str | None:
    """What to do where no server answered; None where something else is wrong."""
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
