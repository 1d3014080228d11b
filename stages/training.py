"""The training loop: update, log, save, stop; resumable bit for bit on the same machine.

    trainer = Trainer(model, groups=groups, objective=objective, steps=1000, ...)
    trainer.run(progress)      # goes on from out/state where an interrupted attempt left off

Everything random is a function of (seed, step): batches, points of the losses and, because the
global generators are seeded anew at every update, dropout. So the state to resume from is the
weights, their average, the optimiser and one number, the step, which is also the position of
sampler, schedule and random states.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from models.ema import Ema
from stages.contracts import Progress
from stages.devices import Device
from stages.shards import file_digest, item_seed, write_json
from stages.training_config import OptimiserConfig
from stages.validation import Validation

log = logging.getLogger(__name__)

Losses = Mapping[str, torch.Tensor]
"""Scalars by name; "total" is what is minimised, the others are shown."""


class TrainingError(ValueError):
    """Training cannot go on: a loss or the gradient is not finite."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of every batch this process computes, in how many passes."""

    rank: int = 0
    ranks: int = 1
    passes: int = 1

    def rows(self, batch_size: int) -> slice:
        """The rows of the batch that belong to this rank."""
        return _cut(batch_size, self.rank, self.ranks)

    def passes_of(self, num_rows: int) -> list[slice]:
        """The rank's rows, one slice per pass."""
        return [_cut(num_rows, index, self.passes) for index in range(self.passes)]


