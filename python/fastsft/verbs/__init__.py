"""What each verb of the command line does: a function whose arguments become its flags.

Heavy imports sit inside the functions, so that help is quick.
"""

from fastsft.verbs.about import demo, info
from fastsft.verbs.benching import bench, bench_compare, bench_list
from fastsft.verbs.checking import check
from fastsft.verbs.console import UsageError
from fastsft.verbs.data import dedup, prepare
from fastsft.verbs.decontamination import decontaminate
from fastsft.verbs.evaluation import evaluate
from fastsft.verbs.iteration import iterate
from fastsft.verbs.merging import restore_layers, soup
from fastsft.verbs.model import generate, train
from fastsft.verbs.reporting import report
from fastsft.verbs.sampling import sample
from fastsft.verbs.serving import serve

__all__ = [
    "UsageError",
    "bench",
    "bench_compare",
    "bench_list",
    "check",
    "decontaminate",
    "dedup",
    "demo",
    "evaluate",
    "generate",
    "info",
    "iterate",
    "prepare",
    "report",
    "restore_layers",
    "sample",
    "serve",
    "soup",
    "train",
]
