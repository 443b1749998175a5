import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers import figures


@pytest.fixture(autouse=True)
def _close():
    figures.use_style()
    yield
    plt.close("all")


def square(n=20, at=5, side=8):
    mask = np.zeros((n, n), bool)
    mask[at : at + side, at : at + side] = True
    return mask


def test_palette_gives_different_colours():
    colours = figures.palette(40)
    assert colours.shape == (40, 3) and colours.min() >= 0 and colours.max() <= 1
    assert len(np.unique(colours.round(3), axis=0)) == 40


def test_grid_has_a_place_for_each_image_and_none_for_ticks():
    images = [np.zeros((8, 8, 3), np.uint8)] * 5
    figure = figures.image_grid(images, titles=list("abcde"), ncols=3, rows=["x", "y"])
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) == 5
    assert [axis.get_title() for axis in shown] == list("abcde")
    assert all(len(axis.get_xticks()) == 0 for axis in shown)
    assert shown[3].get_ylabel() == "y"


def test_long_titles_and_row_labels_do_not_run_into_their_neighbours():
    images = [np.zeros((8, 12, 3), np.uint8)] * 8
    long = "moderately-to-poorly differentiated"
    figure = figures.image_grid(images, titles=[long] * 4, ncols=4, rows=[long] * 2)
    figure.canvas.draw()
    for texts in ([a.title for a in figure.axes[:4]], [a.yaxis.label for a in figure.axes[::4]]):
        boxes = [text.get_window_extent() for text in texts]
        for a, b in itertools.pairwise(boxes):
            assert not a.overlaps(b)


@pytest.mark.parametrize(
    ("label", "inches", "lines"),
    [
        ("poor", 1.0, ["poor"]),
        ("well differentiated tumour", 1.0, ["well", "differentiated", "tumour"]),
        ("two\nlines", 9.0, ["two", "lines"]),
        ("", 1.0, [""]),
    ],
)
def test_wrapped(label, inches, lines):
    assert figures.wrapped(label, inches).split("\n") == lines


def test_grid_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no images"):
        figures.image_grid([])


def test_overlay_changes_segments_only():
    image = np.full((20, 20, 3), 200, np.uint8)
    mask = square()
    out = figures.overlay(image, mask.astype(int))
    assert out.dtype == np.uint8
    assert (out[~mask] == 200).all() and (out[mask] != 200).any(axis=-1).all()
    assert (image == 200).all()


def test_overlay_of_masks_paints_small_ones_on_top():
    image = np.zeros((20, 20, 3), np.uint8)
    small, large = square(side=4), square(at=2, side=14)
    out = figures.overlay(image, np.stack([small, large]), alpha=1, outline=False)
    expected = np.rint(figures.palette(2) * 255)
    np.testing.assert_array_equal(out[6, 6], expected[0])
    np.testing.assert_array_equal(out[3, 3], expected[1])


def test_overlay_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"shape \(20, 20\) do not lie on an image of shape"):
        figures.overlay(np.zeros((8, 8, 3), np.uint8), square())


def test_lines_have_names_bands_and_labels():
    curves = {"a": ([1, 2], [1, 2]), "b": ([1, 2], [2, 1], [0.1, 0.2])}
    axis = figures.lines(curves, xlabel="step", ylabel="loss", logy=True).axes[0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]
    assert len(axis.collections) == 1 and axis.get_yscale() == "log"
    assert axis.lines[0].get_linestyle() != axis.lines[1].get_linestyle()


def test_few_integers_are_ticks_themselves():
    """Steps of 5 to 50 have ticks at themselves; a range of two decades has plain numbers."""
    steps, error = [5, 10, 25, 50], [0.9, 0.3, 0.06, 0.013]
    many = {str(k): (steps, np.array(error) + k / 100) for k in range(4)}
    axis = figures.lines(many, xlabel="steps", ylabel="error", logy=True).axes[0]
    np.testing.assert_array_equal(axis.get_xticks(), steps)
    axis.figure.canvas.draw()
    labels = {text.get_text() for text in axis.get_yticklabels()}
    assert {"0.02", "0.1", "0.5"} <= labels


