"""The faults of the mutation check name lines that are there: whoever changes one changes its fault, too."""

import pytest

from tests.faults import FAULTS
from tests.mutations import ROOT, check_lines


def test_every_fault_changes_a_line_that_is_there_once_and_names_tests_that_are_there():
    check_lines(FAULTS)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25
    for fault in FAULTS:
        assert fault.line != fault.faulty
        for test in fault.tests:
            file, *function = test.split("[")[0].split("::")
            assert (ROOT / file).exists() and all(f"def {one}(" in (ROOT / file).read_text() for one in function), test


def test_control_a_line_that_is_not_there_is_seen():
    with pytest.raises(ValueError, match="0 times"):
        check_lines([FAULTS[0]._replace(line="no such line")])
