"""Particles on their way through chains in training: a figure to play with, and a filmstrip of it.

python -m annealed_report.player    # train the chains, and write results/player.json, to be committed

The file has where 200 particles are after each kernel of a chain on energy D, at several steps of its training, from
three starts of the kernels, by the ELBO and by AVO; all from the same noise. A position is a byte for each coordinate
of the square [-4, 4]^2. The page's script draws it, and the same script goes with the notebook's output.
"""

from __future__ import annotations

import base64
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure

from annealed_core import ENERGIES, Chain, Density, DiagonalGaussian, evidence
from annealed_core.running.experiment import run
from annealed_core.running.system import replace_file
from annealed_core.targets import GeometricPath, linear_alphas
from annealed_report import results
from annealed_report.energy_tables import STARTS
from annealed_report.figures import draw_density, draw_samples
from annealed_report.plotting import COLOURS, NAMES, panels

SCRIPT, FILE = Path(__file__).parent / "page" / "player.js", results.FOLDER / "player.json"
SIDE, PARTICLES, T = 4.0, 200, 4
STEPS = (0, 100, 300, 1000, 3000)
LEVELS = (0.1, 0.4, 0.7)  # of the density's maximum, at which contours are drawn


def trained(start: str, method: str, steps: int) -> Chain:
    """The chain after so many steps: one that is trained for fewer is the beginning of one for more."""
    spec = Density(target="D", n_transitions=T, steps=max(1, steps), **STARTS[start][method])
    if steps:
        found: Any = run(spec).chain
        return found
    torch.manual_seed(spec.seed)
    return Chain(DiagonalGaussian.isotropic(2), spec.kernels())


@torch.no_grad()
def made() -> dict[str, Any]:
    """What the file holds."""
    noise = torch.randn((T + 1, PARTICLES, 2), generator=torch.Generator().manual_seed(0))

    def particles(start: str, method: str) -> str:
        every = [trained(start, method, steps).rsample(noise=noise).z for steps in STEPS]
        return _coded(torch.stack(every))

    found = {start: {method: particles(start, method) for method in ("elbo", "avo")} for start in STARTS}
    lines = [_contours(path()[t]) for t in range(T + 1)]
    return {"commit": results.commit(), "steps": STEPS, "states": T + 1, "particles": found, "contours": lines}


def path() -> GeometricPath:
    """The targets f_0 ... f_T."""
    return GeometricPath(DiagonalGaussian.isotropic(2), ENERGIES["D"], linear_alphas(T))


def _coded(z: Any) -> str:
    """Positions (*, 2) as bytes, in base64."""
    places = np.clip(np.round((np.asarray(z) + SIDE) / (2 * SIDE) * 255), 0, 255)
    return base64.b64encode(places.astype(np.uint8).tobytes()).decode()


def _contours(target: Any) -> list[str]:
    """The contour lines of a density."""
    z, _ = evidence.grid(SIDE, 80, torch.float32)
    density = (log_f := target.log_prob(z)).sub(log_f.max()).exp().numpy()
    figure, axes = panels(1, 1)
    found = axes[0, 0].contour(z[..., 0].numpy(), z[..., 1].numpy(), density, levels=LEVELS)
    plt.close(figure)
    return [_coded(line) for lines in found.allsegs for line in lines]


@cache
def loaded() -> dict[str, Any]:
    """The committed file."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def states(start: str, method: str, step: int) -> np.ndarray:
    """Where the particles are after each kernel at a step of training: (T + 1, particles, 2)."""
    content = base64.b64decode(loaded()["particles"][start][method])
    every = np.frombuffer(content, dtype=np.uint8).reshape(len(STEPS), T + 1, PARTICLES, 2)
    return every[STEPS.index(step)] / 255 * (2 * SIDE) - SIDE


def filmstrip(start: str = "torch's weights", width: float = 8.0) -> Figure:
    """The particles at the end of training, over the contours of f_t: a row for the ELBO and one for AVO."""
    figure, axes = panels(2, T + 1, width)
    for line, method in zip(axes, ("elbo", "avo"), strict=True):
        line[0].set_ylabel(NAMES[method])
        for t, (ax, z) in enumerate(zip(line, states(start, method, STEPS[-1]), strict=True)):
            draw_density(ax, path()[t], filled=False, points=100)
            draw_samples(ax, torch.as_tensor(z), method, 4, 0.8)
            if method == "elbo":
                ax.set_title(f"t = {t}", loc="center")
    return figure


def play(caption: str) -> None:
    """Show the figure to play with, and its caption."""
    if not caption:
        raise ValueError("a figure needs a caption")
    colours = {method: COLOURS[method] for method in ("elbo", "avo")}
    shown = {key: value for key, value in loaded().items() if key != "commit"}
    content = json.dumps(shown | {"names": {m: NAMES[m] for m in colours}, "colours": colours}).replace('"', "&quot;")
    still = "Here particles can be followed through the chains, where scripts run."
    script = SCRIPT.read_text(encoding="utf-8")
    display(HTML(f'<div class="player" data-player="{content}">{still}</div><script>{script}</script>'))
    display(Markdown(caption), metadata={"annealed": "caption"})


if __name__ == "__main__":
    replace_file(FILE, json.dumps(made()).encode())
    sys.stdout.write(f"wrote {FILE}\n")
