import time

import pytest

from fedcore.engine import SystemClock, VirtualClock


def test_virtual_time_passes_only_in_sleep():
    clock = VirtualClock(start=5.0)
    started = time.monotonic()
    assert clock.now() == clock.now() == 5.0
    clock.sleep(1e6)
    assert clock.now() == 1_000_005.0
    assert time.monotonic() - started < 10.0


@pytest.mark.parametrize("clock", [SystemClock(), VirtualClock()])
def test_time_never_runs_backwards(clock):
    before = clock.now()
    clock.sleep(0.01)
    assert clock.now() - before >= 0.01
    with pytest.raises(ValueError, match="non-negative"):
        clock.sleep(-1.0)
