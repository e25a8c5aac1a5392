from __future__ import annotations

import io
import itertools
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.text import Text

from lightning_methods.errors import InvalidArgument, ShapeMismatch
from lightning_methods.report import PALETTE, color_cycle, curves, heatmap, histograms, reliability_diagram, short_names
from lightning_methods.report._sinks import render


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.parametrize(
    "figure",
    [
        lambda: heatmap(torch.tensor([[1.0, float("nan")]], dtype=torch.bfloat16)),
        lambda: heatmap(np.full((3, 3), np.nan), title="nothing known yet"),
        lambda: heatmap(np.zeros((40, 40)), [f"block.{i}.conv" for i in range(40)], range(40), diverging=0.0),
        lambda: heatmap(np.eye(5), vmin=0, vmax=1, annotate=False),
        lambda: curves({"a": ([0], [1.0])}, reference=1.0),
        lambda: curves({"a": ([0, 1], [np.nan, np.nan]), "b": ([0, 1], [1, 1])}),
        lambda: curves({f"layer{i}": (range(300), np.arange(300) * i) for i in range(30)}, reference={"chance": 3}),
        lambda: reliability_diagram([1.0], [True], 1),
        lambda: reliability_diagram(torch.rand(50, requires_grad=True), torch.rand(50) > 0.5),
        lambda: histograms({"a": np.ones((3, 4))}),
        lambda: histograms({f"l{i}": np.arange(9.0) for i in range(20)}, log=True),
    ],
)
def test_every_figure_draws_on_a_light_background(figure):
    image = render(figure())
    assert image.ndim == 3
    assert image[0, 0].min() > 240  # the corner: solid, also on a dark page
    assert image.std() > 3  # something is drawn


def test_values_are_written_into_small_maps_only():
    assert texts(heatmap([[1.0, float("nan")], [0.25, 0.0]])) == ["1.00", "0.25", "0.00"]
    assert texts(heatmap(np.eye(2) * 5000)) == ["5000", "0", "0", "5000"]
    assert texts(heatmap(np.eye(20))) == []


def test_a_two_sided_map_is_neutral_at_its_middle():
    image = heatmap([[0.5, 1.0, 3.0]], diverging=1.0).axes[0].images[0]
    assert image.norm(1.0) == 0.5
    assert image.norm(3.0) == 1.0
    assert image.norm(-1.0) == 0.0


def test_labels_at_the_ends_do_not_overlap_and_bear_their_lines_colour():
    figure = curves({f"layer{i}": ([0, 1], [1.0, 1.0 + 1e-3 * i]) for i in range(7)}, reference={"chance": 1.0})
    axes = figure.axes[0]
    figure.savefig(io.BytesIO(), dpi=figure.dpi)  # lays out in the units of the boxes below
    # without the thin line to the curve, which belongs to the annotation
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 8
    assert all(upper.y0 >= lower.y1 - 2 for lower, upper in itertools.pairwise(boxes))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)
    colors = {text.get_text(): text.get_color() for text in axes.texts}
    assert all(line.get_color() == colors[line.get_label()] for line in axes.lines if line.get_label() in colors)


def test_long_names_stay_apart():
    names = [f"backbone.encoder.layer.{i}.attention.self.output.dense" for i in range(12)]
    assert short_names(names)[11] == "…layer.11…"
    same = ["x" * 40 + "a" + "y" * 40, "x" * 40 + "b" + "y" * 40]
    assert len(set(short_names(same, 12))) == 2
    assert short_names(["fc", "fc"]) == ["fc", "fc"]
    assert short_names(["a" * 50]) == ["a" * 11 + "…" + "a" * 16]
    assert short_names([]) == []


def test_colours_are_distinct():
    assert color_cycle(3) == list(PALETTE[:3])
    assert len(set(color_cycle(30))) == 30
    with pytest.raises(InvalidArgument):
        color_cycle(-1)


def test_the_calibration_error_is_the_textbook_one():
    # two bins: 0.75 said and 1.0 right (half of the data), 0.25 said and 0.5 right
    figure = reliability_diagram([0.75, 0.75, 0.25, 0.25], [1, 1, 1, 0], bins=2)
    assert any("ECE 25.0%   accuracy 75.0%   n 4" in text for text in texts(figure))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: heatmap([1, 2]), ShapeMismatch, "2 dimension"),
        (lambda: heatmap([[1, 2]], ["a", "b"]), ShapeMismatch, "row_labels has 2 names for 1"),
        (lambda: heatmap([["a"]]), InvalidArgument, "must be numbers"),
        (lambda: heatmap(np.zeros((0, 3))), InvalidArgument, "empty"),
        (lambda: curves({}), InvalidArgument, "at least one line"),
        (lambda: curves({"a": ([0, 1], [1])}), ShapeMismatch, "'a' has 2 x and 1 y"),
        (lambda: curves({"a": 3}), InvalidArgument, "pair"),
        (lambda: reliability_diagram([1.2], [1]), InvalidArgument, r"\[0, 1\]"),
        (lambda: reliability_diagram([0.2, float("nan")], [1, 0]), InvalidArgument, r"\[0, 1\]"),
        (lambda: reliability_diagram([0.2], [1, 0]), ShapeMismatch, "1 values and correct has 2"),
        (lambda: reliability_diagram([0.2], [1], 0), InvalidArgument, "bins=0"),
        (lambda: histograms({}), InvalidArgument, "at least one"),
        (lambda: histograms({"a": [float("nan")]}), InvalidArgument, "'a' holds no finite value"),
    ],
)
def test_bad_input_is_a_typed_error(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_global_settings_and_pyplot_are_left_alone():
    names = set(mpl.rcParams) - {"backend"}  # reading that one would import pyplot
    before = {name: mpl.rcParams[name] for name in names}
    render(curves({"a": ([0, 1], [1, 2])}))
    assert {name: mpl.rcParams[name] for name in names} == before
    code = (
        "import sys; from lightning_methods.report import heatmap; from lightning_methods.report._sinks import render;"
        "render(heatmap([[1, 2]])); assert not {'matplotlib.pyplot', 'torch', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
