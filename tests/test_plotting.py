"""Plotting: every figure leaves an image with alternative text and a caption, every table its Markdown."""

import io
import math
import re

import matplotlib.pyplot as plt
import PIL.Image
import pytest
import torch

from annealed_core.targets import ENERGIES
from annealed_report import figures, plotting
from annealed_report.statistics import interval

FIVE, ONE = interval([0.5, 0.75, 1.0, 1.25, 1.5]), interval([2.0])


@pytest.fixture(autouse=True)
def closed_figures():
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    """What is displayed: a list of (object, metadata)."""
    found = []
    monkeypatch.setattr(plotting, "display", lambda thing, metadata=None: found.append((thing, metadata)))
    return found


def show(caption, alt):
    figure, axes = plotting.panels(1, 1, 2)
    axes[0, 0].plot([0, 1])
    plotting.show(figure, caption, alt)


def test_a_figure_is_shown_once_as_an_image_with_its_alternative_text_and_then_a_caption(shown):
    show("**A line.** It rises.", "A rising line")
    (image, about_image), (caption, about_caption) = shown
    assert about_image == {"image/svg+xml": {"alt": "A rising line"}} and image.data.startswith("<svg")
    places = re.findall(r'\b[dxy]="([^"]*)"', image.data)
    assert len(places) > 20 and not any(re.search(r"\.\d{3}", each) for each in places)
    assert caption.data == "**A line.** It rises." and about_caption == {"annealed": "caption"}
    assert not plt.get_fignums()


def of_many_lines():
    figure, axes = plotting.panels(1, 1, 2)
    axes[0, 0].scatter(*torch.randn(2, 9000).numpy())
    return figure, True


def of_pixels():
    figure, axes = plotting.panels(1, 1, 2)
    axes[0, 0].imshow(torch.rand(4, 4).numpy())
    return figure, True


def of_one_line():
    return plotting.panels(1, 1, 2)[0], False


@pytest.mark.parametrize("made", [of_many_lines, of_pixels, of_one_line])
def test_what_is_not_of_few_lines_is_shown_in_pixels(shown, made):
    figure, lines = made()
    plotting.show(figure, "caption", "A cloud", lines=lines)
    (image, about_image), _ = shown
    assert about_image == {"image/png": {"alt": "A cloud"}}
    assert image._repr_mimebundle_()[1]["image/png"]["alt"] == "A cloud"
    with PIL.Image.open(io.BytesIO(image.data)) as picture:
        assert picture.format == "PNG" and len(picture.getcolors()) <= 256
    assert not plt.get_fignums()


@pytest.mark.parametrize(("caption", "alt"), [("", "alt"), ("caption", None)])
def test_a_figure_without_caption_or_alternative_text_is_refused(caption, alt, shown):
    with pytest.raises(ValueError, match="a figure needs a caption and an alternative text"):
        show(caption, alt)
    assert not shown


@pytest.mark.parametrize("lines", [True, False])
def test_the_same_figure_gives_the_same_bytes(shown, lines):
    for _ in range(2):
        plotting.show(figures.densities({"A": ENERGIES["A"]}, columns=1, width=2), "caption", "alt", lines=lines)
    assert shown[0][0].data == shown[2][0].data


def test_a_table_is_markdown_with_numbers_to_the_right_and_its_caption_above(shown):
    rows = [
        {"method": "ELBO", "log Z": 1.87654, "interval": FIVE, "n": 5},
        {"method": "a|b", "log Z": None, "interval": None, "n": 1},
    ]
    plotting.table(rows, "What was found.")
    (caption, about_caption), (table, _) = shown
    assert caption.data == "What was found." and about_caption == {"annealed": "table-caption"}
    assert table.data.splitlines() == [
        "| method | log Z | interval | n |",
        "| :--- | ---: | ---: | ---: |",
        "| ELBO | 1.877 | 1.00\u00a0±\u00a00.49 | 5 |",
        r"| a\|b | – | – | 1 |",
    ]
    plotting.table(rows)  # without one
    assert len(shown) == 3 and shown[2][0].data == table.data


