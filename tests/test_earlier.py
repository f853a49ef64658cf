"""The earlier code's objective in a sum with the ELBO, and the fields of a run with its faults."""

import pytest
import torch

from annealed_core.kernels import Gated
from annealed_core.objectives import ELBO, LocalAVO
from annealed_core.schedules import Linear, Mixed
from annealed_core.targets import LearnedAlphas
from annealed_core.vae import VAE
from annealed_report.earlier import FAULTS, EarlierAVO, faulty


def gradient(objective):
    """Of all weights of a small auto-encoder, on the same images and noise."""
    torch.manual_seed(0)
    model = VAE(4, 16, Gated(8, "identity").build(4, 2, 16)).double()
    x, noise = (torch.rand(20, 784).double() < 0.3).double(), torch.randn(3, 20, 4, dtype=torch.float64)
    values = objective(model.posterior(x), model.joint(x), noise=noise)
    found = torch.autograd.grad(values.mean(), list(model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize("fault", [{}, {"decoder": True}, {"live_base": True}, {"summed": True}], ids=str)
def test_a_weight_below_one_makes_a_sum_with_the_elbo_on_the_same_noise(fault):
    whole, alone = ELBO(0.3), EarlierAVO(1.0, 0.3, **fault)

    def after_the_elbo(chain, joint, noise):  # whose pass changes the statistics that a frozen decoder has
        whole(chain, joint, noise=noise)
        return alone(chain, joint, noise=noise)

    expected = 0.2 * gradient(after_the_elbo) + 0.8 * gradient(whole)
    torch.testing.assert_close(gradient(EarlierAVO(0.2, 0.3, **fault)), expected)


def test_faulty_gives_the_fields_of_a_run_with_these_faults():
    every = faulty(*FAULTS, beta=Linear(), chance=0.5)
    avo = EarlierAVO(beta=Linear(), summed=True, live_base=True, decoder=True)
    assert every == {"objective": Mixed(avo, ELBO(Linear()), 0.5), "grey": True, "shuffled": False}
    assert faulty("grey") == faulty() | {"grey": True} and faulty()["objective"].first == LocalAVO()


def test_without_faults_it_has_avos_gradient():
    torch.testing.assert_close(gradient(EarlierAVO(beta=0.5)), gradient(LocalAVO(beta=0.5)))


@pytest.mark.parametrize("faults", ["live_base", "decoder", "summed", "live_base decoder summed"])
def test_faults_have_the_gradient_of_the_earlier_loss_written_out(faults):
    """One state after another, as that code had it: of each image, but for a likelihood that may be the batch's."""
    faults = faults.split()

    def earlier(chain, joint, noise):
        base, live = chain.base, "live_base" in faults
        context, f_0 = (chain.context, base) if live else (chain.context.detach(), base.detach())
        joint = joint if "decoder" in faults else joint.frozen()
        z, loss = base.rsample(noise[0]).detach(), 0.0
        for alpha, kernel, fresh in zip((0.5, 1.0), chain.kernels, noise[1:], strict=True):
            z, log_ratio = kernel(z.detach(), context, fresh)
            likelihood = joint.log_likelihood(z)
            f_t = (likelihood.sum() if "summed" in faults else likelihood) + 0.3 * joint.log_prior(z)
            loss = loss + alpha * f_t + (1 - alpha) * (1 if live else 0.3) * f_0.log_prob(z) + 0.3 * log_ratio
        return loss

    found = gradient(EarlierAVO(beta=0.3, **dict.fromkeys(faults, True)))
    torch.testing.assert_close(found, gradient(earlier))
    assert (found - gradient(LocalAVO(beta=0.3))).norm() > 0.01 * found.norm()


@pytest.mark.parametrize("live", [False, True])
def test_states_on_the_way_change_the_decoders_batch_statistics_only_with_that_fault(live):
    model, x = VAE(4, 16, Gated(8).build(4, 2, 16)), (torch.rand(20, 784) < 0.3).float()
    before = {name: value.clone() for name, value in model.decoder.named_buffers()}
    EarlierAVO(decoder=live)(model.posterior(x), model.joint(x))
    assert all(torch.equal(before[name], value) != live for name, value in model.decoder.named_buffers())


def test_unknown_faults_and_paths_that_learn_are_refused():
    with pytest.raises(ValueError, match=rf"^unknown fault 'gray': choose some of {', '.join(FAULTS)}$"):
        faulty("gray")
    with pytest.raises(ValueError, match=r"^impossible alphas LearnedAlphas\(\) of EarlierAVO: its path does not"):
        EarlierAVO(alphas=LearnedAlphas())
