"""Inputs that once failed, each standing for a kind, where no other file of tests has them."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from annealed_core import AVO, ELBO, Density, Gated, run
from annealed_core.ais import ais
from annealed_core.kernels import DiagonalGaussian
from annealed_core.running import experiment

SMALL = Density(kernel=Gated(hidden=4), n_transitions=0, objective=ELBO(), samples=2000)
CENTRES = [[-2.0, 0.0], [2.0, 0.0]]


@dataclass
class Blobs:
    """Two blobs whose constants are float64, and so its values; a dataclass of tensors."""

    centres: torch.Tensor
    dim: int = 2
    base_scale: float = 2.0

    def log_prob(self, z):
        return torch.logsumexp(-0.5 * (z.unsqueeze(-2) - self.centres).square().sum(-1) / 0.25, -1)


def blobs(**declared):
    found = Blobs(torch.tensor(CENTRES, dtype=torch.float64))
    vars(found).update(declared)
    return found


@pytest.mark.parametrize(
    "modes", [(CENTRES, [0.5, 0.5]), (np.array(CENTRES), np.array([0.5, 0.5])), (torch.tensor(CENTRES), [0.5, 0.5])]
)
def test_modes_are_taken_in_any_form_beside_a_log_prob_in_float64(store, modes):
    assert run(SMALL.replace(target=blobs(modes=modes))).metrics["mode_masses"] == pytest.approx([0.5, 0.5], abs=0.1)


@pytest.mark.parametrize(
    ("declared", "line"),
    [({"modes": CENTRES}, "modes must be"), ({"support": (1, 2)}, "support must"), ({"base_scale": 0}, "base_scale")],
)
def test_what_is_declared_is_looked_at_before_training(store, monkeypatch, declared, line):
    monkeypatch.setattr(experiment, "_maximise", lambda *_: pytest.fail("it was trained first"))
    with pytest.raises(ValueError, match=f"^target Blobs: {line}"):
        run(SMALL.replace(target=blobs(**declared), n_transitions=2))


def test_descriptions_of_a_dataclass_of_tensors_are_equal_where_it_is_the_same_one():
    one, other = blobs(), blobs()
    assert SMALL.replace(target=one) == SMALL.replace(target=one) != SMALL.replace(target=other)
    assert hash(SMALL.replace(target=one)) == hash(SMALL.replace(target=one))


def test_numbers_of_numpy_and_a_device_of_torch_are_ordinary_values(store):
    spec = Density(kernel=Gated(hidden=4), objective=AVO(), seed=np.int64(3), lr=np.float32(1e-3), steps=np.int32(3))
    spec = spec.replace(samples=np.int64(50), n_transitions=np.uint8(1), batch=np.int16(4), target=blobs())
    assert (spec.seed, spec.lr) == (3, 1e-3) and run(spec, device=torch.device("cpu")).spec is spec
    for wrong in ("gpu", "cuda:x", "meta"):
        with pytest.raises(ValueError, match=f"^unknown device '{wrong}': choose cpu or cuda$"):
            run(spec, device=wrong)


def test_annealing_through_a_thousand_temperatures_bears_a_constant_of_minus_a_million():
    target = type("Far", (), {"dim": 2, "log_prob": lambda self, z: -2 * (z - 1).square().sum(-1) - 1e6})()
    found = ais(target, DiagonalGaussian.isotropic(2), 200, n_temperatures=1000, n_leapfrog=1, n_moves=1)
    assert abs(float(found.log_z) + 1e6 - np.log(np.pi / 2)) < 4 * float(found.log_z_se) + 0.02
