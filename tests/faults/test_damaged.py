"""A small part of what ``python -m tests.faults.damaged`` tries ten thousand times."""

from __future__ import annotations

import pytest

from tests.faults.damaged import KINDS, tries


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_refused_or_read_as_it_now_is(kind):
    told: list[str] = []
    counts = tries(kind, 40, 0, told.append)
    assert counts["refused"] > 5 and counts["read"] > 0
    assert counts["refused"] + counts["read"] == 40, told
