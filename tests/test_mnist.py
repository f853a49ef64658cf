"""MNIST's methods: whom each objective teaches, what the earlier report's faults change, what is kept."""

import math

import pytest
import torch

from annealed_core import TrainingError, data, likelihood, mnist, objectives, run
from annealed_core.chain import Chain
from annealed_core.earlier import FAULTS, faulty_avo
from annealed_core.folded import part_of
from annealed_core.kernels import DiagonalGaussian
from annealed_core.mnist import Mnist, auto_encoder
from annealed_core.paths import LearnedPath
from annealed_core.spec import Spec
from annealed_core.targets import linear_alphas

BASE = Spec("mnist", "avo", train_images=300, epochs=2, width=32, latents=4, n_transitions=2, hidden=8, nll_images=50)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """The first images of each part of MNIST."""
    parts = data.load_mnist()
    few = tuple(data.Images(p.images[:n], p.labels[:n]) for p, n in zip(parts, (300, 100, 100), strict=True))
    monkeypatch.setattr(data, "load_mnist", lambda: few)
    for cached in (mnist.images, mnist.grey_images):
        cached.cache_clear()
    yield
    for cached in (mnist.images, mnist.grey_images):
        cached.cache_clear()


def taught(problem, values):
    """The gradients of encoder, kernels and decoder, each as one vector; zeros where there is none."""
    problem.network.zero_grad()
    values.mean().backward()
    parts = (problem.network.encoder, problem.network.kernels, problem.network.decoder)
    return [
        torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in part.parameters()])
        for part in parts
    ]


def moved(spec):
    """A problem whose weights are some way from where they start, in double precision, and a batch of images."""
    torch.manual_seed(0)
    problem = Mnist([spec])
    problem.network.double().train()
    with torch.no_grad():
        for parameter in problem.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return problem, problem.test[:20].double()


def values_at(problem, x, step=0):
    torch.manual_seed(1)
    return problem._values(x, step)


def test_at_weight_one_avo_alone_teaches_the_kernels_and_the_elbo_alone_encoder_and_decoder():
    problem, x = moved(BASE.replace(avo_weight=1.0))
    encoder, kernels, decoder = taught(problem, values_at(problem, x))

    def alone(method):
        problem, x = moved(BASE)
        torch.manual_seed(1)
        chain, joint, beta = problem.network.posterior(x), problem.network.joint(x), problem.beta(0)
        noise = chain.noise()
        values = objectives.beta_elbo(chain, joint, beta, noise=noise)  # first, as in training: batch statistics change
        return taught(
            problem, objectives.avo(chain, joint, problem.alphas, beta, noise=noise) if method == "avo" else values
        )

    avo, elbo = alone("avo"), alone("elbo")
    torch.testing.assert_close(kernels, avo[1])
    torch.testing.assert_close(encoder, elbo[0])
    torch.testing.assert_close(decoder, elbo[2])
    assert not avo[0].any() and not avo[2].any() and (avo[1] - elbo[1]).abs().max() > 1e-3


def test_a_mixture_is_avo_on_its_steps_and_the_elbo_on_all_others():
    problem, x = moved(BASE.replace(method="mixture", avo_weight=0.5))
    assert 0 < sum(problem._is_avo) < problem.steps
    on, off = problem._is_avo.index(True), problem._is_avo.index(False)
    encoder, kernels, decoder = taught(problem, values_at(problem, x, on))
    assert kernels.any() and not encoder.any() and not decoder.any()
    assert all(part.any() for part in taught(problem, values_at(problem, x, off)))
    whole = objectives.beta_elbo(problem.network.posterior(x), problem.network.joint(x), problem.beta(off))
    assert float(values_at(problem, x, off).detach().mean()) == pytest.approx(float(whole.detach().mean()), rel=0.05)


def gradient_with(faults):
    problem, x = moved(BASE)
    torch.manual_seed(2)
    chain = problem.network.posterior(x)
    values = faulty_avo(chain, problem.network.joint(x), problem.alphas, 0.5, faults, chain.noise())
    return taught(problem, values), problem


