"""Two torch threads unless the environment says otherwise: the suite is sized for a two-core machine."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
