"""What holds of every kernel; of flows inverses, determinants against autograd, densities, recipes."""

import itertools
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from draws import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacrev, vmap

from annealed_core import evidence
from annealed_core.chain import Chain
from annealed_core.flows import (
    IAF,
    AutoregressiveFlow,
    Householder,
    HouseholderSequence,
    Planar,
    PlanarFlow,
    Spline,
    SplineFlow,
)
from annealed_core.kernels import DiagonalGaussian, GatedGaussianPair, ResidualGaussianPair

FLOWS = {
    "planar": PlanarFlow,
    "planar, scale 3": partial(PlanarFlow, scale=3.0),
    "householder": HouseholderSequence,
    "householder sequence": lambda dim, context_dim=0: HouseholderSequence(dim, context_dim, 3),
    "iaf": partial(AutoregressiveFlow, hidden=(16, 16)),
    "iaf, reversed, scale 3": partial(AutoregressiveFlow, hidden=(16, 16), reverse=True, scale=3.0),
    "spline": partial(SplineFlow, hidden=(16, 16)),
    "spline, reversed, scale 3": partial(SplineFlow, hidden=(16, 16), bins=5, bound=3.0, reverse=True, scale=3.0),
}
PAIRS = {"gated": partial(GatedGaussianPair, hidden=8), "residual": partial(ResidualGaussianPair, hidden=8)}
every_flow = pytest.mark.parametrize("name", FLOWS)
every_kernel = pytest.mark.parametrize("name", FLOWS | PAIRS)
every_autoregressive = pytest.mark.parametrize("make", [AutoregressiveFlow, SplineFlow])
every_scaled = pytest.mark.parametrize("make", [PlanarFlow, AutoregressiveFlow, SplineFlow])
every_context = pytest.mark.parametrize("context_dim", [0, 5])
every_dim = pytest.mark.parametrize("dim", [1, 2, 7])


def flow(name, dim=3, context_dim=0, seed=0, move=0.3):
    """A kernel some way from where it starts, so that what is tested is not the identity."""
    torch.manual_seed(seed)
    kernel = (FLOWS | PAIRS)[name](dim, context_dim=context_dim).double()
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.add_(move * torch.randn_like(parameter))
    return kernel


def context_of(context_dim, *batch):
    return draw(*batch, context_dim) if context_dim else None


@every_flow
@every_context
@every_dim
def test_log_ratio_is_the_log_determinant_of_autograds_jacobian(name, dim, context_dim):
    kernel, z, context = flow(name, dim, context_dim), 2 * draw(20, dim), context_of(context_dim, 20)
    log_ratio = kernel(z, context)[1].detach()
    assert log_ratio.any() == (not name.startswith("householder"))
    for row in range(20):
        one = None if context is None else context[row]
        jacobian = jacrev(lambda z, one=one: kernel(z, one)[0])(z[row])
        torch.testing.assert_close(log_ratio[row], torch.linalg.slogdet(jacobian.detach())[1], atol=1e-8, rtol=0)


@every_flow
@every_context
@every_dim
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6)])
@torch.no_grad()
def test_an_inverse_takes_a_flow_back_for_any_batch_and_a_context_that_its_samples_share(name, context_dim, dim, shape):
    kernel, z, context = flow(name, dim, context_dim), 3 * draw(*shape, dim), context_of(context_dim, 6)
    z_next, _ = kernel(z, context)
    assert (z_next - z).abs().max() > 0.1
    torch.testing.assert_close(kernel.inverse(z_next, context), z, atol=1e-7, rtol=0)
    shared = z.select(-2, 0).unsqueeze(-2)  # the same z for all contexts
    found = kernel.inverse(shared.expand((*shape, dim)), context)
    torch.testing.assert_close(kernel(found, context)[0], shared.expand_as(found), atol=1e-7, rtol=0)


@every_flow
@torch.no_grad()
def test_float32_stays_float32_and_the_inverse_comes_as_close_as_it_allows(name):
    kernel, z, context = flow(name, 7, 5).float(), draw(200, 7).float(), draw(200, 5).float()
    z_next, log_ratio = kernel(z, context)
    found = kernel.inverse(z_next, context)
    assert z_next.dtype == log_ratio.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found, z, atol=2e-4, rtol=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    product=st.floats(-40, 40),
    length=st.floats(-3, 2).map(lambda power: 10.0**power),
    offset=st.floats(-5, 5),
    scale=st.floats(0.1, 20),
)
@torch.no_grad()
def test_the_inverse_of_a_planar_flow_is_exact_however_strongly_it_bends(product, length, offset, scale):
    torch.manual_seed(0)
    kernel, w, across = PlanarFlow(3, scale=scale).double(), torch.nn.functional.normalize(draw(3), dim=0), draw(3)
    across -= (across @ w) * w
    w = length * w
    kernel.coefficients.free.copy_(torch.cat([product * w / (w @ w) + across, w, torch.tensor([offset])]))
    z = scale * torch.cat([4 * draw(100, 3), torch.linspace(-1.2, 1.2, 101).unsqueeze(-1) * (-offset * w / (w @ w))])
    z_next, log_ratio = kernel(z)
    rounding = 1e-13 * (z_next.abs().amax(-1) + z.abs().amax(-1) + scale * kernel._allowed(None)[0].abs().amax())
    found = kernel.inverse(z_next)
    assert (kernel(found)[0] - z_next).abs().amax(-1).le(rounding).all()
    # What the flow has pressed together by a factor comes back with a rounding that is larger by as much.
    assert (found - z).abs().amax(-1).le(rounding * (1 + (-log_ratio).exp())).all()


