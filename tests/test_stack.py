"""Stacks: many models at once are what they are one by one."""

import pytest
import torch
from torch import nn

from annealed_core import objectives
from annealed_core.chain import Chain
from annealed_core.flows import Householder, InverseAutoregressive, Planar, Spline
from annealed_core.kernels import DiagonalGaussian, GatedGaussianPair, ResidualGaussianPair
from annealed_core.stack import GaussianStack, MappedStack, stack
from annealed_core.targets import ENERGIES, linear_alphas

MAKE = {
    "gated": lambda: GatedGaussianPair(2, 8),
    "residual": lambda: ResidualGaussianPair(2, 8, near_identity=True),
    "planar": lambda: Planar(2),
    "householder": lambda: Householder(2),
    "iaf": lambda: InverseAutoregressive(2, (8, 8)),
    "spline": lambda: Spline(2, (8, 8), bins=4),
}
MODELS, STEPS, SAMPLES = 3, 4, 5


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def models(kind, n=MODELS, steps=STEPS):
    torch.manual_seed(0)
    return [nn.ModuleList(MAKE[kind]() for _ in range(steps)) for _ in range(n)]


def chains(kind, n=MODELS, steps=STEPS):
    """The stacked chain, and the same models each in a chain of its own; all start from bases of their own."""
    separate = models(kind, n, steps)
    loc, scale = torch.randn(n, 2), 1 + torch.rand(n, 2)
    own = [Chain(DiagonalGaussian(loc[m], scale[m]), separate[m]) for m in range(n)]
    return Chain(DiagonalGaussian(loc, scale), stack(separate)), own


def gradients(kind, stacked):
    """Each model's gradients by name, from those of the stack."""
    twin = stack(models(kind))
    for parameter, other in zip(stacked.parameters(), twin.parameters(), strict=True):
        other.data = torch.zeros_like(other) if parameter.grad is None else parameter.grad
    return twin.unstack()


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("kind", MAKE)
def test_a_stack_draws_what_its_models_draw_one_by_one(kind, local):
    together, own = chains(kind)
    noise = together.noise(SAMPLES)
    drawn = together.rsample(noise=noise, local=local)
    assert drawn.z.shape == (STEPS + 1, SAMPLES, MODELS, 2) and drawn.log_ratios.shape == (STEPS, SAMPLES, MODELS)
    for m, chain in enumerate(own):
        alone = chain.rsample(noise=noise[:, :, m], local=local)
        torch.testing.assert_close(drawn.z[:, :, m], alone.z)
        torch.testing.assert_close(drawn.log_ratios[:, :, m], alone.log_ratios)
        torch.testing.assert_close(drawn.log_q0[:, m], alone.log_q0)


@pytest.mark.parametrize("objective", ["elbo", "avo"])
@pytest.mark.parametrize("kind", MAKE)
def test_a_stack_has_the_gradients_of_its_models(kind, objective):
    together, own = chains(kind)
    noise, target = together.noise(SAMPLES), ENERGIES["D"]

    def value(chain, noise):
        if objective == "elbo":
            return objectives.elbo(chain, target, noise=noise)
        return objectives.avo(chain, target, linear_alphas(STEPS), noise=noise)

    value(together, noise).mean(0).sum().backward()
    for m, (chain, found) in enumerate(zip(own, gradients(kind, together.kernels), strict=True)):
        value(chain, noise[:, :, m]).mean().backward()
        for name, parameter in chain.kernels.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name], expected, msg=f"{kind} {name}")


@pytest.mark.parametrize("kind", ["gated", "iaf"])
def test_one_model_does_not_see_what_another_is_given(kind):
    together, _ = chains(kind)
    noise = together.noise(SAMPLES)
    spoiled = noise.clone()
    spoiled[:, :, 1] = torch.nan
    clean, other = together.rsample(noise=noise), together.rsample(noise=spoiled)
    for m in (0, 2):
        assert torch.equal(clean.z[:, :, m], other.z[:, :, m])
        assert torch.equal(clean.log_ratios[:, :, m], other.log_ratios[:, :, m])
    assert other.z[-1, :, 1].isnan().all()


