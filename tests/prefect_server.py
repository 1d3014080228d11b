"""A real Prefect server with a worker, for tests: spoken to as users and pages do."""

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}
PASSWORD = "clouds:d2f1-test-word"
"""user:password of the server."""


class Prefect:
    """A server with a worker, spoken to as a user (commands) and as a page (its HTTP interface).

    Whoever speaks to it must know its password.
    """

    def __init__(self, home: Path, *, database: str | None = None) -> None:
        self.home, self.port = home, free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.server: subprocess.Popen | None = None
        self.worker: subprocess.Popen | None = None
        self.processes: list[subprocess.Popen] = []
        self.env = {name: value for name, value in os.environ.items() if "PREFECT" not in name}
        self.env |= {
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.url,
            "PREFECT_API_AUTH_STRING": PASSWORD,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }
        self.of_server = {"PREFECT_SERVER_API_AUTH_STRING": PASSWORD}
        if database is not None:
            self.of_server["PREFECT_API_DATABASE_CONNECTION_URL"] = database

    def command(self, *words: str, **env: str) -> subprocess.CompletedProcess:
        """Run a Python program's command line against the server."""
        return subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )

    def serve(self) -> None:
        """Start the server and wait until it answers."""
        words = ("server", "start", "--port", str(self.port))
        self.server = self.start(*words, **self.of_server)
        until(self.answers, timeout_s=600)

    def deploy(self) -> None:
        """`make deploy`."""
        done = self.command("-m", "flows.deploy")
        assert done.returncode == 0, done.stdout

    def work(self) -> None:
        """Start a worker for the deployments."""
        self.worker = self.start("worker", "start", "--pool", "clouds-local")

    def stop(self) -> None:
        """End the newest processes first, with all they started."""
        while self.processes:
            process = self.processes.pop()
            if process.poll() is None:
                end(process)

    def answers(self) -> bool:
        """Whether the server does."""
        with contextlib.suppress(OSError, urllib.error.URLError):
            return self.ask("health") is True
        return False

    def start(self, *words: str, **env: str) -> subprocess.Popen:
        """Start `prefect WORDS`, its output in a log."""
        with (self.home / f"{words[0]}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", *words],
                cwd=self.home,
                env=self.env | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    def deploy_and_run(self, deployment: str, **parameters) -> str:
        """`prefect deployment run`; the flow run's id."""
        words = [
            f"--param={name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in parameters.items()
        ]
        done = self.command("-m", "prefect", "deployment", "run", f"clouds/{deployment}", *words)
        assert done.returncode == 0, done.stdout
        return next(line.split()[-1] for line in done.stdout.splitlines() if "UUID" in line)

    def ask(self, path: str, *, password: str | None = PASSWORD, **body) -> object:
        """A question to the server."""
        data = json.dumps(body).encode() if body else None
        headers = {"content-type": "application/json"}
        if password is not None:
            code = base64.b64encode(password.encode()).decode()
            headers["authorization"] = f"Basic {code}"
        request = urllib.request.Request(f"{self.url}/{path}", data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def finished(self, run_id: str, *, timeout_s: float = 900) -> dict:
        """The flow run, once it has ended."""
        return until(
            lambda: (
                found
                if (found := self.ask(f"flow_runs/{run_id}"))["state"]["type"] in FINAL
                else None
            ),
            timeout_s=timeout_s,
        )

    def _of_run(self, path: str, run_id: str) -> list[dict]:
        return self.ask(path, flow_runs={"id": {"any_": [run_id]}}, limit=200)

    def tasks(self, run_id: str, *, count: int) -> dict[str, dict]:
        """The task runs by name, in order (they reach the server a moment after they end)."""
        found = until(
            lambda: (
                tasks
                if len(tasks := self._of_run("task_runs/filter", run_id)) >= count
                and all(task["state_type"] in FINAL for task in tasks)
                else None
            ),
            timeout_s=120,
        )
        return {task["name"]: task for task in sorted(found, key=lambda task: task["start_time"])}

    def artifacts(self, run_id: str) -> dict[str, dict]:
        """What the run shows beside its states, by key."""
        return {item["key"]: item for item in self._of_run("artifacts/filter", run_id)}

    def log_lines(self, run_id: str) -> list[dict]:
        """The run's logs."""
        return self.ask("logs/filter", logs={"flow_run_id": {"any_": [run_id]}}, limit=200)


def free_port() -> int:
    """A port of the loopback interface that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(look, *, timeout_s: float, every_s: float = 0.25):
    """What `look` returns, once that is something."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every_s)
    return found


def end(process: subprocess.Popen, *, patience_s: float = 10) -> None:
    """Stop a process and whatever it started; at once where there is no patience."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    if patience_s:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience_s)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(timeout=10)
