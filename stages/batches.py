"""Batches for training: number n is a pure function of the seed, so that resuming is exact.

    batches = SourceBatches(samples, batch_size=8, augment=config.augment, seed=config.seed)
    batch = batches.batch(1234)
    for batch in batches.stream(start=1234, stop=40_000, workers=2): ...

Samplers have no state but their position, which follows from the step. A sample's augmentation is
seeded by (seed, step, sample id), so that its place in the batch, the number of ranks and the
number of reading processes change nothing.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from stages.augment import augment, mix_classes
from stages.readers import Sample
from stages.shards import item_seed
from stages.training_config import AugmentConfig

CACHE_BYTES = 512 * 2**20
"""Decoded samples kept in memory, over all reading processes of one training process."""

RARE_MIN_SHARE = 0.0015
"""Share of a picture that a class must fill for the picture to be drawn for it: DAFormer's 3000
pixels of a GTA5 frame."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples for one update."""

    step: int
    images_B3HW: torch.Tensor
    """uint8 RGB."""
    labels_BHW: torch.Tensor
    """uint8 train ids, 255 = ignore."""
    painted_B: torch.Tensor
    """bool: a generated picture."""
    ids: tuple[str, ...]
    """Sample ids."""
    weights_B: torch.Tensor
    """float32: factor on the losses of each sample."""
    seeds: tuple[int, ...]
    """One seed per sample, from (seed, step, id), for further draws such as loss points."""

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, part: slice) -> "Batch":
        """Some samples of the batch."""
        return replace(
            self,
            images_B3HW=self.images_B3HW[part],
            labels_BHW=self.labels_BHW[part],
            painted_B=self.painted_B[part],
            ids=self.ids[part],
            weights_B=self.weights_B[part],
            seeds=self.seeds[part],
        )


@dataclass(frozen=True)
class Draw:
    """One row of a batch, before it is read."""

    sample: Sample
    augment: AugmentConfig
    focus: int | None = None
    """Train id that the sample was drawn for."""
    donor: "Draw | None" = None
    """A labelled sample whose classes are pasted onto this one."""


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """A label map made while training."""

    label_HW: np.ndarray
    """uint8 train ids, 255 none, of the picture's size."""
    weight: float = 1.0
    """Factor on the sample's losses."""


Labelling = Callable[[Sequence[Sample], Sequence[np.ndarray]], Sequence[Fresh]]
"""From painted samples and their pictures to labels made on the spot."""


class UniformSampler:
    """Every sample once per epoch, in an order drawn per (seed, epoch)."""

    def __init__(self, samples: Sequence[Sample], *, seed: int) -> None:
        self.samples, self.seed = samples, seed
        self._epoch, self._order = -1, np.empty(0, np.intp)

    def __call__(self, position: int) -> tuple[Sample, int | None]:
        """The sample at a position of the endless sequence, and the class it was drawn for."""
        epoch, place = divmod(position, len(self.samples))
        if epoch != self._epoch:
            rng = np.random.default_rng(item_seed(self.seed, "order", epoch))
            self._epoch, self._order = epoch, rng.permutation(len(self.samples))
        return self.samples[self._order[place]], None


class RareClassSampler:
    """Draw a class, rare ones more often, then a sample that shows it (Hoyer et al., DAFormer).

    The probability of class c is softmax((1 - f_c) / temperature), with f_c its share of the
    labelled pixels.

    Raises:
        ValueError: the samples carry no class counts.
    """

    def __init__(self, samples: Sequence[Sample], *, seed: int, temperature: float) -> None:
        self.samples, self.seed, self.temperature = samples, seed, temperature
        counts = [sample.classes for sample in samples]
        if any(count is None for count in counts) or not any(counts):
            raise ValueError(
                "rare_class_sampling needs the class counts that `prepare` leaves for labelled "
                "sets; these samples have none. Set it to 0."
            )
        pixels = sum((Counter(count) for count in counts), Counter())
        self.class_ids = sorted(pixels)
        shares = np.array([pixels[c] for c in self.class_ids]) / pixels.total()
        weights = np.exp((shares.min() - shares) / temperature)
        self.probabilities = weights / weights.sum()
        self.pools = [self._pool(c) for c in self.class_ids]

    def _pool(self, class_id: int) -> list[int]:
        """Samples that show the class well, or at all where none does."""
        shown = [sample.classes.get(class_id, 0) for sample in self.samples]
        enough = [
            number
            for number, (sample, pixels) in enumerate(zip(self.samples, shown, strict=True))
            if pixels > RARE_MIN_SHARE * sample.height * sample.width
        ]
        return enough or [number for number, pixels in enumerate(shown) if pixels]

    def __call__(self, position: int) -> tuple[Sample, int | None]:
        """The sample at a position of the endless sequence, and the class it was drawn for."""
        rng = np.random.default_rng(item_seed(self.seed, "rare", position))
        place = int(rng.choice(len(self.class_ids), p=self.probabilities))
        number = self.pools[place][int(rng.integers(len(self.pools[place])))]
        return self.samples[number], self.class_ids[place]


