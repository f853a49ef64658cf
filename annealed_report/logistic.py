"""A real posterior: which of 569 tumours is malignant, by Bayesian logistic regression on 30 features.

The 31 coefficients, the first of them the intercept, have the prior N(0, 1), on features with mean 0 and variance 1.
What is true of the posterior, long runs of NUTS say: `bench/reference.py`.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from annealed_core.energies import Energy, LogisticRegression
from annealed_report.results import ROOT

FOLDER = ROOT / "data" / "breast_cancer"


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    """Features, standardised, after a column of ones (569, 31), and labels, 1 for malignant (569,): double precision.

    Source and licence are those of `data/breast_cancer/README.md`.
    """
    table = torch.from_numpy(np.loadtxt(FOLDER / "wdbc.csv", delimiter=",", skiprows=1))
    features, benign = table[:, :-1], table[:, -1]
    features = (features - features.mean(0)) / features.std(0, correction=0)
    return torch.cat([torch.ones_like(table[:, :1]), features], 1), 1 - benign


@functools.cache
def reference() -> dict[str, Any]:
    """What is true of the posterior: `mean` and `sd` (31,), `log_z` in nats, and how they were found."""
    found: dict[str, Any] = json.loads((FOLDER / "reference.json").read_text(encoding="utf-8"))
    return found | {name: torch.tensor(found[name], dtype=torch.float64) for name in ("mean", "sd")}


@functools.cache
def draws() -> Tensor:
    """Draws of the posterior by NUTS, thinned: (2000, 31) in single precision."""
    return torch.from_numpy(np.load(FOLDER / "draws.npy"))


@functools.cache
def target() -> Energy:
    """The posterior, whose log Z is that of the reference; chains start from the prior."""
    density = LogisticRegression(*data())
    return Energy("logistic", density, dim=31, log_normalizer=reference()["log_z"])
