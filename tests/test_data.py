"""The MNIST loader and the picture in space that the notebook of Figure 8 defines: counterfeits of
the four files, faults, and the announced fallback."""

import gzip
import hashlib
import zlib

import matplotlib.pyplot as plt
import numpy as np
import pooch
import pytest
import torch
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from notebook_cells import definitions
from reference import arrange_at_random, generator, ring

from bimt_utils import EmbeddedMLP

NOTEBOOK = definitions("mnist_3.5", before="## The digits")
NAMES = [name for name, _ in NOTEBOOK["MD5"]]
plt.close("all")


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
    together = b"".join(map(idx, contents()))
    monkeypatch.setitem(NOTEBOOK, "SHA256", hashlib.sha256(together).hexdigest())
    monkeypatch.setattr(pooch, "retrieve", offline)


@pytest.fixture
def folder(tmp_path):
    for name, values in zip(NAMES, contents(), strict=True):
        (tmp_path / name).write_bytes(idx(values))
    return tmp_path


def load(folder):
    return NOTEBOOK["load"](folder)


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
    with pytest.raises((ValueError, zlib.error)):
        load(folder)


def test_exchanged_files_are_refused(folder):
    (folder / NAMES[0]).rename(folder / "other")
    (folder / NAMES[2]).rename(folder / NAMES[0])
    (folder / "other").rename(folder / NAMES[2])
    with pytest.raises(ValueError, match="expected the four files of MNIST"):
        load(folder)


def test_without_a_network_the_small_digits_and_a_notice(tmp_path, capsys):
    name, side, (images, labels), (test_images, test_labels) = load(tmp_path / "mnist")
    printed = capsys.readouterr().out
    assert printed.startswith("NOTICE")
    assert str(tmp_path / "mnist") in printed
    assert (name, side) == ("8x8 digits", 8)
    assert images.shape[1] == test_images.shape[1] == 64
    assert 0 <= images.min() <= images.max() <= 1
    assert set(labels.tolist()) == set(test_labels.tolist()) == set(range(10))


def test_an_answer_that_is_not_the_file(folder, monkeypatch):
    def answer(*args, **kwargs):  # as pooch says it
        raise ValueError("MD5 hash of downloaded file does not match the known hash")

    (folder / NAMES[0]).unlink()
    monkeypatch.setattr(pooch, "retrieve", answer)
    with pytest.raises(ValueError, match="does not match"):
        load(folder)


def test_what_is_missing_is_fetched(folder, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    whole = (folder / NAMES[3]).read_bytes()
    (folder / NAMES[3]).unlink()
    asked = []

    def retrieve(url, known_hash):
        asked.append((url.rsplit("/", 1)[1], known_hash))
        target = cache / "download.gz"
        target.write_bytes(gzip.compress(whole))
        return str(target)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert load(folder)[0] == "MNIST"
    assert asked == [(f"{NAMES[3]}.gz", f"md5:{dict(NOTEBOOK['MD5'])[NAMES[3]]}")]
    assert not (folder / f"{NAMES[3]}.gz").exists()  # the folder is the user's


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
    NOTEBOOK["plot_network_3d"](model, 0, ax, torch.zeros(9))
    places = [group.places for group in model.groups().values()]
    for z, (layer, lines) in enumerate(zip(model.layers, drawn_lines(ax), strict=True)):
        weight = layer.weight[0].detach().abs()
        strong = (weight > 0.01 * weight.max()).nonzero().tolist()
        wires = {(*places[z][i].tolist(), z, *places[z + 1][j].tolist(), z + 1) for j, i in strong}
        segments = {tuple(np.ravel(segment).tolist()) for segment in lines._segments3d}
        assert np.allclose(sorted(segments), sorted(wires))


def test_the_image_and_the_digits_follow_the_neurons():
    model, ax = cube(), space()
    arrange_at_random(model, 1)
    image = torch.rand(9, generator=generator())
    NOTEBOOK["plot_network_3d"](model, 0, ax, image)
    shade = ax.collections[-2].get_array()
    assert np.allclose(shade, 0.15 + image[model.in_perm[0]])
    assert [text.get_text() for text in ax.texts] == [str(i) for i in model.out_perm[0].tolist()]


def test_strongest_wires_only():
    ax = space()
    NOTEBOOK["plot_network_3d"](cube(), 0, ax, torch.zeros(9), strongest=5)
    assert [len(lines._segments3d) for lines in drawn_lines(ax)] == [5, 5]


def test_a_network_without_wires():
    model, ax = cube(), space()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    NOTEBOOK["plot_network_3d"](model, 0, ax, torch.zeros(9))
    ax.figure.canvas.draw()
    assert [len(lines._segments3d) for lines in drawn_lines(ax)] == [0, 0]
