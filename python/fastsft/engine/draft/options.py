"""What ``speculative_config`` may hold: checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# method -> its further options and their defaults
_OPTIONS: dict[str, dict[str, Any]] = {
    "ngram": {"prompt_lookup_max": 4, "prompt_lookup_min": 2},
    "suffix": {"corpus": (), "min_match": 2},
    "draft_model": {"model": None, "num_speculative_paths": 1, "kv_cache_bytes": 64 << 20, "acceptance": "noise"},
    "heads": {"model": None, "num_speculative_paths": 1},
}
_COMMON: dict[str, Any] = {"num_speculative_tokens": 8, "adaptive": True}


def speculative_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The method and all of its options; names as in vLLM.

    Raises:
        ValueError: an unknown method or option, or a value out of range; the message names it.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"speculative_config: expected a mapping such as {{'method': 'ngram'}}, got {config!r:.100}")
    method = config.get("method")
    if not isinstance(method, str) or method not in _OPTIONS:
        raise ValueError(f"speculative_config: method: expected one of {', '.join(_OPTIONS)}, got {method!r}")
    options = {"method": method, **_COMMON, **_OPTIONS[method]}
    for name in config:
        if name not in options:
            known = ", ".join(n for n in options if n != "method")
            raise ValueError(f"speculative_config: {name}: unknown to {method}; it has {known}")
    options.update(config)
    for name in ("num_speculative_tokens", *(n for n, default in _OPTIONS[method].items() if type(default) is int)):
        low = options["prompt_lookup_min"] if name == "prompt_lookup_max" and name in options else 1
        value = options.get(name, low)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"speculative_config: {name}: expected an integer >= {low}, got {value!r}")
    if not isinstance(options["adaptive"], bool):
        raise ValueError(f"speculative_config: adaptive: expected True or False, got {options['adaptive']!r}")
    folder = options.get("model", ".")
    if not isinstance(folder, str | os.PathLike) or not Path(folder).is_dir():
        raise ValueError(f"speculative_config: model: expected a folder, got {folder!r}")
    if (rule := options.get("acceptance", "noise")) not in ("noise", "rejection"):
        raise ValueError(f"speculative_config: acceptance: expected 'noise' or 'rejection', got {rule!r}")
    if rule == "rejection" and (paths := options["num_speculative_paths"]) > 1:  # it judges one draft for each place
        raise ValueError(f"speculative_config: num_speculative_paths: expected 1 with rejection, got {paths}")
    texts = options.get("corpus", ())
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"speculative_config: corpus: expected a list of texts, got {texts!r:.100}")
    return options
