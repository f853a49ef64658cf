"""MNIST: what a description refuses, what every method learns from, and what is kept."""

import math

import pytest
import torch

from annealed_core.chain import Chain
from annealed_core.decoders import Autoregressive
from annealed_core.description import from_json, to_json
from annealed_core.flows import IAF, Householder, Planar, Spline
from annealed_core.kernels import DiagonalGaussian, Gated, Residual
from annealed_core.nested import NVI, TrajectoryBalance
from annealed_core.objectives import AVO, ELBO, IWAE, AlphaELBO, LocalAVO, path_fit
from annealed_core.running import data, mnist
from annealed_core.running.experiment import TrainingError, run
from annealed_core.running.mnist import Mnist, MnistProblem
from annealed_core.schedules import Cyclical, Geometric, Linear, Mixed, Then
from annealed_core.targets import LearnedAlphas
from annealed_core.vae import VAE, Decoder, Independent
from annealed_core.variants import CapacityELBO

BETA = Linear(0.2, 0.1)
FEW = {"train_images": 300, "epochs": 2, "width": 32, "latents": 4, "nll_images": 50, "nll_samples": 5}
VAE_ALONE = Mnist(objective=ELBO(BETA), **FEW)
HVI = Mnist(kernel=Gated(hidden=8, start="identity"), n_transitions=2, objective=ELBO(BETA), **FEW)
BASE = HVI.replace(objective=AVO(weight=0.2, beta=BETA))
METRICS = {"best_epoch", "valid_elbo", "elbo", "reconstruction", "kl", "nll", "nll_se", "nll_samples", "nll_images"}
METRICS |= {"ess", "grey_nll", "pareto_k", "active_units", "valid_nll", "valid_nll_se"}
METHODS = {
    "vae": VAE_ALONE,
    "iwae": VAE_ALONE.replace(objective=IWAE(samples=3, beta=BETA)),
    "hvi": HVI,
    "residual": HVI.replace(kernel=Residual(hidden=8)),
    "avo": BASE,
    "mixed": HVI.replace(objective=Mixed(LocalAVO(BETA), ELBO(BETA), 0.3)),
    "then": HVI.replace(objective=Then(AVO(), IWAE(2), switch=5)),
    "planar": HVI.replace(kernel=Planar()),
    "householder": HVI.replace(kernel=Householder()),
    "iaf": HVI.replace(kernel=IAF(hidden=8), objective=AVO()),
    "spline": HVI.replace(kernel=Spline(hidden=8)),
    "alpha": VAE_ALONE.replace(objective=AlphaELBO(Linear(0.1, 0.1))),
    "capacity": VAE_ALONE.replace(objective=CapacityELBO(20.0, Linear(0.1, 0.1))),
    "prior": BASE.replace(base="prior"),
    "autoregressive": HVI.replace(decoder=Autoregressive()),
    "grey": BASE.replace(grey=True, shuffled=False),
}

pytestmark = [pytest.mark.usefixtures("few"), pytest.mark.filterwarnings("ignore:schedule")]


# ---- what a description refuses


BAD = [
    ({"base": "x"}, "unknown base 'x' of Mnist: base takes one of encoder, prior"),
    ({"decoder": "pixelcnn"}, "impossible decoder 'pixelcnn' of Mnist: decoder takes a description such as Indep"),
    ({"bounds_images": 1}, "impossible bounds_images 1 of Mnist: bounds_images takes 0, or a whole number from 2 to"),
    (
        {"explored_images": 9},
        "impossible explored_images 9 of Mnist: explored_images takes 0, or a whole number from",
    ),
    ({"explored_images": 10, "latents": 1001}, "impossible latents 1001: with explored_images, latents takes at most"),
    ({"train_images": 60_000}, "impossible train_images 60000 of Mnist: train_images takes a whole number from 2 to 5"),
    ({"train_images": 65, "batch": 64}, "impossible batch 64: the last of 65 images would be alone in its batch"),
    ({"batch": 1}, "impossible batch 1 of Mnist: batch takes a whole number from 2"),
    ({"epochs": 2.0}, "impossible epochs 2.0 of Mnist: epochs takes a whole number from 1"),
    ({"grey": 1}, "impossible grey 1 of Mnist: grey takes True or False"),
    ({"n_transitions": 3}, "impossible n_transitions 3 of Mnist: n_transitions takes 0 without a kernel"),
    ({"kernel": Gated(), "n_transitions": 0}, "impossible n_transitions 0 of Mnist: n_transitions takes at least 1"),
    ({"base": "prior"}, "impossible base 'prior' of Mnist: it takes a kernel, which alone would see the image"),
    ({"objective": TrajectoryBalance()}, "impossible objective TrajectoryBalance() of Mnist: it takes many draws"),
    (
        {"objective": Then(NVI(), AVO(), 5), "kernel": Gated()},
        "impossible objective Then(first=NVI(), second=AVO(), switch=5) of Mnist: it takes many draws of one density",
    ),
    ({"objective": AVO()}, "impossible n_transitions 0: AVO() takes at least 1"),
    ({"objective": AlphaELBO(Linear(0.1, 1e-3))}, "schedule Linear(start=0.1, rate=0.001) must end at 1, got 0.109"),
    ({"objective": CapacityELBO(rise=Linear(0.1, 1e-3))}, "schedule Linear(start=0.1, rate=0.001) must end at 1, got"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message.split(":")[0][:45] for _, message in BAD])
