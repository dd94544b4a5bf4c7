"""What the native core refuses of a plan, beside what the fuzzers find by touching memory: see tests/fuzz."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from abccl.errors import ArgumentError
from abccl.transports import _native
from abccl.transports.shm import ShmTransport, shm_threads
from abccl.transports.types import NUMBERS, OPERATORS

SEND = [0, 5, 1, 1, 1, 1, 0, 0, 0, 0]  # block 0 of the input to rank 1, lent
RECV = [1, 5, 1, 1, 0]
FOLD = [2, 2, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 0, 0]  # input and message, to slot 0 of the scratch
COPY = [3, 1, 0, 0, 0, 2, 0, 0, 0]  # that to the output
RELEASE = [5]
SCALE = [4, 1, 0, 0, 0, 0, 0, 0, 0]

PLAN: dict[str, Any] = {
    "code": SEND + RECV + FOLD + COPY + RELEASE,
    "table": [8, 0, 0],
    "rank": 0,
    "size": 2,
    "input_count": 8,
    "output_count": 8,
    "scratch": 1,
    "registers": 1,
    "segment": 8,
    "segments": 1,
    "lanes": 1,
    "straight": False,
    "type": NUMBERS["float32"],
    "op": OPERATORS["sum"],
    "factor": 1.0,
    "signature": 1,
    "text": "test",
    "names": ["0"],
    "remotes": 0,
}

REFUSED = {
    "a rank that is none": ({"rank": 2}, "rank 2 of 2"),
    "no ranks": ({"size": 0}, "rank 0 of 0"),
    "more ranks than an int holds": ({"size": 2**31 - 1, "remotes": 2**31 - 1}, "rank 0 of"),
    "a buffer of negative length": ({"input_count": -1}, "buffers that no memory holds"),
    "a buffer that wraps": ({"input_count": 2**62, "table": [2**62, 0, 0]}, "buffers that no memory holds"),
    "a block that wraps": ({"table": [2**62, 0, 0]}, "a block of impossible length"),
    "a block outside of the input": ({"table": [8, 1, 0]}, "a block outside the buffer: offset 1, 8 of 8"),
    "segments without elements": ({"segments": 2}, "2 segments of 8 elements for 8"),
    "segments for ever": ({"segments": 2**60, "segment": 1}, "segments of 1 elements for 8"),
    "scratch that nobody fills": ({"scratch": 2**31 - 1}, "more scratch than the code fills"),
    "scratch before it is written": ({"code": COPY + PLAN["code"]}, "scratch that does not hold it"),
    "scratch that is lent": ({"code": PLAN["code"] + [0, 5, 1, 1, 1, 1, 2, 0, 0, 0]}, "scratch that is lent"),
    "a message twice to one rank": ({"code": [0, 5, 0, 2, 1, 1, 0], "scratch": 0}, "a message twice to one rank"),
    "a fold that is not defined": ({"type": NUMBERS["complex64"], "op": OPERATORS["max"]}, "can not be folded"),
    "a scaling that is not defined": ({"code": SCALE, "type": NUMBERS["int32"]}, "can not be scaled"),
    "a message that is kept": ({"code": RECV, "scratch": 0}, "does not give its messages back"),
    "an instruction cut off": ({"code": PLAN["code"][:-5]}, "it ends within an instruction"),
}


@pytest.fixture(scope="module")
def transport() -> Iterator[ShmTransport]:
    """One of two ranks."""
    ranks = shm_threads(2)
    yield ranks[0]
    for rank in ranks:
        rank.close()


def made(transport: ShmTransport, **changes: Any) -> Any:
    plan = PLAN | changes
    code, table = np.array(plan["code"], dtype=np.int32), np.array(plan["table"], dtype=np.int64)
    return _native.Plan(**plan | {"code": code, "table": table, "communicator": transport.native})


def test_the_plan_that_is_changed_is_accepted(transport: ShmTransport) -> None:
    assert made(transport).text == "test"


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_plan_is_refused(transport: ShmTransport, name: str) -> None:
    changes, why = REFUSED[name]
    with pytest.raises(ArgumentError, match=f"the plan is broken: .*{why}"):
        made(transport, **changes)


def test_registers_that_are_not_used_take_no_memory(transport: ShmTransport) -> None:
    """Declared are 2^31; the run would need 100 GB for them."""
    plan = made(transport, code=SCALE, registers=2**31 - 1)
    given, result = np.ones(8, np.float32), np.zeros(8, np.float32)
    transport.native.run(plan, given.ctypes.data, result.ctypes.data, 10.0)
    assert result.tolist() == given.tolist()
