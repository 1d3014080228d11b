"""Trainings in several processes, through `accelerate launch`: what one process trains, they do.

That two ranks with half a batch each equal one with all of it stands in `test_stages_launch.py`.
"""

import os
import signal
import threading
import time

import psutil
import pytest
import torch

from models.losses import SetCriterion
from stages.launch import StageKilled, execute
from tests.small_segmenters import DECODER, small_segmenter, some_images
from tests.test_stages_launch import training_spec  # noqa: F401 (a fixture)
from tests.tiny import Told


@pytest.mark.parametrize("labelled", ["all", "none of this rank's pixels"])
@pytest.mark.parametrize("decoder", ["mask2former", "light"])
@pytest.mark.parametrize("tuning", ["frozen", "full", "rein", "lora"])
def test_no_trained_parameter_is_left_without_gradient(tuning, decoder, labelled):
    """Else ranks would wait for each other's gradient of it (DDP's unused parameters)."""
    segmenter = small_segmenter(
        "CLIP ViT", tuning={"kind": tuning}, decoder=DECODER | {"kind": decoder}
    ).train()
    labels_BHW = torch.full((2, 64, 64), 255, dtype=torch.uint8)
    if labelled == "all":
        labels_BHW[:, 8:40] = torch.arange(2, dtype=torch.uint8)[:, None, None]
    criterion = SetCriterion(segmenter.config.losses, segmenter.num_classes)
    for ignore in (False, True):
        segmenter.zero_grad(set_to_none=True)
        losses = criterion(
            segmenter(some_images(2, 3, 64, 64)),
            labels_BHW,
            seeds=[0, 1],
            ignore_B=torch.full((2,), ignore),
        )
        losses["total"].backward()
        bare = {name for name, p in segmenter.trainable_parameters() if p.grad is None}
        assert not bare


def rank(number: int) -> psutil.Process | None:
    """The training process of that rank below this one."""
    for process in psutil.Process().children(recursive=True):
        try:
            if "stages.launch" in process.cmdline() and process.environ().get("RANK") == str(
                number
            ):
                return process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None


@pytest.mark.faults
@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_rank_ends_the_stage_which_then_goes_on(
    training_spec,  # noqa: F811
    tmp_path,
    monkeypatch,
    number,
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    steps = 60
    alone = Told()
    execute(training_spec(tmp_path / "alone", processes=1, steps=steps), alone)
    spec = training_spec(tmp_path / "two", processes=2, steps=steps)
    found, before = [], set(psutil.Process().children(recursive=True))  # a server of other tests

    def kill() -> None:
        state = tmp_path / "two" / "state"
        while not list(state.glob("step-*.json")):
            time.sleep(0.01)
        found.extend(set(psutil.Process().children(recursive=True)) - before)
        os.kill(rank(number).pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(StageKilled, match="one of the 2 training processes was killed"):
        execute(spec, Told())
    _, alive = psutil.wait_procs(found, timeout=5)
    assert not alive
    told = Told()
    summary = execute(spec, told)
    assert summary.numbers["steps"] == steps
    (_, _, first) = told.started[0]
    assert first >= 2, "it went on from a checkpoint"
    losses = [row["loss"] for row in alone.metrics]
    assert [row["loss"] for row in told.metrics] == pytest.approx(losses[first:], rel=2e-2)