def test_without_faults_the_earlier_objective_has_avos_gradient():
    found, problem = gradient_with(())
    torch.manual_seed(2)
    x = problem.test[:20].double()
    problem.network.encoder.train()
    chain = problem.network.posterior(x)
    expected = taught(
        problem, objectives.avo(chain, problem.network.joint(x), problem.alphas, 0.5, noise=chain.noise())
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert found[1].any() and not found[0].any() and not found[2].any()


def test_a_live_base_teaches_the_encoder_and_a_live_decoder_the_decoder():
    encoder, kernels, decoder = gradient_with(("live_base",))[0]
    assert encoder.any() and kernels.any() and not decoder.any()
    encoder, kernels, decoder = gradient_with(("decoder",))[0]
    assert not encoder.any() and kernels.any() and decoder.any()


@pytest.mark.parametrize("faults", [("live_base", "decoder", "summed"), ("live_base",), ("decoder",)])
def test_the_faults_have_the_gradient_of_the_earlier_loss_written_out(faults):
    """One state after another, as that code had it: of each image, but for a likelihood that may be the batch's."""
    problem, x = moved(BASE)
    network, beta, alphas = problem.network, 0.3, problem.alphas.tolist()
    base, features = network.encoder(x)
    noise = network.posterior(x).noise()
    live = "live_base" in faults
    context, f_0 = (features, base) if live else (features.detach(), base.detach())
    decoder = network.joint(x) if "decoder" in faults else network.joint(x).frozen()
    z, loss = base.rsample(noise[0]).detach(), 0.0
    for alpha, kernel, fresh in zip(alphas[1:], network.kernels, noise[1:], strict=True):
        z, log_ratio = kernel(z.detach(), context, fresh)
        likelihood = decoder.log_likelihood(z)
        f_t = (likelihood.sum() if "summed" in faults else likelihood) + beta * decoder.log_prior(z)
        loss = loss + alpha * f_t + (1 - alpha) * (1 if live else beta) * f_0.log_prob(z) + beta * log_ratio
    expected = taught(problem, loss)
    again, _ = moved(BASE)
    chain = again.network.posterior(x)
    found = taught(again, faulty_avo(chain, again.network.joint(x), again.alphas, beta, faults, noise))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_states_on_the_way_change_the_decoders_batch_statistics_only_with_that_fault():
    def statistics(faults):
        problem, x = moved(BASE)
        before = {name: value.clone() for name, value in problem.network.decoder.named_buffers()}
        chain = problem.network.posterior(x)
        faulty_avo(chain, problem.network.joint(x), problem.alphas, 0.5, faults)
        after = dict(problem.network.decoder.named_buffers())
        return [not torch.equal(before[name], after[name]) for name in before]

    assert all(statistics(("decoder",))) and not any(statistics(()))


def test_a_summed_likelihood_weighs_as_many_times_as_there_are_images():
    """With beta = 0 only the likelihood is left, and its gradient is 20 times what it should be."""
    problem, x = moved(BASE)

    def kernels(faults):
        torch.manual_seed(3)
        chain = problem.network.eval().posterior(x)
        return taught(problem, faulty_avo(chain, problem.network.joint(x), problem.alphas, 0.0, faults, chain.noise()))[
            1
        ]

    torch.testing.assert_close(kernels(("summed",)), 20 * kernels(()))


def test_unknown_faults_are_refused():
    problem, x = moved(BASE)
    with pytest.raises(ValueError, match=rf"^unknown fault 'gray': choose some of {', '.join(FAULTS)}$"):
        faulty_avo(problem.network.posterior(x), problem.network.joint(x), linear_alphas(2), 1.0, ("gray",))


def epochs_of(spec, n=2):
    """What a problem shows its model in n epochs, without training it."""
    problem, seen = Mnist([spec]), []
    values = problem._values
    problem._values = lambda x, step: seen.append(x) or values(x, step)
    for step in range(n * problem.steps_per_record):
        problem.objective(step)
    return problem, torch.cat(seen).unflatten(0, (n, -1))


def test_grey_training_sees_grey_images_and_all_other_binary_ones():
    assert set(epochs_of(BASE)[1].unique().tolist()) == {0.0, 1.0}
    problem, seen = epochs_of(BASE.replace(faults=["grey"]))
    assert len(seen.unique()) > 100
    torch.testing.assert_close(seen[0].sum(), problem.train.float().sum() / 255)


def test_unshuffled_training_repeats_its_order_and_keeps_the_last_weights(monkeypatch):
    _, seen = epochs_of(BASE.replace(faults=["grey", "unshuffled"]))
    assert torch.equal(seen[0], seen[1])
    _, seen = epochs_of(BASE.replace(faults=["grey"]))
    assert not torch.equal(seen[0], seen[1])

    def kept(spec):
        problem = Mnist([spec])
        bounds = iter([{"elbo": -1.0}, {"elbo": -2.0}])
        monkeypatch.setattr(problem, "_bound", lambda x: next(bounds) | {"reconstruction": 0.0, "kl": 0.0})
        for _ in range(2):
            problem._step += problem.steps_per_record
            problem._recent = [torch.zeros(1)]
            problem.record()
        return problem.best["elbo"]

    assert kept(BASE) == -1 and kept(BASE.replace(faults=["unshuffled"])) == -2


def test_averaged_weights_are_the_moving_average_of_the_steps_across_epochs():
    problem = Mnist([BASE.replace(ema=0.5, batch=150)])
    assert problem.steps_per_record == 2
    optimiser = torch.optim.SGD([p for p in problem.model.parameters() if p.requires_grad], lr=1e-3)
    weight, seen = problem.network.decoder.outputs.weight, []
    for step in range(4):
        optimiser.zero_grad()
        (-problem.objective(step)).sum().backward()
        optimiser.step()
        seen.append(weight.detach().clone())
        if step % 2:
            problem.record()
    # The average starts at the weights after the first step.
    expected = 0.125 * seen[0] + 0.125 * seen[1] + 0.25 * seen[2] + 0.5 * seen[3]
    torch.testing.assert_close(problem.judged.decoder.outputs.weight, expected)
    assert problem.judged is not problem.network and not problem.judged.decoder.outputs.weight.requires_grad


def test_a_chain_from_the_prior_starts_at_a_standard_normal_and_sees_the_image_through_its_kernels():
    torch.manual_seed(0)
    model, x = auto_encoder(BASE.replace(base="prior")).eval(), Mnist([BASE]).test[:5]
    chain = model.posterior(x)
    standard = DiagonalGaussian.isotropic(4)
    z = torch.randn(7, 5, 4)
    torch.testing.assert_close(chain.base.log_prob(z), standard.log_prob(z))
    ends = chain.rsample(noise=torch.zeros(3, 5, 4)).z[-1]
    assert (ends[0] - ends[1]).abs().max() > 1e-4


def test_iwae_with_one_sample_has_the_elbos_gradient():
    one, x = moved(BASE.replace(method="iwae", iwae_samples=1))
    plain, _ = moved(BASE.replace(method="vae"))
    for a, b in zip(taught_vae(one, values_at(one, x)), taught_vae(plain, values_at(plain, x)), strict=True):
        torch.testing.assert_close(a, b)


def taught_vae(problem, values):
    problem.network.zero_grad()
    values.mean().backward()
    return [p.grad for p in problem.network.parameters()]


@torch.no_grad()
def test_the_iwae_bound_rises_with_its_samples():
    means = []
    for k in (1, 5, 50):
        problem, x = moved(BASE.replace(method="iwae", iwae_samples=k, schedule="constant"))
        problem.network.eval()
        torch.manual_seed(0)
        means.append(float(torch.stack([problem._values(x, 0).mean() for _ in range(100)]).mean()))
    assert means[0] < means[1] < means[2]
    elbo = objectives.elbo(problem.network.posterior(x), problem.network.joint(x), (200,)).mean()
    assert means[0] == pytest.approx(float(elbo), abs=1.0)


@pytest.mark.parametrize("method", ["planar", "householder", "iaf"])
def test_flows_of_an_image_depend_on_the_image(method):
    torch.manual_seed(0)
    model = auto_encoder(BASE.replace(method=method)).eval()
    chain = model.posterior(Mnist([BASE]).test[:3])
    with torch.no_grad():
        chain.base.loc[:], chain.base.scale[:] = 0.5, 1.0
        z = chain.rsample(noise=torch.full((len(chain) + 1, 3, 4), 0.3)).z[-1]
    assert (z[0] - z[1]).abs().max() > 1e-4


def test_gated_layers_have_no_batch_statistics():
    model = auto_encoder(BASE.replace(layers="gated"))
    assert not list(model.buffers())
    x = torch.randn(3, 784)
    layer = model.encoder.features[0]
    value, gate = layer.value_and_gate(x).chunk(2, -1)
    torch.testing.assert_close(layer(x), value * torch.sigmoid(gate))


@pytest.mark.parametrize(("method", "start"), [("vae", "posterior"), ("hvi", "posterior"), ("iaf", "prior")])
def test_bounds_bracket_the_likelihood_of_a_model_with_two_latents(method, start, monkeypatch):
    """Where importance sampling is good, annealing agrees with it, and the sandwich closes."""
    starts = {}
    for name, estimate in (("ais", likelihood.ais), ("bdmc", likelihood.bdmc)):

        def noted(*values, name=name, estimate=estimate, **fields):
            starts[name] = fields["start"]
            return estimate(*values, **fields)

        monkeypatch.setattr(likelihood, name, noted)
    torch.manual_seed(0)
    model = auto_encoder(BASE.replace(method=method, latents=2)).eval().requires_grad_(False)
    found = mnist.bounds(model, Mnist([BASE]).test[:5])
    assert all(math.isfinite(value) for value in found.values())
    assert found["is_nll"] == pytest.approx(found["ais_nll"], abs=0.2)
    assert found["bdmc_gap"] == pytest.approx(found["bdmc_upper"] - found["bdmc_lower"], abs=1e-3)
    assert abs(found["bdmc_gap"]) < 0.2
    assert found["approximation_gap"] > -0.1 and found["amortisation_gap"] > 0
    assert starts == {"ais": start, "bdmc": start}


def test_the_average_is_what_is_judged_kept_and_followed(monkeypatch):
    problem, judged = Mnist([BASE.replace(ema=0.5, epochs=5)]), []
    for name in ("importance_sampling", "inference"):
        assert hasattr(mnist, name)
    estimate = mnist.importance_sampling
    monkeypatch.setattr(mnist, "importance_sampling", lambda model, x, n: judged.append(model) or estimate(model, x, n))
    for epoch in range(1, 6):
        problem.objective((epoch - 1) * problem.steps_per_record)
        problem._step = epoch * problem.steps_per_record - 1
        problem.record()
    problem.metrics()
    assert len(judged) == 4 and all(model is problem.judged is not problem.network for model in judged)
    weights = problem.weights()[0]
    assert all(torch.equal(value, problem.judged.state_dict()[name]) for name, value in weights.items())


def test_averaged_weights_have_batch_statistics_of_their_own():
    """As after a pass over the training images in training mode, and not those of the weights that are averaged."""
    problem = Mnist([BASE.replace(ema=0.5)])
    problem.objective(0)
    problem.record()
    layer, training = problem.judged.encoder.features[1], data.load_mnist()[0].images
    with torch.no_grad():
        x = data.binarise(training, torch.Generator().manual_seed(1))
        expected = problem.judged.encoder.features[0](x).mean(0)
    assert (layer.running_mean - expected).abs().max() < 0.1 * expected.abs().max() + 0.05
    assert (problem.network.encoder.features[1].running_mean - expected).abs().max() > 0.2 * expected.abs().max()
    assert layer.momentum == problem.network.encoder.features[1].momentum


def test_grey_training_is_selected_on_grey_images(monkeypatch):
    seen = []
    for faults in ((), ("grey",)):
        problem = Mnist([BASE.replace(faults=faults)])
        problem.objective(0)
        bound = problem._bound
        monkeypatch.setattr(problem, "_bound", lambda x, bound=bound: seen.append(x) or bound(x))
        problem.record()
    assert set(seen[0].unique().tolist()) == {0.0, 1.0} and len(seen[1].unique()) > 100


def test_the_path_of_a_spec_is_the_one_that_avo_follows():
    linear, geometric = (Mnist([BASE.replace(path=path)]).alphas for path in ("linear", "geometric"))
    torch.testing.assert_close(linear, linear_alphas(2))
    assert geometric[1] < linear[1] and geometric[0] == 0 and geometric[-1] == 1


def test_calibrated_avo_is_its_two_parts_on_the_same_noise():
    problem, x = moved(BASE.replace(avo_weight=0.3))
    torch.manual_seed(1)
    value = problem._values(x, 0).detach()
    fresh, x = moved(BASE)
    torch.manual_seed(1)
    chain, joint = fresh.network.posterior(x), fresh.network.joint(x)
    noise = chain.noise()
    whole = objectives.beta_elbo(chain, joint, fresh.beta(0), noise=noise)
    avo = objectives.avo(chain, joint, fresh.alphas, fresh.beta(0), noise=noise)
    torch.testing.assert_close(value, (0.3 * avo + 0.7 * whole).detach())


def test_data_and_weights_of_a_run_are_drawn_from_different_streams():
    problem = Mnist([BASE.replace(seed=3)])
    ours = torch.rand(5, generator=problem.generator)
    assert not torch.equal(ours, torch.rand(5, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("method", ["vae", "avo"])
def test_training_that_diverges_is_kept_as_failed(store, method):
    spec = BASE.replace(method=method, lr=1e30)
    for _ in range(2):
        with pytest.raises(TrainingError, match=rf"^mnist-{method}-s0: .* became .* lr 1e\+30 may be too large"):
            run(spec)


def test_a_failure_is_part_of_a_checkpoint():
    problem, other = Mnist([BASE]), Mnist([BASE])
    problem.failures[0] = "kl became inf by step 3"
    other.load(problem.state())
    assert other.failures == problem.failures and other.metrics() == [{}]


def test_a_single_image_has_a_likelihood_and_no_active_units(store):
    metrics = run(BASE.replace(method="vae", nll_images=1, epochs=1)).metrics
    assert math.isfinite(metrics["nll"]) and metrics["active_units"] is None and metrics["nll_se"] is None


@pytest.mark.parametrize("anneals", ["alpha", "capacity"])
def test_what_is_annealed_is_what_the_spec_says(anneals):
    spec = BASE.replace(method="hvi", schedule=half, anneals=anneals)
    spec = spec.replace(capacity=20.0) if anneals == "capacity" else spec
    problem, x = moved(spec)
    torch.manual_seed(1)
    chain, joint = problem.network.posterior(x), problem.network.joint(x)
    expected = {"alpha": (objectives.alpha_elbo, 0.5), "capacity": (objectives.capacity_elbo, 10.0)}[anneals]
    wanted = expected[0](chain, joint, expected[1])
    torch.testing.assert_close(values_at(problem, x), wanted)
    whole = values_at(problem, x, step=1)  # then the schedule is at 1
    torch.manual_seed(1)
    wanted = objectives.elbo(chain, joint) if anneals == "alpha" else objectives.capacity_elbo(chain, joint, 20.0)
    torch.testing.assert_close(whole, wanted)


def half(step):
    return 0.5 if step == 0 else 1.0


def test_under_every_schedule_a_run_starts_from_the_same_weights_and_sees_the_same_images():
    made = [Mnist([BASE.replace(schedule=name)]) for name in ("constant", "linear", "geometric", "cyclical")]
    for other in made[1:]:
        pairs = zip(made[0].network.parameters(), other.network.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    firsts = [next(data.batches(p.train, 50, p.generator, True, True)) for p in made]
    assert all(torch.equal(first, firsts[0]) for first in firsts)


def test_a_learned_path_is_taught_by_path_fit_alone_and_teaches_nothing_else():
    problem, x = moved(BASE.replace(path="learned", schedule="constant"))
    fixed, _ = moved(BASE.replace(schedule="constant"))
    problem.path.double()
    torch.testing.assert_close(problem.alphas, torch.tensor([0.0, 0.5, 1.0]).double())
    torch.manual_seed(1)
    noise = problem.network.posterior(x).noise()
    for each in (problem, fixed):
        each.grads = taught(each, each._avo(each.network.posterior(x), each.network.joint(x), 1.0, noise))
    for ours, theirs in zip(problem.grads, fixed.grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    taught_path = problem.path.logits.grad.clone()
    problem.path.zero_grad()
    torch.manual_seed(1)
    problem.network.posterior(x).noise()  # the draws for the path come after
    chain, joint = part_of(problem.network.posterior(x), slice(0, 1)), problem.network.joint(x[:1])
    objectives.path_fit(chain, joint.frozen(), problem.alphas, mnist.PATH_SAMPLES).mean().backward()
    torch.testing.assert_close(problem.path.logits.grad, taught_path)
    assert taught_path.norm() > 0


def test_a_path_is_learned_to_where_its_optimum_is_in_as_many_dimensions():
    """From N(0, I) to N(0.5, 1.2^2 I) by kernels that do nothing: the best exponents by numerical optimisation."""
    torch.manual_seed(0)
    path, dim = LearnedPath(linear_alphas(5), 1).double(), 40
    base = DiagonalGaussian(torch.zeros(dim).double(), torch.ones(dim).double())
    chain = Chain(base, [Still() for _ in range(5)])
    optimiser = torch.optim.Adam(path.parameters(), 0.02)
    for _ in range(400):
        optimiser.zero_grad()
        (-objectives.path_fit(chain, Wide(dim), path().squeeze(-1), mnist.PATH_SAMPLES).mean()).backward()
        optimiser.step()
    exact = torch.tensor([0.0, 0.243, 0.462, 0.659, 0.838, 1.0]).double()
    torch.testing.assert_close(path().squeeze(-1).detach(), exact, atol=0.12, rtol=0)


class Still:
    """A kernel that leaves z as it is."""

    def __call__(self, z, context=None, noise=None):
        return z, z.new_zeros(z.shape[:-1])


class Wide:
    """N(0.5, 1.2^2 I)."""

    def __init__(self, dim):
        self.dim = dim

    def log_prob(self, z):
        return -((z - 0.5) / 1.2).square().sum(-1) / 2


@pytest.mark.parametrize("path", ["linear", "learned"])
def test_a_run_that_diverges_is_kept_as_failed(path, store):
    with pytest.raises(TrainingError, match="train_objective became"):
        run(BASE.replace(path=path, lr=1e8))


def test_a_learned_path_moves_and_is_part_of_what_a_run_says(store):
    found = run(BASE.replace(path="learned", nll_samples=10, lr=0.01)).metrics["alphas"]
    assert found[0] == 0 and found[2] == 1 and 0 < found[1] < 1 and abs(found[1] - 0.5) > 0.005


@pytest.mark.parametrize("decoder", ["independent", "autoregressive"])
def test_a_run_says_how_much_its_posterior_explores_where_it_is_asked(decoder, store):
    spec = BASE.replace(method="vae", decoder=decoder, explored_images=20, nll_samples=10, epochs=1)
    torch.manual_seed(0)
    found = run(spec).metrics
    assert len(found["latent_kl"]) == 4 and found["information_images"] == 20 and 0 <= found["coverage"] <= 1
    assert ("grey_nll" in found) == (decoder == "independent")
    averaged = run(spec.replace(explored_images=0, ema=0.5)).metrics
    assert math.isfinite(averaged["nll"])
    plain = run(spec.replace(explored_images=0)).metrics
    assert "latent_kl" not in plain and plain["nll"] == found["nll"] and plain["active_units"] == found["active_units"]