def _sampler(
    samples: Sequence[Sample], *, seed: int, temperature: float
) -> UniformSampler | RareClassSampler:
    if temperature > 0:
        return RareClassSampler(samples, seed=seed, temperature=temperature)
    return UniformSampler(samples, seed=seed)


class Batches(Dataset):
    """What source and mixed batches share: reading, augmenting, streaming."""

    def __init__(self, *, batch_size: int, seed: int, labelling: Labelling | None = None) -> None:
        self.batch_size, self.seed, self.labelling = batch_size, seed, labelling
        self._cache: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._cache_bytes, self._cache_limit = 0, CACHE_BYTES

    def draws(self, step: int) -> list[Draw]:
        """What batch number `step` consists of; nothing is read."""
        raise NotImplementedError

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """Batch number `step` (0 upwards), or only the rows that a rank needs.

        Raises:
            ValueError: a file cannot be read; names it.
        """
        chosen = list(enumerate(self.draws(step)))
        times = Counter[str]()
        seeds = []
        for _, draw in chosen:
            seeds.append(item_seed(self.seed, step, draw.sample.id, times[draw.sample.id]))
            times[draw.sample.id] += 1
        chosen = chosen[rows]
        fresh = self._fresh([draw.sample for _, draw in chosen])
        config = chosen[0][1].augment
        shape = (len(chosen), config.crop_height, config.crop_width)
        images, labels = np.empty((*shape, 3), np.uint8), np.empty(shape, np.uint8)
        weights = np.empty(len(chosen), np.float32)
        for row, (number, draw) in enumerate(chosen):
            images[row], labels[row], weights[row] = self._view(
                draw, seeds[number], fresh.get(draw.sample.id)
            )
        return Batch(
            step=step,
            images_B3HW=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            labels_BHW=torch.from_numpy(labels),
            painted_B=torch.tensor([draw.sample.painted for _, draw in chosen]),
            ids=tuple(draw.sample.id for _, draw in chosen),
            weights_B=torch.from_numpy(weights),
            seeds=tuple(seeds[number] for number, _ in chosen),
        )

    def _fresh(self, samples: Sequence[Sample]) -> dict[str, Fresh]:
        """Labels of the painted samples by id, where they are made while training."""
        painted = list({sample.id: sample for sample in samples if sample.painted}.values())
        if self.labelling is None or not painted:
            return {}
        found = self.labelling(painted, [self._read(sample)[0] for sample in painted])
        return {sample.id: each for sample, each in zip(painted, found, strict=True)}

    def _view(
        self, draw: Draw, seed: int, fresh: Fresh | None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Augmented image, labels and weight; a mixed view weighs as its pixels do on average."""
        rng = np.random.default_rng(seed)
        image, labels = self._read(draw.sample)
        weight = draw.sample.weight
        if fresh is not None:
            labels, weight = fresh.label_HW, fresh.weight
        view = augment(image, labels, draw.augment, rng, focus=draw.focus)
        if draw.donor is None:
            return *view, weight
        own = np.random.default_rng(item_seed(seed, "donor"))
        donor = draw.donor
        donated = augment(*self._read(donor.sample), donor.augment, own, focus=donor.focus)
        image, labels, share = mix_classes(view, donated, own)
        return image, labels, share * donor.sample.weight + (1 - share) * weight

    def _read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        if sample.id in self._cache:
            return self._cache[sample.id]
        image = sample.read_image()
        made_here = sample.painted and self.labelling is not None
        labels = np.empty((0, 0), np.uint8) if made_here else sample.read_label()
        if self._cache_bytes + image.nbytes + labels.nbytes <= self._cache_limit:
            self._cache[sample.id] = image, labels
            self._cache_bytes += image.nbytes + labels.nbytes
        return image, labels

    def stream(
        self, start: int, stop: int, *, workers: int = 0, rows: slice = slice(None)
    ) -> Iterator[Batch]:
        """Batches number `start` to `stop` - 1, read ahead by processes where `workers` > 0.

        Labels that are made while training can only be made in this process, as the batch is asked
        for: with the weights of that moment.
        """
        assert not (workers and self.labelling), "labels made in training cannot be read ahead"
        if workers == 0:
            for step in range(start, stop):
                yield self.batch(step, rows)
            return
        self._cache_limit = CACHE_BYTES // workers
        loader = DataLoader(
            _Rows(self, rows),
            batch_size=None,
            sampler=range(start, stop),
            num_workers=workers,
            collate_fn=_unchanged,
            # Its own: otherwise the loader would draw from the global one when it starts.
            generator=torch.Generator(),
        )
        for found in loader:
            if isinstance(found, Exception):
                raise found
            yield found


class _Rows(Dataset):
    """Some rows of every batch, by step, for the loader's processes."""

    def __init__(self, batches: Batches, rows: slice) -> None:
        self.batches, self.part = batches, rows

    def __getitem__(self, step: int) -> Batch | Exception:
        """The batch, or why there is none: the loader would wrap the message in a traceback."""
        try:
            return self.batches.batch(step, self.part)
        except (ValueError, OSError) as error:
            return error


def _unchanged(found: Batch | Exception) -> Batch | Exception:
    return found


class SourceBatches(Batches):
    """Labelled source samples only."""

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        batch_size: int,
        augment: AugmentConfig,
        seed: int,
        rare_class_sampling: float = 0.0,
    ) -> None:
        """Batches of `batch_size` samples over all ranks.

        Args:
            samples: labelled samples, of one or several data sets.
            batch_size: samples per batch.
            augment: what happens to each.
            seed: of order and augmentation.
            rare_class_sampling: temperature of rare-class sampling; 0: uniform.

        Raises:
            ValueError: there are no samples.
        """
        super().__init__(batch_size=batch_size, seed=seed)
        _require(samples, "source")
        self.augment = augment
        self.sampler = _sampler(samples, seed=seed, temperature=rare_class_sampling)

    def draws(self, step: int) -> list[Draw]:
        first = step * self.batch_size
        drawn = [self.sampler(position) for position in range(first, first + self.batch_size)]
        return [Draw(sample, self.augment, focus) for sample, focus in drawn]


