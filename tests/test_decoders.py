"""Locally masked convolutions: what a pixel sees in each order, unfolding gives the same, the mean of all orders."""

import math

import pytest
import torch
from draws import draw, generator, images
from torch.nn.functional import unfold

from annealed_core.decoders import LocallyMasked, LocallyMaskedConv, LocallyMaskedDecoder, local_masks, s_curve
from annealed_core.objectives import ELBO
from annealed_core.running import mnist
from annealed_core.running.experiment import run
from annealed_core.running.mnist import Mnist
from annealed_core.vae import VAE, Joint
from annealed_core.variants import FreeBits

ORDERS = range(8)
every_order = pytest.mark.parametrize("which", ORDERS)
FEW = {"train_images": 200, "epochs": 2, "width": 8, "nll_images": 20, "nll_samples": 5}
SMALL = LocallyMasked(channels=2, blocks=1, orders=2)


def decoder_of(latents=2, size=6, orders=8, blocks=3):
    """One whose pixels depend clearly on z and on each other."""
    torch.manual_seed(0)
    decoder = LocallyMaskedDecoder(latents, 5, channels=4, blocks=blocks, orders=orders, size=size).double().eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.5)
    return decoder


def all_images():
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 9)


def test_the_eight_orders_are_one_curve_and_its_images():
    assert s_curve(0, 3).tolist() == [[0, 1, 2], [5, 4, 3], [6, 7, 8]]
    assert torch.equal(s_curve(1, 5), s_curve(0, 5).flip(0)) and torch.equal(s_curve(2, 5), s_curve(0, 5).flip(1))
    assert all(torch.equal(s_curve(which + 4, 5), s_curve(which, 5).T) for which in range(4))
    assert len({tuple(s_curve(which, 6).flatten().tolist()) for which in ORDERS}) == 8
    for which in ORDERS:  # each step is to a neighbour
        rows, columns = torch.stack(torch.unravel_index(s_curve(which, 6).flatten().argsort(), (6, 6)))
        assert ((rows.diff().abs() + columns.diff().abs()) == 1).all()


@every_order
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_neighbour_counts_where_it_comes_before_and_two_masks_are_enough(which, centre, dilation):
    masks, chosen = local_masks(which, 28, dilation, centre)
    assert len(masks) == 2
    place = s_curve(which, 28)
    for row, column in [(0, 0), (0, 27), (1, 3), (13, 14), (14, 14), (27, 0), (27, 27), (20, 27)]:
        mask = masks[chosen[row, column]]
        for a in range(3):
            for b in range(3):
                r, c = row + (a - 1) * dilation, column + (b - 1) * dilation
                if 0 <= r < 28 and 0 <= c < 28:
                    before = place[r, c] <= place[row, column] if centre else place[r, c] < place[row, column]
                    assert mask[a, b] == before


@every_order
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolving_and_selecting_is_unfolding_and_masking(which, centre, dilation):
    torch.manual_seed(0)
    conv, x = LocallyMaskedConv(3, 4, dilation, centre).double(), draw(2, 3, 7, 7)
    place = s_curve(which, 7).double() + 1
    around = unfold(place.view(1, 1, 7, 7), 3, dilation, dilation).view(9, 49)  # outside of the image 0: it comes first
    seen = around <= place.flatten() if centre else around < place.flatten()
    patches = unfold(x, 3, dilation, dilation).view(2, 3, 9, 49) * seen
    expected = torch.einsum("oik,nikp->nop", conv.weight.flatten(2), patches) + conv.bias.view(-1, 1)
    found = conv(x, which)
    torch.testing.assert_close(found, expected.view(2, 4, 7, 7))
    sides = [torch.autograd.grad(side.square().sum(), conv.weight)[0] for side in (found, expected)]
    torch.testing.assert_close(*sides)


@every_order
def test_a_logit_depends_on_z_and_on_pixels_before_its_own_in_the_order_and_on_no_other(which):
    decoder, z, x = decoder_of(), draw(1, 2), images(1, 36)
    by_x = torch.autograd.functional.jacobian(lambda x: decoder.along(which, z, x)[0], x)[:, 0]
    by_z = torch.autograd.functional.jacobian(lambda z: decoder.along(which, z, x)[0], z)[:, 0]
    place = s_curve(which, 6).flatten()
    before = place < place.unsqueeze(1)
    assert not (by_x[~before] != 0).any()
    along = place.argsort()
    assert (by_x[along][:, along].diagonal(-1) != 0).all()  # each on the one just before
    assert (by_x != 0).float().sum() > 0.9 * before.sum() and (by_z != 0).all()


@pytest.mark.parametrize("latents", [0, 2])
def test_the_probabilities_of_all_images_sum_to_one_in_each_order_and_on_average(latents):
    decoder, x = decoder_of(latents, size=3), all_images()
    z = draw(3, 1, latents).expand(3, 512, latents)
    joint = Joint(decoder, x, latents)
    each = [Joint(lambda z, x, which=which: decoder.along(which, z, x), x, latents) for which in ORDERS]
    values = [order.log_likelihood(z) for order in each]
    for found in (joint.log_likelihood(z), *values):
        torch.testing.assert_close(found.exp().sum(1), torch.ones(3, dtype=torch.float64))
    assert max((values[0] - value).abs().max() for value in values[1:]) > 0.1
    expected = torch.logsumexp(torch.stack(values), 0) - math.log(8)
    torch.testing.assert_close(joint.log_likelihood(z), expected)
    assert (expected >= torch.stack(values).mean(0)).all()


