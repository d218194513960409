"""Pictures, curves, videos and explorers: what is drawn and written."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import reference as ref
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex

import bimt_utils as bimt
from bimt_utils import animate, explore, figure_folder, plot_curves, plot_network

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BIMT_FIGURES", str(tmp_path))
    yield
    plt.close("all")


def new_model(shape=(4, 6, 2), runs=1, **kwargs):
    return bimt.EmbeddedMLP(shape, runs, generator=ref.generator(), **kwargs)


def new_history(loss_fn=lambda m: m(torch.ones(5, 4)).square().mean((1, 2))):
    phases = {"lamb": [(0, 1e-3), (0.5, 1e-2)], "snapshots": 3}
    return bimt.train(new_model(runs=5), loss_fn, steps=6, lr=1e-2, **phases)


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
    assert [text.get_text() for text in ax.texts] == ["input", "Embed", "A1", "Res1", "output"]
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


def test_pictures_that_cannot_be():
    labels = [{"in_labels": "abc"}, {"in_labels": "abcde"}, {"out_labels": "y"}, {"out_labels": []}]
    for arguments in ({"strongest": 0}, {"strongest": -1}, *labels):  # defects 24 and 26
        with pytest.raises(ValueError, match="expected"):
            plot_network(new_model(), **arguments)
    for value in (float("nan"), float("inf")):  # defect 25
        model = new_model()
        model.layers[1].weight.data[0, 0, 0] = value
        with pytest.raises(ValueError, match="expected finite"):
            plot_network(model)


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


@pytest.mark.parametrize("name", ["film.mp4", "film.gif"])
def test_video_and_one_that_fails(name, capsys):
    history, seen, path = new_history(), [], figure_folder() / name
    capsys.readouterr()

    def draw(fig, model, step):
        assert not fig.axes
        seen.append((step, model.layers[0].weight[0, 0, 0].item()))
        plot_network(model, ax=fig.add_subplot())

    animate(history, draw, name, figsize=(2.1, 1.5), dpi=50)
    assert [step for step, _ in seen] == [0, 2, 4, 6]
    assert len({weight for _, weight in seen}) == 4
    film = path.read_bytes()
    assert film[4:8] == b"ftyp" if name.endswith("mp4") else film[:3] == b"GIF"
    assert name in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):  # defect 15: the earlier film stays
        animate(history, lambda fig, model, step: step / (4 - step), name)
    assert path.read_bytes() == film
    assert list(figure_folder().iterdir()) == [path]
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", ["film.avi", "film", "../film.gif", "", "a/b.mp4"])
def test_videos_of_another_kind_or_elsewhere(name):
    with pytest.raises(ValueError, match="expected"):
        animate(new_history(), lambda *_: None, name)


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


def test_an_interrupt_in_the_first_step_leaves_something_to_film():  # defects 15 and 21
    steps, history = [], new_history(ref.raising(KeyboardInterrupt, 1, None))
    animate(history, lambda fig, model, step: steps.append(step), "film.gif")
    explore(history, lambda fig, model, step: steps.append(step))
    assert steps == [0, 0]
