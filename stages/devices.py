"""Which device and which precision a stage computes in, chosen once and with the reason.

    device = choose_device(config)
    progress.note(device.reason)
    with device.autocast():
        ...

CPU runs repeat bit for bit for a seed, a torch version and a number of threads (sums over threads
depend on how many there are: keep `OMP_NUM_THREADS` for runs that shall be compared).
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from stages.config import StageConfig
from stages.memory import is_out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where a stage computes."""

    device: torch.device
    dtype: torch.dtype
    """torch.bfloat16: under autocast; torch.float32: no autocast."""
    reason: str
    """One line for the log: device and precision, and why these."""

    def autocast(self) -> contextlib.AbstractContextManager:
        """A context in which networks run in this precision."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def choose_device(config: StageConfig) -> Device:
    """The device of `config.run.device` in `config.precision`; also makes torch repeatable.

    Raises:
        ValueError: the device is unknown or not on this machine.
    """
    return device_for(config.run.device, precision=config.precision)


def device_for(name: str, *, precision: Literal["fp32", "bf16"]) -> Device:
    """The device called `name` (auto, cpu, cuda, cuda:N), set up for repeatable results.

    On a CPU every operation is deterministic; on a GPU some of torch's kernels are not (the
    backward pass of `grid_sample`), so there torch is only asked to prefer those that are.

    Raises:
        ValueError: the device is unknown or not on this machine.
    """
    device, why = _find(name)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    # Deterministic mode also fills every new tensor with NaN: a debugging aid that costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Device(device=device, dtype=dtype, reason=f"{why}; {_precision_note(device, dtype)}")


def in_halves(
    work: Callable[[Sequence[Item]], Sequence[Result]],
    batch: Sequence[Item],
    *,
    note: Callable[[str], None],
) -> Iterator[tuple[Result, int]]:
    """Results of `work(batch)`, or of its halves where memory does not suffice for the whole.

    Args:
        work: returns one result per item.
        batch: items that are worked on at once, if possible.
        note: told when a batch is cut.

    Yields:
        Each result, with how many items were worked on at once (last bits depend on it).

    Raises:
        MemoryError: a single item does not fit.
    """
    try:
        results = work(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(batch) == 1:
            raise MemoryError("a single picture does not fit into the device's memory") from error
        results = None  # outside this block, so that the error's frames free what they hold
    if results is None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = (len(batch) + 1) // 2
        note(f"out of memory with {len(batch)} pictures at once: {half} instead")
        yield from in_halves(work, batch[:half], note=note)
        yield from in_halves(work, batch[half:], note=note)
        return
    yield from ((result, len(batch)) for result in results)


def _find(name: str) -> tuple[torch.device, str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        asked = "asked for" if name == "cpu" else "no CUDA device here"
        return torch.device("cpu"), f"cpu ({asked}), {torch.get_num_threads()} threads"
    match = re.fullmatch(r"(?:auto|cuda)(?::(\d+))?", name)
    if match is None or name.startswith("auto:"):
        raise ValueError(f"run.device is {name!r}; known are auto, cpu, cuda and cuda:N.")
    # One of several training processes of this machine takes the GPU of its number.
    index = int(match.group(1) or os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        raise ValueError(
            f"run.device is {name!r}, but this machine has {count} CUDA devices that torch can use"
            f" (torch {torch.__version__}); choose cpu or auto, or fewer run.processes."
        )
    asked = "asked for" if name != "auto" else "found"
    return torch.device(
        "cuda", index
    ), f"cuda:{index} {torch.cuda.get_device_name(index)} ({asked})"


def _precision_note(device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "fp32 (precision of the recipe)"
    native = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    speed = "" if native else ", emulated on this GPU: slow, but the same numbers"
    return f"bf16 autocast (precision of the recipe{speed})"
