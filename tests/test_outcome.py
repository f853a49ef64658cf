"""What a run gives to others: a distribution of torch, draws for ArviZ, notes on what speaks against its figures."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, TransformedDistribution
from torch.distributions.transforms import AffineTransform

from annealed_core import IAF, Density, External, Gated, Householder, Planar, PyroModel, Residual, Spline, run
from annealed_core.dais import Leapfrog
from annealed_core.objectives import AVO, ELBO
from annealed_core.running.density import DensityProblem
from annealed_core.running.experiment import Run
from annealed_core.running.outcome import ChainDistribution, doubts
from annealed_core.running.system import optional

SMALL = Density(n_transitions=2, steps=60, batch=16, samples=200, lr=0.01)


def chain_of(spec):
    return spec.restore(DensityProblem([spec]).weights()[0])[1]


@pytest.mark.parametrize("kernel", [Planar(), Householder(), IAF(hidden=8), Spline(hidden=8)], ids=repr)
def test_the_density_of_flows_integrates_to_one_and_is_that_of_what_is_drawn(kernel):
    chain = chain_of(SMALL.replace(kernel=kernel))
    found = ChainDistribution(chain)
    trajectory = chain.rsample(50)
    drawn = trajectory.log_q0 - trajectory.log_ratios.sum(0)
    torch.testing.assert_close(found.log_prob(trajectory.z[-1]), drawn, atol=1e-3, rtol=1e-4)
    axis = torch.linspace(-12, 12, 241)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
    assert float(found.log_prob(grid).exp().sum()) * 0.01 == pytest.approx(1, abs=0.01)
    assert found.sample((3, 4)).shape == (3, 4, 2) and found.event_shape == (2,)
    moved = TransformedDistribution(found, AffineTransform(1.0, 2.0, event_dim=1))
    z = torch.zeros(2)
    assert float(moved.log_prob(2 * z + 1)) == pytest.approx(float(found.log_prob(z)) - 2 * math.log(2), abs=1e-5)


def test_a_chain_that_draws_on_the_way_has_no_density_and_says_so(store):
    found = run(SMALL.replace(kernel=Gated(hidden=4), target="many_well")).distribution
    assert found.sample((5,)).shape == (5, 32) and not found.sample().requires_grad
    with pytest.raises(TypeError, match=r"^GatedGaussianPair has no inverse, and so this chain no density"):
        found.log_prob(torch.zeros(32))


def test_a_chain_for_each_batch_is_none_for_all():
    with pytest.raises(AttributeError, match="a run of Density has a chain for each batch"):
        _ = Run(SMALL, {}, [], 0.0, torch.nn.Identity(), None).distribution


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        (
            {"pareto_k": 0.71},
            "Pareto k is 0.71, above 0.7: log_z, ess and all that is weighted are not to be relied on",
        ),
        ({"pareto_k": math.inf}, "Pareto k is inf"),
        ({"ess": 0.004}, "the effective sample size is 0.40% of the samples"),
        ({"elbo": -3.0, "log_z": 0.0}, "the ELBO lies 3.0 nats below log_z"),
        ({"is_minus_ais": -0.9}, "is_minus_ais is -0.90 nats: sampling and annealing disagree"),
        ({"notes": ["support misses mass"]}, "support misses mass"),
    ],
)
def test_what_speaks_against_figures_is_noted_in_a_line(metrics, line):
    (said,) = doubts(metrics)
    assert said.startswith(line) and "\n" not in said


def test_nothing_is_noted_of_a_run_that_is_sound_and_something_of_one_that_is_not(store):
    exact = SMALL.replace(target=MultivariateNormal(torch.zeros(2), torch.eye(2)), n_transitions=0, objective=ELBO())
    assert run(exact).notes == [] == doubts({"pareto_k": -math.inf, "ess": 1.0, "elbo": 0.0, "log_z": 0.0})
    afar = External(lambda z: (-50 * ((z - 4) ** 2).sum(1), -100 * (z - 4)), dim=2, log_normalizer=0.0)
    assert any("Pareto k" in line for line in run(exact.replace(target=afar)).notes)


def test_a_lost_mode_is_noted_where_the_target_declares_its_modes(store):
    (said,) = doubts({"mode_shares": [0.76, 0.039, 0.201]}, masses=[0.5, 0.2, 0.3])
    assert said == "mode 1 has 0.039 of the samples, and 0.200 of the target's mass: it is lost"
    assert doubts({"mode_shares": [0.76, 0.041, 0.199]}, masses=[0.5, 0.2, 0.3]) == doubts({"mode_shares": None}) == []

    class Far:
        dim, modes = 1, (torch.tensor([[0.0], [50.0]]), torch.tensor([0.5, 0.5]))

        def log_prob(self, z):
            return -0.5 * torch.minimum(z.square(), (z - 50).square()).sum(-1)

    notes = run(SMALL.replace(target=Far(), n_transitions=0, objective=ELBO())).notes
    assert [line for line in notes if "lost" in line] == [
        "mode 1 has 0.000 of the samples, and 0.500 of the target's mass: it is lost"
    ]


@pytest.mark.parametrize(
    ("log_z", "error", "declared", "noted"),
    [
        (2.75, 0.01, 100.0, True),
        (2.75, 0.01, 2.2, True),
        (2.75, 0.01, 2.3, False),
        (2.75, 0.2, 1.8, False),
        (2.75, None, 2.2, True),
        (2.75, math.nan, 2.3, False),
        (2.75, 0.01, None, False),
    ],
)
def test_a_log_normalizer_that_the_figures_contradict_is_noted(log_z, error, declared, noted):
    found = doubts({"log_z": log_z, "log_z_se": error}, declared)
    assert len(found) == noted
    for line in found:
        assert line.startswith("log_z is 2.75 +- ") and f"declares log_normalizer {declared:g}: either" in line


def test_a_run_notes_that_its_target_declares_another_log_normalizer(store):
    exact = MultivariateNormal(torch.zeros(3), torch.eye(3))
    for declared in (0.0, 100.0):
        own = type("Own", (), {"dim": 3, "log_normalizer": declared, "log_prob": lambda self, z: exact.log_prob(z)})()
        notes = run(SMALL.replace(target=own, n_transitions=0)).notes
        assert sum("declares log_normalizer 100" in line for line in notes) == (declared > 0)


def test_draws_for_arviz_have_their_weights(store):
    warnings.simplefilter("ignore")
    pytest.importorskip("arviz")
    r = run(SMALL.replace(target=MultivariateNormal(torch.zeros(2), torch.eye(2)), objective=ELBO(), n_transitions=0))
    found = r.to_arviz(draws=20, chains=3)
    assert found.posterior["z"].shape == (3, 20, 2) and found.sample_stats["log_weight"].shape == (3, 20)
    assert np.isfinite(found.sample_stats["log_weight"].to_numpy()).all()


def test_without_an_extra_one_line_says_how_to_have_it():
    with pytest.raises(ImportError, match=r"^nothing_of_that_name is missing: pip install 'annealed_core\[arviz\]'$"):
        optional("nothing_of_that_name", "arviz")


# ---- Pyro


@pytest.fixture
def pyro():
    return pytest.importorskip("pyro")


def test_the_posterior_of_a_pyro_model_is_the_conjugate_one_in_unconstrained_space(store, pyro):
    """A normal mean with a known answer, and a Gamma rate, whose logarithm is what the chain sees."""
    x = torch.tensor([0.3, 1.2, 0.8])

    def model(x):
        mean = pyro.sample("mean", pyro.distributions.Normal(0.0, 2.0))
        rate = pyro.sample("rate", pyro.distributions.Gamma(3.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", pyro.distributions.Normal(mean, 1.0), obs=x)
            pyro.sample("y", pyro.distributions.Exponential(rate), obs=x)

    target = PyroModel(model, x)
    assert target.dim == 2 and target.name == "model"
    z = torch.randn(5, 3, 2)
    mean, rate = z[..., 0], z[..., 1].exp()
    by_hand = torch.distributions.Normal(0.0, 2.0).log_prob(mean) + torch.distributions.Gamma(3.0, 2.0).log_prob(rate)
    by_hand = by_hand + torch.distributions.Normal(mean.unsqueeze(-1), 1.0).log_prob(x).sum(-1) + z[..., 1]
    by_hand = by_hand + torch.distributions.Exponential(rate.unsqueeze(-1)).log_prob(x).sum(-1)
    torch.testing.assert_close(target.log_prob(z), by_hand)
    torch.testing.assert_close(target.constrained(z)["rate"], rate)
    r = run(SMALL.replace(target=target, kernel=IAF(hidden=8), steps=600, batch=64, samples=4000))
    draws = target.constrained(r.chain.rsample(4000).z[-1])
    precision = 1 / 4 + 3
    assert float(draws["mean"].mean()) == pytest.approx(float(x.sum()) / precision, abs=0.1)
    assert float(draws["rate"].mean()) == pytest.approx(6 / (2 + float(x.sum())), abs=0.15)


def test_a_model_without_latent_sites_is_refused(pyro):
    with pytest.raises(ValueError, match=r"^Pyro's model nothing has no continuous latent sites$"):
        PyroModel(nothing, pyro)


def nothing(pyro):
    pyro.sample("x", pyro.distributions.Normal(0.0, 1.0), obs=torch.zeros(()))


# ---- dimensions


@pytest.mark.parametrize("dim", [1, 2, 3, 10, 32, 100])
@pytest.mark.parametrize(
    "kernel",
    [Gated(), Residual(), Planar(), Householder(), IAF(hidden=100), Spline(hidden=100), Leapfrog()],
    ids=lambda kernel: type(kernel).__name__,
)
def test_every_kernel_trains_in_one_to_a_hundred_dimensions(store, kernel, dim):
    """Towards N(0, I), from N(0, I): whatever kernels do, log Z is 0 and no bound lies above it."""
    target = MultivariateNormal(torch.zeros(dim), torch.eye(dim))
    r = run(Density(target=target, kernel=kernel, n_transitions=1, steps=3, batch=8, samples=400, objective=AVO()))
    assert r.metrics["elbo"] <= r.metrics["log_z"] + 1e-6 and r.chain.rsample(2).z.shape == (2, 2, dim)
    assert r.metrics["elbo"] < 6 * r.metrics["log_z_se"] + 1e-3 and math.isfinite(r.metrics["ess"])