def test_what_is_impossible_is_refused_with_one_line_of_field_value_and_what_it_takes(fields, message):
    with pytest.raises(ValueError) as refusal:
        Mnist(**{**FEW, **fields})
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


def test_the_defaults_are_the_reports_configuration():
    spec = Mnist(kernel=Gated(hidden=40, start="identity"))
    assert (spec.width, spec.latents, spec.n_transitions, spec.train_images) == (300, 40, 5, 50_000)
    assert (spec.epochs, spec.batch, spec.lr, spec.objective) == (25, 64, 1e-3, ELBO(Linear(0.2, 2e-4)))
    assert spec.n_steps == 25 * 782 and spec.label == "mnist-gated-elbo-s0" and Mnist().label == "mnist-vae-elbo-s0"


@pytest.mark.parametrize("spec", METHODS.values(), ids=METHODS)
def test_what_a_description_prints_and_writes_is_read_back(spec):
    assert eval(repr(spec)) == spec and from_json(to_json(spec)) == spec and hash(spec) == hash(spec.replace())


def test_where_a_kernel_comes_or_goes_the_number_of_transitions_follows():
    assert VAE_ALONE.replace(kernel=Gated()).n_transitions == 5 and HVI.replace(kernel=None).n_transitions == 0
    assert HVI.replace(kernel=Planar()).n_transitions == 2 == HVI.replace(seed=1).n_transitions
    assert VAE_ALONE.replace(kernel=Gated(), n_transitions=3).n_transitions == 3


def test_a_warm_up_that_is_too_slow_for_the_training_is_warned_of_where_it_is_asked_for():
    for make in (lambda: Mnist(**FEW), lambda: VAE_ALONE.replace(objective=ELBO(Geometric()))):
        with pytest.warns(
            UserWarning, match=r"^schedule .* should end near 1, .* got 0\.2\d* at step 9, its l"
        ) as seen:
            make()
        assert seen[0].filename == __file__


# ---- what every method gives