@pytest.mark.parametrize(
    ("value", "cell"),
    [(0.5, "0.5"), (2.0, "2"), (0.12345, "0.123"), (123.456, "123.5"), (-99.5, "−99.5"), (7, "7"), (math.nan, "nan")],
)
def test_cells_have_three_decimals_at_most(value, cell):
    assert plotting._cell(value) == cell


def test_intervals_draw_a_dot_for_each_group_and_series_and_a_bar_only_where_there_is_one():
    figure, ((ax,),) = plotting.panels(1, 1)
    plotting.intervals(ax, {"A": {"elbo": FIVE, "avo": ONE}, "B": {"avo": FIVE}}, "nats", zero=True)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["A", "B"] and ax.get_xlabel() == "nats"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["HVI, ELBO", "HVI-AVO"]
    dots = {c.get_label(): sorted(c.lines[0].get_xdata()) for c in ax.containers}
    assert dots == {"HVI, ELBO": [1.0], "HVI-AVO": [1.0, 2.0]}
    assert all(math.isfinite(edge) for edge in ax.get_xlim())
    figure.canvas.draw()


def test_a_band_leaves_out_what_is_not_known():
    _, ((ax,),) = plotting.panels(1, 1)
    figures.band(ax, [1, 2, 4], [FIVE, None, ONE], "avo")
    assert list(ax.containers[0].lines[0].get_xdata()) == [1, 4]


def test_curves_show_the_mean_and_range_over_seeds():
    _, ((ax,),) = plotting.panels(1, 1)
    histories = {"avo": [[{"step": s, "elbo": offset - s} for s in (1, 2)] for offset in (0.0, 1.0)]}
    figures.curves(ax, histories, "step", "elbo")
    assert ax.lines[0].get_xydata().tolist() == [[1, -0.5], [2, -1.5]] and ax.lines[0].get_label() == "HVI-AVO"
    assert ax.collections[0].get_paths()[0].get_extents().bounds == (1, -2, 1, 2)


def test_figures_have_a_panel_for_each_target():
    few = {name: ENERGIES[name] for name in "AD"}
    drawn = {"ELBO": {name: torch.randn(50, 2) for name in few}}
    for figure, n in ((figures.densities(few, columns=2), 2), (figures.samples(drawn, few), 4)):
        figure.canvas.draw()
        assert len(figure.axes) == n
    assert [ax.get_ylabel() for ax in figure.axes] == ["target", "", "ELBO", ""]
    assert [ax.get_title() for ax in figure.axes] == ["A", "D", "", ""]


def test_image_grid_lays_images_side_by_side():
    images = torch.rand(3, 784)
    drawn = figures.image_grid({"data": images}).axes[0].images[0].get_array()
    assert drawn.shape == (28, 84) and drawn.data[:, 28:56].tolist() == images[1].view(28, 28).tolist()


def test_methods_have_colours_that_differ():
    colours = [plotting.COLOURS[name] for name in ("target", "elbo", "avo", "vae", "ais", "other")]
    assert len(set(map(str, colours))) == len(colours)


def test_heat_maps_share_a_scale_write_each_value_and_stand_in_rows_of_three():
    maps = {name: [[0.0, 1.0], [2.0, 0.5]] for name in ("vae", "hvi", "avo", "iaf", "householder")}
    figure = figures.heat_maps(maps | {"hvi": [[4.0, 1.0], [0.0, 3.0]]}, ["0", "0.2"], ["a", "b"], ("y", "x", "nats"))
    first, second = figure.axes[:2]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 4)
    assert [text.get_text() for text in first.texts] == ["0.0", "1.0", "2.0", "0.5"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["0", "0.2"] and second.get_title("left") == "HVI"
    assert [ax.get_ylabel() for ax in figure.axes[:5]] == ["y", "", "", "y", ""]
    assert [ax.get_xlabel() for ax in figure.axes[:5]] == ["", "", "x", "x", "x"]
    assert not figure.axes[5].axison  # the sixth place stays empty