class MixedBatches(Batches):
    """Source and painted samples in a fixed composition per step: source rows first.

    After n steps exactly floor(n * batch_size * painted_share) painted samples were drawn; where
    batch_size * painted_share is whole, every batch has that many.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        painted: Sequence[Sample],
        *,
        batch_size: int,
        painted_share: float,
        augment: AugmentConfig,
        painted_augment: AugmentConfig,
        seed: int,
        rare_class_sampling: float = 0.0,
        mixing: bool = False,
        labelling: Labelling | None = None,
    ) -> None:
        """Batches of `batch_size` samples over all ranks.

        Args:
            samples: labelled source samples.
            painted: generated pictures with their labels.
            batch_size: samples per batch.
            painted_share: share of painted samples, 0..1.
            augment: what happens to source samples.
            painted_augment: what happens to painted ones; the same crop size.
            seed: of order and augmentation.
            rare_class_sampling: temperature on the source; 0: uniform.
            mixing: paste classes of a source sample onto each painted one. The donors are drawn by
                a sampler of their own, so that a painted row is the same on any rank.
            labelling: makes the labels of painted samples; None: they are read.

        Raises:
            ValueError: a kind of samples that is needed is missing, or crop sizes differ.
        """
        super().__init__(batch_size=batch_size, seed=seed, labelling=labelling)
        self.share = Fraction(painted_share).limit_denominator(10**6)
        crops = [(config.crop_height, config.crop_width) for config in (augment, painted_augment)]
        if crops[0] != crops[1]:
            raise ValueError(
                f"augment crops to {crops[0]} and painted_augment to {crops[1]} (height, width): "
                "samples of one batch need one size."
            )
        if self.share < 1:
            _require(samples, "source")
            self.sampler = _sampler(samples, seed=seed, temperature=rare_class_sampling)
        if self.share > 0:
            _require(painted, "painted")
            self.painted_sampler = UniformSampler(painted, seed=item_seed(seed, "painted"))
        self.donors = None
        if mixing:
            _require(samples, "source")
            self.donors = _sampler(
                samples, seed=item_seed(seed, "donors"), temperature=rare_class_sampling
            )
        self.augment, self.painted_augment = augment, painted_augment

    def draws(self, step: int) -> list[Draw]:
        first, last = (math.floor(n * self.batch_size * self.share) for n in (step, step + 1))
        source = range(step * self.batch_size - first, (step + 1) * self.batch_size - last)
        drawn = [self.sampler(position) for position in source]
        painted = [self._painted(position) for position in range(first, last)]
        return [Draw(sample, self.augment, focus) for sample, focus in drawn] + painted

    def _painted(self, position: int) -> Draw:
        sample, _ = self.painted_sampler(position)
        if self.donors is None:
            return Draw(sample, self.painted_augment)
        donor, focus = self.donors(position)
        return Draw(sample, self.painted_augment, donor=Draw(donor, self.augment, focus))


def _require(samples: Sequence[Sample], kind: str) -> None:
    if not samples:
        raise ValueError(f"there are no {kind} samples to train on; is the index empty?")
