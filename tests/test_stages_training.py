"""The training loop: updates, schedules, checkpoints, and resuming after a kill."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.build import build_segmenter
from models.ema import Ema
from models.segmenter import Segmenter
from stages import train_source
from stages.contracts import Progress
from stages.devices import device_for
from stages.training import (
    Checkpoints,
    Metrics,
    Share,
    Trainer,
    TrainingError,
    learning_rate_factor,
    trained_tensors,
)
from stages.training_config import OptimiserConfig
from tests.tiny import SEGMENTER, Told, stage_config, tiny_recipe, write_labelspace, write_sources

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_network() -> nn.Module:
    """With a frozen layer, dropout and running statistics: all that a resume can get wrong."""
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Linear(6, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)
    )
    network[0].requires_grad_(False)
    return network


def regression(network: nn.Module, step: int, share: Share):
    """Learn sums and differences; the batch follows from the step."""
    inputs = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
    targets = torch.stack([inputs.sum(1), inputs[:, 0] - inputs[:, 1]], 1)
    mine = inputs[share.rows(12)], targets[share.rows(12)]
    for rows in share.passes_of(len(mine[0])):
        error = F.mse_loss(network(mine[0][rows]), mine[1][rows], reduction="sum")
        yield {"total": error * share.ranks / 12, "error": error}


def trainer_of(network: nn.Module, out: Path, **options) -> Trainer:
    settings = {
        "groups": [
            {
                "params": [p for p in network.parameters() if p.requires_grad],
                "lr": 0.01,
                "weight_decay": 0.1,
            }
        ],
        "objective": regression,
        "steps": 10,
        "optimiser": OptimiserConfig(lr=0.01, clip_norm=1.0, warmup_steps=3),
        "device": device_for("cpu", precision="fp32"),
        "seed": 0,
        "out": out,
        "batch_size": 12,
        "checkpoint_every": 4,
        "log_every": 1,
    }
    return Trainer(network, **(settings | options))


def optimiser_tensors(trainer: Trainer) -> list[torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return [value for entry in state.values() for value in entry.values()]


def assert_equal_tensors(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0)


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.9, 2.0])
def test_poly_schedule_equals_torchs_own(power):
    config = OptimiserConfig(schedule="poly", poly_power=power)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=20, power=power)
    for step in range(20):
        ours = learning_rate_factor(config, step=step, steps=20)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_warm_up_rises_linearly_to_the_schedule():
    config = OptimiserConfig(schedule="constant", warmup_steps=4)
    factors = [learning_rate_factor(config, step=step, steps=10) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_groups_keep_their_ratio_under_the_schedule(tmp_path):
    network = small_network()
    groups = [
        {"params": list(network[1].parameters()), "lr": 0.001, "weight_decay": 0.0},
        {
            "params": [p for part in (network[2], network[4]) for p in part.parameters()],
            "lr": 0.01,
            "weight_decay": 0.1,
        },
    ]
    trainer = trainer_of(network, tmp_path, groups=groups, steps=2)
    last = trainer.run(Told())
    slow, fast = (group["lr"] for group in trainer.optimizer.param_groups)
    assert fast == last["lr"] == pytest.approx(0.01 * (2 / 3) * 0.5**0.9)
    assert slow == pytest.approx(0.1 * fast)


# --- updates -------------------------------------------------------------------------------------


def test_update_equals_plain_adamw_with_clipping(tmp_path):
    network, plain = small_network()[4], small_network()[4]
    inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))

    def objective(model, step, share):
        yield {"total": model(inputs).square().sum() * 100}

    optimiser = OptimiserConfig(lr=0.01, clip_norm=0.5, schedule="constant")
    trainer = trainer_of(network, tmp_path, objective=objective, optimiser=optimiser, steps=3)
    trainer.run(Told())
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        reference.zero_grad()
        (plain(inputs).square().sum() * 100).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        reference.step()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_frozen_parameters_do_not_move(tmp_path):
    network = small_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trainer_of(network, tmp_path).run(Told())
    moved = {n for n, v in network.state_dict().items() if not torch.equal(v, before[n])}
    assert {"1.weight", "2.running_mean", "4.bias"} <= moved
    assert not {"0.weight", "0.bias"} & moved


def test_groups_that_leave_out_a_parameter_are_refused(tmp_path):
    network = small_network()
    groups = [{"params": list(network[1].parameters()), "lr": 0.1, "weight_decay": 0.0}]
    with pytest.raises(AssertionError, match="exactly what requires gradients"):
        trainer_of(network, tmp_path, groups=groups)


def test_accumulated_passes_equal_one_pass(tmp_path):
    networks = [nn.Linear(6, 2), nn.Linear(6, 2)]
    networks[1].load_state_dict(networks[0].state_dict())
    for network, passes in zip(networks, (1, 3), strict=True):
        optimiser = OptimiserConfig(lr=0.01, clip_norm=1.0, accumulate=passes)
        trainer_of(network, tmp_path / str(passes), optimiser=optimiser).run(Told())
    for one, three in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(one, three)


def test_more_passes_than_samples_are_refused(tmp_path):
    optimiser = OptimiserConfig(accumulate=13)
    with pytest.raises(ValueError, match=r"batch_size is 12.*accumulate=13"):
        trainer_of(small_network(), tmp_path, optimiser=optimiser)


@pytest.mark.parametrize("total", [1, 7, 8, 9])
@pytest.mark.parametrize(("ranks", "passes"), [(1, 1), (2, 1), (3, 2), (1, 4)])
def test_shares_cover_every_row_once(total, ranks, passes):
    rows = list(range(total))
    covered = []
    for rank in range(ranks):
        share = Share(rank=rank, ranks=ranks, passes=passes)
        mine = rows[share.rows(total)]
        covered += [row for part in share.passes_of(len(mine)) for row in mine[part]]
    assert covered == rows


def test_bf16_runs_the_network_in_bf16_and_keeps_fp32_weights(tmp_path):
    seen = []

    def objective(model, step, share):
        outputs = model(torch.ones(2, 6))
        seen.append(outputs.dtype)
        yield {"total": outputs.float().square().sum()}

    network = nn.Linear(6, 2)
    device = device_for("cpu", precision="bf16")
    trainer_of(network, tmp_path, objective=objective, device=device, steps=1).run(Told())
    assert seen == [torch.bfloat16]
    assert network.weight.dtype == torch.float32
    assert network(torch.ones(2, 6)).dtype == torch.float32


def test_callers_random_numbers_are_left_alone(tmp_path):
    trainer = trainer_of(small_network(), tmp_path, steps=2)
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(1), random.random()
    torch.manual_seed(5)
    random.seed(5)
    trainer.run(Told())
    assert (torch.rand(1), random.random()) == expected


# --- numbers that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_before_the_update(tmp_path, bad):
    network = nn.Linear(6, 2)
    kept = {}

    def objective(model, step, share):
        loss = model(torch.ones(3, 6)).square().mean()
        if step == 2:
            kept.update({name: value.clone() for name, value in model.state_dict().items()})
            loss = loss * bad
        yield {"total": loss, "loss_dice": loss.detach(), "loss_ce": torch.tensor(0.5)}

    trainer = trainer_of(network, tmp_path, objective=objective)
    with pytest.raises(TrainingError, match=rf"update 3 of 10 .*loss_dice {bad}.*loss_ce 0.5"):
        trainer.run(Told())
    assert_equal_tensors(dict(network.state_dict()), kept)


def test_gradient_that_is_not_finite_stops_before_the_update(tmp_path):
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)

    def objective(model, step, share):
        yield {"total": model(torch.ones(1, 1)).sqrt().sum()}  # slope at 0 is infinite

    with pytest.raises(TrainingError, match="gradient norm inf"):
        trainer_of(network, tmp_path, objective=objective).run(Told())
    assert network.weight.item() == 0


# --- checkpoints and resuming --------------------------------------------------------------------


class Interrupt(Exception):
    pass


def interrupted(objective, at: int):
    """The objective, until step `at` is reached."""

    def stopping(model, step, share):
        if step == at:
            raise Interrupt
        yield from objective(model, step, share)

    return stopping


@pytest.mark.parametrize("at", [1, 4, 7, 9])
def test_resumed_training_equals_an_undisturbed_one(tmp_path, at):
    whole = trainer_of(small_network(), tmp_path / "whole")
    whole.run(Told())
    first = trainer_of(small_network(), tmp_path / "cut", objective=interrupted(regression, at))
    with pytest.raises(Interrupt):
        first.run(Told())
    torch.manual_seed(random.randrange(2**31))  # nothing may hang on the generators' state
    second, told = trainer_of(small_network(), tmp_path / "cut"), Told()
    second.run(told)
    assert told.started == [(10, "steps", at // 4 * 4)]
    assert told.advanced == 10 - at // 4 * 4
    assert_equal_tensors(trained_tensors(whole.model), trained_tensors(second.model))
    for ours, theirs in zip(optimiser_tensors(whole), optimiser_tensors(second), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert steps_logged(tmp_path / "cut") == list(range(1, 11))


def steps_logged(out: Path) -> list[int]:
    lines = (out / "logs" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def flipped(data: bytes) -> bytes:
    """The same size, one bit of the middle altered."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda data: data[:-100], flipped])
