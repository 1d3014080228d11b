"""How much memory a process held at most, and what running out of it looks like. No torch here."""

import re
import resource
import sys
from pathlib import Path

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CPU_REFUSALS = ("DefaultCPUAllocator", "can't allocate memory")
"""In torch's errors where the machine's own memory is used up (on GPUs: OutOfMemoryError)."""


def forget_peak() -> None:
    """Begin to measure anew, where the kernel can (Linux, unless it forbids it)."""
    try:
        _FORGET.write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Most resident memory of this process since `forget_peak` (elsewhere than on Linux: ever)."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, torch's included, says that memory did not suffice."""
    if isinstance(error, MemoryError):
        return True
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _CPU_REFUSALS)
