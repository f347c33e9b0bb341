"""Runs in bad weather on the in-process grid: nothing that must hold is broken."""

from collections import Counter

from tests.chaos.virtual import campaign


def test_nothing_is_broken_by_some_runs_of_random_faults(tmp_path):
    said = []
    found = campaign(48, 3, tmp_path, said.append)
    assert (found["broken"], said) == ([], [])
    assert found["rounds"] >= 48
    assert found["completed"] > found["rounds"] // 2
    done = Counter(found["faults"])
    assert done["lost request"]
    assert done["lost reply"]
    assert done["death of the coordinator"]
    assert done["replay"]
