"""Compiled training: the same values and gradients as eager training, the same reports of failure."""

import pytest
import torch

from annealed_core import Spec, TrainingError, compiled, run
from annealed_core.experiment import train
from annealed_core.store import Folder, key
from annealed_core.targets import ENERGIES
from annealed_core.toys import Toys

VARIANTS = [
    {"method": "elbo", "kernel": "gated"},
    {"method": "avo", "kernel": "residual", "path": "learned"},
    {"method": "alpha", "kernel": "gated"},
    {"method": "calibrated", "kernel": "gated"},
]


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANNEALED_COMPILE", "1")
    try:
        compiled.compiled(lambda: None)
    except RuntimeError as error:
        pytest.skip(str(error))


def outcome(specs: list[Spec], step: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    problem = Toys(specs)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in problem.stack.parameters():  # the last layer of some kernels starts at 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    values = problem.objective(step)
    values.sum().backward()
    return values.detach(), [p.grad for p in problem.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v["method"])
@pytest.mark.usefixtures("compiling")
def test_compiled_steps_have_the_values_and_gradients_of_eager_ones(variant, monkeypatch):
    specs = [Spec("toy", **variant, target=name, seed=seed, batch=16) for seed, name in enumerate("DDA")]
    values, gradients = outcome(specs, 700)
    monkeypatch.setenv("ANNEALED_COMPILE", "0")
    expected, expected_gradients = outcome(specs, 700)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert len(gradients) == len(expected_gradients) > 0
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()) + 1e-6)


class Cliff:
    """A Gaussian whose value, or whose gradient alone, is not a number beyond an edge."""

    dim = 2

    def __init__(self, what: str) -> None:
        self.what = what

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        beyond = z[..., 0] > 2.5
        if self.what == "value":
            return torch.where(beyond, torch.nan, -0.5 * z.square().sum(-1))
        # The square root's slope at 0 is infinite, and 0 times infinity no number; its value is 0.
        return -0.5 * z.square().sum(-1) + torch.where(beyond, 0.0, z[..., 0] - z[..., 0].detach()).sqrt() * 0


@pytest.mark.usefixtures("compiling", "store")
@pytest.mark.parametrize(("what", "said"), [("value", "log_prob is nan"), ("gradient", "gradient of log_prob is nan")])
def test_a_target_that_fails_under_compiled_training_is_named_with_step_and_point(what, said, monkeypatch):
    # A gradient that fails anywhere is refused before training starts, so that check is left out here.
    monkeypatch.setattr("annealed_core.toys.check_target", lambda *args, **kwargs: None)
    failing = Spec("toy", "elbo", target=Cliff(what), steps=20, batch=64, samples=100)
    fine = failing.replace(target="D", seed=1)
    train([failing, fine])
    failure = Folder.of(failing).failure()
    assert failure is not None
    assert said in failure
    assert "Cliff" in failure
    assert "at step" in failure
    assert "z = (" in failure
    assert Folder.of(fine).result() is not None
    with pytest.raises(TrainingError, match=said):
        run(failing)


def test_only_pairs_of_gaussians_on_the_cpu_are_compiled_and_kept_apart(monkeypatch):
    pair, flow = Spec("toy", "elbo"), Spec("toy", "elbo", kernel="planar")
    before = key(pair), key(flow), key(pair, "cuda")
    monkeypatch.setenv("ANNEALED_COMPILE", "1")
    assert key(pair) != before[0]
    assert (key(flow), key(pair, "cuda")) == before[1:]
    for other in (Spec("mnist", "vae"), Spec("toy", "iwae"), Spec("toy", "elbo", n_transitions=0)):
        assert not compiled.is_asked(other, "cpu")


def test_a_wrong_setting_and_a_missing_compiler_are_said_in_one_line(monkeypatch):
    monkeypatch.setenv("ANNEALED_COMPILE", "yes")
    with pytest.raises(ValueError, match=r"^ANNEALED_COMPILE must be 0 or 1, got 'yes'$"):
        key(Spec("toy", "elbo"))
    monkeypatch.setenv("ANNEALED_COMPILE", "1")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("annealed_core.compiled.shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"^ANNEALED_COMPILE=1 takes a C\+\+ compiler, .* none was found$"):
        Toys([Spec("toy", "elbo", target=ENERGIES["D"].name)])
