"""How much the engine costs: `plan`, a run that finds everything done, growth with shards.

    python tests/benchmarks/engine.py [--json]

`plan` is set against importing what any such tool must (yaml and pydantic); `cached_run` against
`plan`; `plan_shards_N` against the same plan with 10 shards. Both sides are whole processes, run
alternately after a warm-up.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = 9
IMPORTS = [sys.executable, "-c", "import yaml; from pydantic import BaseModel"]
TOY = """
import sys
from pathlib import Path
from flows.runs import run
from tests.toy_pipeline import Ears, engine, in_process
made = engine(Path(sys.argv[2]), toy={"count": int(sys.argv[3]), "shard_size": 100})
if sys.argv[1] == "plan":
    print([step.action for step in made.plan(made.instances.values())])
else:
    run(made, list(made.instances.values()), listener=Ears(), execute=in_process)
"""


def seconds(command: Sequence[str]) -> float:
    """Wall time of a whole process; it must succeed (3: a plan that found work)."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    elapsed_s = time.perf_counter() - started
    if done.returncode not in (0, 3):
        raise SystemExit(f"{command} failed: {done.stderr}")
    return elapsed_s


def compare(name: str, ours: Sequence[str], theirs: Sequence[str], runs: int) -> dict[str, object]:
    """Median of both sides, run alternately, and theirs / ours."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(runs + 1):
        for command, kept in zip((ours, theirs), times, strict=True):
            elapsed_s = seconds(command)
            if number:
                kept.append(elapsed_s)
    mine, other = (statistics.median(kept) for kept in times)
    return {
        "name": name,
        "ours": round(mine, 4),
        "theirs": round(other, 4),
        "unit": "s",
        "ratio": round(other / mine, 3),
        "spread_ours": [round(min(times[0]), 4), round(max(times[0]), 4)],
        "spread_theirs": [round(min(times[1]), 4), round(max(times[1]), 4)],
    }


def toy(verb: str, root: Path, shards: int) -> list[str]:
    """A process that plans or runs the toy pipeline with that many shards."""
    return [sys.executable, "-c", TOY, verb, str(root), str(100 * shards)]


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu", help="not used: the engine needs none")
    parser.add_argument("--runs", type=int, default=RUNS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(cases(Path(folder), arguments.runs))
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"{row['name']:<18} ours {row['ours']:.3f} s {row['spread_ours']}  "
            f"theirs {row['theirs']:.3f} s {row['spread_theirs']}  ratio {row['ratio']:.2f}"
        )


def cases(folder: Path, runs: int):
    """The comparisons."""
    plan = [sys.executable, "flows/clouds.py", "plan", "--artifacts", str(folder / "none")]
    yield compare("plan", plan, IMPORTS, runs)
    roots = {}
    for shards in (10, 100, 1000):
        roots[shards] = folder / str(shards)
        seconds(toy("run", roots[shards], shards))
    yield compare("cached_run", toy("run", roots[10], 10), toy("plan", roots[10], 10), runs)
    for shards in (100, 1000):
        ours, theirs = toy("plan", roots[shards], shards), toy("plan", roots[10], 10)
        yield compare(f"plan_shards_{shards}", ours, theirs, runs)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