@every_flow
@torch.no_grad()
def test_a_density_pushed_through_a_flow_integrates_to_one(name):
    kernel = flow(name, 2)
    z_next, area = evidence.grid(20.0, 300)
    z = kernel.inverse(z_next)
    density = DiagonalGaussian.isotropic(2, 2.0).log_prob(z) - kernel(z)[1]
    assert float(density.exp().sum() * area) == pytest.approx(1, abs=0.01)


@every_kernel
@every_context
@pytest.mark.parametrize("dim", [2, 7])
def test_every_parameter_gets_a_gradient(name, dim, context_dim):
    kernel = flow(name, dim, context_dim)
    z_next, log_ratio = kernel(draw(64, dim), context_of(context_dim, 64))
    (log_ratio.sum() + (z_next - 1).pow(4).sum()).backward()
    for parameter_name, parameter in kernel.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), parameter_name


@every_kernel
@every_context
@pytest.mark.parametrize("shape", [(), (6,), (4, 6)])
def test_batch_shapes_are_kept_and_context_is_shared_by_all_samples(name, context_dim, shape):
    kernel, z, noise = flow(name, 3, context_dim), draw(*shape, 3), draw(*shape, 3)
    context = context_of(context_dim, *shape[-1:])
    z_next, log_ratio = kernel(z, context, noise)
    assert z_next.shape == (*shape, 3) and log_ratio.shape == shape
    for index in itertools.product(*map(range, shape)):
        one = context if context is None or shape == () else context[index[-1]]
        torch.testing.assert_close(kernel(z[index], one, noise[index]), (z_next[index], log_ratio[index]))


@every_kernel
def test_context_changes_the_transition_and_noise_that_of_a_pair_alone(name):
    kernel, z, context, noise = flow(name, 3, 5), draw(6, 3), draw(6, 5), draw(6, 3)
    z_next, log_ratio = kernel(z, context, noise)
    assert not torch.equal(z_next, kernel(z, draw(6, 5), noise)[0])
    for other in (draw(6, 3), None):
        again, again_ratio = kernel(z, context, other)
        assert (torch.equal(again, z_next) and torch.equal(again_ratio, log_ratio)) == (name in FLOWS)


@every_flow
def test_the_state_dict_has_all_that_a_flow_is(name):
    kernel, other, z, context = flow(name, 3, 5), flow(name, 3, 5, seed=1), draw(6, 3), draw(6, 5)
    assert not torch.equal(kernel(z, context)[0], other(z, context)[0])
    other.load_state_dict(kernel.state_dict())
    assert all(map(torch.equal, kernel(z, context), other(z, context)))


@every_scaled
@every_dim
def test_scale_is_the_unit_in_which_a_flow_sees_z(make, dim):
    one, wide = make(dim).double(), make(dim, scale=20.0).double()
    wide.load_state_dict(one.state_dict() | {"scale": torch.tensor(20.0)})
    z = draw(50, dim)
    (z_next, log_ratio), (wide_next, wide_ratio) = one(z), wide(20 * z)
    torch.testing.assert_close(wide_next, 20 * z_next)
    torch.testing.assert_close(wide_ratio, log_ratio)


@every_scaled
@every_dim
def test_flows_start_near_the_identity(make, dim):
    moved, log_ratios = [], []
    for seed in range(10):
        torch.manual_seed(seed)
        z = torch.randn(500, dim)
        z_next, log_ratio = make(dim)(z)
        moved.append((z_next - z).abs().mean())
        log_ratios.append(log_ratio.abs().mean() / dim)
    assert torch.stack(moved).mean() < 0.3 and torch.stack(log_ratios).mean() < 0.2


@every_autoregressive
@pytest.mark.parametrize("reverse", [False, True])
def test_each_dimension_depends_on_all_that_come_before_it_and_on_no_other(make, reverse):
    torch.manual_seed(0)
    kernel = make(5, reverse=reverse).double()
    jacobians = vmap(jacrev(lambda z: kernel(z)[0]))(2 * draw(50, 5)).abs().amax(0)
    before = torch.ones(5, 5).triu() if reverse else torch.ones(5, 5).tril()
    assert torch.equal(jacobians > 0, before.bool())


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_a_spline_keeps_its_interval_and_is_the_identity_outside(scale):
    torch.manual_seed(0)
    kernel = SplineFlow(2, bound=3.0, scale=scale).double()
    z = 6 * scale * draw(500, 2)
    z_next, log_ratio = kernel(z)
    inside = z.abs() < 3 * scale
    torch.testing.assert_close(z_next[~inside], z[~inside])
    assert (z_next[inside].abs() <= 3 * scale).all() and (z_next[inside] != z[inside]).any()
    assert not log_ratio[~inside.any(-1)].any() and log_ratio[inside.all(-1)].all()