@pytest.mark.parametrize("kind", ["gated", "residual", "iaf"])
def test_in_a_local_draw_a_transition_has_no_gradient_outside_its_own_kernel(kind):
    together, _ = chains(kind)
    drawn = together.rsample(SAMPLES, local=True)
    for step in range(STEPS):
        together.kernels.zero_grad()
        (drawn.log_ratios[step].sum() + drawn.z[step + 1].sum()).backward(retain_graph=True)
        for found in gradients(kind, together.kernels):
            touched = {name.split(".")[0] for name, value in found.items() if value.is_floating_point() and value.any()}
            masks = {name.split(".")[0] for name in found if "mask" in name}
            assert str(step) in touched and touched <= {str(step)} | masks


@pytest.mark.parametrize("kind", MAKE)
def test_unstacking_gives_back_the_weights_of_each_model(kind):
    separate = models(kind)
    for model, found in zip(separate, stack(separate).unstack(), strict=True):
        state = model.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["gated", "iaf"])
def test_samples_may_have_any_number_of_dimensions(kind):
    together, own = chains(kind)
    noise = together.noise((3, 2))
    assert noise.shape == (STEPS + 1, 3, 2, MODELS, 2)
    drawn = together.rsample(noise=noise)
    torch.testing.assert_close(drawn.z[:, :, :, 1], own[1].rsample(noise=noise[:, :, :, 1]).z)
    assert together.rsample().z.shape == (STEPS + 1, MODELS, 2)


@pytest.mark.parametrize("kind", ["gated", "iaf"])
def test_a_stack_of_one_is_its_model(kind):
    together, (alone,) = chains(kind, n=1)
    noise = together.noise(SAMPLES)
    torch.testing.assert_close(together.rsample(noise=noise).z[:, :, 0], alone.rsample(noise=noise[:, :, 0]).z)


def test_stacked_flows_may_differ_in_their_scale():
    separate = [nn.ModuleList([Spline(2, (8, 8), 4, scale=scale)]) for scale in (1.0, 7.0)]
    together, z = stack(separate), 6 * torch.randn(50, 2, 2)
    drawn, _ = together.rsample(z, torch.zeros(1, 50, 2, 2))
    for m in (0, 1):
        torch.testing.assert_close(drawn[-1, :, m], separate[m][0](z[:, m])[0])


def test_pairs_of_gaussians_are_batched_and_other_kernels_mapped():
    assert isinstance(stack(models("gated")), GaussianStack)
    assert isinstance(stack(models("iaf")), MappedStack)


@pytest.mark.parametrize("make", [lambda: GatedGaussianPair(2, 8, context_dim=3), lambda: Planar(2, context_dim=3)])
def test_kernels_with_a_context_are_refused(make):
    with pytest.raises(ValueError, match="models to be stacked must have kernels without a context"):
        stack([nn.ModuleList([make()]) for _ in range(2)])


def test_a_stack_without_kernels_draws_from_the_base():
    together = Chain(DiagonalGaussian(torch.zeros(3, 2), torch.ones(3, 2)), stack([nn.ModuleList()] * 3))
    drawn = together.rsample(7)
    assert drawn.z.shape == (1, 7, 3, 2) and drawn.log_ratios.shape == (0, 7, 3)


def test_models_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="models to be stacked must have the same kernels and shapes"):
        stack([nn.ModuleList([GatedGaussianPair(2, 8)]), nn.ModuleList([GatedGaussianPair(2, 9)])])
    with pytest.raises(ValueError, match="models to be stacked must have the same kernels and shapes"):
        stack([nn.ModuleList([GatedGaussianPair(2, 8)]), nn.ModuleList([Planar(2)])])
