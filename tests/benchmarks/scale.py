"""A million pictures through the real engine: what planning costs, and what lies on the disk.

    python tests/benchmarks/scale.py [--json] [--sizes 10000 100000 1000000] [--folder DIR --keep]

Two stages of stub work, shards of 1000: one writes pictures of a few bytes, the next a label for
each. Every size in a process of its own: seconds (of the clock, and of the CPU)
and peak memory of a run, of `plan` when all is done, and with one shard damaged; entries per
folder; bytes of the manifest. `growth` sets CPU seconds and bytes per picture at the largest size
against those at the smallest: 1 is linear.
A million pictures take about 9 GB of disk and 2.1 million inodes. Removing them can take as long as
the rest: `--keep` leaves them in `--folder`, a disk of its own that is then thrown away.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIZES = (10_000, 100_000, 1_000_000)
SHARD = 1000
CHILD = """
import json, sys, time
from pathlib import Path
from tests.benchmarks.scale_stub import engine, Quiet
from flows.runs import run
from stages.launch import execute
from stages.memory import peak_memory_bytes
verb, root, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
made = engine(root, count=count)
chosen = list(made.instances.values())
started = time.perf_counter()
if verb == "plan":
    told = [step.action for step in made.plan(chosen)]
else:
    run(made, chosen, listener=Quiet(), execute=lambda spec, told, lock: execute(spec, told))
    told = ["run"]
print(json.dumps({"seconds": time.perf_counter() - started, "told": told,
                  "cpu_s": time.process_time(), "peak_bytes": peak_memory_bytes()}))
"""


def child(verb: str, root: Path, count: int) -> dict:
    """Run or plan in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, verb, str(root), str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def measure(count: int, folder: Path, *, keep: bool) -> dict:
    """One size: run, plan, damage, plan."""
    root = folder / str(count)
    made = child("run", root, count)
    done = child("plan", root, count)
    assert done["told"] == ["skip", "skip"], done
    artifact = next(root.glob("pictures/[0-9a-f]*"))
    victim = artifact / f"shard-{count // SHARD - 1:05d}" / "index.jsonl"
    victim.write_bytes(victim.read_bytes()[:-1])
    hurt = child("plan", root, count)
    assert hurt["told"][0] == "run", hurt
    found = {
        "pictures": count,
        "shards": count // SHARD,
        "run_s": made["seconds"],
        "run_cpu_s": made["cpu_s"],
        "run_peak_bytes": made["peak_bytes"],
        "plan_s": done["seconds"],
        "plan_cpu_s": done["cpu_s"],
        "plan_peak_bytes": done["peak_bytes"],
        "plan_damaged_s": hurt["seconds"],
        "manifest_bytes": (artifact / "manifest.json").stat().st_size,
        "entries_in_artifact": len(os.listdir(artifact)),
        "entries_in_shard": len(os.listdir(victim.parent)),
    }
    if not keep:
        shutil.rmtree(root)
    return found


def told(row: dict) -> str:
    """A size in words."""
    return (
        f"{row['pictures']:>9} pictures, {row['shards']} shards: run {row['run_s']:.1f} s "
        f"(CPU {row['run_cpu_s']:.1f} s, {row['run_peak_bytes'] / 2**20:.0f} MiB), plan "
        f"{row['plan_s']:.3f} s (CPU {row['plan_cpu_s']:.3f} s, "
        f"{row['plan_peak_bytes'] / 2**20:.0f} MiB), with a damaged shard "
        f"{row['plan_damaged_s']:.3f} s; manifest {row['manifest_bytes'] / 1024:.0f} KiB, "
        f"{row['entries_in_artifact']} entries in the artifact, at most "
        f"{row['entries_in_shard']} in a shard"
    )


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu", help="not used: the work is a stub")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of pictures")
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave what was written (in --folder)")
    arguments = parser.parse_args()
    if arguments.keep and not arguments.folder:
        parser.error("--keep needs --folder: where to leave what was written")
    rows = []
    folder = Path(tempfile.mkdtemp(prefix="scale-", dir=arguments.folder))
    try:
        for size in arguments.sizes:
            rows.append(measure(size, folder, keep=arguments.keep))
            if not arguments.json:
                print(told(rows[-1]), flush=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    first, last = rows[0], rows[-1]
    grown = last["pictures"] / first["pictures"]
    growth = {
        name: round(last[name] / first[name] / grown, 3)
        for name in ("run_cpu_s", "plan_cpu_s", "manifest_bytes")
    }
    if arguments.json:
        print(json.dumps({"rows": rows, "growth": growth}, indent=1))
        return
    print(f"growth per picture, {last['pictures']} against {first['pictures']}: {growth}")


if __name__ == "__main__":
    main()
