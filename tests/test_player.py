"""The figure to play with: its data, and that what is shown of them is what they are."""

import json
import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_notebook, new_output

from annealed_core import AVO, ENERGIES, Density, Residual
from annealed_report import player
from annealed_report.energy_tables import STARTS
from annealed_report.markdown import sanitise
from annealed_report.pages import render_page


def test_the_committed_particles_begin_alike_and_end_on_the_modes_that_the_runs_keep():
    """At the end AVO has particles at all four modes of D, and the ELBO from torch's weights has lost one."""
    base = {player.states(s, m, n)[0].tobytes() for s in STARTS for m in ("elbo", "avo") for n in player.STEPS}
    assert len(base) == 1  # the same noise
    for start in STARTS:  # before training both are the same chain
        assert np.array_equal(*(player.states(start, method, 0) for method in ("elbo", "avo")))
    centres = ENERGIES["D"].modes[0]

    def shares(start, method):
        z = torch.as_tensor(player.states(start, method, player.STEPS[-1])[-1])
        return torch.bincount(torch.cdist(z, centres.double()).argmin(1), minlength=4) / len(z)

    assert shares("torch's weights", "elbo").min() < 0.02
    assert all(shares(start, "avo").min() > 0.04 for start in STARTS)
    figure = player.filmstrip(width=2)
    assert len(figure.axes) == 2 * (player.T + 1)
    plt.close(figure)


def test_what_is_made_is_what_the_chains_do(monkeypatch):
    """To half a 255th of the square."""
    kernel = lambda z, context, noise: (z + 0.1, torch.zeros_like(z[..., 0]))
    chain = player.Chain(player.DiagonalGaussian.isotropic(2), [kernel] * player.T)
    monkeypatch.setattr(player, "trained", lambda start, method, steps: chain)
    found = player.made()
    monkeypatch.setattr(player, "loaded", lambda: found)
    z = player.states("residual", "avo", player.STEPS[1])
    inside = np.abs(z[0]).max(-1) < 3
    assert np.abs(z[-1] - z[0] - 0.4)[inside].max() < 8 / 255 + 1e-9
    assert len(found["contours"]) == player.T + 1 and len(found["contours"][0]) == len(player.LEVELS)  # one round mode


def test_a_chain_is_the_one_of_that_many_steps_and_at_first_untrained(monkeypatch):
    asked = []
    monkeypatch.setattr(player, "run", lambda spec: asked.append(spec) or SimpleNamespace(chain="trained"))
    assert player.trained("residual", "avo", 100) == "trained"
    (spec,) = asked
    assert spec == Density(target="D", n_transitions=player.T, steps=100, kernel=Residual(), objective=AVO())
    chain = player.trained("residual", "avo", 0)
    torch.manual_seed(0)
    fresh = spec.kernels()
    assert len(asked) == 1 and len(chain) == player.T
    for ours, theirs in zip(chain.kernels, fresh, strict=True):
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_a_page_numbers_it_as_a_figure_and_draws_it_by_its_own_script(tmp_path):
    caption = new_output("display_data", {"text/markdown": "To play with."}, metadata={"annealed": "caption"})
    html = new_output("display_data", {"text/html": "<div class='player' data-player='{}'></div><script>x</script>"})
    notebook = new_notebook(cells=[new_code_cell("player.play()", outputs=[html, caption])])
    page = BeautifulSoup(render_page(notebook, "a", {"a": "A"}, tmp_path), "html.parser")
    assert page.select_one("#figure-1 figcaption").get_text() == "Figure 1. To play with."
    assert page.select_one("#figure-1 .player")["data-player"] == "{}"
    assert sum(player.SCRIPT.read_text() in script.get_text() for script in page.select("script")) == 1


def test_the_notebook_shows_the_data_with_a_script_which_a_page_leaves_to_its_own(monkeypatch):
    shown = []
    monkeypatch.setattr(player, "display", lambda thing, metadata=None: shown.append((thing, metadata)))
    player.play("Particles.")
    (html, _), (caption, about) = shown
    assert about == {"annealed": "caption"} and caption.data == "Particles."
    assert player.SCRIPT.read_text() in html.data
    clean = sanitise(html.data)
    assert "<script" not in clean and "getContext" not in clean
    data = json.loads(re.search('data-player="(.*?)"', clean)[1].replace("&quot;", '"'))
    assert data["particles"] == player.loaded()["particles"] and data["names"] == {
        "elbo": "HVI, ELBO",
        "avo": "HVI-AVO",
    }
    with pytest.raises(ValueError, match="a figure needs a caption"):
        player.play("")
