"""The MNIST loader: small counterfeits of the four files, faults, and the announced fallback."""

import gzip
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.datasets
import torch

import bimt_utils
from bimt_utils import load_mnist

NAMES = [name for _, *names in bimt_utils.IDX_FILES.values() for name in names]


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """Let the canonical files have 20 and 10 digits, so that tests are quick."""
    monkeypatch.setitem(bimt_utils.IDX_FILES, "train", (20, *NAMES[:2]))
    monkeypatch.setitem(bimt_utils.IDX_FILES, "test", (10, *NAMES[2:]))
    monkeypatch.setattr(bimt_utils, "fetch_openml", offline)


def offline(*args, **kwargs):
    raise urllib.error.URLError("no network")


def idx(values):
    """IDX as its specification has it: 0, 0, type 8, rank, sizes as big-endian 32 bits, bytes."""
    sizes = np.array(values.shape, ">u4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def contents():
    random = np.random.default_rng(0)
    shapes = [(20, 28, 28), (20,), (10, 28, 28), (10,)]
    return [random.integers(0, 256 if len(s) > 1 else 10, s) for s in shapes]


@pytest.fixture
def folder(tmp_path):
    for name, values in zip(NAMES, contents(), strict=True):
        (tmp_path / name).write_bytes(idx(values))
    return tmp_path


def test_the_real_sizes():
    sizes = {"train": 60_000, "test": 10_000}
    assert (
        bimt_utils._idx_header((sizes["train"], 28, 28)).hex() == "000008030000ea600000001c0000001c"
    )
    assert bimt_utils._idx_header((sizes["test"],)).hex() == "0000080100002710"


@pytest.mark.parametrize("zipped", [False, True])
def test_reads_plain_and_zipped_files(folder, zipped):
    if zipped:
        for name in NAMES:
            (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
            (folder / name).unlink()
    digits = load_mnist(folder)
    images, labels, _, test_labels = contents()
    assert (digits.name, digits.side) == ("MNIST", 28)
    assert torch.equal(digits.train[0], torch.from_numpy(images).reshape(20, 784).float() / 255)
    assert torch.equal(digits.train[1], torch.from_numpy(labels))
    assert torch.equal(digits.test[1], torch.from_numpy(test_labels))


def test_finds_the_folder_of_the_environment(folder, monkeypatch):
    (folder / "mnist").mkdir()
    for name in NAMES:
        (folder / name).rename(folder / "mnist" / name)
    monkeypatch.setenv("BIMT_DATA", str(folder))
    assert len(load_mnist().train[0]) == 20


def broken(kind, whole):
    return {
        "truncated": whole[:-1],
        "too long": whole + b"0",
        "empty": b"",
        "foreign": b"<html>" + whole[6:],
        "signed": whole[:2] + b"\x09" + whole[3:],
        "mislabelled": idx(np.zeros((10, 28, 14))),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["truncated", "too long", "empty", "foreign", "signed", "mislabelled"]
)
@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_not_what_they_claim(folder, kind, name):
    (folder / name).write_bytes(broken(kind, (folder / name).read_bytes()))
    with pytest.raises(ValueError, match=name):
        load_mnist(folder)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: b"PK" + raw, lambda raw: b""])
def test_broken_gzip(folder, damage):
    whole = gzip.compress((folder / NAMES[0]).read_bytes())
    (folder / NAMES[0]).unlink()
    (folder / f"{NAMES[0]}.gz").write_bytes(damage(whole))
    with pytest.raises(ValueError, match=NAMES[0]):
        load_mnist(folder)


def test_images_in_place_of_labels(folder):
    (folder / NAMES[1]).write_bytes((folder / NAMES[0]).read_bytes())
    with pytest.raises(ValueError, match=NAMES[1]):
        load_mnist(folder)


def test_labels_beyond_nine(folder):
    (folder / NAMES[3]).write_bytes(idx(np.full(10, 10)))
    with pytest.raises(ValueError, match="allowed are 0 to 9"):
        load_mnist(folder)


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), TimeoutError("slow")])
def test_without_files_and_network_it_says_so_and_falls_back(tmp_path, monkeypatch, capsys, error):
    def fetch(*args, **kwargs):
        raise error

    monkeypatch.setattr(bimt_utils, "fetch_openml", fetch)
    digits = load_mnist(tmp_path / "nowhere")
    assert "NOTICE" in capsys.readouterr().out
    assert (digits.side, len(digits.train[0]) + len(digits.test[0])) == (8, 1797)
    assert digits.train[0].shape[1] == 64
    assert 0 <= digits.train[0].min() < digits.train[0].max() == 1
    assert digits.train[1].dtype == torch.int64
    assert not (tmp_path / "nowhere").exists()


def openml(*args, **kwargs):
    images, labels, test_images, test_labels = contents()
    return SimpleNamespace(
        data=np.concatenate([images, test_images]).reshape(30, 784).astype(float),
        target=np.concatenate([labels, test_labels]).astype(str).astype(object),
    )


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(bimt_utils, "fetch_openml", openml)


@pytest.mark.usefixtures("online")
def test_a_download_is_kept_and_read_again(tmp_path, monkeypatch):
    first = load_mnist(tmp_path / "mnist")
    monkeypatch.setattr(bimt_utils, "fetch_openml", offline)
    again = load_mnist(tmp_path / "mnist")
    assert torch.equal(first.train[0], again.train[0])
    assert torch.equal(again.test[1], torch.from_numpy(contents()[3]))
    assert sorted(p.name for p in (tmp_path / "mnist").iterdir()) == sorted(
        f"{n}.gz" for n in NAMES
    )


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("written", range(4))
def test_a_download_killed_half_way_leaves_no_half_files(tmp_path, monkeypatch, written):
    replace, done = bimt_utils.os.replace, []

    def killed(source, target):
        if len(done) == written:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(bimt_utils.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        load_mnist(tmp_path / "mnist")
    assert len(list((tmp_path / "mnist").iterdir())) == written
    monkeypatch.undo()
    monkeypatch.setattr(bimt_utils, "fetch_openml", openml)
    monkeypatch.setitem(bimt_utils.IDX_FILES, "train", (20, *NAMES[:2]))
    monkeypatch.setitem(bimt_utils.IDX_FILES, "test", (10, *NAMES[2:]))
    assert len(load_mnist(tmp_path / "mnist").train[0]) == 20


@pytest.mark.filterwarnings("error")
def test_scikit_learn_understands_what_it_is_asked(tmp_path, monkeypatch, capsys):
    """The real `fetch_openml`, with nothing but the network taken away."""
    monkeypatch.setattr(bimt_utils, "fetch_openml", sklearn.datasets.fetch_openml)
    monkeypatch.setattr(sklearn.datasets._openml, "urlopen", offline)
    assert load_mnist(tmp_path).side == 8
    assert "no network" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_download_of_something_else(tmp_path, monkeypatch):
    wrong = SimpleNamespace(data=np.zeros((5, 784)), target=np.zeros(5))
    monkeypatch.setattr(bimt_utils, "fetch_openml", lambda *a, **k: wrong)
    with pytest.raises(ValueError, match="mnist_784 has shape"):
        load_mnist(tmp_path / "mnist")
    assert not (tmp_path / "mnist").exists()
