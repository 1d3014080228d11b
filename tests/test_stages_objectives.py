"""The segmenter's training loss over source and painted samples."""

import itertools

import pytest
import torch

from models.build import build_segmenter
from models.config import LossConfig
from stages.batches import MixedBatches, SourceBatches
from stages.objectives import SegmentationObjective, load_sources
from stages.readers import load_painted
from stages.training import Share
from tests.tiny import AUGMENT, CLASSES, SEGMENTER, write_labels, write_pictures, write_sources


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Labelled source samples, and painted ones."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    sources = load_sources(write_sources(folder / "sources", data=folder / "data"))
    painted = load_painted(write_pictures(folder / "pictures"), write_labels(folder / "labels"))
    return sources, painted


def mixed(samples, *, share: float = 0.5, batch_size: int = 4) -> MixedBatches:
    return MixedBatches(
        *samples,
        batch_size=batch_size,
        painted_share=share,
        augment=AUGMENT,
        painted_augment=AUGMENT,
        seed=0,
    )


def objective_of(batches, *, unlabelled: str = "negative", **options):
    losses = SEGMENTER.losses.model_copy(update={"unlabelled": unlabelled})
    config = SEGMENTER.model_copy(update={"losses": losses})
    segmenter = build_segmenter(config, class_names=list(CLASSES)).train()
    options = {"steps": 3, "device": torch.device("cpu")} | options
    return segmenter, SegmentationObjective(segmenter, batches, **options)


def summed(segmenter, objective, share: Share = Share(), step: int = 0):  # noqa: B008
    """Losses summed over the passes, and the gradient."""
    segmenter.zero_grad()
    totals = {}
    for losses in objective(segmenter, step, share):
        losses["total"].backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.item()
    gradient = [p.grad.flatten() for p in segmenter.parameters() if p.grad is not None]
    return totals, torch.cat(gradient)


@pytest.mark.parametrize("passes", [2, 3])
@pytest.mark.parametrize("unlabelled", ["negative", "ignore"])
def test_passes_add_up_to_the_whole_batch(samples, passes, unlabelled):
    one = summed(*objective_of(mixed(samples), unlabelled=unlabelled, painted_weight=0.3))
    many = summed(
        *objective_of(mixed(samples), unlabelled=unlabelled, painted_weight=0.3),
        Share(passes=passes),
    )
    assert many[0] == pytest.approx(one[0], rel=1e-4)
    torch.testing.assert_close(many[1], one[1], rtol=1e-3, atol=1e-5 * one[1].abs().max().item())


def test_painted_weight_scales_the_losses_of_painted_samples_alone(samples):
    only_painted = mixed(samples, share=1.0)
    full, _ = summed(*objective_of(only_painted))
    half, _ = summed(*objective_of(only_painted, painted_weight=0.5))
    assert half == pytest.approx({name: value / 2 for name, value in full.items()}, rel=1e-5)
    nothing, gradient = summed(*objective_of(only_painted, painted_weight=0.0))
    assert nothing["total"] == 0
    assert not gradient.any()

    only_source = mixed(samples, share=0.0)
    unweighted, weighted = (
        summed(*objective_of(only_source, painted_weight=weight))[0] for weight in (1.0, 0.5)
    )
    assert weighted == pytest.approx(unweighted, rel=1e-6)


@pytest.mark.parametrize("source_rule", ["negative", "ignore"])
@pytest.mark.parametrize("painted_rule", ["negative", "ignore"])
def test_unlabelled_pixels_are_handled_by_kind(samples, source_rule, painted_rule):
    for share, rule in ((0.0, source_rule), (1.0, painted_rule)):
        batches = mixed(samples, share=share)
        found, _ = summed(
            *objective_of(batches, unlabelled=source_rule, ignore_painted=painted_rule == "ignore")
        )
        expected, _ = summed(*objective_of(batches, unlabelled=rule))
        assert found == pytest.approx(expected, rel=1e-5)


def test_rules_for_unlabelled_pixels_differ_on_these_samples(samples):
    batches = mixed(samples)
    negative, ignored = (
        summed(*objective_of(batches, unlabelled=rule))[0] for rule in ("negative", "ignore")
    )
    assert negative["loss_mask"] != ignored["loss_mask"]


def test_reading_ahead_in_a_process_changes_neither_losses_nor_random_numbers(samples):
    found = []
    for workers in (0, 1):
        segmenter, objective = objective_of(mixed(samples), workers=workers)
        torch.manual_seed(3)
        losses = [summed(segmenter, objective, step=step)[0] for step in (1, 2)]
        found.append((losses, torch.rand(1)))
    assert found[0] == found[1]


def test_light_decoder_trains_on_the_same_batches(samples):
    config = SEGMENTER.model_copy(
        update={
            "decoder": SEGMENTER.decoder.model_copy(update={"kind": "light"}),
            "losses": LossConfig(),
        }
    )
    segmenter = build_segmenter(config, class_names=list(CLASSES)).train()
    batches = mixed(samples)
    results = []
    for passes in (1, 2):
        objective = SegmentationObjective(
            segmenter, batches, steps=1, device=torch.device("cpu"), painted_weight=0.5
        )
        segmenter.decoder.eval()  # running statistics would differ from pass to pass
        results.append(summed(segmenter, objective, Share(passes=passes)))
    assert results[0][0]["total"] > 0
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)


def test_ranks_see_their_own_rows(samples):
    sources, _ = samples
    batches = SourceBatches(sources, batch_size=5, augment=AUGMENT, seed=0)
    whole = batches.batch(0)
    seen = []
    for rank in range(2):
        _, objective = objective_of(batches)
        seen += objective._next(0, Share(rank=rank, ranks=2)).ids
    assert seen == list(whole.ids)
    assert len(set(itertools.chain(seen))) > 1


def test_sources_without_samples_are_refused(tmp_path):
    part = write_sources(tmp_path / "sources", data=tmp_path / "data", num_samples=0)
    with pytest.raises(ValueError, match=r"no source samples.*data\.sources"):
        load_sources(part)


def test_source_sample_without_a_label_is_named(tmp_path):
    part = write_sources(tmp_path / "sources", data=tmp_path / "data")
    index = part / "streets.jsonl"
    index.write_text(index.read_text().replace('"3.label.png"', "null"))
    with pytest.raises(ValueError, match=r"1 of 6 source samples .* streets/3"):
        load_sources(part)
