"""Training curves: every quantity of `logs/metrics.jsonl`, one chart each, all trainings in it."""

from collections.abc import Mapping

from stages.charts import LineChart, line_chart
from stages.report_lineage import Instance
from stages.report_scores import number
from stages.shards import read_jsonl

_FIRST = ("loss", "total", "loss_total", "miou")
_LAST = ("lr", "learning_rate")


def read_curves(instances: Mapping[str, Instance], colours: Mapping[str, int]) -> list[LineChart]:
    """The charts, the total loss first, the learning rate last; values that are not finite are left
    out.

    Args:
        instances: those with `logs/metrics.jsonl` count.
        colours: instance -> colour number.

    Raises:
        ValueError: a line of a log is no JSON object.
    """
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for one in instances.values():
        path = one.folder / "logs" / "metrics.jsonl"
        for row in read_jsonl(path) if path.is_file() else []:
            step = number(row.get("step"))
            for name, value in row.items():
                finite = number(value)
                if name == "step" or step is None or finite is None or isinstance(value, bool):
                    continue
                lines.setdefault(name, {}).setdefault(one.name, []).append((step, finite))
    return [line_chart(name, lines[name], colours) for name in sorted(lines, key=_rank)]


def _rank(name: str) -> tuple[int, str]:
    if name in _FIRST:
        return (_FIRST.index(name) - len(_FIRST), name)
    return (1 if name in _LAST else 0, name)
