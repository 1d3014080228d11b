"""What is asked for and what is named: a plan of prompts, the bank and a writer, value by value.

    python tests/benchmarks/coverage.py [--num 1000] [--labels miniature] [--writer builtin:writer]

Runs the stage `write_prompts` itself, as the recipe `miniature` sets it: for the writer with as
many prompts as asked for, for the bank with all that it holds. `asked` counts the plan, the others
the prompts that name it: classes by the label space's words; attributes by the phrases that the
miniature's writer learned, and in the bank by the time, weather and season that it states.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import process_time
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flows.recipes import load_recipe
from models.miniature.writer_lessons import ATTRIBUTES, says
from prompts.loader import load_attributes, load_bank
from stages import write_prompts
from stages.config import StageConfig
from stages.labels import load_labelspace
from stages.shards import read_jsonl


class Silent:
    """Progress that nobody hears."""

    def start(self, total: int, unit: str, *, done: int = 0) -> None:
        """Nothing."""

    def advance(self, count: int = 1, **metrics: float) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


def written(model: str, num_prompts: int, labels: str) -> dict[str, Any]:
    """`statistics.json` of the stage, "texts", and "cpu_s": seconds of this process."""
    recipe = load_recipe(
        "miniature",
        [f"write_prompts.model={model}", f"write_prompts.num_prompts={num_prompts}"],
    )
    config = StageConfig(recipe, stage="write_prompts", sections=("write_prompts",))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        load_labelspace(labels).save(out)
        started_s = process_time()
        write_prompts.run(config, out=out, progress=Silent(), labelspace=out)
        cpu_s = process_time() - started_s
        texts = [row["text"] for row in read_jsonl(out / "prompts.jsonl")]
        found = json.loads((out / "statistics.json").read_text(encoding="utf-8"))
    return found | {"texts": texts, "cpu_s": round(cpu_s, 1)}


def coverage(writer: str, num_prompts: int, labels: str) -> dict[str, Any]:
    """The table: per class and per attribute value what the plan asks for and who names it."""
    ours = written(writer, num_prompts, labels)
    bank = written(write_prompts.BANK, len(load_bank()), labels)
    said = {name: _said(ours["texts"], name) for name in ATTRIBUTES}
    stated = {name: counts for name, counts in bank["attributes"].items() if counts}
    return {
        "labels": labels,
        "prompts": {"writer": len(ours["texts"]), "bank": len(bank["texts"])},
        "replies": ours["replies"],
        "from_bank": ours["from_bank"],
        "cpu_s": ours["cpu_s"],
        "classes": {
            name: {
                "asked": entry["asked"],
                "writer": entry["named"],
                "bank": bank["classes"][name]["named"],
            }
            for name, entry in ours["classes"].items()
        },
        "attributes": {
            name: {
                value: {"asked": ours["attributes"][name].get(value, 0)}
                | {"writer": said[name][value]}
                | ({"bank": stated[name].get(value, 0)} if name in stated else {})
                for value in values
            }
            for name, values in load_attributes().values.items()
        },
    }


def _said(texts: list[str], attribute: str) -> Counter[str]:
    return Counter(value for text in texts for value in says(text, attribute))


def show(table: dict[str, Any]) -> None:
    """Print the table as Markdown."""
    prompts, replies = table["prompts"], table["replies"]
    print(
        f"{prompts['writer']} prompts by the writer ({replies['valid']} of {replies['asked']} "
        f"replies valid, {table['from_bank']} from the bank, {table['cpu_s']} s of CPU); "
        f"{prompts['bank']} of the bank; classes of {table['labels']}\n"
    )
    print("| | asked | writer | bank |\n|---|---|---|---|")
    groups = {"class": table["classes"], **table["attributes"]}
    for group, entries in groups.items():
        for name, entry in entries.items():
            cells = [str(entry.get(column, "")) for column in ("asked", "writer", "bank")]
            print(f"| {group}: {name} | {' | '.join(cells)} |")


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=1000, help="prompts of the plan")
    parser.add_argument("--labels", default="miniature", help="label space")
    parser.add_argument("--writer", default="builtin:writer", help="model, as write_prompts.model")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = coverage(arguments.writer, arguments.num, arguments.labels)
    if arguments.json:
        print(json.dumps(table, indent=1))
    else:
        show(table)


if __name__ == "__main__":
    main()
