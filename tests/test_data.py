"""The MNIST loader and the picture in space that the notebook of Figure 8 defines: counterfeits of
the four files, faults, and the announced fallback."""

import gzip
import hashlib

import matplotlib.pyplot as plt
import numpy as np
import pooch
import pytest
import torch
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from notebook_cells import definitions
from reference import generator, ring

from bimt_utils import EmbeddedMLP, swap_neurons

NOTEBOOK = definitions("mnist_3.5", before="Offline and without the files")
NAMES = list(NOTEBOOK["MD5"])


def idx(values):
    """IDX as its specification has it: 0, 0, type 8, rank, sizes as big-endian 32 bits, bytes."""
    sizes = np.array(values.shape, ">u4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def contents():
    random = np.random.default_rng(0)
    shapes = [(20, 28, 28), (20,), (10, 28, 28), (10,)]
    return [random.integers(0, 256 if len(s) > 1 else 10, s) for s in shapes]


def offline(*args, **kwargs):
    raise OSError("no network")


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """Let the canonical files be those of `contents`, so that tests are quick."""
    sums = [hashlib.sha256(idx(values)).hexdigest() for values in contents()]
    monkeypatch.setitem(NOTEBOOK, "SHA256", sums)
    monkeypatch.setattr(pooch, "retrieve", offline)


@pytest.fixture
def folder(tmp_path):
    for name, values in zip(NAMES, contents(), strict=True):
        (tmp_path / name).write_bytes(idx(values))
    return tmp_path


def load(folder):
    return NOTEBOOK["load_mnist"](folder)


@pytest.mark.parametrize("level", [None, 1, 9])
def test_reads_plain_and_zipped_files(folder, level):
    if level:  # files are judged by what is in them, however they were compressed
        for name in NAMES:
            packed = gzip.compress((folder / name).read_bytes(), level)
            (folder / f"{name}.gz").write_bytes(packed)
            (folder / name).unlink()
    name, side, train, test = load(folder)
    images, labels, test_images, test_labels = contents()
    assert (name, side) == ("MNIST", 28)
    for (x, y), (a, b) in ((train, (images, labels)), (test, (test_images, test_labels))):
        assert torch.equal(x, torch.from_numpy(a).reshape(-1, 784).float() / 255)
        assert torch.equal(y, torch.from_numpy(b))


def zipped(content):
    return gzip.compress(content)


FAULTS = {
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[:-1],
    "longer": lambda whole: whole + b"\0",
    "one bit": lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
    "web page": lambda whole: b"<html>not found</html>",
    "gzip of another": lambda whole: zipped(whole[:-1]),
    "half a gzip": lambda whole: zipped(whole)[:-20],
    "damaged gzip": lambda whole: zipped(whole)[:30] + b"damage" + zipped(whole)[36:],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_any_other_content_is_refused(folder, fault, name, ending):
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    (folder / f"{name}{ending}").write_bytes(FAULTS[fault](whole))
    with pytest.raises(ValueError, match=f"expected .*{name}"):
        load(folder)


def test_without_a_network_the_small_digits_and_a_notice(tmp_path, capsys):
    name, side, (images, labels), (test_images, test_labels) = load(tmp_path / "mnist")
    assert str(tmp_path / "mnist") in capsys.readouterr().out  # defect 31
    assert (name, side) == ("8x8 digits", 8)
    assert images.shape[1] == test_images.shape[1] == 64
    assert 0 <= images.min() <= images.max() <= 1
    assert set(labels.tolist()) == set(test_labels.tolist()) == set(range(10))


@pytest.mark.parametrize("error", [ValueError("hash differs"), OSError("404")])
def test_an_answer_that_is_not_the_file(folder, monkeypatch, capsys, error):  # defect 5
    def answer(*args, **kwargs):
        raise error

    (folder / NAMES[0]).unlink()
    monkeypatch.setattr(pooch, "retrieve", answer)
    assert load(folder)[0] == "8x8 digits"
    assert "NOTICE" in capsys.readouterr().out


@pytest.mark.parametrize("writable", [True, False])
def test_what_is_missing_is_fetched(folder, tmp_path_factory, monkeypatch, writable):  # defect 30
    cache = tmp_path_factory.mktemp("cache")
    whole = (folder / NAMES[3]).read_bytes()
    (folder / NAMES[3]).unlink()
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append((url, known_hash))
        target = (folder if str(path) == str(folder) else cache) / fname
        target.write_bytes(gzip.compress(whole))
        return str(target)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.setattr(NOTEBOOK["os"], "access", lambda *args: writable)
    assert load(folder)[0] == "MNIST"
    md5 = NOTEBOOK["MD5"][NAMES[3]]
    assert asked == [(f"{NOTEBOOK['SERVER']}{NAMES[3]}.gz", f"md5:{md5}")]
    assert (folder / f"{NAMES[3]}.gz").exists() == writable


# ---------------------------------------------------------------- the picture in space


def test_neurons_of_a_grid_run_along_x_first():
    places = [[(x + 0.5) / 3, (y + 0.5) / 3] for y in range(3) for x in range(3)]
    assert torch.allclose(NOTEBOOK["grid"](3), torch.tensor(places))


def cube(**kwargs):
    places = [NOTEBOOK["grid"](3), NOTEBOOK["grid"](2), ring(4)]
    return EmbeddedMLP((9, 4, 4), places=places, generator=generator(), **kwargs)


def space():
    return plt.figure().add_subplot(projection="3d")


def drawn_lines(ax):
    return [c for c in ax.collections if isinstance(c, Line3DCollection)]


def test_every_wire_joins_the_places_of_its_neurons():
    model, ax = cube(), space()
    NOTEBOOK["plot_network_3d"](model, 0, ax)
    places = [group.places for group in model.groups().values()]
    for z, (layer, lines) in enumerate(zip(model.layers, drawn_lines(ax), strict=True)):
        weight = layer.weight[0].detach().abs()
        strong = (weight > 0.01 * weight.max()).nonzero().tolist()
        wires = {(*places[z][i].tolist(), z, *places[z + 1][j].tolist(), z + 1) for j, i in strong}
        segments = {tuple(np.ravel(segment).tolist()) for segment in lines._segments3d}
        assert np.allclose(sorted(segments), sorted(wires))


def test_the_image_and_the_labels_follow_the_neurons():
    model, ax = cube(), space()
    while swap_neurons(model, 9) > 0:
        pass
    image, labels = torch.rand(9, generator=generator()), ["a", "b", "c", "d"]
    NOTEBOOK["plot_network_3d"](model, 0, ax, image=image, out_labels=labels)
    shade = ax.collections[-2].get_array()
    assert np.allclose(shade, 0.15 + image[model.in_perm[0]])
    texts = [text.get_text() for text in ax.texts]
    assert texts == [labels[item] for item in model.out_perm[0].tolist()]


def test_strongest_wires_only():
    ax = space()
    NOTEBOOK["plot_network_3d"](cube(), 0, ax, strongest=5)
    assert [len(lines._segments3d) for lines in drawn_lines(ax)] == [5, 5]


def test_rows_that_do_not_fit_are_refused():  # defect 8
    folded = EmbeddedMLP((18, 4), in_folds=2, places=[NOTEBOOK["grid"](side) for side in (3, 2)])
    for model in (folded, EmbeddedMLP((3, 4))):
        with pytest.raises(ValueError, match="expected rows in the plane"):
            NOTEBOOK["plot_network_3d"](model, 0, space())
