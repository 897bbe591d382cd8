"""What goes wrong on real processes: nothing is lost, nothing counts twice, and no server goes down.

All of it is in `make soak`, and as a table from `python -m tests.diloco.faults`; every test run has those that no test
within one process shows.
"""

import pytest

from tests.diloco.faults import FAULTS, Fault

DOSE = {
    "worker killed during an upload",
    "server killed during saving",
    "evicted worker comes back",
    "full disk on the server",
}


def test_the_dose_is_of_the_table():
    assert {fault.name for fault in FAULTS} >= DOSE
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, id=fault.name.replace(" ", "-"), marks=() if fault.name in DOSE else pytest.mark.soak)
        for fault in FAULTS
    ],
)
def test_what_comes_of(fault: Fault, tmp_path):
    assert fault(tmp_path)
