"""A disk that fills up anywhere, and files that got shorter: nothing that was finished is lost.

The disk is a real one: a tmpfs of a few pages in a mount namespace of its own, grown afterwards.
"""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flows.filesystem import lacks
from flows.outputs import StoreError
from flows.store import Store
from stages.shards import SYNC_EACH_MAX, ShardJob, write_shards
from stages.training import Checkpoints
from tests.tiny import Told

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = ["unshare", "--map-root-user", "--mount"]

FILLING = """
import subprocess, sys
from pathlib import Path
from flows.steps import StageError
from flows.outputs import StoreError
from flows.store import Store
from tests.test_stages_crew import make, shards_of

def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "none", root], check=True)

def outcome():
    files = shards_of(root)
    (folder,) = Store(root).artifacts("numbers")
    outputs = Store(root).manifest(folder)["outputs"]
    return files, {path: entry["digest"] for path, entry in outputs.items() if "logs" not in path}

root = Path(sys.argv[1])
mount("size=64m")
make(root, 1)
expected, refused = outcome(), []
subprocess.run(["umount", root], check=True)
for pages in range(2, 60, int(sys.argv[2])):
    mount(f"size={4 * pages}k")
    try:
        make(root, 1)
    except (StageError, StoreError, OSError) as error:
        assert "No space left on device" in str(error), error
        refused.append(pages)
    mount("remount", "size=64m")
    if pages in refused:
        make(root, 1)
    assert outcome() == expected, f"with {pages} pages at first"
    assert not list(root.glob("numbers/.staging-*")), pages
    subprocess.run(["umount", root], check=True)
print("refused", *refused)
"""


def fill(folder: Path, step: int) -> list[int]:
    """Sizes, in pages, of disks on which the toy found no room at first."""
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace here")
    command = [*NAMESPACE, sys.executable, "-c", FILLING, str(folder), str(step)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.splitlines()[-1].split()[1:]]


def test_a_disk_that_is_full_at_some_points_loses_nothing(tmp_path):
    assert len(fill(tmp_path, 9)) >= 3


@pytest.mark.faults
def test_a_disk_that_is_full_at_any_point_loses_nothing(tmp_path):
    refused = fill(tmp_path, 1)
    assert refused == list(range(2, len(refused) + 2)), "every size below the least that suffices"
    assert len(refused) > 20


def test_a_checkpoint_that_found_no_room_leaves_the_one_before(tmp_path):
    state = {"model": {"weight": torch.arange(40_000.0)}}
    checkpoints = Checkpoints(tmp_path / "state")
    checkpoints.save(2, state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # a write past it fails
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            checkpoints.save(4, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    told = Told()
    step, found = checkpoints.newest(told.note)
    assert (step, told.notes) == (2, [])
    assert torch.equal(found["model"]["weight"], state["model"]["weight"])
    checkpoints.save(4, state)
    assert checkpoints.newest(told.note)[0] == 4


def test_the_file_system_here_does_what_the_store_needs(tmp_path):
    assert lacks(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("fcntl.flock", "file locks (flock) keep nobody out"),
        ("os.utime", "the time set for a file is not kept"),
        ("pathlib.Path.symlink_to", "a link to a folder beside it fails"),
        ("pathlib.Path.replace", "a rename over a file, or of a folder, fails"),
    ],
)
def test_a_file_system_that_will_not_do_is_refused_before_any_work(
    tmp_path, monkeypatch, broken, told
):
    def refuse(*args, **how):
        raise OSError(errno.EPERM, "Operation not permitted")

    silent = broken in ("fcntl.flock", "os.utime")
    monkeypatch.setattr(broken, (lambda *args, **how: None) if silent else refuse)
    with pytest.raises(StoreError, match="--artifacts DIR") as caught:
        Store(tmp_path / "artifacts").open()
    assert told in str(caught.value)


@pytest.mark.parametrize("num_files", [3, SYNC_EACH_MAX + 1])
def test_a_shard_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch, num_files):
    """Else a power cut could leave the name without what it stands for."""
    on_disk: set[str] = set()
    left: list[set[str]] = []
    fsync, rename = os.fsync, Path.rename

    def told_fsync(descriptor):
        fsync(descriptor)
        on_disk.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    def told_sync():
        on_disk.update(str(path) for path in tmp_path.rglob("*"))

    def told_rename(self, target):
        if self.is_dir():
            left.append({str(path) for path in [self, *self.iterdir()]} - on_disk)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", told_fsync)
    monkeypatch.setattr(os, "sync", told_sync)
    monkeypatch.setattr(Path, "rename", told_rename)

    def work(items, folder):
        for item in items:
            (folder / f"{item}.txt").write_text("whole")
        return [{"id": str(item)} for item in items]

    job = ShardJob(
        items=range(num_files), shard_size=1000, unit="files", open=lambda progress: work
    )
    write_shards(tmp_path, job, progress=Told())
    assert left == [set()]
