from typing import Any


def pack_sequences(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("in work")