def test_a_planar_flow_is_the_formula_of_the_paper():
    kernel, z = flow("planar", 3), draw(6, 3)
    u, w, b = kernel.coefficients.free.detach().split([3, 3, 1])
    product = u @ w
    u = u + (math.log1p(math.exp(product + math.log(math.e - 1))) - 1 - product) * w / (w @ w)
    h = torch.tanh(z @ w + b)
    z_next, log_ratio = kernel(z)
    torch.testing.assert_close(z_next, z + h.unsqueeze(-1) * u)
    torch.testing.assert_close(log_ratio, (1 + (1 - h**2) * (u @ w)).abs().log())


def test_a_planar_flow_with_u_of_zero_is_the_identity():
    kernel, z = PlanarFlow(2).double(), draw(6, 2)
    with torch.no_grad():
        kernel.coefficients.free.copy_(torch.tensor([0.0, 0.0, 1.0, -2.0, 0.5]))
    z_next, log_ratio = kernel(z)
    torch.testing.assert_close(z_next, z)
    torch.testing.assert_close(log_ratio, torch.zeros(6, dtype=torch.float64))


def test_householder_changes_nothing_of_an_isotropic_base():
    kernel, base, z = flow("householder", 4), DiagonalGaussian.isotropic(4, 2.0), draw(100, 4)
    z_next, log_ratio = kernel(z)
    assert not log_ratio.any() and (z_next - z).abs().max() > 0.1
    torch.testing.assert_close(base.log_prob(z_next), base.log_prob(z))


def test_householder_reflects_its_vector_and_keeps_what_is_at_right_angles_to_it():
    kernel = flow("householder", 3)
    v = kernel.first.free.detach()
    across = torch.linalg.cross(v, draw(3))
    torch.testing.assert_close(kernel(v)[0], -v)
    torch.testing.assert_close(kernel(across)[0], across)


RECIPES = {
    "planar": Planar,
    "householder": Householder,
    "iaf": partial(IAF, hidden=8),
    "spline": partial(Spline, hidden=8),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@every_recipe
@every_context
def test_a_recipe_builds_kernels_that_chain(recipe, context_dim):
    kernels = RECIPES[recipe]().build(3, 4, context_dim)
    assert len(kernels) == (1 if recipe == "householder" and context_dim else 4)
    chain = Chain(DiagonalGaussian.isotropic(3), kernels, torch.randn(context_dim) if context_dim else None)
    trajectory = chain.rsample(5)
    assert trajectory.z.shape == (len(kernels) + 1, 5, 3) and trajectory.log_ratios.shape == (len(kernels), 5)
    assert RECIPES[recipe]().build(3, 0, context_dim) == []


@pytest.mark.parametrize("recipe, told", [("planar", 5.0), ("iaf", 5.0), ("spline", 9.2)])
def test_a_recipe_takes_its_scale_from_the_target_unless_it_has_one(recipe, told):
    def scales(recipe):
        return {round(float(kernel.scale), 6) for kernel in recipe.build(2, 3)}

    make = RECIPES[recipe]
    assert scales(make()) == {1.0} and scales(make(scale=2.0).for_target(5.0, 46.0)) == {2.0}
    assert scales(make().for_target(5.0, 46.0)) == {told}
    assert make().for_target(5.0, 46.0) == make(scale=told)
    assert Householder().for_target(5.0, 46.0) == Householder()  # reflections have no scale


@pytest.mark.parametrize("recipe", ["iaf", "spline"])
def test_every_second_autoregressive_kernel_takes_the_dimensions_in_reverse(recipe):
    z, other = torch.randn(5, 3), torch.randn(5, 3)
    other[:, 0] = z[:, 0]
    first_kept = [torch.equal(kernel(z)[0][:, 0], kernel(other)[0][:, 0]) for kernel in RECIPES[recipe]().build(3, 4)]
    assert first_kept == [True, False, True, False]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: IAF(hidden=0), "impossible hidden 0 of IAF: hidden takes a whole number from 1"),
        (lambda: Spline(bins=1), "impossible bins 1 of Spline: bins takes a whole number from 2"),
        (lambda: Planar(scale=0.0), "impossible scale 0.0 of Planar: scale takes a number above 0"),
    ],
)
def test_recipes_refuse_impossible_numbers(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_torch_checks_its_arguments_after_the_import_as_before():
    """In a process of its own: zuko, which the flows come from, turns these checks off."""
    lines = [
        "import annealed_core, torch",
        "from torch.distributions import Normal",
        "def refused():",
        "    try: Normal(0.0, -1.0)",
        "    except ValueError: return True",
        "assert refused(), 'after the import'",
        "for recipe in (annealed_core.IAF(), annealed_core.Spline()):",
        "    recipe.build(2, 1)[0](torch.zeros(3, 2))",
        "assert refused(), 'after its use'",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
