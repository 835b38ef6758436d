"""Settings of the native code: what a test makes of them goes back after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fastsft import _C


@pytest.fixture(autouse=True)
def native_settings() -> Iterator[None]:
    isa, threads = _C.active_isa(), _C.num_threads()
    yield
    _C.set_isa(isa)
    _C.set_num_threads(threads)


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set of this CPU in turn."""
    name: str = request.param
    _C.set_isa(name)
    return name


@pytest.fixture
def threads() -> Callable[[int], None]:
    """Sets the number of threads."""
    return _C.set_num_threads
