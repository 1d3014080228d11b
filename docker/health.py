"""Health check of a container: if a Prefect worker runs in it, its own page must answer.

python docker/health.py

A container that runs a command instead (`clouds --recipe tiny`) is healthy as long as it runs.
"""

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT_S = 8.0


def has_worker(proc: Path) -> bool:
    """Whether a process of this container is a Prefect worker."""
    for path in proc.glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"worker" in words and any(word.endswith(b"prefect") for word in words):
            return True
    return False


def problem(proc: Path = Path("/proc")) -> str | None:
    """Why the container is not well, or None."""
    if not has_worker(proc):
        return None
    port = os.environ.get("PREFECT_WORKER_WEBSERVER_PORT", "8080")
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=TIMEOUT_S).close()
    except (urllib.error.URLError, OSError) as error:
        return f"the worker does not answer on port {port}: {error}"
    return None


if __name__ == "__main__":
    sys.exit(problem())
