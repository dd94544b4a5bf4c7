"""Random collectives against numpy, by hypothesis: everything that a call may be made of, over every transport.

tests/test_communicator.py draws counts, types, algorithms by name, protocols and ways to call one at a time. Here it is
also parameters of algorithms, segments, lanes, uneven parts, values that round, buffers in odd places, up to 8 ranks,
and several calls under way. ABCCL_TEST_EXAMPLES says how many rounds of examples there are (20 in `make soak`).
Communicators serve many examples, so that what one leaves behind meets the next; what failed is printed as a command
that makes the call again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import random_calls
import random_runs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_calls import RandomCall
from random_runs import Group

ROUNDS = int(os.environ.get("ABCCL_TEST_EXAMPLES", "1"))
"""Each round is a test of its own, so that the time limits of one hold."""

KINDS = {"shm": (range(1, 9), 250), "inproc": (range(1, 9), 60), "joint": (range(3, 9), 60), "apart": (range(2, 5), 30)}
"""The numbers of ranks, and the examples."""
GLOO = (range(2, 4), 16)


@pytest.fixture(scope="module")
def group() -> Iterator[Callable[[str, int], Group]]:
    """A group of so many ranks over a transport; the last one, unless it has failed."""
    groups: dict[tuple[str, int], Group] = {}

    def made(kind: str, size: int) -> Group:
        if (kind, size) not in groups or groups[kind, size].broken:
            groups[kind, size] = random_runs.make(kind, size)
        return groups[kind, size]

    yield made
    for one in groups.values():
        one.close()


@st.composite
def several_calls(draw: Any, size: int, slot_bytes: int, natives: Any) -> list[RandomCall]:
    def pick(options: Any) -> Any:
        return draw(st.sampled_from(options))

    def one() -> RandomCall:
        return random_calls.draw(pick, size, slot_bytes=slot_bytes, most_bytes=1 << 19, natives=natives)

    return [one() for _ in range(pick((1, 1, 1, 2, 3)))]


@pytest.mark.parametrize("round", range(ROUNDS))
@pytest.mark.parametrize("kind", [*KINDS, pytest.param("gloo", marks=pytest.mark.torch)])
def test_random_calls_against_numpy(kind: str, round: int, group: Callable[[str, int], Group]) -> None:
    sizes, examples = KINDS.get(kind, GLOO)

    # No database: a failure on a machine must not depend on what failed there before.
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def holds(data: st.DataObject) -> None:
        size = data.draw(st.sampled_from(sizes), "ranks")
        ranks = group(kind, size)
        transport = ranks.communicators[0]._transport
        calls = data.draw(several_calls(size, transport.slot_bytes, transport.collectives), "calls")
        before = ranks.runs
        try:
            random_runs.check(ranks, calls)
        except Exception as error:
            words = " ".join(f"'{call.to_json()}'" for call in calls)
            raise AssertionError(
                f"{type(error).__name__}: {error}\nafter {before} other examples; to repeat this one alone:\n"
                f"python tests/random_runs.py {kind} {size} {words}"
            ) from error

    holds()
