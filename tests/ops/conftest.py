"""Settings of the native code that a test may change and that go back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fastsft import _C


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU in turn."""
    before = _C.active_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads."""
    before = _C.num_threads()
    yield _C.set_num_threads
    _C.set_num_threads(before)