def _cut(length: int, index: int, parts: int) -> slice:
    return slice(length * index // parts, length * (index + 1) // parts)


Objective = Callable[[nn.Module, int, Share], Iterator[Losses]]
"""`objective(model, step, share)` yields the losses of one pass after the other, `share.passes` in
all. Their sum over the passes, averaged over the ranks, is the loss of the batch."""


def learning_rate_factor(config: OptimiserConfig, *, step: int, steps: int) -> float:
    """What the learning rate is multiplied by in update `step` (from 0) of `steps`.

    Linear warm-up times constant, or times (1 - step / steps) ** power ("poly", Chen et al.,
    DeepLab, section 4.1).
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return warm
    return warm * (1 - step / steps) ** config.poly_power


class Trainer:
    """One training: a model, what it minimises, and a folder to resume from.

    Args:
        model: on the device already, in training mode.
        groups: parameter groups of AdamW with "params", "lr" and "weight_decay"; together they
            hold exactly the parameters that require gradients.
        objective: see `Objective`.
        steps: updates in all.
        optimiser: schedule, clipping, accumulation (`lr` and `weight_decay` are in `groups`).
        ema: average of the model, updated here; None: none.
        validation: which step's weights stay, and when to stop; None: the last step's.
        device: where, in which precision.
        seed: of the global generators (dropout); batches and points have seeds of their own.
        out: the stage's folder; `state/` and `logs/metrics.jsonl` are written below it.
        batch_size: samples per update over all processes, for the log and for a check.
        checkpoint_every: updates between checkpoints; changes no result.
        log_every: updates between lines of `logs/metrics.jsonl`; changes no result.

    Raises:
        ValueError: there are more passes than samples in a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        groups: Sequence[dict[str, Any]],
        objective: Objective,
        steps: int,
        optimiser: OptimiserConfig,
        device: Device,
        seed: int,
        out: Path,
        batch_size: int,
        ema: Ema | None = None,
        validation: Validation | None = None,
        checkpoint_every: int = 500,
        log_every: int = 20,
    ) -> None:
        self.model, self.objective, self.ema = model, objective, ema
        self.validation = validation
        self.steps, self.config, self.seed, self.batch_size = steps, optimiser, seed, batch_size
        self.checkpoint_every, self.log_every = checkpoint_every, log_every
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        grouped = [p for group in groups for p in group["params"]]
        assert {id(p) for p in grouped} == {id(p) for p in self.parameters}, (
            "the optimiser's groups must hold exactly what requires gradients"
        )
        self.optimizer = torch.optim.AdamW(
            [{**group, "base_lr": group["lr"]} for group in groups], fused=True
        )
        self.accelerator = _accelerator(device)
        self.share = Share(
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            passes=optimiser.accumulate,
        )
        if self.share.ranks * self.share.passes > batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, but {self.share.ranks} processes times accumulate="
                f"{self.share.passes} need at least one sample each; lower accumulate or raise "
                f"batch_size."
            )
        self.wrapped = self.accelerator.prepare(model) if self.share.ranks > 1 else model
        self.checkpoints = Checkpoints(out / "state")
        self.metrics = Metrics(out / "logs" / "metrics.jsonl")

    def run(self, progress: Progress) -> dict[str, float]:
        """Train up to `steps`; model and ema hold the result: the last step's, or the best one's.

        Returns:
            The numbers of the last update: "loss", each loss, "grad_norm", "lr".

        Raises:
            TrainingError: a loss or the gradient is not finite; the update is not made.
            ValueError: the checkpoint in `state/` is of another model.
        """
        with _random_states_kept():
            return self._run(progress)

    def _run(self, progress: Progress) -> dict[str, float]:
        first = self._resume(progress)
        started, values = perf_counter(), {}
        progress.start(self.steps, "steps", done=first)
        for step in range(first, self.steps):
            values = self._update(step)
            done = step + 1
            if self.is_main and (done % self.log_every == 0 or done in (1, self.steps)):
                samples_per_s = (done - first) * self.batch_size / (perf_counter() - started)
                self.metrics.write({"step": done, **values, "samples_per_s": samples_per_s})
            progress.advance(1, loss=values["loss"], lr=values["lr"])
            if self._judge(done, progress):
                break
            if self.is_main and done % self.checkpoint_every == 0 and done < self.steps:
                self.checkpoints.save(done, self._state())
        self.accelerator.wait_for_everyone()
        if self.validation is not None:
            self._put_back(self.validation.weights)
        return values

    def _judge(self, done: int, progress: Progress) -> bool:
        """Validate if it is time; whether to stop. One rank judges, all hear the same number."""
        validation = self.validation
        if validation is None or not validation.is_due(done, self.steps):
            return False
        own = validation.judge() if self.is_main else 0.0
        told = torch.tensor(own, dtype=torch.float32, device=self.accelerator.device)
        miou = self.accelerator.reduce(told, reduction="sum").item()
        validation.record(done, miou, self._weights())
        if self.is_main:
            self.metrics.write({"step": done, "miou": miou})
        if validation.is_over:
            progress.note(
                f"stops after step {done} of {self.steps}: no better validation since step "
                f"{validation.best_step} (mIoU {100 * validation.best_miou:.2f})"
            )
        return validation.is_over

    def _weights(self) -> dict[str, dict[str, torch.Tensor]]:
        weights = {"model": trained_tensors(self.model)}
        return weights | ({"ema": self.ema.state_dict()} if self.ema is not None else {})

    def _put_back(self, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        load_trained_tensors(self.model, weights["model"])
        if self.ema is not None:
            self.ema.load_state_dict(dict(weights["ema"]))

    @property
    def kept_step(self) -> int:
        """Updates behind the weights that `run` left."""
        return self.validation.best_step if self.validation is not None else self.steps

    @property
    def is_main(self) -> bool:
        """Whether this process writes files: the only one, or the first of several."""
        return self.share.rank == 0

    def _update(self, step: int) -> dict[str, float]:
        # 1. Everything random of this update follows from its number.
        _seed_everything(item_seed(self.seed, "update", step, self.share.rank))
        factor = learning_rate_factor(self.config, step=step, steps=self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

        # 2. Gradients of the whole batch, pass by pass.
        self.optimizer.zero_grad(set_to_none=True)
        passes = [self._backward(*item) for item in self._passes(step)]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)

        # 3. One look at all numbers; nothing is changed by numbers that are not finite.
        values = self._checked(step, passes, norm)

        # 4. The update.
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model, step + 1)
        return {**values, "lr": self.config.lr * factor}

    def _passes(self, step: int) -> Iterator[tuple[bool, Iterator[Losses]]]:
        losses = self.objective(self.wrapped, step, self.share)
        return ((index == self.share.passes - 1, losses) for index in range(self.share.passes))

    def _backward(self, last: bool, losses: Iterator[Losses]) -> dict[str, torch.Tensor]:
        """One pass; gradients are exchanged between ranks in the last one."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            with self.accelerator.autocast():
                found = next(losses)
            self.accelerator.backward(found["total"])
        return {name: value.detach() for name, value in found.items()}

    def _checked(self, step: int, passes: Sequence[Losses], norm: torch.Tensor) -> dict[str, float]:
        names = list(passes[0])
        sums = torch.stack([torch.stack([p[name].float() for name in names]) for p in passes]).sum(
            0
        )
        sums = self.accelerator.reduce(sums, reduction="mean")
        *losses, norm_value = torch.cat([sums, norm.reshape(1)]).tolist()
        values = dict(zip(names, losses, strict=True))
        if not all(map(math.isfinite, [*losses, norm_value])):
            told = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise TrainingError(
                f"update {step + 1} of {self.steps} was not made, its numbers are not finite: "
                f"{told}; gradient norm {norm_value:g}. Lower the learning rate, or look at the "
                f"samples of this step."
            )
        values["loss"] = values.pop("total")
        return {**values, "grad_norm": norm_value}

    def _state(self) -> dict[str, Any]:
        state = self._weights() | {"optimizer": self.optimizer.state_dict()}
        if self.validation is not None:
            state["validation"] = self.validation.state_dict()
        return state

    def _resume(self, progress: Progress) -> int:
        found = self.checkpoints.newest(progress.note)
        if found is None:
            if self.is_main:
                self.metrics.cut(0)
            return 0
        step, state = found
        self._put_back(state)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.validation is not None:
            self.validation.load_state_dict(state["validation"])
        if self.is_main:
            self.metrics.cut(step)
        progress.note(f"goes on after step {step} of {self.steps}")
        return step


def _accelerator(device: Device) -> Accelerator:
    """An Accelerator for this device and precision, whatever an earlier one in this process had."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        AcceleratorState._reset_state(reset_partial_state=True)
    precision = "bf16" if device.dtype == torch.bfloat16 else "no"
    return Accelerator(mixed_precision=precision, cpu=device.device.type == "cpu")


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """The caller's global generators, CPU and GPU, are afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The entries of the state dict that training can change: all but frozen parameters."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def load_trained_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put tensors of `trained_tensors` back.

    Raises:
        ValueError: names or shapes are not those of this model.
    """
    own = trained_tensors(model)
    wrong = sorted(
        name
        for name in own.keys() | tensors.keys()
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    )
    if wrong:
        raise ValueError(
            f"the interrupted training in state/ is of another model: {len(wrong)} tensors differ, "
            f"first {', '.join(wrong[:3])}; delete state/ to begin anew."
        )
    model.load_state_dict(tensors, strict=False)


