"""The energies, fair: what is compared has as many evaluations, and is tuned alike."""

from types import SimpleNamespace

import pytest
import torch

from annealed_core.kernels import Gated
from annealed_core.objectives import AVO, ELBO
from annealed_core.running.density import Density
from annealed_report.fair import (
    FRESH_SEEDS,
    METHODS,
    SETTINGS,
    TUNING,
    TUNING_SEEDS,
    Started,
    best_setting,
    line,
    tuning,
)


def evaluations(fields):
    """How often the target is evaluated in training."""
    steps, each = fields["steps"], fields["batch"]
    objective, length = fields["objective"], fields["n_transitions"]
    if isinstance(objective, AVO):
        return steps * each * length
    if isinstance(objective, ELBO):
        return steps * each
    return objective.switch * each * length + (steps - objective.switch) * each


@pytest.mark.parametrize("target", SETTINGS)
def test_the_elbo_is_given_as_many_evaluations_as_avo(target):
    counts = {method: evaluations(line(method, target)) for method in METHODS}
    assert counts["ELBO, T times the steps"] == counts["ELBO, T times the batch"] == counts["AVO"]
    assert counts["ELBO"] * SETTINGS[target]["n_transitions"] == counts["AVO"] > counts["AVO, then ELBO"]


def test_every_method_is_tuned_over_the_same_settings_on_other_seeds_than_it_is_judged_on():
    specs = tuning()
    for method in METHODS:
        own = [
            s
            for s in specs
            if s.replace(lr=1, lr_schedule="constant", clip=None, seed=0) == Density(lr=1, **line(method, "D"))
        ]
        assert {(s.lr, s.lr_schedule, s.clip) for s in own} == {tuple(each.values()) for each in TUNING}
        assert len(own) == len(TUNING) * len(TUNING_SEEDS)
    assert not set(TUNING_SEEDS) & set(FRESH_SEEDS) and len(FRESH_SEEDS) == 20


def test_the_best_setting_has_the_smallest_mean_total_variation():
    def value(spec):
        return 0.1 if (spec.lr, spec.lr_schedule, spec.clip) == (3e-3, "cosine", None) else 0.2 + 0.01 * spec.seed

    runs = [SimpleNamespace(spec=spec, metrics={"total_variation": value(spec)}) for spec in tuning()]
    assert best_setting(runs, "AVO", "A") == {"lr": 3e-3, "lr_schedule": "cosine", "clip": None}


def weights(kernel):
    torch.manual_seed(0)
    return [parameter for pair in kernel.build(2, 3) for parameter in pair.parameters()]


def test_the_factors_together_are_the_start_near_the_identity_and_alone_torchs():
    torch.testing.assert_close(weights(Started(gate=-4.0, sigma=0.02, scale=0.3)), weights(Gated(start="identity")))
    assert all(map(torch.equal, weights(Started()), weights(Gated())))
    (pair,) = Started(gate=-2.0).build(2, 1)
    assert (pair.forwards.outputs.bias[2:4] == -2).all() and (pair.reverse.outputs.bias[2:4] == -2).all()
