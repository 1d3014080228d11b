"""A PostgreSQL cluster of a test's own: on loopback, in a temporary folder, with a password."""

import contextlib
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.prefect_server import free_port

USER = "prefect"


def find_programs() -> Path | None:
    """The folder of PostgreSQL's server programs (Debian keeps them off the PATH), or None."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    versions = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    return max((path.parent for path in versions), default=None, key=lambda path: path.parts[-2])


PROGRAMS = find_programs()


class Cluster:
    """One server; run by an ordinary user, because PostgreSQL refuses root."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.password = secrets.token_hex(12)
        self.user = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            self.user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    @property
    def url(self) -> str:
        """The address as Prefect wants it."""
        return f"postgresql+asyncpg://{USER}:{self.password}@127.0.0.1:{self.port}/postgres"

    def make(self) -> None:
        """`initdb`: scram passwords for everybody, no sockets elsewhere."""
        secret = self.folder / "password"
        secret.write_text(self.password)
        secret.chmod(0o644)  # inside a folder of the user's own
        self._run(
            *("initdb", "--pgdata", self.folder / "data", "--username", USER, "--no-sync"),
            *("--auth", "scram-sha-256", "--pwfile", secret, "--encoding", "UTF8"),
        )
        settings = (
            f"listen_addresses = '127.0.0.1'\nport = {self.port}\nfsync = on\n"
            f"unix_socket_directories = '{self.folder}'\nshared_buffers = 32MB\n"
        )
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.write(settings)

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        self._control("start", "--wait", "--timeout", "120", "--log", self.folder / "log")

    def stop(self, mode: str = "fast") -> None:
        """Stop it; by "immediate" as a power cut would."""
        self._control("stop", "--wait", "--timeout", "60", "--mode", mode)

    def _control(self, *words: str | Path) -> None:
        self._run("pg_ctl", "--pgdata", self.folder / "data", *words)

    def _run(self, program: str, *words: str | Path) -> None:
        command = [str(PROGRAMS / program), *map(str, words)]
        # a file, no pipe: the server inherits it and would keep a pipe open
        with tempfile.TemporaryFile("w+") as said:
            done = subprocess.run(
                command, cwd=self.folder, stdout=said, stderr=subprocess.STDOUT, **self.user
            )
            said.seek(0)
            assert done.returncode == 0, said.read()


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A running cluster; nothing is left of it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="clouds-postgres-"))  # pytest's are closed to nobody
    made = Cluster(folder)
    try:
        made.make()
        made.start()
        yield made
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            made.stop("immediate")
        shutil.rmtree(folder)
