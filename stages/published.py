"""Numbers that others published, to be shown beside ours and marked as published.

    for row in read_published("gta5"):
        print(row.method, row.average, row.marker)

`stages/published.yaml` holds them and says what each field means. No torch here.
"""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field

from stages.section import Section

FILE = Path(__file__).with_name("published.yaml")

Table = Literal["synthia", "gta5", "ablation", "frozen", "test_server"]


class Published(Section):
    """One trained model's published scores."""

    method: str
    """Name as published."""
    variant: str | None = None
    """What sets it apart from the method's other rows; None: the full method."""
    encoder: str
    """Backbone."""
    source: str
    """What it was trained on; several joined by "+"."""
    protocol: str | None
    """A name of `stages/protocols.py`; None: another one, or not told."""
    where: str = Field(alias="from")
    """Where the numbers were printed."""
    table: Table
    """The comparison that it belongs to."""
    marker: Literal["published"]
    """What must be shown beside the number."""
    miou: dict[str, float]
    """Percent per data set."""
    average: float | None
    """Percent, over Cityscapes, BDD100K and Mapillary, as printed; None: not printed."""


def read_published(table: Table | None = None) -> tuple[Published, ...]:
    """The published rows in the file's order; with `table`, those of one comparison."""
    rows = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    found = tuple(Published.model_validate(row) for row in rows)
    return tuple(row for row in found if table in (None, row.table))
