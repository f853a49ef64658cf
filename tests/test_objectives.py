"""Objectives: whose gradient reaches what, and which of them are the same in which limit."""

import itertools

import pytest
import torch
from torch import nn

from annealed_core.chain import Chain
from annealed_core.kernels import DiagonalGaussian, GatedGaussianPair
from annealed_core.objectives import alpha_elbo, avo, avo_steps, beta_elbo, calibrated_avo, capacity_elbo, elbo, iwae
from annealed_core.targets import ENERGIES, linear_alphas
from annealed_core.vae import VAE

T = 3
every_energy = pytest.mark.parametrize("name", [name for name, target in ENERGIES.items() if target.dim == 2])
every_beta = pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
every_start = pytest.mark.parametrize("near_identity", [False, True])


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def toy_chain(n_transitions=T, near_identity=False):
    """A chain in float64 whose base has trainable parameters."""
    torch.manual_seed(0)
    base = DiagonalGaussian((0.1 * draw(2)).requires_grad_(), draw(2).exp().requires_grad_())
    kernels = nn.ModuleList(GatedGaussianPair(2, 8, near_identity=near_identity) for _ in range(n_transitions))
    return Chain(base, kernels.double())


def vae_and_images(n_transitions=T, train=False, batch=6, near_identity=False, layers="plain"):
    """A tiny auto-encoder in float64, its batch statistics not those of its initialisation."""
    torch.manual_seed(0)
    kernels = (GatedGaussianPair(3, 8, 10, near_identity) for _ in range(n_transitions))
    vae = VAE(3, 10, kernels, layers).double().train()
    x = (torch.rand(batch, 784) < 0.3).double()
    with torch.no_grad():
        vae.joint(x).log_prob(2 * vae.posterior(x).rsample().z[-1])
    return vae.train(train), x


def gradients(value, parameters):
    return torch.autograd.grad(value.sum(), list(parameters), allow_unused=True, retain_graph=True)


def absent(found):
    return all(gradient is None or not gradient.any() for gradient in found)


def present(found):
    return all(gradient is not None and gradient.any() and gradient.isfinite().all() for gradient in found)


def assert_local(steps, kernels, others):
    for t in range(T):
        for s, kernel in enumerate(kernels):
            if s == t:
                assert present(gradients(steps[t], kernel.forwards.parameters()))
                assert present(gradients(steps[t], kernel.reverse.parameters()))
            else:
                assert absent(gradients(steps[t], kernel.parameters())), f"step {t + 1} reaches kernel {s + 1}"
        assert absent(gradients(steps[t], others)), f"step {t + 1} reaches base, encoder or decoder"


@every_energy
@every_start
def test_avo_step_has_no_gradient_outside_its_transition(name, near_identity):
    chain = toy_chain(near_identity=near_identity)
    steps = avo_steps(chain, ENERGIES[name], linear_alphas(T), sample_shape=16)
    assert steps.shape == (T, 16)
    assert_local(steps, chain.kernels, [chain.base.loc, chain.base.scale])


@pytest.mark.parametrize("train", [False, True])
@every_start
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_avo_step_has_no_gradient_outside_its_transition_in_an_auto_encoder(train, near_identity, beta):
    vae, x = vae_and_images(train=train, near_identity=near_identity)
    steps = avo_steps(vae.posterior(x), vae.joint(x), linear_alphas(T), beta)
    assert_local(steps, vae.kernels, [*vae.encoder.parameters(), *vae.decoder.parameters()])


def test_avo_steps_context_gets_no_gradient():
    chain = toy_chain()
    context = draw(5, 4).requires_grad_()
    kernels = nn.ModuleList(GatedGaussianPair(2, 8, 4) for _ in range(T)).double()
    chain = Chain(DiagonalGaussian(draw(5, 2), draw(5, 2).exp()), kernels, context)
    assert present(gradients(elbo(chain, ENERGIES["A"]), [context]))
    assert absent(gradients(avo_steps(chain, ENERGIES["A"], linear_alphas(T)), [context]))


