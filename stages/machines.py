"""How the machines that share a training meet: a card in the stage's folder, which all of them see.

The machine that runs the stage leads (rank 0): it leaves a card with the stage's spec and its own
address while it trains. The others read it (`stages/join.py`) and start their processes. Addresses
are given as to torch and accelerate, by MASTER_ADDR and MASTER_PORT; without them the leader takes
its host name and a free port. The port is open to the network that the machines share, which must
be one that can be trusted: torch's processes ask nobody for a password. No torch here.
"""

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.children import Spec
from stages.shards import write_json

CARD = ".machines.json"
"""In the stage's folder while its machines work; no output (the store drops what begins with a
dot)."""
RANK, ADDRESS, PORT = "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"
"""Environment: which of the machines this is, and where the first one listens."""


class Meeting(NamedTuple):
    """How this machine's processes find the others."""

    rank: int
    """This machine's, from 0."""
    options: Mapping[str, Any]
    """Of `accelerate launch`."""
    note: str
    """What the user is to do; empty: nothing."""


@contextlib.contextmanager
def call_for_machines(spec: Spec, count: int) -> Iterator[Meeting]:
    """Where this machine's training processes meet those of the others.

    The first of several machines leaves a card for the others, and takes it away in the end.

    Args:
        spec: of the stage.
        count: machines in all.

    Raises:
        ValueError: NODE_RANK is none of theirs, or the first one's address is not known.
    """
    if count == 1:
        yield Meeting(0, {"num_machines": 1, "main_process_port": 0}, "")  # a free port
        return
    rank = int(os.environ.get(RANK, "0"))
    if rank >= count:
        raise ValueError(
            f"this is machine {rank} ({RANK}), but run.machines is {count}: they are 0 to "
            f"{count - 1}."
        )
    if rank and not {ADDRESS, PORT} <= os.environ.keys():
        raise ValueError(
            f"this is machine {rank} ({RANK}): {ADDRESS} and {PORT} must say where machine 0 "
            f"listens."
        )
    address = os.environ.get(ADDRESS) or socket.gethostname()
    port = int(os.environ.get(PORT) or _free_port())
    options = {
        "num_machines": count,
        "machine_rank": rank,
        "main_process_ip": address,
        "main_process_port": port,
        "rdzv_backend": "static",
    }
    if rank:
        yield Meeting(rank, options, "")
        return
    card = Path(spec["out"]) / CARD
    about = {"spec": dict(spec), "address": address, "port": port, "machines": count}
    write_json(card, about | {"attempt": uuid.uuid4().hex})
    note = (
        f"leads {count} machines from {address}:{port}; each of the others takes part by: python "
        f"-m stages.join {card.parents[2]} --machine 1 (to {count - 1})"
    )
    try:
        yield Meeting(0, options, note)
    finally:
        card.unlink(missing_ok=True)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of torch's says that another process of the training does not answer."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
