"""Annealed variational inference: chains of kernels weighed against a target.

    from annealed_core import Spec, run
    r = run(Spec(experiment="toy", target="D", method="avo"))
    r.metrics["log_z"], r.chain.rsample(1000).z[-1]

`chain.py` holds the one idea; `targets`, `kernels`, `flows`, `objectives`, `schedules`, `evidence`, `ais`,
`likelihood` and `inference` are parts of it.
"""

from annealed_core import (
    ais,
    chain,
    data,
    evidence,
    flows,
    inference,
    kernels,
    likelihood,
    moves,
    objectives,
    schedules,
    targets,
)
from annealed_core.chain import Chain
from annealed_core.data import load_mnist
from annealed_core.experiment import Run, TrainingError, run
from annealed_core.kernels import DiagonalGaussian, GatedGaussianPair, ResidualGaussianPair
from annealed_core.spec import Spec
from annealed_core.sweep import sweep

__all__ = [
    "Chain",
    "DiagonalGaussian",
    "GatedGaussianPair",
    "ResidualGaussianPair",
    "Run",
    "Spec",
    "TrainingError",
    "ais",
    "chain",
    "data",
    "evidence",
    "flows",
    "inference",
    "kernels",
    "likelihood",
    "load_mnist",
    "moves",
    "objectives",
    "run",
    "schedules",
    "sweep",
    "targets",
]
