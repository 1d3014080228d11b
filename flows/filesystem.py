"""What the store takes for granted of the file system under the artifacts folder, tried out.

- A rename within the folder replaces a file at once, and moves a folder with all that is in it:
  finished work appears whole or not at all.
- `flock` keeps a second process out: one writer per key. (It holds between machines on NFS 4; where
  it does not, start the runs of one artifacts folder from one machine only. Workers take no lock.)
- Times of files are kept as they were set, to the precision they are read with: unchanged outputs
  are known by size and time.
- Names may hold "@", "#" and a leading ".", and a link may lead to a folder beside it.

With `run.engine=ray` the nodes must also see the folder under the same path, and what one of them
has renamed the others must see within a minute and a half (`stages/ray_crew.py` tries that out).
Local disks, NFS 4, Lustre (mounted with flock), CephFS and GPFS do all that; object stores mounted
as folders do not.
"""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

_TRIED_MTIME_NS = 1_700_000_000_123_456_789


def lacks(root: Path) -> list[str]:
    """What the file system of a writable folder does not do; empty: nothing.

    Raises:
        OSError: it cannot be written to at all.
    """
    probe = root / f".probe@{socket.gethostname()}#{os.getpid()}"
    shutil.rmtree(probe, ignore_errors=True)
    probe.mkdir(parents=True)
    try:
        return list(_findings(probe))
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _findings(probe: Path) -> Iterator[str]:
    for tried in (_renames, _locks, _keeps_times, _links):
        try:
            problem = tried(probe)
        except OSError as error:
            problem = f"{tried.__doc__} fails ({error.strerror or error})"
        if problem:
            yield problem


def _renames(probe: Path) -> str | None:
    """a rename over a file, or of a folder,"""
    (probe / "old").write_text("old")
    (probe / "new").write_text("new")
    (probe / "new").replace(probe / "old")
    if (probe / "new").exists() or (probe / "old").read_text() != "new":
        return "a rename does not replace the file of that name"
    (probe / "made").mkdir()
    (probe / "made" / "file").write_text("whole")
    (probe / "made").rename(probe / "done")
    if (probe / "made").exists() or (probe / "done" / "file").read_text() != "whole":
        return "a renamed folder does not take along what is in it"
    return None


def _locks(probe: Path) -> str | None:
    """a file lock (flock)"""
    with (probe / "lock").open("w") as mine, (probe / "lock").open("w") as other:
        fcntl.flock(mine, fcntl.LOCK_EX)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
    return "file locks (flock) keep nobody out"


def _keeps_times(probe: Path) -> str | None:
    """setting a file's time"""
    file = probe / "time"
    file.write_text("")
    os.utime(file, ns=(_TRIED_MTIME_NS, _TRIED_MTIME_NS))
    first = file.stat().st_mtime_ns
    if abs(first - _TRIED_MTIME_NS) > 2 * 10**9:
        return "the time set for a file is not kept"
    file.rename(probe / "moved")
    if (probe / "moved").stat().st_mtime_ns != first:
        return "a rename changes the time of a file"
    return None


def _links(probe: Path) -> str | None:
    """a link to a folder beside it"""
    (probe / "target").mkdir()
    (probe / "link").symlink_to("target")
    return None if (probe / "link").resolve() == (probe / "target").resolve() else "links get lost"
