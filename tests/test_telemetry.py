from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.telemetry import RoundReport, Traffic

counts = st.integers(0, 10**12)
traffics = st.builds(Traffic, *[counts] * 6)
NAMES = [field.name for field in fields(Traffic)]


@given(traffics, traffics, traffics)
def test_traffic_adds_up_field_by_field_in_any_order(one, two, three):
    total = one + two + three
    for name in NAMES:
        assert getattr(total, name) == sum(getattr(part, name) for part in (one, two, three))
    assert one + two == two + one
    assert one + Traffic() == one


def test_a_report_is_a_value():
    report = RoundReport(
        round_number=1,
        attempts=1,
        invited=5,
        survivors=4,
        lost={"upload": 1},
        aborted=(),
        traffic=Traffic(),
        clipped=None,
        metrics={},
        neighbours=4,
        threshold=3,
        epsilon=1.0,
    )
    with pytest.raises(FrozenInstanceError):
        report.survivors = 5
    assert not hasattr(report, "__dict__")
