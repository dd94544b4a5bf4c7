"""The tests that need a GPU. Without one they are skipped, all with the same reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu import device

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no GPU."""
    ours = [item for item in items if HERE in item.path.parents]
    reason = device.missing() if ours else None
    for item in ours:
        item.add_marker("gpu")
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    """The driver of the device."""
    made = device.make_driver()
    yield made
    made.close_all()


@pytest.fixture(scope="session")
def kernels(driver: Any) -> Any:
    """Our kernels on it."""
    return device.make_kernels(driver)


@pytest.fixture
def stream(driver: Any) -> Iterator[int]:
    """A stream of the test's own."""
    made = driver.create_stream()
    yield made
    driver.destroy_stream(made)
