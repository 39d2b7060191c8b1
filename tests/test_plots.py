"""Plots draw what they are given onto the axes they are given."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyro_vae_defence import plots


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


@pytest.mark.parametrize("channels", [1, 3])
def test_image(axes, channels):
    image = torch.rand(channels, 4, 5)
    assert plots.show_image(axes, image) is axes
    drawn = np.asarray(axes.images[0].get_array())
    expected = image.permute(1, 2, 0).numpy()
    np.testing.assert_allclose(drawn, expected[..., 0] if channels == 1 else expected)


def test_panel_has_a_column_per_entry_and_a_row_per_image():
    figure, grid = plt.subplots(2, 3, squeeze=False)
    columns = {name: torch.rand(2, 1, 4, 4) for name in ("a", "b", "c")}
    plots.panel(grid, columns)
    assert [ax.get_title() for ax in grid[0]] == ["a", "b", "c"]
    np.testing.assert_allclose(grid[1, 2].images[0].get_array(), columns["c"][1, 0])
    with pytest.raises(ValueError, match="axes must have 2 columns"):
        plots.panel(grid, {"a": columns["a"], "b": columns["b"]})
    with pytest.raises(ValueError, match="'a' has 1 images for 2 rows"):
        plots.panel(grid, {**columns, "a": columns["a"][:1]})
    plt.close(figure)


def test_trace_has_a_line_per_chain(axes):
    draws = torch.randn(3, 20)
    plots.trace(axes, draws, "z")
    assert len(axes.lines) == 3
    np.testing.assert_allclose(axes.lines[1].get_ydata(), draws[1])


def test_ranks_are_flat_for_equal_chains_and_not_for_shifted_ones(axes):
    def counts(draws):
        axes.clear()
        plots.rank(axes, draws, bins=4)
        return np.array([patch.get_data().values for patch in axes.patches])

    interleaved = np.arange(40.0).reshape(20, 2).T
    assert (counts(interleaved) == 5).all()
    shifted = np.arange(40.0).reshape(2, 20)
    assert counts(shifted).tolist() == [[10, 10, 0, 0], [0, 0, 10, 10]]


def test_equal_draws_share_their_ranks(axes):
    """Chains that never move agree, whichever is named first."""
    plots.rank(axes, np.zeros((2, 8)), bins=4)
    one, other = (patch.get_data().values.tolist() for patch in axes.patches)
    assert one == other == [0, 8, 0, 0]


def test_images_of_8_bits_are_not_cut_to_white(axes):
    grey = torch.full((1, 2, 2), 51, dtype=torch.uint8)
    shown = plots.show_image(axes, grey).images[0].get_array()
    np.testing.assert_allclose(shown, 0.2)
    assert plots.picture([grey[None]]) == plots.picture([torch.full((1, 1, 2, 2), 0.2)])


def test_a_panel_of_one_column_takes_the_vector_of_axes_that_matplotlib_makes():
    column = plt.subplots(3, 1)[1]
    assert plots.panel(column, {"x": torch.rand(3, 1, 4, 4)}).shape == (3, 1)
    assert all(len(each.images) == 1 for each in column)
    plt.close("all")


def test_histograms_and_curves(axes):
    plots.posterior_ratios(axes, torch.randn(50), torch.randn(50))
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["undefended", "defended"]
    axes.clear()
    plots.curve(axes, [0, 1], [0.5, 0.6], [0.4, 0.5], [0.6, 0.7], "hmc")
    assert axes.lines[0].get_label() == "hmc"
    assert len(axes.collections) == 1


def test_draws_of_the_wrong_shape(axes):
    with pytest.raises(ValueError, match=r"draws must have shape \(chain, draw\), got \(3,\)"):
        plots.trace(axes, torch.zeros(3))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.randint(0, 256, (1, 4, 5)), "image has dtype torch.int64"),
        (torch.rand(4, 5), r"image must have shape \(C, H, W\)"),
        (torch.rand(2, 4, 5), "with 1, 3 or 4 channels"),
        (torch.rand(1, 1, 4, 5), r"got \(1, 1, 4, 5\)"),
        (np.zeros((1, 4, 5)), "image must be a tensor"),
    ],
)
def test_what_is_no_image_is_refused(axes, image, message):
    """Integers up to 255 were drawn white."""
    with pytest.raises(ValueError, match=message):
        plots.show_image(axes, image)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [torch.rand(3, 1, 4, 5), torch.rand(2, 1, 4, 5)],
        [torch.rand(2, 1, 4, 5), torch.rand(2, 3, 4, 5)],
        torch.rand(3, 1, 4, 5),
    ],
    ids=["none", "fewer", "channels", "one row"],
)
def test_rows_of_a_picture_are_alike(rows):
    """Shorter ones stood in other columns, and three grey images became one in colours."""
    with pytest.raises(
        ValueError, match=r"rows must be one or more tensors of images of one shape"
    ):
        plots.picture(rows)


def test_ratios_that_are_not_finite_are_named(axes):
    with pytest.raises(ValueError, match="after has 1 values that are not finite"):
        plots.posterior_ratios(axes, torch.zeros(2), torch.tensor([0.0, float("inf")]))


@pytest.mark.parametrize("bins", [0, 2.5, "5"])
def test_number_of_bins_is_checked(axes, bins):
    with pytest.raises(ValueError, match="bins must be an integer of at least 1"):
        plots.rank(axes, np.zeros((2, 8)), bins=bins)


def test_values_without_a_rank_are_named(axes):
    with pytest.raises(ValueError, match="draws has 1 values that are NaN, which have no rank"):
        plots.rank(axes, np.array([[0.0, np.nan], [-np.inf, 1.0]]))
