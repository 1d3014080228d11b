"""Published numbers: a readable file whose averages agree with its parts."""

import pytest
from pydantic import ValidationError

from stages.published import Published, read_published

AVERAGED = ("cityscapes", "bdd100k", "mapillary")


def test_every_row_is_marked_as_published_and_says_where_from():
    rows = read_published()
    assert len(rows) > 25
    assert {row.marker for row in rows} == {"published"}
    assert all(row.where and row.encoder and (row.miou or row.average) for row in rows)
    assert len({(r.method, r.variant, r.encoder, r.source, r.table) for r in rows}) == len(rows)


def test_printed_averages_are_the_means_of_their_parts():
    checked = 0
    for row in read_published():
        if row.average is not None and row.miou:
            mean = sum(row.miou[name] for name in AVERAGED) / len(AVERAGED)
            assert mean == pytest.approx(row.average, abs=0.11), row.method
            checked += 1
    assert checked > 12


def test_one_comparison_can_be_asked_for():
    gta = read_published("gta5")
    assert {row.table for row in gta} == {"gta5"}
    (rein,) = [r for r in gta if (r.method, r.encoder, r.source) == ("Rein", "DINOv2-L", "gta5")]
    assert rein.miou == {"cityscapes": 66.4, "bdd100k": 60.4, "mapillary": 66.1}
    assert (rein.average, rein.protocol) == (64.3, "rein")


def test_a_row_without_the_marker_is_refused():
    row = read_published()[0].model_dump(by_alias=True)
    with pytest.raises(ValidationError, match="marker"):
        Published.model_validate(row | {"marker": "measured"})
