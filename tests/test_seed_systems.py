"""The seed's other systems: sprites and their score, what studies compare, and that each of their runs can be made."""

import math
from types import SimpleNamespace

import pytest
import torch

from annealed_core.description import from_json, own_objects, to_json
from annealed_core.fit import maximise
from annealed_core.judging import inference
from annealed_core.judging.disentanglement import mutual_information, mutual_information_gap
from annealed_core.objectives import ELBO
from annealed_core.running.experiment import run
from annealed_core.running.mnist import Mnist, images
from annealed_core.schedules import Between, Linear, value_at
from annealed_core.vae import IterativeVAE
from annealed_core.variants import MIWAE, BetaELBO, Relaxed
from annealed_report import seed_systems, varied
from annealed_report.seed_systems import ITERATIONS, RATES, SAMPLES, STARTS, Amortised, effect, rises
from annealed_report.sprites import Sprites, sprites
from annealed_report.varied import Varied

STUDIED = {study.__name__: study() for study in seed_systems.STUDIES}
FEW = {"train_images": 300, "epochs": 2, "width": 16, "latents": 4, "nll_images": 30, "nll_samples": 5}


def fake(spec, **metrics):
    return SimpleNamespace(spec=spec, metrics=metrics)


# ---- sprites and the score


def test_every_sprite_is_another_image_whole_and_has_the_factors_it_was_made_with():
    images, factors = sprites()
    assert images.shape == (2352, 784) and len(images.unique(dim=0)) == 2352
    assert [int(factor.max()) + 1 for factor in factors.T] == [14, 14, 4, 3] and len(factors.unique(dim=0)) == 2352
    image = images.view(-1, 28, 28).float() / 255
    assert set(images.unique().tolist()) == {0, 255}
    assert not image[:, [0, -1]].any() and not image[:, :, [0, -1]].any()
    mass, at = image.sum((1, 2)), torch.arange(28.0)
    torch.testing.assert_close((image.sum(2) @ at) / mass, 7.0 + factors[:, 0])
    torch.testing.assert_close((image.sum(1) @ at) / mass, 7.0 + factors[:, 1])
    assert all(mass[factors[:, 2] == n].min() < mass[factors[:, 2] == n + 1].min() for n in range(3))


