"""The selection kernels take no more instructions than they did."""

import pytest

from benchmarks import instructions, records


def test_kernels_take_no_more_instructions_than_stored():
    try:
        rows = instructions.measure(instructions.QUICK, seed=0)
    except records.Unavailable as error:
        pytest.skip(str(error))
    assert not instructions.exceeded(rows, records.load("instructions")["rows"])


def test_a_regression_is_named():
    stored = [{"kernel": "assign", "element": "float32", "instructions": 10.0}]
    assert not instructions.exceeded([{**stored[0], "instructions": 12.9}], stored)
    said = instructions.exceeded([{**stored[0], "instructions": 13.1}], stored)
    assert said == ["assign of float32: 13.1 instructions per weight, 10.0 stored"]
