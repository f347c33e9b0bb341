import os
import subprocess
import sys

import pytest

from clients.priority import Priority, priority_of
from fedcore.errors import ConfigurationError


def test_a_node_that_says_nothing_keeps_its_priority(tmp_path):
    before = os.getpriority(os.PRIO_PROCESS, 0)
    priority_of({"partition-id": 3}).take(tmp_path / "is not there")
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_a_process_stands_back_as_far_as_its_node_says_and_never_forward():
    code = (
        "import os\n"
        "from clients.priority import priority_of\n"
        "priority_of({'nice': 7, 'oom-score': 500}).take()\n"
        "priority_of({'nice': 3, 'oom-score': 200}).take()\n"
        "print(os.nice(0), open('/proc/self/oom_score_adj').read().strip())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    nice, score = map(int, done.stdout.split())
    assert (max(7, os.nice(0)), True) == (nice, score >= 500)


def test_a_score_is_raised_and_never_lowered(tmp_path):
    score = tmp_path / "oom_score_adj"
    for before, after in (("0\n", "300"), ("-500\n", "300"), ("700\n", "700\n")):
        score.write_text(before)
        Priority(oom_score=300).take(score)
        assert score.read_text() == after


@pytest.mark.parametrize("text", [None, "", "high\n"])
def test_a_score_that_cannot_be_set_is_refused(tmp_path, text):
    score = tmp_path / "oom_score_adj"
    if text is not None:
        score.write_text(text)
    with pytest.raises(ConfigurationError, match="leave oom-score out"):
        Priority(oom_score=300).take(score)


@pytest.mark.parametrize(
    ("key", "value"),
    [("nice", -1), ("nice", 20), ("nice", "7"), ("nice", 1.0), ("nice", True), ("oom-score", 1001)],
)
def test_a_value_out_of_range_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigurationError, match=f"^{key} must be a whole number"):
        priority_of({key: value})