def test_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, damage):
    first = trainer_of(small_network(), tmp_path, objective=interrupted(regression, 9))
    with pytest.raises(Interrupt):
        first.run(Told())
    newest = tmp_path / "state" / "step-00000008.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    second, told = trainer_of(small_network(), tmp_path), Told()
    second.run(told)
    assert any("step-00000008.pt is truncated or altered" in note for note in told.notes)
    assert told.started == [(10, "steps", 4)]
    whole = trainer_of(small_network(), tmp_path / "whole")
    whole.run(Told())
    assert_equal_tensors(trained_tensors(whole.model), trained_tensors(second.model))


def test_checkpoint_without_its_card_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, {"value": torch.ones(2)})
    checkpoints.save(6, {"value": torch.ones(2) * 2})
    (tmp_path / "step-00000006.json").unlink()
    step, state = checkpoints.newest(print)
    assert step == 3
    assert state["value"].tolist() == [1, 1]


def test_two_newest_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {"value": torch.tensor(step)})
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "step-00000003.pt",
        "step-00000004.pt",
    ]


def test_state_of_another_network_is_refused(tmp_path):
    first = trainer_of(small_network(), tmp_path, objective=interrupted(regression, 5))
    with pytest.raises(Interrupt):
        first.run(Told())
    other = nn.Linear(6, 2)
    with pytest.raises(ValueError, match=r"of another model.*delete state/"):
        trainer_of(other, tmp_path).run(Told())


