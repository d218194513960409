"""Pictures, curves, films and explorers: what is drawn and written."""

import copy
import subprocess
from contextlib import suppress

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import reference as ref
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from PIL import Image, ImageSequence

import bimt_utils as bimt
from bimt_utils import animate, explore, figure_folder, plot_curves, plot_network, save_figure

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BIMT_FIGURES", str(tmp_path))
    yield
    plt.close("all")


def new_model(shape=(4, 6, 2), runs=1, **kwargs):
    return bimt.EmbeddedMLP(shape, runs, generator=ref.generator(), **kwargs)


def loss_fn(model):
    return model(torch.ones(5, 4)).square().mean((1, 2))


def new_history(loss_fn=loss_fn, steps=6, snapshots=3):
    settings = {"steps": steps, "snapshots": snapshots, "lr": 1e-2}
    return bimt.train(new_model(runs=5), loss_fn, lamb=[(0, 1e-3), (0.5, 1e-2)], **settings)


def lines_of(ax, grey=False):
    """The collections of lines of a picture: one per layer, or the grey ones of a stream."""
    lines = [drawn for drawn in ax.collections if isinstance(drawn, LineCollection)]
    return [part for part in lines if ("#d9d9d9" in map(to_hex, part.get_colors())) == grey]


def dots_of(ax):
    dots = [drawn.get_offsets() for drawn in ax.collections if isinstance(drawn, PathCollection)]
    return {tuple(dot) for dot in np.concatenate(dots).round(6).tolist()}


@pytest.mark.parametrize("strongest", [None, 3, 1000])
@pytest.mark.parametrize("model", [new_model(runs=2), ref.Stream(4, 3, 5, 2, runs=2)])
def test_a_line_for_every_weight(model, strongest):
    model.layers[0].weight.data[1, 0] *= 1e-4
    ax = plot_network(model, 1, strongest=strongest, width=3.0)
    for layer, lines in zip(model.layers, lines_of(ax), strict=True):
        weights = layer.weight[1].detach().flatten().double()
        share = weights.abs() / weights.abs().max()
        order = share.argsort(descending=True)[: int((share > 0.01).sum())][:strongest]
        assert np.allclose(np.sort(lines.get_linewidths())[::-1], 3 * share[order], atol=1e-5)
        colors = [to_hex(color) for color in lines.get_colors()]
        assert colors.count(bimt.POSITIVE) == (weights[order] > 0).sum()
        assert colors.count(bimt.NEGATIVE) == (weights[order] < 0).sum()