@every_energy
@every_start
def test_avo_with_one_transition_has_the_gradient_of_the_elbo(name, near_identity):
    chain = toy_chain(1, near_identity)
    noise = chain.noise(32)
    parameters = list(chain.kernels.parameters())
    ours = gradients(avo(chain, ENERGIES[name], linear_alphas(1), noise=noise), parameters)
    theirs = gradients(elbo(chain, ENERGIES[name], noise=noise), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_avo_with_one_transition_has_the_gradient_of_the_beta_elbo(beta):
    vae, x = vae_and_images(1)
    chain, joint = vae.posterior(x), vae.joint(x)
    noise = chain.noise(4)
    ours = gradients(avo(chain, joint, linear_alphas(1), beta, noise=noise), vae.kernels.parameters())
    theirs = gradients(beta_elbo(chain, joint, beta, noise=noise), vae.kernels.parameters())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_avo_with_several_transitions_has_another_gradient_than_the_elbo():
    chain = toy_chain()
    noise = chain.noise(32)
    parameters = list(chain.kernels[0].parameters())
    ours = gradients(avo(chain, ENERGIES["A"], linear_alphas(T), noise=noise), parameters)
    theirs = gradients(elbo(chain, ENERGIES["A"], noise=noise), parameters)
    assert any((a - b).abs().max() > 0.1 for a, b in zip(ours, theirs, strict=True))


@every_energy
@pytest.mark.parametrize("n_transitions", [1, 2, 5])
def test_avo_steps_sum_to_the_elbo(name, n_transitions):
    chain = toy_chain(n_transitions)
    noise = chain.noise((2, 8))
    steps = avo_steps(chain, ENERGIES[name], linear_alphas(n_transitions), noise=noise)
    assert steps.shape == (n_transitions, 2, 8)
    whole = elbo(chain, ENERGIES[name], noise=noise)
    torch.testing.assert_close(steps.sum(0), whole, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(
        avo(chain, ENERGIES[name], linear_alphas(n_transitions), noise=noise), whole, atol=1e-9, rtol=1e-9
    )


@every_beta
def test_avo_steps_sum_to_the_beta_elbo(beta):
    vae, x = vae_and_images()
    chain, joint = vae.posterior(x), vae.joint(x)
    noise = chain.noise(4)
    steps = avo_steps(chain, joint, linear_alphas(T), beta, noise=noise)
    torch.testing.assert_close(steps.sum(0), beta_elbo(chain, joint, beta, noise=noise), atol=1e-9, rtol=1e-9)


def test_avo_step_is_its_formula():
    chain = toy_chain()
    noise, target = chain.noise(8), ENERGIES["B"]
    alphas = torch.tensor([0, 0.25, 0.75, 1])
    trajectory = chain.rsample(noise=noise)
    log_f = [
        a * target.log_prob(z) + (1 - a) * chain.base.log_prob(z) for a, z in zip(alphas, trajectory.z, strict=True)
    ]
    by_hand = torch.stack([log_f[t] + trajectory.log_ratios[t - 1] - log_f[t - 1] for t in range(1, T + 1)])
    torch.testing.assert_close(avo_steps(chain, target, alphas, noise=noise), by_hand, atol=1e-9, rtol=1e-9)


def test_avo_of_an_auto_encoder_scales_everything_but_the_likelihood_by_beta():
    vae, x = vae_and_images()
    chain, joint, beta = vae.posterior(x), vae.joint(x), 0.3
    noise = chain.noise()
    alphas = torch.tensor([0, 0.25, 0.75, 1])
    trajectory = chain.rsample(noise=noise)
    log_f = [
        a * (joint.log_likelihood(z) + beta * joint.log_prior(z)) + (1 - a) * beta * chain.base.log_prob(z)
        for a, z in zip(alphas, trajectory.z, strict=True)
    ]
    by_hand = torch.stack([log_f[t] + beta * trajectory.log_ratios[t - 1] - log_f[t - 1] for t in range(1, T + 1)])
    torch.testing.assert_close(avo_steps(chain, joint, alphas, beta, noise=noise), by_hand, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_avo_refuses_alphas_for_another_number_of_transitions(n):
    with pytest.raises(ValueError, match=f"alphas must have {T + 1} values for {T} transitions, got {n}"):
        avo_steps(toy_chain(), ENERGIES["A"], linear_alphas(n - 1), sample_shape=4)


@every_beta
def test_calibrated_avo_with_weight_zero_is_the_elbo(beta):
    vae, x = vae_and_images()
    chain, joint = vae.posterior(x), vae.joint(x)
    noise = chain.noise(2)
    ours = calibrated_avo(chain, joint, linear_alphas(T), 0.0, beta, noise=noise)
    theirs = beta_elbo(chain, joint, beta, noise=noise)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    parameters = list(vae.parameters())
    for a, b in zip(gradients(ours, parameters), gradients(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_calibrated_avo_with_weight_one_is_avo(beta):
    vae, x = vae_and_images()
    chain, joint = vae.posterior(x), vae.joint(x)
    noise = chain.noise(2)
    ours = calibrated_avo(chain, joint, linear_alphas(T), 1.0, beta, noise=noise)
    theirs = avo(chain, joint, linear_alphas(T), beta, noise=noise)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    assert absent(gradients(ours, [*vae.encoder.parameters(), *vae.decoder.parameters()]))
    kernels = list(vae.kernels.parameters())
    for a, b in zip(gradients(ours, kernels), gradients(theirs, kernels), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("weight", [0.2, 0.7])
def test_calibrated_avo_mixes_the_gradients(weight):
    chain = toy_chain()
    noise, target = chain.noise(16), ENERGIES["D"]
    everything = [chain.base.loc, chain.base.scale, *chain.kernels.parameters()]
    mixed = gradients(calibrated_avo(chain, target, linear_alphas(T), weight, noise=noise), everything)
    local = gradients(avo(chain, target, linear_alphas(T), noise=noise), everything)
    whole = gradients(elbo(chain, target, noise=noise), everything)
    for m, a, b in zip(mixed, local, whole, strict=True):
        expected = (1 - weight) * b + (0 if a is None else weight * a)
        torch.testing.assert_close(m, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_calibrated_avo_refuses_a_weight_outside_0_1(weight):
    with pytest.raises(ValueError, match=r"weight must lie in \[0, 1\], got"):
        calibrated_avo(toy_chain(), ENERGIES["A"], linear_alphas(T), weight)


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("train", [False, True])
def test_an_avo_pass_leaves_the_decoder_as_it_is(beta, train):
    vae, x = vae_and_images(train=train)
    chain, joint = vae.posterior(x), vae.joint(x)
    before = {name: value.clone() for name, value in vae.decoder.state_dict().items()}
    assert any("running_mean" in name for name in before) and any("num_batches_tracked" in name for name in before)
    avo(chain, joint, linear_alphas(T), beta).mean().backward()
    for name, value in vae.decoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in vae.decoder.parameters())
    assert all(module.training == train for module in vae.decoder.modules())


def test_an_elbo_pass_in_training_mode_updates_the_decoders_batch_statistics():
    vae, x = vae_and_images(train=True)
    before = {name: value.clone() for name, value in vae.decoder.named_buffers()}
    elbo(vae.posterior(x), vae.joint(x))
    assert all(not torch.equal(value, before[name]) for name, value in vae.decoder.named_buffers())


@pytest.mark.parametrize("train", [False, True])
def test_the_decoders_mode_is_restored_after_an_exception(train):
    vae, x = vae_and_images(train=train, layers="gated")

    def fail(*_):
        raise RuntimeError("inside the decoder")

    vae.decoder.outputs.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside the decoder"):
        avo(vae.posterior(x), vae.joint(x), linear_alphas(T))
    assert all(module.training == train for module in vae.decoder.modules())


def losses(chain, target, beta=0.3):
    """Every objective as noise -> loss."""
    alphas = linear_alphas(T)
    found = {
        "elbo": lambda noise: elbo(chain, target, noise=noise),
        "alpha_elbo": lambda noise: alpha_elbo(chain, target, 0.4, noise=noise),
        "avo": lambda noise: avo(chain, target, alphas, noise=noise),
        "calibrated_avo": lambda noise: calibrated_avo(chain, target, alphas, 0.5, noise=noise),
    }
    if hasattr(target, "log_likelihood"):
        found["beta_elbo"] = lambda noise: beta_elbo(chain, target, beta, noise=noise)
        found["beta avo"] = lambda noise: avo(chain, target, alphas, beta, noise=noise)
    return {name: lambda noise, loss=loss: loss(noise).mean() for name, loss in found.items()}


@every_energy
def test_duplicating_the_batch_changes_no_loss(name):
    chain = toy_chain()
    noise = chain.noise(8)
    for method, loss in losses(chain, ENERGIES[name]).items():
        torch.testing.assert_close(loss(torch.cat([noise, noise], 1)), loss(noise), atol=1e-9, rtol=1e-9, msg=method)
    noise = chain.noise((5, 8))
    once = iwae(chain, ENERGIES[name], 5, 8, noise).mean()
    twice = iwae(chain, ENERGIES[name], 5, 16, torch.cat([noise, noise], 2)).mean()
    torch.testing.assert_close(twice, once, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("method", ["elbo", "alpha_elbo", "beta_elbo", "avo", "beta avo", "iwae"])
def test_duplicating_the_batch_of_an_auto_encoder_changes_no_loss(method, train):
    values, noise = [], torch.randn((T + 1, 5, 6, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for copies in (1, 2, 5):
        vae, x = vae_and_images(train=train)
        x = x.repeat(copies, 1)
        chain, joint = vae.posterior(x), vae.joint(x)
        repeated = noise.repeat(1, 1, copies, 1)
        loss = (
            iwae(chain, joint, 5, (), repeated).mean() if method == "iwae" else losses(chain, joint)[method](repeated)
        )
        loss.backward()
        values.append([loss.detach(), *[p.grad for p in vae.kernels.parameters()]])
    for other in values[1:]:
        for once, more in zip(values[0], other, strict=True):
            torch.testing.assert_close(more, once, atol=1e-8, rtol=1e-8)


@every_energy
def test_alpha_one_is_the_elbo_and_alpha_tempers_the_energy_alone(name):
    chain = toy_chain()
    noise = chain.noise(16)
    whole = elbo(chain, ENERGIES[name], noise=noise)
    torch.testing.assert_close(alpha_elbo(chain, ENERGIES[name], 1.0, noise=noise), whole, atol=1e-6, rtol=0)
    energy = ENERGIES[name].log_prob(chain.rsample(noise=noise).z[-1])
    torch.testing.assert_close(
        alpha_elbo(chain, ENERGIES[name], 0.4, noise=noise), whole - 0.6 * energy, atol=1e-9, rtol=1e-9
    )


def test_beta_one_is_the_elbo_and_beta_zero_the_likelihood():
    vae, x = vae_and_images()
    chain, joint = vae.posterior(x), vae.joint(x)
    noise = chain.noise(3)
    torch.testing.assert_close(
        beta_elbo(chain, joint, 1.0, noise=noise), elbo(chain, joint, noise=noise), atol=1e-6, rtol=0
    )
    likelihood = joint.log_likelihood(chain.rsample(noise=noise).z[-1])
    torch.testing.assert_close(beta_elbo(chain, joint, 0.0, noise=noise), likelihood, atol=1e-9, rtol=0)


@pytest.mark.parametrize("above", [True, False])
def test_a_capacity_holds_the_mean_kl_from_both_sides(above):
    vae, x = vae_and_images()
    chain, joint = vae.posterior(x), vae.joint(x)
    noise = chain.noise(3)
    likelihood = beta_elbo(chain, joint, 0.0, noise=noise)
    kl = (likelihood - elbo(chain, joint, noise=noise)).mean()
    capacity = kl.item() - 0.5 if above else kl.item() + 0.5
    values = capacity_elbo(chain, joint, capacity, noise=noise)
    torch.testing.assert_close(values, likelihood - 0.5)
    weights = list(vae.encoder.parameters())
    found = torch.autograd.grad(values.mean(), weights, retain_graph=True)
    expected = torch.autograd.grad(likelihood.mean() + (-kl if above else kl), weights)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_capacity_of_0_is_the_elbo():
    vae, x = vae_and_images()
    chain, joint = vae.posterior(x), vae.joint(x)
    noise = chain.noise(3)
    whole = elbo(chain, joint, noise=noise).mean()
    torch.testing.assert_close(capacity_elbo(chain, joint, 0, noise=noise).mean(), whole)


@pytest.mark.parametrize("capacity", [-1, float("nan"), float("inf")])
def test_an_impossible_capacity_is_refused(capacity):
    vae, x = vae_and_images()
    with pytest.raises(ValueError, match=r"^capacity must be a number of nats from 0, got "):
        capacity_elbo(vae.posterior(x), vae.joint(x), capacity)


@every_energy
def test_iwae_with_one_sample_is_the_elbo(name):
    chain = toy_chain()
    noise = chain.noise(16)
    ours = iwae(chain, ENERGIES[name], 1, 16, noise.unsqueeze(1))
    torch.testing.assert_close(ours, elbo(chain, ENERGIES[name], noise=noise), atol=1e-12, rtol=0)


@every_energy
def test_iwae_rises_with_the_number_of_samples(name):
    """On the same noise the mean over groups can't fall when groups are joined: Jensen's inequality, no statistics."""
    chain = toy_chain()
    noise = chain.noise(64)
    bounds = []
    for k in (1, 2, 8, 64):
        groups = noise.unflatten(1, (64 // k, k)).transpose(1, 2)
        bounds.append(iwae(chain, ENERGIES[name], k, 64 // k, groups).mean())
    assert all(low < high for low, high in itertools.pairwise(bounds))


@every_energy
@pytest.mark.parametrize("k", [2, 7])
def test_iwae_is_the_log_of_the_mean_weight(name, k):
    chain = toy_chain()
    noise = chain.noise((k, 5))
    weights = elbo(chain, ENERGIES[name], noise=noise).exp()
    bound = iwae(chain, ENERGIES[name], k, 5, noise)
    torch.testing.assert_close(bound.exp(), weights.mean(0), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("sample_shape", [(), 4, (2, 4)])
def test_iwae_draws_its_own_noise_of_the_right_shape(sample_shape):
    shape = (sample_shape,) if isinstance(sample_shape, int) else sample_shape
    assert iwae(toy_chain(), ENERGIES["A"], 7, sample_shape).shape == shape
    vae, x = vae_and_images()
    assert iwae(vae.posterior(x), vae.joint(x), 7, sample_shape).shape == (*shape, 6)


@pytest.mark.parametrize("sample_shape", [(), 4, (2, 4)])
def test_objectives_have_a_value_for_each_sample(sample_shape):
    shape = (sample_shape,) if isinstance(sample_shape, int) else sample_shape
    vae, x = vae_and_images()
    chain, joint = vae.posterior(x), vae.joint(x)
    assert elbo(chain, joint, sample_shape).shape == (*shape, 6)
    assert beta_elbo(chain, joint, 0.5, sample_shape).shape == (*shape, 6)
    assert alpha_elbo(chain, joint, 0.5, sample_shape).shape == (*shape, 6)
    assert avo(chain, joint, linear_alphas(T), 0.5, sample_shape).shape == (*shape, 6)
    assert calibrated_avo(chain, joint, linear_alphas(T), 0.5, 0.5, sample_shape).shape == (*shape, 6)