@pytest.mark.parametrize("name", METHODS)
def test_a_run_has_finite_metrics_and_a_line_for_each_epoch(store, name):
    spec = METHODS[name]
    r = run(spec)
    chain = {"kernels_earn", "kernels_earn_se", "kernels_move"} if spec.kernel else set()
    assert METRICS - r.metrics.keys() == ({"grey_nll"} if name == "autoregressive" else set())
    assert all(math.isfinite(value) for key, value in r.metrics.items() if key in METRICS - {"pareto_k"} | chain)
    assert r.metrics["nll_samples"] == 5 and r.metrics["nll_images"] == 50
    assert [(line["step"], line["epoch"]) for line in r.history] == [(5, 1), (10, 2)]
    annealed = {"alpha": "alpha", "capacity": "rise", "then": None, "iaf": None}.get(name, "beta")
    if annealed:
        first = 0.1 if name in ("alpha", "capacity") else 0.2
        assert [line[annealed] for line in r.history] == pytest.approx([first + 0.4, min(1, first + 0.9)])
    for line in r.history:
        assert line["elbo"] == pytest.approx(line["reconstruction"] - line["kl"])
    assert r.chain is None and isinstance(r.vae, VAE) and r.vae is r.model and not r.model.training
    assert len(r.vae.kernels) == (1 if name == "householder" else spec.n_transitions)
    assert r.vae.decode(torch.randn(3, 4)).shape == (3, 784)
    moved = zip(r.model.parameters(), spec.auto_encoder().parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def test_evaluation_is_at_beta_one(store):
    """With beta 0 in training the KL is free; the bound that is reported charges it all the same."""
    r = run(VAE_ALONE.replace(objective=ELBO(beta=0.0)))
    assert r.metrics["elbo"] == pytest.approx(r.metrics["reconstruction"] - r.metrics["kl"], abs=1e-3)
    assert r.metrics["kl"] > 0.1


def test_a_run_learns(store):
    first, *_, last = run(VAE_ALONE.replace(train_images=1000, epochs=6, lr=3e-3)).history
    assert last["elbo"] > first["elbo"] + 20


def records(spec, bounds):
    """The problem after epochs whose validation bounds are told."""
    problem = MnistProblem(spec)
    for epoch, bound in enumerate(bounds, 1):
        problem._step, problem._recent = epoch * problem.steps_per_record - 1, [torch.zeros(1)]
        problem._bound = lambda *_, bound=bound: {"elbo": bound, "reconstruction": 0.0, "kl": 0.0}
        with torch.no_grad():
            next(problem.network.parameters()).fill_(epoch)
        problem.record()
    return problem.best["epoch"], float(problem.weights()[0]["encoder.features.0.weight"][0, 0])


def test_the_weights_of_the_best_epoch_are_kept_and_of_unshuffled_training_the_last():
    assert records(VAE_ALONE, [-200.0, -150.0, -180.0]) == (2, 2)
    assert records(VAE_ALONE.replace(shuffled=False), [-200.0, -150.0, -180.0]) == (3, 3)


# ---- data and initial weights


def batches_of(spec, monkeypatch):
    """What a problem shows its model in two epochs, and its initial weights."""
    problem, seen = MnistProblem(spec), []
    posterior = VAE.posterior
    with monkeypatch.context() as patch:
        patch.setattr(VAE, "posterior", lambda self, x, *rest: seen.append(x) or posterior(self, x, *rest))
        for step in range(2 * problem.steps_per_record):
            problem.values(step)
    return problem, torch.cat(seen).unflatten(0, (2, -1))


def test_methods_with_the_same_seed_share_data_and_initial_weights_where_shapes_agree(monkeypatch):
    others = [HVI, BASE, HVI.replace(kernel=Planar()), VAE_ALONE.replace(objective=ELBO(Cyclical(steps=10)))]
    plain, seen = batches_of(VAE_ALONE, monkeypatch)
    weights = dict(plain.network.named_parameters())
    for spec in others:
        problem, images = batches_of(spec, monkeypatch)
        assert torch.equal(images, seen)
        assert all(torch.equal(value, weights.get(n, value)) for n, value in problem.network.named_parameters())
    hvi, avo = (dict(MnistProblem(spec).network.named_parameters()) for spec in (HVI, BASE))
    assert all(torch.equal(hvi[name], avo[name]) for name in hvi)
    assert not torch.equal(seen[0], seen[1]) and set(seen.unique().tolist()) == {0.0, 1.0}


def test_another_seed_gives_other_weights_and_other_data_of_another_stream_than_the_weights():
    first, second = (MnistProblem(VAE_ALONE.replace(seed=seed)) for seed in (0, 1))
    a, b = (next(data.batches(each.train, 64, each.generator)) for each in (first, second))
    assert not torch.equal(a, b) and torch.equal(first.test, second.test)
    assert any(not torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    ours = torch.rand(5, generator=MnistProblem(VAE_ALONE).generator)
    assert not torch.equal(ours, torch.rand(5, generator=torch.Generator().manual_seed(0)))


def test_grey_training_sees_and_is_selected_on_grey_images_in_the_same_order_where_it_is_not_shuffled(monkeypatch):
    problem, seen = batches_of(BASE.replace(grey=True, shuffled=False), monkeypatch)
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[0].sum(), problem.train.float().sum() / 255)
    assert not torch.equal(*batches_of(BASE.replace(grey=True), monkeypatch)[1])
    selected = []
    bound = problem._bound
    problem._bound = lambda x, generator: selected.append(x) or bound(x, generator)
    problem.record()
    assert len(selected[0].unique()) > 100


# ---- what is learned from what


def moved(spec):
    """A problem whose weights are some way from where they start, in double precision, and a batch of images."""
    problem = MnistProblem(spec)
    problem.network.double().train()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in problem.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return problem, problem.test[:20].double()


def taught(problem, values):
    """The gradients of encoder, kernels and decoder, each as one vector; zeros where there is none."""
    parts = (problem.network.encoder, problem.network.kernels, problem.network.decoder)
    found = [torch.autograd.grad(values.mean(), [*p.parameters()], None, True, allow_unused=True) for p in parts]
    pairs = [zip(part.parameters(), each, strict=True) for part, each in zip(parts, found, strict=True)]
    return [torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in part]) for part in pairs]


def gradient(objective, spec=BASE, seed=1):
    problem, x = moved(spec)
    chain = problem.network.posterior(x, torch.Generator().manual_seed(seed))
    return taught(problem, objective(chain, problem.network.joint(x)))


def test_at_weight_one_avo_alone_teaches_the_kernels_and_the_elbo_alone_encoder_and_decoder():

    def after_the_elbo(chain, joint):  # first, as in training: it changes the batch statistics
        noise = chain.noise()
        ELBO(beta=0.5)(chain, joint, noise=noise)
        return LocalAVO(beta=0.5)(chain, joint, noise=noise)

    both, avo, elbo = gradient(AVO(beta=0.5)), gradient(after_the_elbo), gradient(ELBO(beta=0.5))
    for ours, theirs in zip(both, (elbo[0], avo[1], elbo[2]), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not avo[0].any() and not avo[2].any() and (avo[1] - elbo[1]).abs().max() > 1e-3


def test_a_mixture_is_avo_on_its_steps_and_the_elbo_on_all_others():
    mixed = METHODS["mixed"].objective
    names = [type(mixed.at(step)).__name__ for step in range(10)]
    assert {*names} == {"LocalAVO", "ELBO"}
    encoder, kernels, decoder = gradient(mixed.at(names.index("LocalAVO")))
    assert kernels.any() and not encoder.any() and not decoder.any()
    assert all(part.any() for part in gradient(mixed.at(names.index("ELBO"))))


def test_a_learned_path_is_taught_by_path_fit_alone_and_teaches_nothing_else():
    built = AVO(weight=0.2, alphas=LearnedAlphas()).build(2)
    for ours, theirs in zip(gradient(built), gradient(AVO(weight=0.2)), strict=True):
        torch.testing.assert_close(ours, theirs)
    problem, x = moved(BASE)
    chain, joint = problem.network.posterior(x, torch.Generator().manual_seed(1)), problem.network.joint(x)
    (found,) = torch.autograd.grad(built(chain, joint).mean(), built.alphas.logits)
    chain.generator.manual_seed(1)
    chain.noise()  # the draws for the path come after
    wanted = 0.2 * path_fit(chain[:1], joint[:1], built.alphas, 256).mean()
    torch.testing.assert_close(torch.autograd.grad(wanted, built.alphas.logits)[0], found)
    assert found.norm() > 0


def test_a_path_is_learned_to_where_its_optimum_is_in_as_many_dimensions():
    """From N(0, I) to N(0.5, 1.2^2 I) by kernels that do nothing: the best exponents by numerical optimisation."""
    dim, path = 40, LearnedAlphas().build(5).double()
    wide = type("Wide", (), {"dim": dim, "log_prob": lambda self, z: -((z - 0.5) / 1.2).square().sum(-1) / 2})()
    still = lambda z, context, noise: (z, z.new_zeros(z.shape[:-1]))
    base = DiagonalGaussian(torch.zeros(dim).double(), torch.ones(dim).double())
    chain = Chain(base, [still] * 5, generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(path.parameters(), 0.02)
    for _ in range(400):
        optimiser.zero_grad()
        (-path_fit(chain, wide, path, 256)).backward()
        optimiser.step()
    exact = torch.tensor([0.0, 0.243, 0.462, 0.659, 0.838, 1.0]).double()
    torch.testing.assert_close(path().detach(), exact, atol=0.12, rtol=0)


def test_a_learned_path_moves_and_is_part_of_what_a_run_says(store):
    found = run(BASE.replace(objective=AVO(weight=0.2, alphas=LearnedAlphas()), lr=0.01)).metrics["alphas"]
    assert found[0] == 0 and found[2] == 1 and 0 < found[1] < 1 and abs(found[1] - 0.5) > 0.005


def test_a_chain_from_the_prior_starts_at_a_standard_normal_and_sees_the_image_through_its_kernels():
    model = METHODS["prior"].auto_encoder().eval()
    chain, z = model.posterior(MnistProblem(BASE).test[:5]), torch.randn(7, 5, 4)
    torch.testing.assert_close(chain.base.log_prob(z), DiagonalGaussian.isotropic(4).log_prob(z))
    ends = chain.rsample(noise=torch.zeros(3, 5, 4)).z[-1]
    assert (ends[0] - ends[1]).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["planar", "householder", "iaf", "spline"])
def test_kernels_of_an_image_depend_on_the_image(name):
    torch.manual_seed(0)
    model = METHODS[name].auto_encoder().eval()
    chain = model.posterior(MnistProblem(BASE).test[:3])
    chain.base = DiagonalGaussian(torch.full((3, 4), 0.5), torch.ones(3, 4))
    z = chain.rsample(noise=torch.full((len(chain) + 1, 3, 4), 0.3)).z[-1]
    assert (z[0] - z[1]).abs().max() > 1e-4


# ---- parts of one's own


class Halved(torch.nn.Module):
    """A kernel that looks at the context: z' = z / 2 + a linear function of it."""

    def __init__(self, dim, context_dim):
        super().__init__()
        self.shift = torch.nn.Linear(context_dim, dim)

    def forward(self, z, context=None, noise=None):
        return z / 2 + self.shift(context), z.new_full(z.shape[:-1], -z.shape[-1] * math.log(2))


class Halvings:
    def build(self, dim, n, context_dim=0):
        return [Halved(dim, context_dim) for _ in range(n)]


class Pale(Decoder):
    def forward(self, z, x=None):
        return super().forward(z, x) - 2


class Pales:
    def build(self, latents, width):
        return Pale(latents, width)


def own_objective(chain, target, sample_shape=(), noise=None):
    return chain.log_weight(target, chain.rsample(sample_shape, noise))


@pytest.mark.parametrize(
    "fields",
    [{"kernel": Halvings()}, {"decoder": Pales()}, {"objective": own_objective}, {"objective": ELBO(lambda step: 1.0)}],
    ids=["kernel", "decoder", "objective", "schedule"],
)
def test_parts_of_ones_own_are_trained_and_judged_and_kept_under_a_name(store, fields):
    spec = HVI.replace(**fields)
    first = run(spec)
    assert math.isfinite(first.metrics["nll"]) and not store.exists()
    named = run(spec.replace(name="mine"))
    assert named.metrics == first.metrics == run(spec.replace(name="mine")).metrics and len(list(store.iterdir())) == 1


def test_a_kernel_of_ones_own_that_fits_no_chain_is_refused_before_training(store):
    class Halves(Halvings):
        def build(self, dim, n, context_dim=0):
            return super().build(dim, n + 1, context_dim)

    with pytest.raises(ValueError, match=r"^build of the kernel must give n_transitions 2 kernels, got 3$"):
        run(HVI.replace(kernel=Halves()))
    alone = type("Alone", (torch.nn.Module,), {"forward": lambda self, z, context, noise: z})
    alones = type("Alones", (), {"build": lambda self, dim, n, context_dim: [alone() for _ in range(n)]})()
    with pytest.raises(
        ValueError, match=r"^kernel Alone must give z_next of shape \(4, 4\) and log_ratio of shape \(4,\)"
    ):
        run(HVI.replace(kernel=alones))


# ---- what else is judged


@pytest.mark.parametrize("lr", [1e8, 1e30])
@pytest.mark.parametrize("spec", [VAE_ALONE, BASE.replace(objective=AVO(alphas=LearnedAlphas()))], ids=["vae", "path"])
def test_training_that_diverges_is_kept_as_failed(store, spec, lr):
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"^mnist-\w+-\w+-s0: .* became .* lr .* may be too large"):
            run(spec.replace(lr=lr))


def test_a_failure_is_part_of_a_checkpoint():
    problem, other = MnistProblem(BASE), MnistProblem(BASE)
    problem.failures[0] = "kl became inf by step 3"
    other.load(problem.state())
    assert other.failures == problem.failures and other.metrics() == [{}]


def test_a_single_image_has_a_likelihood_and_no_active_units(store):
    metrics = run(VAE_ALONE.replace(nll_images=1)).metrics
    assert math.isfinite(metrics["nll"]) and metrics["active_units"] is None and metrics["nll_se"] is None


@pytest.mark.parametrize("decoder", [Independent(), Autoregressive()], ids=repr)
def test_a_run_says_how_much_its_posterior_explores_and_its_bounds_where_it_is_asked(decoder, store):
    spec = VAE_ALONE.replace(decoder=decoder, epochs=1)
    found = run(spec.replace(explored_images=20)).metrics
    assert len(found["latent_kl"]) == 4 and found["information_images"] == 20 and 0 <= found["coverage"] <= 1
    plain = run(spec).metrics
    assert "latent_kl" not in plain and plain["nll"] == found["nll"] and plain["active_units"] == found["active_units"]


def test_images_are_binarised_once_for_all_runs():
    _, valid, test = mnist.images()
    assert set(test.unique().tolist()) == {0.0, 1.0} and not torch.equal(valid, test)
    assert torch.equal(MnistProblem(BASE.replace(seed=1)).test, test)
