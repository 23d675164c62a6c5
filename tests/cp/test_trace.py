"""How many files and borders between files a reader crosses who follows one call."""

import pytest

from tests.helpers.trace import traced

# Mode, direction -> at most so many files and borders, on four ranks.
LIMITS = {
    ("auto", "forward"): (16, 200),
    ("auto", "backward"): (11, 170),
    ("allgather", "forward"): (11, 90),
    ("allgather", "backward"): (11, 110),
}


@pytest.mark.parametrize("mode", ["auto", "allgather"])
def test_a_call_crosses_few_borders(mode):
    for direction, trace in traced(mode).items():
        files, borders = LIMITS[mode, direction]
        assert len(trace.files) <= files and trace.borders <= borders, f"{direction}: {trace}, {sorted(trace.files)}"