def test_the_gap_is_one_for_a_latent_a_factor_and_none_for_two_that_know_the_same():
    factors = torch.cartesian_prod(torch.arange(4), torch.arange(5)).repeat(20, 1)
    codes = torch.cat([factors.double() * 3 - 1, torch.zeros(400, 1).double()], 1)
    assert mutual_information_gap(codes, factors) == pytest.approx(1)
    torch.testing.assert_close(mutual_information(codes, factors).diagonal(), torch.tensor([4.0, 5.0]).double().log())
    assert mutual_information_gap(torch.cat([codes, codes], 1), factors) == pytest.approx(0, abs=1e-12)
    # A latent with half of the first factor beside one that has it all: the gap is log 2 of log 4.
    half = torch.cat([codes, (factors[:, :1] // 2).double()], 1)
    assert mutual_information_gap(half, factors) == pytest.approx((math.log(2) / math.log(4) + 1) / 2)
    turned = codes[:, :2] @ torch.tensor([[1.0, 1.0], [-1.0, 1.0]]).double()
    assert mutual_information_gap(turned, factors) < 0.2
    with pytest.raises(ValueError, match=r"^codes and factors must be .* got \(400, 1\) and \(400, 2\)$"):
        mutual_information_gap(codes[:, :1], factors)


@pytest.mark.usefixtures("few")
@pytest.mark.filterwarnings("ignore:schedule")
def test_an_auto_encoder_is_trained_on_sprites(store):
    spec = Sprites(objective=ELBO(), latents=4, width=16, epochs=1, nll_images=20, nll_samples=5)
    found = run(spec)
    assert 0 <= found.metrics["gap"] <= 1 and "grey_nll" not in found.metrics and found.history[0]["step"] == 28
    assert from_json(to_json(spec)) == spec and spec.label == "sprites-vae-elbo-s0"
    with pytest.raises(ValueError, match="impossible train_images 2352 of Sprites"):
        Sprites(train_images=2352)


# ---- variants of the bound


@pytest.mark.usefixtures("few")
@pytest.mark.filterwarnings("ignore:schedule")
def test_a_variant_is_judged_as_it_ends_and_its_kl_term_has_three_parts(store):
    spec = Varied(objective=BetaELBO(Between(0, 5, Linear(0.0, 0.5))), **FEW)
    problem = Varied.problem([spec])
    for elbo in (-1.0, -2.0):  # the bound of the validation images falls
        problem._recent.append(torch.zeros(1))
        problem._bound = lambda x, generator, elbo=elbo: {"elbo": elbo, "kl": 0.0}
        problem.record()
    assert problem.best["elbo"] == -2
    found = run(spec)
    parts = [found.metrics[name] for name in ("information", "correlation", "dimensionwise")]
    assert sum(parts) == pytest.approx(found.metrics["kl"], abs=0.3) and 0 < parts[0] < math.log(1000)
    mixed = Varied(objective=Relaxed(ELBO(), 1.0), groups=2, **FEW)
    assert "information" not in run(mixed).metrics


@pytest.mark.usefixtures("few")
@pytest.mark.filterwarnings("ignore:schedule")
def test_a_likelihood_of_a_few_images_is_corrected_by_what_all_have_more(store, monkeypatch):
    monkeypatch.setattr(inference, "FITTED", 50)
    monkeypatch.setattr(varied, "importance_sampling", lambda *given: SimpleNamespace(log_px=-given[1].sum(-1)))
    found = run(Varied(**FEW | {"bounds_images": 5, "annealed_images": 0})).metrics
    assert found["bounds_images"] == 5 and found["nll_images"] == 30
    lit = images()[2][:5].sum(-1).mean()
    assert found["adaptive_nll_all"] == pytest.approx(found["adaptive_nll"] + found["nll"] - float(lit))


# ---- iterative inference on a decoder that stands still


@pytest.mark.usefixtures("few")
@pytest.mark.filterwarnings("ignore:schedule")
def test_encoder_and_iterative_inference_are_held_against_the_best_gaussian(store, monkeypatch):
    monkeypatch.setattr(seed_systems, "GAP_IMAGES", 10)
    monkeypatch.setattr(seed_systems, "GAP_STEPS", 50)
    model = Mnist(objective=ELBO(), **FEW)
    for iterations, objective in ((0, MIWAE(1, 1.0, 4)), (2, ELBO())):
        spec = Amortised(model=model, encoder="fresh", iterations=iterations, objective=objective, steps=8, batch=8)
        found = run(spec)
        assert isinstance(found.vae, IterativeVAE) == bool(iterations)
        assert found.metrics["amortisation"] > 0 and found.metrics["best_elbo"] > found.metrics["elbo"] - 100
        decoder = run(model).vae.decoder.state_dict()
        assert all(torch.equal(value, decoder[name]) for name, value in found.vae.decoder.state_dict().items())
        assert run(spec).metrics == found.metrics and spec.label.startswith(f"amortised-{iterations}-")
        assert len(found.metrics.get("stage_elbos", ())) == iterations
        if iterations:
            assert found.metrics["stage_elbos"][-1] == pytest.approx(found.metrics["elbo"], abs=3)


def test_encoder_and_iterative_inference_have_as_many_steps_and_draws():
    fixed = [spec for spec in STUDIED["refined"] if isinstance(spec, Amortised)]
    assert len({(s.steps, s.batch, s.lr, s.lr_schedule, s.model, s.encoder) for s in fixed}) == 1
    for spec in STUDIED["refined"]:
        draws = math.prod(spec.objective.draws(()))
        assert (draws, spec.iterations) in ((SAMPLES, 0), (1, ITERATIONS)) and SAMPLES == 2 * ITERATIONS


# ---- studies and claims


@pytest.mark.parametrize("name", STUDIED)
def test_the_runs_of_a_study_can_be_recorded(name):
    for spec in STUDIED[name]:
        assert not own_objects(spec) and from_json(to_json(spec)) == spec


def test_cycles_and_restarts_are_crossed_and_each_ends_with_the_plain_bound():
    cells = {(spec.objective, spec.lr_schedule) for spec in STUDIED["restarts"]}
    assert len(cells) == 8
    for spec in STUDIED["restarts"]:
        assert value_at(spec.objective.beta, spec.n_steps - 1) == 1 and value_at(spec.objective.beta, 0) in STARTS
    rate = RATES["restarts"]
    steps = STUDIED["restarts"][0].n_steps
    peaks = [step for step in range(steps) if rate(step) > 0.99999 and (step == 0 or rate(step - 1) < 0.01)]
    assert len(peaks) == 4 and rate(steps // 8) == pytest.approx(0.5, abs=0.01) and rate(steps) == 0


def test_main_effects_are_those_of_a_table_with_known_ones():
    def value(spec):
        cycles = spec.objective == rises(0.1)["four cycles"]
        return 5.0 + 2.0 * cycles + 0.5 * (spec.lr_schedule != "constant") + spec.seed

    runs = [fake(spec, kl=value(spec)) for spec in STUDIED["restarts"]]
    assert effect(runs, 0.1, "cycles").mean == pytest.approx(2) and effect(runs, 0.1, "restarts").mean == pytest.approx(
        0.5
    )
    assert effect([], 0.1, "cycles") is None


def test_every_claim_is_decided_by_runs_of_its_study_and_by_nothing_before_there_are_any():
    found = seed_systems.claims()
    assert len({claim.text for claim in found}) == len(found) and {claim.study for claim in found} == set(STUDIED)
    metrics = {"nll": 90.0, "kl": 5.0, "gap": 0.2, "amortisation": 3.0}
    for claim in found:
        assert claim.contrast([]) is None
        jitter = [
            fake(spec, **{name: value + 0.01 * (number % 7) for name, value in metrics.items()})
            for number, spec in enumerate(STUDIED[claim.study])
        ]
        assert claim.contrast(jitter) is not None, claim.text


def test_half_a_gap_closed_is_the_claims_border():
    fixed = [spec for spec in STUDIED["refined"] if isinstance(spec, Amortised)]
    runs = [fake(spec, amortisation=(1.0 if spec.iterations else 4.0) + 0.1 * spec.seed) for spec in fixed]
    (claim,) = [claim for claim in seed_systems.claims() if "at least half" in claim.text]
    assert claim.contrast(runs).mean == pytest.approx(0.25, abs=0.03)


def test_a_learning_rate_follows_a_function_of_the_step():
    weight, seen = torch.nn.Parameter(torch.zeros(1)), []

    class Noted(torch.optim.SGD):
        def step(self):
            seen.append(self.param_groups[0]["lr"])

    schedule = lambda step: 0.5**step
    maximise(lambda step: weight.sum(), [weight], 4, lr=2, lr_schedule=schedule, optimiser=Noted([weight], lr=2))
    assert seen == [2, 1, 0.5, 0.25]
    assert Mnist(lr_schedule=RATES["restarts"]).replace(seed=1).lr_schedule(0) == 1
    with pytest.raises(ValueError, match="unknown lr_schedule 'step' of Mnist: lr_schedule takes one of constant"):
        Mnist(lr_schedule="step")