def test_training_draws_one_order_a_pass_and_goes_on_as_it_would_have():
    decoder, z, x = decoder_of(), draw(4, 2), images(4, 36)
    along = torch.stack([decoder.along(which, z, x) for which in ORDERS])
    decoder.train()

    def drawn(n):
        apart = torch.stack([(along - decoder(z, x)).abs().amax((1, 2)) for _ in range(n)])
        assert apart.amin(1).max() < 1e-9
        return apart.argmin(1).tolist()

    first, kept = drawn(5), {name: value.clone() for name, value in decoder.state_dict().items()}
    more = drawn(40)
    assert set(first + more) == set(ORDERS) and len({tuple(more[n : n + 8]) for n in range(0, 40, 8)}) > 1
    decoder.load_state_dict(kept)
    assert drawn(40) == more


def test_a_frozen_decoder_is_the_mean_of_all_orders_and_draws_none():
    decoder = decoder_of().train()
    joint, z = Joint(decoder, images(4, 36), 2), draw(4, 2)
    frozen = joint.frozen().log_likelihood(z)
    assert int(decoder.turn) == 0 and decoder.training
    torch.testing.assert_close(frozen, Joint(decoder.eval(), joint.x, 2).log_likelihood(z))


@pytest.mark.parametrize("orders", [1, 3])
def test_every_sample_has_the_logits_that_it_has_alone(orders):
    decoder, z, x = decoder_of(orders=orders), draw(2, 3, 4, 2), images(4, 36)
    logits = decoder(z, x)
    assert logits.shape == ((orders,) if orders > 1 else ()) + (2, 3, 4, 36)
    torch.testing.assert_close(logits[..., 1, 2, 3, :], decoder(z[1, 2, 3:], x[3:])[..., 0, :])


@pytest.mark.parametrize("latents", [0, 2])
def test_images_are_drawn_as_often_as_their_probability_says(latents):
    decoder, n = decoder_of(latents, size=2, orders=1).requires_grad_(False), 20_000
    for parameter in decoder.parameters():
        parameter.mul_(1.5)
    z = draw(1, latents)
    x = decoder.decode(z.expand(n, latents), generator())
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
    exact = Joint(decoder, every, latents).log_likelihood(z.expand(16, latents)).exp()
    found = torch.bincount((x @ torch.tensor([8.0, 4.0, 2.0, 1.0]).double()).long(), minlength=16) / n
    assert ((found - exact).abs() < 4.5 * (exact * (1 - exact) / n).sqrt()).all() and exact.std() > 0.01


@pytest.mark.usefixtures("few")
@pytest.mark.filterwarnings("ignore:schedule")
def test_a_model_without_latents_has_a_bound_that_is_its_likelihood(store):
    found = run(Mnist(latents=0, objective=ELBO(), decoder=SMALL, **FEW))
    m = found.metrics
    likelihood = found.vae.joint(mnist.images()[2][:20]).log_likelihood(torch.zeros(20, 0))
    assert m["nll"] == pytest.approx(-float(likelihood.mean()), rel=1e-5)
    assert m["kl"] == pytest.approx(0, abs=1e-4) and m["active_units"] == 0 and m["ess"] == 1 and m["pareto_k"] is None
    assert found.history[-1]["elbo"] > found.history[0]["elbo"]
    assert run(found.spec).metrics == m


@pytest.mark.usefixtures("few")
@pytest.mark.filterwarnings("ignore:schedule")
@pytest.mark.parametrize("objective", [ELBO(), FreeBits(3.0)], ids=repr)
def test_it_is_a_decoder_with_latents_too(store, objective):
    spec = Mnist(latents=3, decoder=SMALL.replace(orders=1), objective=objective, **FEW)
    found = run(spec)
    assert isinstance(found.vae, VAE) and found.metrics["nll"] <= -found.metrics["elbo"] + 0.5
    assert "grey_nll" not in found.metrics


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latents": 0}, "impossible latents 0 of Mnist: Independent() takes at least 1"),
        (
            {"latents": 0, "decoder": SMALL, "iterations": 2},
            "impossible iterations 2 of Mnist with latents 0 and groups",
        ),
        (
            {"latents": 0, "decoder": SMALL, "bounds_images": 2},
            "impossible bounds_images 2 of Mnist with latents 0 and",
        ),
        (
            {"latents": -1},
            "impossible latents -1 of Mnist: latents takes a whole number from 0",
        ),
    ],
)
def test_what_a_model_without_latents_can_not_have_is_refused(fields, message):
    with pytest.raises(ValueError) as refusal:
        Mnist(objective=ELBO(), **fields)
    assert str(refusal.value).startswith(message)
    with pytest.raises(
        ValueError, match="impossible orders 9 of LocallyMasked: orders takes a whole number from 1 to 8"
    ):
        LocallyMasked(orders=9)
