"""Annealed variational inference: chains of kernels weighed against a target.

    from annealed_core import AVO, Density, run
    r = run(Density(target="D", objective=AVO()))
    r.metrics["log_z"], r.chain.rsample(1000).z[-1]

The modules here are the mathematics, `chain` the one idea; `running` trains what a description says and keeps it.
"""

from annealed_core.chain import Chain, Trajectory
from annealed_core.dais import Drift, Leapfrog
from annealed_core.decoders import Autoregressive, LocallyMasked
from annealed_core.fit import fit
from annealed_core.flows import IAF, Householder, Planar, Spline
from annealed_core.kernels import DiagonalGaussian, Gated, Residual
from annealed_core.nested import NVI, Inclusive, TrajectoryBalance, sequential
from annealed_core.objectives import AVO, ELBO, IWAE, AlphaELBO, LocalAVO
from annealed_core.running.density import Density
from annealed_core.running.experiment import Experiment, Run, TrainingError, run
from annealed_core.running.external import External, PyroModel
from annealed_core.running.former import Spec
from annealed_core.running.mnist import Mnist
from annealed_core.running.sweep import sweep
from annealed_core.schedules import Between, Constant, Cyclical, Geometric, Linear, Mixed, Then
from annealed_core.targets import ENERGIES, GeometricAlphas, LearnedAlphas, LinearAlphas
from annealed_core.vae import VAE, Independent
from annealed_core.variants import MIWAE, BetaELBO, BetaTC, CapacityELBO, FreeBits, JointCapacity, Relaxed

# fmt: off
__all__ = [
    "AVO", "ELBO", "ENERGIES", "IAF", "IWAE", "MIWAE", "NVI", "VAE", "AlphaELBO", "Autoregressive", "BetaELBO",
    "BetaTC", "Between", "CapacityELBO", "Chain", "Constant", "Cyclical", "Density", "DiagonalGaussian", "Drift",
    "Experiment", "External", "FreeBits", "Gated", "Geometric", "GeometricAlphas", "Householder", "Inclusive",
    "Independent", "JointCapacity", "Leapfrog", "LearnedAlphas", "Linear", "LinearAlphas", "LocalAVO", "LocallyMasked",
    "Mixed", "Mnist", "Planar", "PyroModel", "Relaxed", "Residual", "Run", "Spec", "Spline", "Then", "TrainingError",
    "Trajectory", "TrajectoryBalance", "fit", "run", "sequential", "sweep",
]