def test_metrics_drop_later_lines_and_a_line_cut_off(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st', encoding="utf-8")
    metrics.cut(2)
    assert metrics.path.read_text() == '{"step": 1}\n{"step": 2}\n'
    metrics.path.write_text('{"step": 1}\n{"st', encoding="utf-8")
    metrics.cut(2)
    assert metrics.path.read_text() == '{"step": 1}\n'


def train_a_segmenter(world: Path, out: Path, progress: Progress) -> None:
    recipe = tiny_recipe(train_source={"steps": 14, "checkpoint_every": 3})
    train_source.run(
        stage_config(recipe, "train_source"),
        out=out,
        progress=progress,
        sources=world / "sources",
        labelspace=world / "labelspace",
    )


TRAIN_IN_A_PROCESS = """
    import os, random, signal, sys
    from pathlib import Path
    from threading import Timer
    import torch
    from tests.test_stages_training import train_a_segmenter
    from tests.tiny import Told

    class Dying(Told):
        def advance(self, count=1, **metrics):
            super().advance(count)
            if self.advanced == die_after:
                Timer(random.random() * 0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()

    die_after = int(sys.argv[3])
    torch.set_num_threads(1)
    train_a_segmenter(Path(sys.argv[1]), Path(sys.argv[2]), Dying())
"""


def train_in_a_process(world: Path, out: Path, *, die_after: int) -> int:
    """The exit code."""
    code = textwrap.dedent(TRAIN_IN_A_PROCESS)
    return subprocess.run(
        [sys.executable, "-c", code, str(world), str(out), str(die_after)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120,
    ).returncode


def test_training_killed_at_a_random_step_ends_with_the_same_files(tmp_path):
    world = tmp_path / "world"
    write_sources(world / "sources", data=world / "data")
    write_labelspace(world / "labelspace")
    train_a_segmenter(world, tmp_path / "whole", Told())

    kill_after = random.randint(1, 9)
    died = train_in_a_process(world, tmp_path / "cut", die_after=kill_after)
    assert died == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert train_in_a_process(world, tmp_path / "cut", die_after=-1) == 0

    for name in ("model.safetensors", "ema.safetensors", "checkpoint.json"):
        whole, cut = ((tmp_path / which / name).read_bytes() for which in ("whole", "cut"))
        assert whole == cut, f"{name} differs after a kill past step {kill_after}"
    assert steps_logged(tmp_path / "cut") == list(range(1, 15))


def test_average_is_resumed_with_the_weights(tmp_path):
    def objective(model, step, share):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8)
        yield {"total": model(images).masks_BQHW.square().mean()}

    def train(out: Path, stop: int | None) -> tuple[Segmenter, Ema]:
        segmenter = build_segmenter(SEGMENTER, class_names=["a", "b"]).train()
        ema = Ema(segmenter, 0.5, 3)
        trainer = trainer_of(
            segmenter,
            out,
            groups=segmenter.parameter_groups(0.01, 0.0),
            objective=objective if stop is None else interrupted(objective, stop),
            ema=ema,
        )
        trainer.run(Told())
        return segmenter, ema

    _, whole = train(tmp_path / "whole", None)
    with pytest.raises(Interrupt):
        train(tmp_path / "cut", 5)
    segmenter, cut = train(tmp_path / "cut", None)
    assert_equal_tensors(whole.state_dict(), cut.state_dict())
    moved = [n for n, v in segmenter.trained_state().items() if not torch.equal(cut.shadow[n], v)]
    assert moved, "the average must differ from the weights, else this shows nothing"