@pytest.mark.parametrize(
    ("model", "number", "below", "above"),
    [(new_model((4, 3, 2), in_folds=2), 0, (0, -0.25), (1,)), (ref.Stream(), 1, (1,), (1.75, 2))],
)
def test_lines_lead_from_neuron_to_neuron_and_fold_to_fold(model, number, below, above):  # defect 8
    layer = ref.thinned(model, 3, 0.3).layers[number]
    size, n, m = layer.weight[0].abs(), len(layer.in_places), len(layer.out_places)
    wires = (size > 0.01 * size.max()).nonzero().tolist()
    wanted = [
        [[(i % n + 0.5) / n, below[i // n]], [(j % m + 0.5) / m, above[j // m]]] for j, i in wires
    ]
    drawn = np.array(lines_of(plot_network(model))[number].get_segments()).tolist()
    assert np.allclose(sorted(drawn), sorted(wanted), atol=1e-6)


def test_a_network_without_wires_can_be_drawn():
    ax = plot_network(bimt.prune(new_model((4, 3, 2), in_folds=2), 10.0))
    assert not any(len(lines.get_segments()) for lines in lines_of(ax))
    assert len(dots_of(ax)) == 4 + 3 + 2


def test_a_stream_is_joined_by_grey_lines():
    ax = plot_network(ref.Stream(3, 4, 2, 2))
    (grey,) = lines_of(ax, grey=True)
    wanted = [[[x, 1], [x, 3]] for x in (0.125, 0.375, 0.625, 0.875)]
    assert np.allclose(grey.get_segments(), wanted)
    shown = [text.get_text() for text in ax.texts if text.get_text()]
    assert shown == ["input", "Embed", "A1", "Res1", "output"]
    assert len(dots_of(ax)) == 3 + 4 + 2 * 2 + 4 + 2
    assert {y for _, y in dots_of(ax)} == {0, 1, 1.75, 2, 3, 4}


def test_labels_follow_their_neurons():
    model = new_model((5, 9, 3), runs=2)
    bimt.swap_neurons(model, 9)
    assert not torch.equal(model.in_perm[1], torch.arange(5))
    ax = plot_network(model, 1, in_labels="abcde", out_labels="xyz")
    shown = {text.get_text(): text.get_position()[0] for text in ax.texts}
    assert len(shown) == 8 + 3
    for perm, names in ((model.in_perm, "abcde"), (model.out_perm, "xyz")):
        for slot, item in enumerate(perm[1].tolist()):
            assert shown[names[item]] == pytest.approx((slot + 0.5) / len(names))


@pytest.mark.parametrize("kind", [list, tuple, "".join, np.array, dict.fromkeys])
def test_any_kind_of_labels(kind):
    labels = kind(["0", "1", "2", "3"])
    if isinstance(labels, dict):
        labels = {number: name for number, name in enumerate(labels)}
    ax = plot_network(new_model(), in_labels=labels)
    assert [text.get_text() for text in ax.texts][:4] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "wrong", [{"in_labels": "abc"}, {"in_labels": "abcde"}, {"out_labels": "y"}, {"out_labels": []}]
)
def test_labels_of_another_number(wrong):
    with pytest.raises(ValueError, match="expected a label for each"):
        plot_network(new_model(), **wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_drawn(value):
    model = new_model(runs=2)
    model.layers[1].weight.data[1, 0, 0] = value
    with pytest.raises(ValueError, match="expected finite weights from A1 to output"):
        plot_network(model, 1)
    plot_network(model, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_picture_in_any_precision(dtype):
    model = ref.thinned(ref.Stream(4, 4, 4, 4), 1, 0.5)
    drawn = [plot_network(m) for m in (model, copy.deepcopy(model).to(dtype))]
    widths = [[lines.get_linewidths() for lines in lines_of(ax)] for ax in drawn]
    for ours, wanted in zip(*widths, strict=True):
        assert np.allclose(ours, wanted, atol=0.02)


def test_curves_show_median_range_and_phases():
    history = new_history()
    ax, losses = plot_curves(history, "loss", log=True), history["loss"].numpy()
    assert np.allclose(ax.lines[0].get_ydata(), np.median(losses, 1))
    assert list(ax.lines[0].get_xdata()) == history.steps
    edges = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert np.allclose([edges.min(), edges.max()], [losses.min(), losses.max()])
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == [3]
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "loss")
    groups, colors = {"none": [4], "both": [0, 2, 3]}, {"none": "red", "both": "blue"}
    ax = plot_curves(history, "cost", groups=groups, colors=colors)
    for drawn, (label, runs) in zip(ax.lines, groups.items(), strict=False):
        assert np.allclose(drawn.get_ydata(), np.median(history["cost"][:, runs], 1))
        assert (drawn.get_label(), drawn.get_color()) == (label, colors[label])


def draw_network(fig, model, step):
    plot_network(model, ax=fig.add_subplot())


def files():
    return {path.name: path.read_bytes() for path in figure_folder().iterdir()}


def test_a_film_shows_every_snapshot():
    history, seen = new_history(), []

    def draw(fig, model, step):
        assert not fig.axes
        seen.append((step, model.layers[0].weight[0, 0, 0].item()))
        draw_network(fig, model, step)

    animate(history, draw, "film", figsize=(2.1, 1.5), dpi=50)
    assert [step for step, _ in seen] == [0, 2, 4, 6]
    assert len({weight for _, weight in seen}) == 4
    film = files()
    assert sorted(film) == ["film.gif", "film.mp4"]
    assert film["film.mp4"][4:8] == b"ftyp"
    assert not plt.get_fignums()


@pytest.mark.parametrize(("fps", "gif_fps"), [(12, 12), (12, 6), (10, 5), (12, 5)])
def test_the_gif_is_smaller_and_holds_its_last_frame_for_two_seconds(fps, gif_fps):
    history, colors = new_history(steps=7, snapshots=7), iter(plt.get_cmap("tab10").colors)
    ends = np.array(plt.get_cmap("tab10").colors)[[0, 7]] * 255
    settings = {"figsize": (4, 2), "fps": fps, "gif_fps": gif_fps, "gif_width": 100}
    animate(history, lambda fig, model, step: fig.set_facecolor(next(colors)), "film", **settings)
    with Image.open(figure_folder("film.gif")) as gif:
        pictures = [frame.copy() for frame in ImageSequence.Iterator(gif)]
    assert {picture.size for picture in pictures} == {(100, 50)}
    length = sum(picture.info["duration"] for picture in pictures)
    assert length == pytest.approx(1000 * (8 / fps + 2), abs=1000 / gif_fps)
    shown = [np.array(picture.convert("RGB"))[25, 50] for picture in pictures]
    assert np.allclose(shown[0], ends[0], atol=12)
    held = [p for p, c in zip(pictures, shown, strict=True) if np.allclose(c, ends[1], atol=12)]
    assert held[-1] is pictures[-1]
    assert sum(picture.info["duration"] for picture in held) >= 1900


def test_the_same_film_is_the_same_file():
    history, made = new_history(), []
    for _ in range(2):
        animate(history, draw_network, "film", figsize=(2, 2))
        made.append(files())
    assert made[0] == made[1]


@pytest.mark.parametrize("last", [0, 4, 6])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_film_that_fails_leaves_the_earlier_one(last, error):
    history = new_history()

    def draw(fig, model, step):
        if step == last:
            raise error("while drawing")
        draw_network(fig, model, step)

    with pytest.raises(error, match="while drawing"):
        animate(history, draw, "film")
    assert not files()
    animate(history, draw_network, "film")
    before = files()
    with pytest.raises(error, match="while drawing"):
        animate(history, draw, "film")
    assert files() == before


@pytest.mark.parametrize("wrong", [{"gif_fps": 0}, {"fps": 0}])
def test_a_film_that_ffmpeg_refuses_leaves_the_earlier_one(wrong):
    history = new_history()
    animate(history, draw_network, "film")
    before = files()
    with pytest.raises((subprocess.CalledProcessError, ValueError, ZeroDivisionError)):
        animate(history, draw_network, "film", **wrong)
    assert files() == before


# ---------------------------------------------------------------- files


def test_the_same_figure_is_the_same_file():
    made = []
    for _ in range(2):
        fig = plt.figure()
        plot_network(new_model(), ax=fig.add_subplot())
        save_figure(fig, "figure")
        made.append(files())
    assert made[0] == made[1]
    assert sorted(made[0]) == ["figure.pdf", "figure.png"]
    assert made[0]["figure.png"].startswith(b"\x89PNG")
    assert made[0]["figure.pdf"].startswith(b"%PDF")


def test_a_full_disk_leaves_the_earlier_file():
    resource = pytest.importorskip("resource")
    save_figure(plt.figure(), "figure")
    before, limits = files(), resource.getrlimit(resource.RLIMIT_FSIZE)
    more = plt.figure()
    plot_network(new_model(), ax=more.add_subplot())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # no file may be longer
    try:
        with pytest.raises(OSError, match="too large"):
            save_figure(more, "figure")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files() == before
    save_figure(more, "figure")
    assert files() != before


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, None])
def test_a_file_is_written_as_a_whole_or_not_at_all(error):
    path = figure_folder("notes.txt")
    path.write_text("earlier", encoding="utf-8")
    with suppress(OSError, KeyboardInterrupt), bimt.whole_file(path) as part:
        part.write_text("half", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "earlier"
        if error:
            raise error
    assert files() == {"notes.txt": b"earlier" if error else b"half"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_whole_file_hides_no_error(error):
    with pytest.raises(error, match="why"), bimt.whole_file(figure_folder("notes.txt")):
        raise error("why")
    with pytest.raises(FileNotFoundError), bimt.whole_file(figure_folder("notes.txt")):
        pass  # nothing was written
    assert not files()


# ---------------------------------------------------------------- explorer


def test_explorer_draws_the_chosen_snapshot():
    steps, weights = [], set()

    def draw(fig, model, step):
        steps.append(step)
        weights.add(model.layers[0].weight[0, 0, 0].item())

    box = explore(new_history(), draw)
    play, slider = box.children[0].children
    slider.value = 2
    play.value = 2
    assert steps == [6, 2, 4]
    assert len(weights) == 3
    assert bytes(box.children[1].value).startswith(b"\x89PNG")
    assert not plt.get_fignums()


def test_an_interrupt_in_the_first_step_leaves_something_to_film():
    steps, history = [], new_history(ref.raising(KeyboardInterrupt, 1, None))
    animate(history, lambda fig, model, step: steps.append(step), "film")
    explore(history, lambda fig, model, step: steps.append(step))
    assert steps == [0, 0]
