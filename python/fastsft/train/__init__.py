"""Training. The package itself is callable: ``fastsft.train(config)`` runs what the configuration describes.

Hazard: a plain function ``fastsft.train`` would be replaced by this subpackage whenever one of its modules is first
imported, since the import system sets the parent's attribute. A callable module is right in either order.
"""

from __future__ import annotations

import os
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsft.config import Config
    from fastsft.train.trainer import TrainResult


def train(config: Config | dict[str, Any] | str | os.PathLike[str], *, progress: bool = True) -> TrainResult:
    """Run a configuration to its end, resuming from its newest valid checkpoint.

    Under torchrun the processes share the run, and each returns the result.

    Args:
        config: a :class:`fastsft.Config`, the same as nested dicts, or the path of a TOML file.
        progress: show a progress bar (lines where the output is no terminal).

    Returns:
        Losses before and after, throughput, and the folder of the tuned model.

    Raises:
        ConfigError, DataError: input that cannot be used. NonFiniteError: the loss or gradient was NaN or infinite; the
            weights are those before the offending step.
    """
    from fastsft.config import load_config
    from fastsft.train.distributed import joined
    from fastsft.train.trainer import Trainer

    with joined() as world:
        return Trainer(load_config(config), progress=progress, world=world).run()


class _CallablePackage(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> TrainResult:
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