class Checkpoints:
    """Resumable states of a training: the newest whole one, and the one before it.

    A state is `step-00000500.pt`; it counts once `step-00000500.json` with its digest stands beside
    it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a state whole or not at all, then drop all but the newest two."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        temporary = path.with_suffix(".pt.tmp")
        with temporary.open("wb") as file:
            try:
                torch.save(dict(state), file)
            except RuntimeError as error:  # torch closes its archive, which hides a full disk
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        write_json(path.with_suffix(".json"), {"step": step, "digest": file_digest(path)})
        for card in self._cards()[2:]:
            card.unlink()
            card.with_suffix(".pt").unlink(missing_ok=True)

    def newest(self, note: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
        """The newest state whose digest is right, on the CPU; says what it passes over."""
        for card in self._cards():
            path = card.with_suffix(".pt")
            try:
                described = json.loads(card.read_text(encoding="utf-8"))
                if file_digest(path) == described["digest"]:
                    return described["step"], torch.load(
                        path, map_location="cpu", weights_only=True
                    )
            except (OSError, ValueError, KeyError, UnpicklingError):
                pass
            note(f"the checkpoint {path.name} is truncated or altered; taking the one before it")
        return None

    def _cards(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.json"), reverse=True)

    def clear(self) -> None:
        """Remove all states: the training has ended well and its result is stored."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Metrics:
    """`metrics.jsonl`: one JSON object a line, each step once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: Mapping[str, float]) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def cut(self, step: int) -> None:
        """Drop lines past `step`, and what follows a line that was not finished."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = itertools.takewhile(lambda line: _step_of(line) <= step, lines)
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf
