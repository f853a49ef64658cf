"""Training: any chain, target and objective; what is changed by it, and what is left as it was."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn

from annealed_core.chain import Chain
from annealed_core.fit import adam, fit, maximise
from annealed_core.flows import IAF, Householder, Planar, Spline
from annealed_core.kernels import DiagonalGaussian, Gated, Residual
from annealed_core.objectives import AVO, ELBO, IWAE, AlphaELBO, LocalAVO
from annealed_core.schedules import Linear, Mixed, Then
from annealed_core.targets import Energy, LearnedAlphas, LearnedPath, linear_alphas
from annealed_core.vae import VAE


class Affine(nn.Module):
    """A reader's own kernel: z' = shift + exp(log_scale) * z, whose log-ratio is that of any invertible map."""

    def __init__(self, dim):
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, z, context=None, noise=None):
        return self.shift + self.log_scale.exp() * z, self.log_scale.sum().expand(z.shape[:-1])


class Renyi:
    """A reader's own objective: the Renyi bound of order 1/2 (Li & Turner 2016), 2 log E[w^(1/2)]."""

    def __init__(self, samples):
        self.samples = samples

    def __call__(self, chain, target, sample_shape=(), noise=None):
        trajectory = chain.rsample((self.samples, sample_shape), noise)
        log_weight = chain.log_weight(target, trajectory)
        return 2 * (torch.logsumexp(0.5 * log_weight, 0) - math.log(self.samples))


def plain_bound(chain, target, sample_shape=(), noise=None):
    return chain.log_weight(target, chain.rsample(sample_shape, noise))


def chain_of(recipe=None, n=2, dim=2):
    torch.manual_seed(0)
    kernels = [Affine(dim)] if recipe is None else recipe.build(dim, n)
    return Chain(DiagonalGaussian.isotropic(dim), kernels)


NORMAL = DiagonalGaussian(torch.tensor([1.0, -0.5]), torch.tensor([0.6, 1.5]))
TARGET = Energy("normal", NORMAL.log_prob)
OBJECTIVES = [
    ELBO(),
    AlphaELBO(Linear(0.5, 0.01)),
    IWAE(4),
    LocalAVO(),
    AVO(),
    AVO(0.3, alphas=LearnedAlphas()),
    AVO(alphas=lambda n: linear_alphas(n)),
    Mixed(AVO(), ELBO(), 0.3),
    Then(AVO(), ELBO(), 50),
    Renyi(4),
    plain_bound,
]


def weights(chain):
    return [parameter.detach().clone() for parameter in chain.parameters()]


def bound(chain, target=TARGET):
    again = Chain(chain.base, chain.kernels, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float(ELBO()(again, target, 4000).mean())


@pytest.mark.parametrize(
    ("recipe", "objective"),
    [
        *((Gated(8, "identity"), objective) for objective in OBJECTIVES),
        *((recipe, ELBO()) for recipe in (None, Residual(8), Planar(), IAF(8), Spline(8))),
    ],
    ids=lambda each: getattr(each, "__name__", type(each).__name__),
)
def test_any_objective_trains_any_kernel_towards_the_target(recipe, objective):
    chain = chain_of(recipe)
    before = bound(chain)
    fitted = fit(chain, TARGET, objective, steps=100, batch=32, lr=0.02)
    assert bound(chain) > before / 2 and fitted.chain is chain
    assert fitted.history[-1]["step"] == 100 and math.isfinite(fitted.history[-1]["objective"])


def test_an_affine_kernel_comes_to_a_normal_target_by_itself():
    chain = chain_of()
    fit(chain, TARGET, AVO(), steps=1000, lr=0.02, lr_schedule="cosine")
    assert bound(chain) == pytest.approx(0, abs=1e-3)
    torch.testing.assert_close(chain.kernels[0].shift, NORMAL.loc, atol=0.02, rtol=0)


@pytest.mark.parametrize("own", [Affine, Renyi, plain_bound])
def test_what_a_reader_adds_takes_at_most_fifteen_lines(own):
    assert len(inspect.getsource(own).splitlines()) <= 15


def auto_encoder():
    torch.manual_seed(0)
    vae = VAE(2, 8, Gated(8, "identity").build(2, 2, 8))
    return vae, (torch.rand(40, 784) < 0.3).float()


@pytest.mark.parametrize("objective", [AVO(alphas=LearnedAlphas()), ELBO(Linear(0.2, 0.1)), IWAE(3)], ids=repr)
def test_chain_and_target_may_be_a_function_of_the_step_that_is_asked_once_for_each(objective):
    vae, x = auto_encoder()
    asked, before = [], [parameter.detach().clone() for parameter in vae.parameters()]

    def batch(step):
        asked.append(step)
        some = x[: 40 if step % 2 else 30]  # batches may differ in size
        return vae.posterior(some), vae.joint(some)

    fitted = fit(batch, objective=objective, steps=20, batch=(), lr=0.01, parameters=vae.parameters())
    assert asked == list(range(20)) and fitted.chain is batch
    after = list(vae.parameters())
    assert all(not torch.equal(*pair) and pair[1].grad is None for pair in zip(before, after, strict=True))
    late = fit(batch, objective=ELBO(), steps=60, batch=(), lr=0.01, parameters=vae.parameters()).history
    assert late[-1]["objective"] > -500


class Learning(nn.Module):
    """A target with a network."""

    dim = 2

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.ones(2))

    def log_prob(self, z):
        return -0.5 * (z - self.loc).square().sum(-1)


@pytest.mark.parametrize("objective", [ELBO(), AVO()], ids=repr)
def test_only_what_is_trained_is_changed_and_no_gradient_is_left_anywhere(objective):
    chain, target = chain_of(Gated(8)), Learning()
    fixed = chain.kernels[1].requires_grad_(False)
    before, loc = [copy.deepcopy(kernel.state_dict()) for kernel in chain.kernels], target.loc.detach().clone()
    fit(chain, target, objective, steps=5)
    changed = [
        {k for k, v in kernel.state_dict().items() if not torch.equal(v, old[k])}
        for kernel, old in zip(chain.kernels, before, strict=True)
    ]
    assert changed[0] == set(before[0]) and not changed[1] and torch.equal(target.loc, loc)
    assert all(p.grad is None for p in (*chain.parameters(), target.loc))
    assert not fixed.forwards.hidden.weight.requires_grad
    fit(chain, target, objective, steps=5, parameters=[target.loc])
    assert not torch.equal(target.loc, loc) and target.loc.grad is None


@pytest.mark.parametrize("shared", ["kernels", "parameters"])
def test_weights_that_come_twice_take_one_step(shared):
    found = []
    for twice in (False, True):
        chain = chain_of(n=1)
        chain.kernels = chain.kernels * 2
        given = {"parameters": [*chain.parameters()] * (1 + twice)} if shared == "parameters" or not twice else {}
        fit(chain, TARGET, steps=3, lr=0.1, **given)
        found.append(weights(chain))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_torchs_random_state_is_left_alone_and_the_seed_decides():
    found = {}
    for run, (state, seed) in enumerate([(0, 0), (1, 0), (0, 1)]):
        chain = chain_of(Gated(8))
        torch.manual_seed(state)
        before = torch.get_rng_state()
        fit(chain, TARGET, Mixed(AVO(), IWAE(2), 0.5), steps=10, seed=seed)
        assert torch.equal(torch.get_rng_state(), before) and chain.generator is None
        found[run] = weights(chain)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert any(not torch.equal(*pair) for pair in zip(found[0], found[2], strict=True))


def test_a_chain_with_a_generator_of_its_own_draws_from_that():
    found = []
    for seed in (0, 1):
        chain = chain_of(Gated(8))
        chain.generator = torch.Generator().manual_seed(7)
        fit(chain, TARGET, steps=5, seed=seed)
        found.append(weights(chain))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_gradients_are_recorded_whatever_the_caller_has_set():
    chain, other = chain_of(Gated(8)), chain_of(Gated(8))
    with torch.no_grad():
        fit(chain, TARGET, AVO(), steps=3)
        assert not torch.is_grad_enabled()
    fit(other, TARGET, AVO(), steps=3)
    torch.testing.assert_close(weights(chain), weights(other), rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrap", [lambda o: o, lambda o: Mixed(o, ELBO(), 0.9), lambda o: Then(Mixed(ELBO(), o, 0), o, 5)]
)
def test_learned_exponents_are_built_trained_and_found_in_what_was_fitted(wrap):
    wide = Energy("wide", DiagonalGaussian.isotropic(2, 6.0).log_prob)
    given, chain = wrap(AVO(alphas=LearnedAlphas())), chain_of(Gated(8), n=3)
    fitted = fit(chain, wide, given, steps=30, lr=0.05)
    paths = fitted.objective.modules()
    assert paths and all(isinstance(path, LearnedPath) and path.logits.grad is None for path in paths)
    assert all((path() - linear_alphas(3)).abs().max() > 0.05 for path in paths)
    assert given == wrap(AVO(alphas=LearnedAlphas())), "the objective that was given is as it was"


def test_training_that_diverges_says_so_in_one_line_with_the_step_and_leaves_no_gradient():
    chain = chain_of(Gated(8))
    target = Energy("cliff", lambda z: torch.where(z[..., 0] > -100, z.square().sum(-1), torch.nan).exp().exp())
    with pytest.raises(FloatingPointError) as failure:
        fit(chain, target, steps=300, lr=10.0)
    assert str(failure.value).startswith("the objective became ") and "\n" not in str(failure.value)
    assert str(failure.value).endswith(" by step 250: lr 10.0 may be too large")
    assert all(parameter.grad is None for parameter in chain.parameters()) and chain.generator is None


@pytest.mark.parametrize("recipe", [Gated(8), Householder()])
def test_nothing_to_train_is_refused(recipe):
    chain = chain_of(recipe, n=0)
    with pytest.raises(ValueError, match=r"^nothing to train: neither kernels nor parameters have weights "):
        fit(chain, TARGET)


def test_the_history_has_the_means_since_the_line_before():
    chain, seen = chain_of(Gated(8)), []

    def watched(chain, target, sample_shape=(), noise=None):
        values = plain_bound(chain, target, sample_shape)
        seen.append(values.detach())
        return values

    history = fit(chain, TARGET, watched, steps=600, batch=2).history
    assert [line["step"] for line in history] == [250, 500, 600]
    means = [float(torch.stack(part).mean()) for part in (seen[:250], seen[250:500], seen[500:])]
    assert [line["objective"] for line in history] == pytest.approx(means)


def quadratic():
    torch.manual_seed(0)
    weight, centre = nn.Parameter(torch.randn(3)), torch.randn(3)
    return weight, lambda step: -(weight - centre).square() * (1 + step % 3)


@pytest.mark.parametrize("lr_schedule", ["constant", "cosine"])
def test_the_loop_is_torchs_adam_on_minus_the_values(lr_schedule):
    weight, values = quadratic()
    maximise(values, [weight], 20, lr=0.1, lr_schedule=lr_schedule, beta1=0.8)
    other, values = quadratic()
    optimiser = torch.optim.Adam([other], 0.1, (0.8, 0.999))
    for step in range(20):
        if lr_schedule == "cosine":
            optimiser.param_groups[0]["lr"] = 0.1 * (0.5 + 0.5 * math.cos(math.pi * step / 20))
        optimiser.zero_grad()
        (-values(step)).sum().backward()
        optimiser.step()
    torch.testing.assert_close(weight, other)


def test_training_can_be_ended_and_goes_on_from_where_it_was():
    falling = {"lr": 0.1, "lr_schedule": "cosine"}
    weight, values = quadratic()
    maximise(values, [weight], 20, **falling)
    other, values = quadratic()
    optimiser, taken = adam([other], 0.1), []
    until_eight = lambda step: taken.append(step) or step == 8
    maximise(values, [other], 20, **falling, optimiser=optimiser, after=until_eight)
    maximise(values, [other], 20, **falling, optimiser=optimiser, first=8)
    assert taken == list(range(1, 9)) and torch.equal(weight, other)


def test_an_unknown_schedule_of_the_learning_rate_is_refused():
    with pytest.raises(ValueError, match=r"^unknown lr_schedule 'linear': choose one of constant, cosine$"):
        fit(chain_of(Gated(8)), TARGET, lr_schedule="linear")


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, None, "half"])
def test_a_function_for_the_learning_rate_must_give_a_number_from_0(value):
    said = rf"^lr_schedule must give a number from 0 at each step, got {value!r} at step 3$"
    with pytest.raises(ValueError, match=said):
        fit(chain_of(Gated(8)), TARGET, steps=5, lr_schedule=lambda step: value if step == 3 else 1.0)
    fit(chain_of(Gated(8)), TARGET, steps=1, lr_schedule=lambda step: torch.tensor(0.5))


def test_elements_of_the_gradient_are_cut_off_and_smaller_ones_left():
    weight, seen = torch.nn.Parameter(torch.zeros(3)), []

    class Noted(torch.optim.SGD):
        def step(self):
            seen.append(weight.grad.tolist())

    slopes = torch.tensor([-3.0, 0.05, 7.0])
    for clip in (None, 0.1):
        maximise(lambda step: (slopes * weight).sum(), [weight], 1, lr=1, clip=clip, optimiser=Noted([weight], lr=1))
    assert seen[0] == pytest.approx([3, -0.05, -7]) and seen[1] == pytest.approx([0.1, -0.05, -0.1])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"steps": -5}, "steps must be a whole number from 1, got -5"),
        ({"steps": "30"}, "steps must be a whole number from 1, got '30'"),
        ({"batch": 0}, "batch must be a whole number from 1, got 0"),
        ({"lr": "0.1"}, "lr must be a number above 0, got '0.1'"),
        ({"clip": -1.0}, r"clip must be finite and above 0, got -1\.0"),
        ({"objective": AVO}, r"objective must be an object such as AVO\(\), got the class"),
        ({"target": None}, "target must have log_prob, got None"),
        (
            {"target": Energy("wide", lambda z: -z.square().sum(-1, keepdim=True))},
            r"target\.log_prob must give a tensor with a value for each state, \(2,\) for z of \(2, 2\), got \(2, 1\)",
        ),
        (
            {"target": Energy("one", lambda z: -z.square().sum())},
            r"target\.log_prob must give a tensor .* for z of \(2, 2\), got \(\)",
        ),
    ],
)
def test_what_cannot_be_trained_with_is_refused_in_one_line(given, line):
    chain = Chain(DiagonalGaussian.isotropic(2), nn.ModuleList(Gated(hidden=8).build(2, 2)))
    fields = {"target": Energy("bowl", lambda z: -z.square().sum(-1)), "objective": ELBO(), "steps": 2} | given
    with pytest.raises((ValueError, TypeError), match=f"^{line}$"):
        fit(chain, fields.pop("target"), fields.pop("objective"), **fields)
