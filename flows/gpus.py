"""How many GPUs this machine offers, found without torch: device files and CUDA_VISIBLE_DEVICES."""

import os
from pathlib import Path


def count_gpus(devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that a process started now could use."""
    there = sum(1 for path in devices.glob("nvidia[0-9]*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    named = [entry.strip() for entry in visible.split(",")]
    stop = next((n for n, entry in enumerate(named) if entry in {"", "-1"}), len(named))
    return min(there, stop)


def wants_gpu(device: str) -> bool:
    """Whether `run.device` (auto, cpu, cuda, cuda:N) will be a GPU here."""
    return device.startswith("cuda") or (device == "auto" and count_gpus() > 0)
