"""Pictures, videos, explorers, claims: what is drawn and written."""

import json

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from bimt_utils import (
    NEGATIVE,
    POSITIVE,
    Claims,
    EmbeddedMLP,
    animate,
    as_png,
    claims_table,
    explore,
    figure_folder,
    grid,
    mse_loss,
    plot_curves,
    plot_network,
    plot_network_3d,
    ring,
    save_figure,
    swap_neurons,
    train,
)

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BIMT_FIGURES", str(tmp_path / "figures"))
    yield
    plt.close("all")


def new_model(shape=(4, 6, 2), **kwargs):
    return EmbeddedMLP(shape, generator=torch.Generator().manual_seed(0), **kwargs)


def new_history():
    model = new_model(runs=2)
    x = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    settings = {"steps": 6, "lr": 1e-2, "lamb": [(0, 1e-3), (0.5, 1e-2)], "snapshot_every": 2}
    return train(model, lambda m: mse_loss(m(x), x[:, :2]), **settings)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_a_line_for_every_weight_above_the_threshold(threshold):
    model = new_model(runs=2)
    ax = plot_network(model, 1, threshold=threshold)
    for layer, lines in zip(model.layers, ax.collections[:2], strict=True):
        weights = layer.weight[1].detach()
        weights = weights[weights.abs() > threshold]
        assert len(lines.get_segments()) == len(weights)
        colors = [matplotlib.colors.to_hex(c) for c in lines.get_colors()]
        assert colors.count(POSITIVE) == (weights > 0).sum()
        assert colors.count(NEGATIVE) == (weights < 0).sum()
        widths = np.sort(lines.get_linewidths())
        assert np.allclose(
            widths, 2 * weights.abs().sort().values / layer.weight[1].abs().max().item()
        )
    assert len(ax.collections[2].get_offsets()) == 4 + 6 + 2


def test_faint_weights_are_left_out_by_default():
    model = new_model()
    with torch.no_grad():
        model.layers[0].weight.fill_(1e-4)[0, 0, 0] = 1
    assert len(plot_network(model).collections[0].get_segments()) == 1


def test_each_fold_has_its_own_dots_and_weights():
    model = new_model((4, 3, 2), in_folds=2)
    ax = plot_network(model, threshold=0)
    segments = np.array(ax.collections[0].get_segments())
    assert set(np.round(segments[:, 0, 1], 2)) == {0.0, -0.25}
    assert len(ax.collections[2].get_offsets()) == 4 + 3 + 2


def test_labels_follow_their_neurons():
    model = new_model((5, 9, 3))
    swap_neurons(model, 9)
    ax = plot_network(model, in_labels="abcde", out_labels="xyz", row_names=False)
    shown = {t.get_text(): t.get_position()[0] for t in ax.texts}
    for slot, feature in enumerate(model.in_perm[0].tolist()):
        assert shown["abcde"[feature]] == pytest.approx((slot + 0.5) / 5)
    for slot, output in enumerate(model.out_perm[0].tolist()):
        assert shown["xyz"[output]] == pytest.approx((slot + 0.5) / 3)


def test_curves_mark_the_phases():
    history = new_history()
    ax = plot_curves(history, history.losses)
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == [3]


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_video(name):
    history, steps = new_history(), []

    def draw(fig, model, step):
        steps.append(step)
        plot_network(model, ax=fig.add_subplot())

    path = animate(history, draw, name, figsize=(2.1, 1.5), dpi=50)
    assert path == figure_folder() / name
    assert steps == [0, 2, 4, 6]
    head = path.read_bytes()[:12]
    assert head[4:8] == b"ftyp" if name.endswith("mp4") else head[:3] == b"GIF"
    assert not plt.get_fignums()


def test_video_of_another_kind():
    with pytest.raises(ValueError, match="avi"):
        animate(new_history(), lambda *_: None, "film.avi")


def test_explorer_draws_the_chosen_snapshot():
    steps = []
    box = explore(new_history(), lambda fig, model, step: steps.append(step))
    play, slider = box.children[0].children
    assert steps == [6]
    slider.value = 2
    play.value = 2
    assert steps == [6, 2, 4]
    assert bytes(box.children[1].value).startswith(b"\x89PNG")
    assert not plt.get_fignums()


