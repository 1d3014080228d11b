"""Take part in the trainings that another machine leads, one after the other, until stopped.

    clouds --set run.machines=2 --set run.processes=8      on the first machine
    python -m stages.join artifacts --machine 1            on the second

All machines must see the artifacts folder, the data and this code under the same paths, as the
nodes of a Ray cluster must. The first machine alone decides what runs and keeps the results; it
waits for the others at the start of each training. A machine that dies ends the training on all of
them; the same command on the first goes on from the checkpoint, and who waits here joins again.
"""

import argparse
import json
import logging
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import sleep
from typing import Any

from stages.children import USER_ERRORS, StageFailed, Watch, process_group, write_spec
from stages.machines import ADDRESS, CARD, PORT, RANK

log = logging.getLogger("stages.join")

LOOK_EVERY_S = 0.5
"""How often the artifacts folder is looked at for a training to join."""
ANSWER_TIMEOUT_S = 3.0
"""Longest wait for the first machine's answer."""


def main(words: Sequence[str] | None = None) -> int:
    """Join whatever training is led below the artifacts folder.

    Returns:
        130 when stopped by Ctrl-C; 2 where the folder is none, or the machine is the first.
    """
    parser = argparse.ArgumentParser(prog="python -m stages.join", description=__doc__)
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("--machine", type=int, required=True, help="this machine's number, from 1")
    arguments = parser.parse_args(words)
    if arguments.machine < 1:
        parser.error("machine 0 is the one that runs the stages: the others are 1, 2, ...")
    if not arguments.artifacts.is_dir():
        parser.error(
            f"no artifacts folder {str(arguments.artifacts)!r} here: all machines share it"
        )
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    log.info("machine %d waits for trainings below %s", arguments.machine, arguments.artifacts)
    seen: set[str] = set()
    try:
        while True:
            for path in sorted(arguments.artifacts.glob(f"*/.staging-*/{CARD}")):
                join(path, arguments.machine, seen)
            sleep(LOOK_EVERY_S)
    except KeyboardInterrupt:
        return 130


def join(path: Path, machine: int, seen: set[str]) -> None:
    """Take part in the training of a card, once, if it wants this machine and is still led."""
    card = _read(path)
    if card is None or card["attempt"] in seen or machine >= card["machines"]:
        return
    if not _is_led(card):  # not yet, or its leader was killed
        return
    seen.add(card["attempt"])
    stage = str(card["spec"]["stage"])
    log.info("%s: joins %s:%s", stage, card["address"], card["port"])
    env = {RANK: str(machine), ADDRESS: str(card["address"]), PORT: str(card["port"])}
    try:
        with (
            tempfile.TemporaryDirectory(prefix="clouds-") as folder,
            process_group(write_spec(card["spec"], Path(folder)), env=env) as child,
        ):
            Watch(child, stage, _Log()).until_done(None)
    except (StageFailed, *USER_ERRORS.values()) as error:
        log.warning("%s: ended: %s", stage, error)
        return
    log.info("%s: done", stage)


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # taken away in this moment
        return None


def _is_led(card: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((card["address"], card["port"]), ANSWER_TIMEOUT_S).close()
    except OSError:
        return False
    return True


class _Log:
    """Progress of a machine that helps: the first machine shows it."""

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        pass

    def advance(self, count: int = 1, **metrics: float) -> None:
        pass

    def note(self, text: str) -> None:
        log.info(text)


if __name__ == "__main__":
    sys.exit(main())
