"""The loop that trains the miniature's networks: step, log, save; resumable after any kill.

Everything random of a step is a function of (seed, step), so weights, their average, the optimiser
and the
step's number are all there is to save.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import Any

import torch
from torch import nn

from stages.contracts import Progress
from stages.pretrain_config import PretrainSection
from stages.training import Checkpoints, Metrics, TrainingError

StepLosses = Callable[[int], Mapping[str, torch.Tensor]]
"""`losses(step)`: scalars by name; "total" is minimised, the others are logged."""


def pretrain(
    network: nn.Module,
    losses: StepLosses,
    config: PretrainSection,
    *,
    seed: int,
    out: Path,
    progress: Progress,
) -> dict[str, float]:
    """Train to `config.steps`, from the newest checkpoint in `out/state` where there is one.

    The network holds the averaged weights afterwards. Returns last metrics, steps and CPU seconds.

    Raises:
        TrainingError: a loss or the gradient is not finite; the update is not made.
    """
    optimizer = torch.optim.AdamW(_groups(network, config), lr=config.lr, betas=(0.9, 0.98))
    average = {name: value.detach().clone() for name, value in network.state_dict().items()}
    checkpoints, metrics = Checkpoints(out / "state"), Metrics(out / "logs" / "metrics.jsonl")

    last = min(config.steps, config.stop_after or config.steps)

    # 1. Go on where an interrupted attempt left off.
    first, spent_s = 0, 0.0
    row: dict[str, float] = {}
    found = checkpoints.newest(progress.note)
    if found is not None:
        first, state = found
        network.load_state_dict(state["network"])
        average = state["average"]
        optimizer.load_state_dict(state["optimizer"])
        spent_s, row = state["cpu_s"], state["row"]
    metrics.cut(first)
    progress.start(last, "steps", done=first)

    # 2. Step by step.
    started_s = process_time()
    seen: list[dict[str, float]] = []
    for step in range(first, last):
        values = _update(network, optimizer, losses, config, seed, step)
        _follow(average, network, min(config.ema_decay, (1 + step) / (10 + step)))
        seen.append(values)
        cpu_s = spent_s + process_time() - started_s
        if (step + 1) % config.log_every == 0 or step + 1 == last:
            row = _means(seen, row)
            metrics.write({"step": step + 1, **row, "cpu_s": cpu_s})
            seen = []
        progress.advance(1, loss=values["total"])
        if (step + 1) % config.checkpoint_every == 0:
            state = {"network": network.state_dict(), "average": average}
            state |= {"optimizer": optimizer.state_dict(), "cpu_s": cpu_s, "row": row}
            checkpoints.save(step + 1, state)

    # 3. What is shipped is the average; the state to resume from has done its duty.
    network.load_state_dict(average)
    checkpoints.clear()
    return {**row, "steps": max(first, last), "cpu_s": spent_s + process_time() - started_s}


def learning_rate_factor(config: PretrainSection, step: int) -> float:
    """Warm-up, plateau, and a linear fall to nought over the last `decay_share` of the steps."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (config.steps - step) / (config.decay_share * config.steps)
    return warm * min(1.0, left)


def _means(seen: list[dict[str, float]], before: dict[str, float]) -> dict[str, float]:
    """Means since the last line; of what no update since then told, the figures before."""
    names = {name for values in seen for name in values}
    told = {name: [values[name] for values in seen if name in values] for name in sorted(names)}
    return before | {name: fmean(values) for name, values in told.items()}


def _groups(network: nn.Module, config: PretrainSection) -> list[dict[str, Any]]:
    matrices = [p for p in network.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in network.parameters() if p.requires_grad and p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _update(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: StepLosses,
    config: PretrainSection,
    seed: int,
    step: int,
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = config.lr * learning_rate_factor(config, step)
    torch.manual_seed(seed * 1_000_003 + step)
    optimizer.zero_grad(set_to_none=True)
    found = losses(step)
    found["total"].backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
    values = {name: float(value.detach()) for name, value in found.items()}
    if not all(map(math.isfinite, [*values.values(), float(norm)])):
        told = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise TrainingError(
            f"update {step + 1} of {config.steps} was not made, its numbers are not finite: "
            f"{told}; gradient norm {float(norm):g}. Lower the learning rate."
        )
    optimizer.step()
    return values


@torch.no_grad()
def _follow(average: dict[str, torch.Tensor], network: nn.Module, decay: float) -> None:
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)
