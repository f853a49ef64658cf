"""Latents followed through training, and the bound of a posterior on one side: what pages 04 and 08 draw."""

import pytest
import torch

from annealed_core import ELBO, Gated, Mnist, run
from annealed_report.folded_line import LineModel, nodes
from annealed_report.followed import Followed
from annealed_report.one_mode import one_sided, profile

SMALL = {"objective": ELBO(), "epochs": 2, "train_images": 64, "batch": 16, "latents": 3, "width": 8}


@pytest.mark.usefixtures("few", "store")
def test_following_the_latents_changes_nothing_of_training():
    followed, plain = run(Followed(**SMALL)), run(Mnist(**SMALL, nll_images=2, nll_samples=2))
    assert followed.metrics["valid_elbo"] == plain.metrics["valid_elbo"]
    assert followed.metrics["steps"] == [0, 8] and len(followed.metrics["latent_kl"]) == 2
    assert all(len(kl) == 3 and min(kl) > 0 for kl in followed.metrics["latent_kl"])


def test_only_a_plain_vae_is_followed():
    with pytest.raises(ValueError, match=r"^impossible kernel of Followed: "):
        Followed(kernel=Gated())


def test_the_bound_of_one_side_is_that_of_the_posterior_cut_off_there():
    model = LineModel.of(offset=0.1, right=1.2, left=0.8, noise=0.3)
    x = model.sample(50, 2, torch.Generator().manual_seed(0))
    z, log_weights = nodes()
    joint = model.log_joint_at(z, x) + log_weights
    sides = [torch.logsumexp(joint[:, where], -1) for where in (z > 0, z < 0)]
    assert torch.allclose(one_sided(model, x), torch.maximum(*sides), atol=1e-8)


def test_the_likelihood_prefers_no_tilt_and_the_bound_of_one_side_a_posterior_of_one_mode():
    x = LineModel.of(noise=0.1).sample(1000, 2, torch.Generator().manual_seed(0))
    tilts = torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64)
    _, likelihood = profile(LineModel.log_prob, x, tilts)
    models, bound = profile(one_sided, x, tilts)
    assert likelihood.argmax() == 0 and bound.argmax() == 2 and (likelihood > bound).all()
    assert (models.right * models.left < 0).squeeze(-1).tolist() == [False, False, True]