def test_integers_have_ticks_at_integers():
    curves = {"a": (range(4), [0, 1, 2, 2]), "b": (np.arange(4), np.array([1, 1, 0, 0]))}
    axis = figures.lines(curves, xlabel="epoch", ylabel="times used").axes[0]
    for ticks in (axis.get_xticks(), axis.get_yticks()):
        np.testing.assert_array_equal(ticks, np.round(ticks))
    axis = figures.lines({"a": ([0.0, 1.0], [0.0, 0.4])}, xlabel="x", ylabel="y").axes[0]
    assert (axis.get_yticks() != np.round(axis.get_yticks())).any()


def test_bars_write_their_values():
    axis = figures.bars({"g": {"a": 0.25, "b": 0.5}, "h": {"a": 1.0}}, ylabel="x").axes[0]
    assert sorted(text.get_text() for text in axis.texts) == ["0.25", "0.50", "1.00"]
    axis = figures.bars({"a": 1.0, "b": 2.0}, ylabel="x", errors={"a": 0.1, "b": (0.1, 0.3)}).axes[
        0
    ]
    assert [patch.get_height() for patch in axis.patches] == [1.0, 2.0]


@pytest.mark.parametrize("values", [{}, {"a": {}}, {"a": {}, "b": {}}])
def test_bars_of_nothing_are_an_empty_figure(values):
    figure = figures.bars(values, ylabel="x")
    figure.canvas.draw()
    (axis,) = figure.axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == list(values)
    assert not axis.patches and axis.get_legend() is None


def test_shares_of_ranges():
    values = np.random.default_rng(3).uniform(0, 1, 57).round(1)  # many lie on an edge
    values = np.concatenate([values, [0, 1, 1, np.nan, 1.2]])
    edges = np.linspace(0, 1, 6)
    found = figures.shares({"a": values, "none": []}, edges)
    assert list(found) == ["0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1"]
    for share, low, high in zip(found.values(), edges[:-1], edges[1:], strict=True):
        inside = (values >= low) & ((values < high) | ((high == 1) & (values == 1)))
        assert share == {"a": pytest.approx(inside.mean()), "none": 0.0}
    assert figures.bars(found, ylabel="share").axes[0].patches


def test_sweeps_mark_the_chosen_dot_and_share_one_axis():
    values = {
        f"setting {i}": {"a": 0.1 * (i + 1), "b": 0.05 * (i + 1)}
        for i in range(figures._PANELS + 2)
    }
    chosen = dict.fromkeys(values, "b")
    figure = figures.sweeps(values, chosen=chosen, ylabel="value", noise=0.01)
    assert [axis.get_title() for axis in figure.axes] == list(values)
    (limits,) = {axis.get_ylim() for axis in figure.axes}
    assert 0 < limits[0] < 0.05 - 0.01 and limits[1] > 0.1 * len(values) + 0.01
    for axis, row in zip(figure.axes, values.values(), strict=True):
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        assert [float(dot.get_ydata()[0]) for dot in dots] == list(row.values())
        assert dots[0].get_color() != dots[1].get_color()
        (band,) = axis.patches
        assert band.get_y() == pytest.approx(row["b"] - 0.01)
        assert band.get_height() == pytest.approx(0.02)
    assert [len(part.axes) for part in figure.subfigs] == [3, 3]
    unknown = figures.sweeps({"x": {"a": -0.2, "b": 0.3}}, chosen={"x": "c"}, ylabel="value")
    assert unknown.axes[0].get_ylim()[0] < -0.2 and not unknown.axes[0].patches


