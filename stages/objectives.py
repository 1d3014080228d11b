"""What the segmenter's trainings minimise: the set criterion over source and painted samples.

Used by `train_source` and `self_train`; `stages/training.py` runs it.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from models.config import LossConfig
from models.losses import SetCriterion, count_batch
from models.segmenter import Segmenter
from stages.batches import Batch, Batches
from stages.readers import Sample, load_index
from stages.training import Losses, Share


class SegmentationObjective:
    """The losses of batch after batch; an `Objective` of `stages/training.py`.

    Args:
        segmenter: tells the number of classes and the losses' settings.
        batches: where samples come from.
        steps: batches in all, so that readers need not read past the end.
        device: where the segmenter is.
        workers: processes that read ahead; they change no result.
        painted_weight: factor on all losses of painted samples, beside their own weights.
        weighted: whether samples have weights of their own.
        ignore_painted: leave unlabelled pixels of painted samples out of the mask losses, else
            they are negative for every mask; those of source samples are handled as
            `losses.unlabelled` says.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        batches: Batches,
        *,
        steps: int,
        device: torch.device,
        workers: int = 0,
        painted_weight: float = 1.0,
        weighted: bool = False,
        ignore_painted: bool | None = None,
    ) -> None:
        losses: LossConfig = segmenter.config.losses
        temperature = segmenter.config.decoder.text.temperature
        self.num_classes = segmenter.num_classes
        self.criterion = SetCriterion(losses, self.num_classes, temperature=temperature)
        self.ignore_source = losses.unlabelled == "ignore"
        self.ignore_painted = self.ignore_source if ignore_painted is None else ignore_painted
        self.batches, self.steps, self.device, self.workers = batches, steps, device, workers
        self.painted_weight, self.weighted = painted_weight, weighted
        self._stream: Iterator[Batch] | None = None

    def __call__(self, model: nn.Module, step: int, share: Share) -> Iterator[Losses]:
        """Yield the losses of one pass after the other."""
        batch = self._next(step, share)
        images = batch.images_B3HW.to(self.device, non_blocking=True)
        labels = batch.labels_BHW.to(self.device, non_blocking=True)
        painted = batch.painted_B.to(self.device, non_blocking=True)
        weights = self._weights(painted, batch.weights_B.to(self.device, non_blocking=True))
        ignore = self._ignore(painted)
        whole = count_batch(labels, self.num_classes) if share.passes > 1 else None
        for rows in share.passes_of(len(batch)):
            yield self.criterion(
                model(images[rows]),
                labels[rows],
                seeds=batch.seeds[rows],
                weights_B=None if weights is None else weights[rows],
                ignore_B=None if ignore is None else ignore[rows],
                whole=whole,
            )

    def _next(self, step: int, share: Share) -> Batch:
        if self._stream is None:
            rows = share.rows(self.batches.batch_size)
            self._stream = self.batches.stream(step, self.steps, workers=self.workers, rows=rows)
            # A DataLoader draws from the global generator when it starts: after a resume this
            # would give dropout other numbers than in an undisturbed run.
            with torch.random.fork_rng(devices=[]):
                batch = next(self._stream)
        else:
            batch = next(self._stream)
        assert batch.step == step, f"batch {batch.step} arrived for step {step}"
        return batch

    def _weights(self, painted_B: torch.Tensor, weights_B: torch.Tensor) -> torch.Tensor | None:
        if self.painted_weight == 1.0 and not self.weighted:
            return None
        return weights_B * torch.where(painted_B, self.painted_weight, 1.0)

    def _ignore(self, painted_B: torch.Tensor) -> torch.Tensor | None:
        if not (self.ignore_source or self.ignore_painted):
            return None
        return torch.where(painted_B, self.ignore_painted, self.ignore_source)


def load_sources(part: Path) -> list[Sample]:
    """The labelled samples to train on.

    Raises:
        ValueError: there are none, or one has no label.
    """
    samples = load_index(part)
    if not samples:
        raise ValueError(
            f"{part}: the index holds no source samples to train on. Name labelled data sets under "
            f"data.sources, and look at what `prepare` refused."
        )
    bare = [sample.id for sample in samples if sample.label is None]
    if bare:
        raise ValueError(
            f"{part}: {len(bare)} of {len(samples)} source samples have no label, the first is "
            f"{bare[0]}. Pictures without labels belong under data.unlabelled."
        )
    return samples
