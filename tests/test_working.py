"""The search for a chain that earns its keep, and what is judged with it."""

from types import SimpleNamespace

import pytest

from annealed_core import AVO, ELBO
from annealed_core.schedules import value_at
from annealed_report import results, working


def searched(**gained):
    """Runs of `chains` in which the named chains have so many nats more than a VAE's -100, or -104 without a norm."""
    vae = {working.PLAIN: -104.0}
    return [
        SimpleNamespace(
            spec=spec,
            metrics={
                "valid_elbo": vae.get(spec.decoder, -100.0) + (gained.get(name_of(spec), 0.0) if spec.kernel else 0.0)
            },
        )
        for spec in working.chains()
    ]


def name_of(spec):
    fields = {"kernel": spec.kernel, "n_transitions": spec.n_transitions, "decoder": spec.decoder}
    return next((name for name, each in working.CHAINS.items() if each == fields), None)


def test_each_chain_is_one_line_of_the_search_and_has_its_own_gain():
    assert sorted(map(name_of, {s.replace(seed=0) for s in working.chains() if s.kernel})) == sorted(working.CHAINS)
    gains = working.gains(searched(residual=2.0))
    assert list(gains) == list(working.CHAINS)
    assert gains.pop("residual") == pytest.approx([2.0] * 3) and not any(map(any, gains.values()))


def test_the_chain_with_the_highest_bound_is_chosen_of_those_that_earn():
    far = {"leapfrog, T = 2": 3.0, "residual": 0.5, "gated, torch's weights": 0.2}
    assert working.chosen_chain(searched(**far)) == "residual"  # -99.5, and the leapfrog chain has -101
    assert working.chosen_chain(searched(**far, **{"leapfrog, T = 5": 6.0})) == "leapfrog, T = 5"
    assert working.chosen_chain(searched(residual=0.29)) is None
    assert working.chosen_chain([]) is None


def test_four_methods_are_judged_with_the_chain_that_the_records_choose(monkeypatch):
    chain = working.CHAINS[working.chosen_chain(results.load("full", "chains"))]
    runs = [SimpleNamespace(spec=spec) for spec in working.working()]
    sides = {name: [run.spec for run in working.of_line(runs, name)] for name in ("VAE", "HVI", "HVI-AVO", "IAF")}
    assert sum(map(len, sides.values())) == len(runs)
    for hvi, avo, vae in zip(sides["HVI"], sides["HVI-AVO"], sides["VAE"], strict=True):
        assert (hvi.kernel, hvi.decoder, vae.decoder) == (chain["kernel"], chain["decoder"], chain["decoder"])
        assert isinstance(hvi.objective, ELBO) and isinstance(avo.objective, AVO)
        assert avo.replace(objective=hvi.objective) == hvi
    monkeypatch.setattr(results, "load", lambda *_: [])
    assert working.working() == []


def test_what_minds_the_warm_up_is_asked_at_every_corner_with_the_chosen_chain(monkeypatch):
    specs = working.robust()
    betas = {spec.objective.beta for spec in specs}
    assert len(specs) == 3 * 2 * 4 and betas == set(working.CORNERS)
    assert all(value_at(spec.objective.beta, spec.n_steps) == 1 for spec in specs)
    runs = [SimpleNamespace(spec=spec) for spec in specs]
    sides = [[run.spec.seed for run in working.of_line(runs, name)] for name in ("HVI", "HVI-AVO")]
    assert sides[0] == sides[1] == [seed for seed in (20, 21, 22) for _ in betas]
    monkeypatch.setattr(results, "load", lambda *_: [])
    assert working.robust() == []
