"""What a run that goes on must have in common with the one that was interrupted."""

from __future__ import annotations

from typing import Any

from fastsft.config import ConfigError, load_config, to_dict
from fastsft.train.checkpoint import Checkpoint

# Settings that do not change the weights; every other difference to the checkpoint's configuration stops a resume.
# What the files of the last line hold is compared, wherever they lie: it is in the data's key and the model's digest.
_FREE = {
    "output", "train.eval_every", "train.save_every", "train.keep", "train.async_save", "train.parallel",
    "log", "samples", "eval",
    "model.path", "tokenizer.path", "data.train", "data.eval", "data.decontaminate.against", "data.sources.files",
}  # fmt: skip


def refuse_changes(found: Checkpoint, config: dict[str, Any], *, data: str | None, origin: str) -> None:
    """Compare with what the checkpoint's run was made of.

    Args:
        data, origin: key of the prepared data, and digest of the model that the run starts from.

    Raises:
        ConfigError: naming everything that differs and could change the result.
    """
    changed = sorted(_differences(_completed(found.state["config"]), config))
    if found.state["data"] != data:
        changed.append("the data")
    if found.state.get("origin") != origin:
        changed.append("the model it started from (weights or config.json)")
    if changed:
        raise ConfigError(
            f"{found.path} was written with other settings: {', '.join(changed)}. "
            "Restore them, or choose another output folder"
        )


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of keys that came after it was written; as it is, if it has one that is gone."""
    try:
        return to_dict(load_config(config))
    except ConfigError:
        return config


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of the settings that differ and that can change the result."""
    names: set[str] = set()
    for key in old.keys() | new.keys():
        name = f"{prefix}{key}"
        a, b = old.get(key), new.get(key)
        if name in _FREE or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict) and name != "model.init":
            names |= _differences(a, b, f"{name}.")
        elif name == "data.sources" and isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            for one, other in zip(a, b, strict=True):
                names |= _differences(one, other, f"{name}.")
        else:
            names.add(name)
    return names