def test_a_map_asks_for_the_pictures_that_it_shows():
    points, asked = np.random.default_rng(0).normal(size=(400, 2)), []

    def picture(i):
        asked.append(i)
        return np.full((4, 6, 3), i % 256, np.uint8)

    groups = {"class": ["a", "b"] * 200, "patient": [f"p{i}" for i in range(400)]}
    figure = figures.embedding(points, groups, pictures=picture, n_pictures=7)
    shown = figure.axes[2].get_images()
    assert len(shown) == len(asked) == 7
    for i, image in zip(asked, shown, strict=True):
        left, right, low, high = image.get_extent()
        np.testing.assert_allclose([(left + right) / 2, (low + high) / 2], points[i])


def test_a_map_gives_its_groups_the_colours_of_the_order_asked_for():
    points = np.random.default_rng(0).normal(size=(6, 2))
    groups = {"class": list("cabcab"), "patient": list("yyxxzz")}
    figure = figures.embedding(points, groups, order={"class": ["a", "none of them", "b", "c"]})

    def drawn(axis):
        return {part.get_label(): tuple(part.get_facecolor()[0][:3]) for part in axis.collections}

    wanted = figures.palette(4)
    by_class = drawn(figure.axes[0])
    assert list(by_class) == ["a", "b", "c"]
    np.testing.assert_allclose([*by_class.values()], wanted[[0, 2, 3]])
    assert list(drawn(figure.axes[1])) == ["y", "x", "z"]


def test_of_many_groups_a_map_colours_the_largest_and_names_them():
    points = np.random.default_rng(0).normal(size=(40, 2))
    patients = [*("abcd" * 4), *(f"p{i}" for i in range(24))]
    axis = figures.embedding(points, {"patient": patients}).axes[0]
    names = [part.get_label() for part in axis.collections]
    assert names == ["others", "a", "b", "c", "d"]
    assert len(axis.collections[0].get_offsets()) == 24
    assert [text.get_text() for text in axis.get_legend().get_texts()] == names


def test_an_outline_is_drawn_on_the_rim_of_a_segment():
    image, mask = np.full((20, 20, 3), 200, np.uint8), square()
    out = figures.outline(image, mask, colour=(0, 1, 0))
    assert (out[~square(at=4, side=10)] == 200).all() and (image == 200).all()
    assert (out[mask & ~square(at=6, side=6)] == (0, 255, 0)).all()
    assert (out[square(at=6, side=6)] == 200).all()


def test_boundaries_are_lines_with_dark_rims():
    image, labels = np.full((20, 30, 3), 200, np.uint8), np.zeros((20, 30), int)
    labels[:, 12:] = 1
    row = figures.boundaries(image, labels, colour=(1, 1, 0))[9]
    line = (row == (255, 255, 0)).all(1)
    assert np.flatnonzero(line).tolist() in ([11, 12], [12], [11])
    assert (row[line.argmax() - 1] == 20).all() and (row[:9] == 200).all()
    assert (row[16:] == 200).all() and (image == 200).all()


def test_a_single_mask_may_be_laid_over():
    image, mask = np.full((20, 20, 3), 200, np.uint8), square()
    out = figures.overlay(image, mask, alpha=1, outline=False, colours=[figures.GREEN])
    np.testing.assert_array_equal(
        out[mask], np.tile(np.rint(255 * np.array(figures.GREEN)), (64, 1))
    )
    np.testing.assert_array_equal(
        out, figures.overlay(image, mask[None], alpha=1, outline=False, colours=[figures.GREEN])
    )


def disc(shape, centre, radius):
    y, x = np.ogrid[: shape[0], : shape[1]]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def test_a_square_holds_most_of_a_mask():
    """Against all squares, one by one; on a mask of any form."""
    rng = np.random.default_rng(5)
    mask = rng.random((17, 23)) < rng.random((17, 23)) ** 3
    for size in (1, 4, 9):
        held = {
            (y, x): mask[y : y + size, x : x + size].sum()
            for y in range(17 - size + 1)
            for x in range(23 - size + 1)
        }
        rows, columns = figures.most_of(mask, size)
        assert rows.stop - rows.start == columns.stop - columns.start == size
        assert held[rows.start, columns.start] == max(held.values())


