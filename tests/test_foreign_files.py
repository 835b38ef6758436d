"""Any bytes in the place of a file from outside: it is read, or refused with an error that names it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsft.config import load_config
from fastsft.config.errors import ConfigError
from fastsft.models.stored import INDEX, open_tensors

VALID = (Path(__file__).parents[1] / "examples" / "gsm8k.toml").read_bytes()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["data", "train", "lr", "x"]), inner),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


def refusal(read: Callable[[], object], error: type[ValueError], names: Path) -> str:
    """What the error says; the name if there is none."""
    try:
        read()
    except error as refused:
        return str(refused)
    return str(names)


def check_config(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert str(file) in refusal(lambda: load_config(file), ConfigError, file)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    at=st.integers(0, len(VALID)), cut=st.integers(0, 12), put=st.binary(max_size=6) | st.sampled_from([b"-1", b"nan"])
)
def test_damaged_toml(folder: Path, at: int, cut: int, put: bytes) -> None:
    check_config(folder / "run.toml", VALID[:at] + put + VALID[at + cut :])


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(content=JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20))
def test_any_json(folder: Path, content: bytes) -> None:
    check_config(folder / "config.json", content)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(value=JSON | st.dictionaries(st.text(max_size=3), st.text(max_size=6), min_size=1))
def test_any_index_of_weights(folder: Path, value: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": value}))
    with contextlib.ExitStack() as stack:
        assert str(folder) in refusal(lambda: open_tensors(folder, stack), ValueError, folder)
