"""How many GPUs this machine offers, and how many of them a stage takes, all without torch.

They are counted by their device files and CUDA_VISIBLE_DEVICES.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from stages.contracts import Contract


def count_gpus(devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that a process started now could use."""
    return len(visible_gpus(devices))


def visible_gpus(devices: Path = Path("/dev")) -> list[str]:
    """Their names for CUDA_VISIBLE_DEVICES, in the order in which a process would number them."""
    there = sum(1 for path in devices.glob("nvidia[0-9]*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(there)]
    named = [entry.strip() for entry in visible.split(",")]
    stop = next((n for n, entry in enumerate(named) if entry in {"", "-1"}), len(named))
    return named[: min(there, stop)]


def wants_gpu(device: str) -> bool:
    """Whether `run.device` (auto, cpu, cuda, cuda:N) will be a GPU here."""
    return device.startswith("cuda") or (device == "auto" and count_gpus() > 0)


def gpus_taken(contract: Contract, recipe: Any) -> int:
    """GPUs of this machine that a stage computes on: one per process of its own; 0: none."""
    loads = (attrgetter(field)(recipe) for field in contract.weights)
    if not ((contract.numeric or any(loads)) and wants_gpu(recipe.run.device)):
        return 0
    # what a cluster's nodes compute on, the cluster counts
    away = contract.shared == "shards" and recipe.run.engine != "local"
    return recipe.run.processes if contract.shared and not away else 1


@contextlib.contextmanager
def own_gpus(
    count: int, *, devices: Path = Path("/dev"), locks: Path | None = None
) -> Iterator[Mapping[str, str]]:
    """The environment in which a process sees `count` GPUs that no other of our runs computes on.

    Slots count GPUs, they do not tell them apart: each GPU has a lock file on its machine, which
    the kernel frees when its holder dies. Where not enough are free the environment is empty, and
    processes number the GPUs from the first on.
    """
    folder = locks or Path(tempfile.gettempdir())
    with contextlib.ExitStack() as stack:
        held: list[str] = []
        for name in visible_gpus(devices):
            if len(held) < count and _take(stack, folder / f"clouds-gpu-{name.replace('/', '-')}"):
                held.append(name)
        yield {"CUDA_VISIBLE_DEVICES": ",".join(held)} if len(held) == count else {}


def _take(stack: contextlib.ExitStack, path: Path) -> bool:
    """Lock a file until the stack ends, unless another holds it (or it is another user's)."""
    try:
        file = stack.enter_context(path.open("a"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