def test_figures_go_where_the_environment_says(tmp_path):
    fig, ax = plt.subplots()
    ax.plot([0, 1])
    path = save_figure(fig, "figure")
    assert path.parent == tmp_path / "figures"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_claims():
    claims = Claims(9)
    claims.add("short", [0.1, 0.3, 0.2], [True, True, False], authors=0.15, unit="m")
    claims.add("never", [1, 2, 3, 4], [False, True, True, False])
    assert claims.verdict() == "Figure 9: 1 of 2 claims hold in most runs"
    table = claims._repr_markdown_()
    assert "| short | 0.15 | 0.2 [0.1, 0.3] m | 2 of 3 | held |" in table
    assert "| never | - | 2.5 [1, 4] | 2 of 4 | **not held** |" in table
    saved = json.loads(claims.save().read_text())
    assert saved["figure"] == 9
    assert claims_table(saved["claims"]) == table


@pytest.mark.parametrize(("values", "held"), [([], []), ([1, 2], [True]), ([[1]], [[True]])])
def test_claims_need_one_verdict_per_run(values, held):
    with pytest.raises(ValueError, match="values and held"):
        Claims(1).add("bad", values, held)


def test_only_the_strongest_lines():
    model = new_model()
    ax = plot_network(model, strongest=3, width=1.0)
    for layer, lines in zip(model.layers, ax.collections[:2], strict=True):
        sizes = layer.weight[0].detach().abs().flatten().sort().values[-3:]
        assert np.allclose(np.sort(lines.get_linewidths()), sizes / sizes[-1], atol=1e-6)


# ---------------------------------------------------------------- in space


def network_in_space():
    model = new_model((9, 4, 3), runs=2, places=[grid(3), grid(2), ring(3)], frozen=(0,))
    swap_neurons(model, 9)
    return model


@pytest.mark.parametrize("strongest", [5, 1000])
def test_the_strongest_lines_in_space(strongest):
    model = network_in_space()
    ax = plot_network_3d(model, 1, threshold=0.05, strongest=strongest)
    ax.figure.canvas.draw()
    for layer, lines in zip(model.layers, ax.collections[:2], strict=False):
        sizes = layer.weight[1].detach().abs().flatten().sort(descending=True).values
        shown = min(strongest, int((sizes > 0.05).sum()))
        assert len(lines.get_linewidths()) == shown
        widths = np.sort(lines.get_linewidths())[::-1]
        assert np.allclose(widths, 1.5 * (sizes / sizes[0])[:shown], atol=1e-5)


def test_places_image_and_labels_in_space():
    model = network_in_space()
    image = torch.linspace(0, 1, 9)
    ax = plot_network_3d(model, 0, image=image, out_labels="abc")
    dots = ax.collections[2:]
    assert [len(d.get_offsets()) for d in dots] == [9, 4, 3]
    assert np.allclose(dots[0].get_array(), 0.15 + image[model.in_perm[0]])
    assert [text.get_text() for text in ax.texts] == ["abc"[i] for i in model.out_perm[0]]


def test_a_network_without_wires_can_be_drawn():
    model = network_in_space()
    with torch.no_grad():
        model.layers[0].weight.zero_()
    ax = plot_network_3d(model)
    ax.figure.canvas.draw()
    assert len(ax.collections) == 1 + 3


def test_rows_in_a_line_lie_in_the_middle():
    ax = plot_network_3d(new_model())
    assert len(ax.collections) == 2 + 3


# ---------------------------------------------------------------- where figures go


def test_png_for_widgets_leaves_no_figure_open():
    before = plt.get_fignums()
    png = as_png(lambda fig: fig.add_subplot(), (2, 1))
    assert png.startswith(b"\x89PNG")
    assert plt.get_fignums() == before


def test_a_relative_folder_starts_at_the_module(monkeypatch, tmp_path):
    import bimt_utils

    monkeypatch.setattr(bimt_utils, "__file__", str(tmp_path / "bimt_utils.py"))
    monkeypatch.setenv("BIMT_FIGURES", "elsewhere/deep")
    assert figure_folder() == tmp_path / "elsewhere" / "deep"
    monkeypatch.delenv("BIMT_FIGURES")
    assert figure_folder() == tmp_path / "figures"
    assert figure_folder().is_dir()


def test_a_read_only_folder_is_named(monkeypatch):
    import bimt_utils

    folder = figure_folder()
    monkeypatch.setattr(bimt_utils.os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=f"{folder} is read-only; set BIMT_FIGURES"):
        save_figure(plt.figure(), "nothing")