def test_a_square_holds_one_of_two_discs_far_apart():
    large, small = disc((40, 90), (12, 15), 7), disc((40, 90), (28, 75), 5)
    window = figures.most_of(large | small, 20)
    assert large[window].sum() == large.sum() and not small[window].any()
    for mask in (large, small):
        window = figures.most_of(mask, 20)
        assert mask[window].sum() == mask.sum()


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_a_square_is_centred_on_a_mask_that_fits_unless_the_image_ends(shape):
    mask = disc(shape, (21, 18), 6)
    assert figures.most_of(mask, 17) == np.s_[13:30, 10:27]
    corner = disc(shape, (2, shape[1] - 3), 2)
    assert figures.most_of(corner, 15) == np.s_[0:15, shape[1] - 15 : shape[1]]


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_a_square_is_cut_to_an_image_that_is_smaller(shape):
    mask = disc(shape, (shape[0] - 6, shape[1] - 6), 5)
    assert figures.most_of(mask, 99) == (slice(0, shape[0]), slice(0, shape[1]))
    assert figures.most_of(np.zeros((40, 60), bool), 16) == np.s_[12:28, 22:38]
    rows, columns = figures.most_of(mask, 20)
    assert (rows.stop - rows.start, columns.stop - columns.start) == tuple(np.minimum(20, shape))
    assert mask[rows, columns].sum() == mask.sum()


@pytest.mark.parametrize("at", [0, 30, 52])
def test_a_closeup_shows_the_surroundings_of_a_segment_and_stays_in_the_image(at):
    image = np.random.default_rng(1).integers(0, 200, (64, 80, 3), np.uint8)
    mask = np.zeros((64, 80), bool)
    mask[at : at + 12, at : at + 6] = True
    out = figures.closeup(image, mask, margin=0.5, size=24)
    assert out.shape == (24, 24, 3)
    # A box of 12 and a half of it at each side: the image at its own resolution.
    top, left = min(max(at - 6, 0), 40), max(at - 9, 0)
    expected = figures.outline(
        image[top : top + 24, left : left + 24], mask[top : top + 24, left : left + 24]
    )
    np.testing.assert_array_equal(out, expected)


def test_a_closeup_keeps_in_sight_what_is_asked_for():
    image = np.full((64, 64, 3), 255, np.uint8)
    small, large = np.zeros((2, 64, 64), bool)
    small[10:14, 10:14] = large[8:40, 8:40] = True
    near, far = (figures.closeup(image, small, around=a) for a in (small, large))
    assert (near == 20).any() and (near < 255).sum() > 3 * (far < 255).sum() > 0
    whole = figures.closeup(image, np.ones_like(small))
    assert whole.shape == (180, 180, 3)


def test_labelled_names_stand_at_the_nearer_side_in_the_order_of_their_places():
    image = np.full((30, 40, 3), 200, np.uint8)
    places = {"low left": (3, 25), "right": (33, 12), "high left": (8, 4)}
    figure = figures.labelled(image, places)
    (axis,) = figure.axes
    assert {text.get_text(): text.xy for text in axis.texts} == places
    stand = {text.get_text(): text.xyann for text in axis.texts}  # as shares of the picture
    assert stand["low left"][0] < 0 and stand["high left"][0] < 0 and stand["right"][0] > 1
    assert 1 > stand["high left"][1] > stand["low left"][1] > 0, "lines do not cross"


def test_forest_has_a_row_each_and_fills_what_does_not_reach_zero():
    rows = {"one": (1.0, 0.5, 2.0), "two": (0.2, -0.5, 0.7)}
    axis = figures.forest(rows, xlabel="difference").axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["one", "two"]
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, True]
    both = figures.forest({"left": rows, "right": {"two": (0, -1, 1)}}, xlabel="d").axes
    assert [axis.get_title() for axis in both] == ["left", "right"]
    assert both[1].lines[-1].get_ydata().tolist() == [1]  # the row of its name
