"""No case of the set goes unread."""

from __future__ import annotations

from typing import Any

import pytest
from pruner_cases import every_case


@pytest.mark.cases("pruners", every_case)
def test_one_test_reads_the_case(case: Any) -> None:
    _, rules = case
    assert len(rules) == 1
