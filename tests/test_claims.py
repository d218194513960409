"""Claims, their summary and verdicts, and the folder that figures and claims go to."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bimt_utils as bimt
from bimt_utils import figure_folder, save_figure
from evidence import Claims, summarise, verdicts


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BIMT_FIGURES", str(tmp_path / "figures"))
    yield
    plt.close("all")


def some_claims(figure=9):
    claims = Claims(figure, 5)
    claims.add("short", [0.1, 0.3, 0.2], at_most=0.25, authors=0.15)
    claims.add("exact", np.linspace(0.9, 1, 16), at_least=0.9, at_most=1)
    claims.add("never", [1, 2, 3, 4, 5, 6], at_least=7)
    return claims


def held(values, **bounds):
    claims = Claims(1, 0)
    claims.add("any", values, **bounds)
    return claims.table.held.tolist()


def test_one_row_per_claim_and_run_and_one_per_claim_in_the_summary():
    table = some_claims().table
    assert len(table) == 3 + 16 + 6
    short = table[table.claim == "short"]
    assert short.held.tolist() == [True, False, True]
    assert short.value.tolist() == [0.1, 0.3, 0.2]
    assert short.run.tolist() == [0, 1, 2]
    assert set(table.seed) == {5}
    together = summarise(table).join(verdicts(table)).drop(columns="share")
    assert together.reset_index().to_numpy().tolist() == [
        [9, "short", "0.15", "0.2 [0.1, 0.3]", "2 of 3", "undecided"],
        [9, "exact", "-", "0.95 [0.9, 1]", "16 of 16", "held"],  # the bounds themselves are allowed
        [9, "never", "-", "3.5 [1, 6]", "0 of 6", "not held"],
    ]


NUMBERS = st.floats(-1e3, 1e3)


@settings(deadline=None, max_examples=50)
@given(st.lists(NUMBERS, min_size=1, max_size=9), st.tuples(NUMBERS, NUMBERS).map(sorted))
def test_a_claim_holds_between_its_bounds(values, bounds):
    low, high = bounds
    wanted = [low <= value <= high for value in values]
    assert held(values, at_least=low, at_most=high) == wanted
    assert held(values, at_least=low) == [value >= low for value in values]
    assert held(values, at_most=high) == [value <= high for value in values]


@settings(deadline=None, max_examples=50)
@given(NUMBERS, st.sampled_from([np.float16, np.float32, np.float64]))
def test_a_value_at_its_bound_holds_in_every_precision(bound, precision):
    value = np.array([bound]).astype(precision)
    assert held(value, at_least=bound) == held(value, at_most=bound) == [True]
    above = np.nextafter(value, precision(np.inf))
    below = np.nextafter(value, precision(-np.inf))
    assert held(above, at_most=bound) == held(below, at_least=bound) == [False]


def test_an_accuracy_of_nine_in_ten_is_at_least_that():
    accuracy = torch.tensor([[1.0] * 9 + [0.0]]).mean(1)
    assert accuracy.double().item() != 0.9  # float32
    frame = pd.DataFrame({"accuracy": accuracy.numpy()})
    for values in (accuracy, accuracy.numpy(), frame.accuracy, list(accuracy.numpy())):
        assert held(values, at_least=0.9) == held(values, at_most=0.9) == [True]


def test_bounds_are_not_rounded_to_whole_numbers():
    assert held([0, 1], at_least=0.5) == [False, True]
    assert held([False, True], at_most=0.5) == [True, False]
    assert held(torch.tensor([1, 2]), at_most=1.9) == [True, False]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_verdict_follows_the_wilson_interval(held):
    claims = Claims(1, 0)
    claims.add("any", held, at_least=1)
    row = verdicts(claims.table).iloc[0]
    n, share, z = len(held), sum(held) / len(held), 1.6448536269514722  # 90 %
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((share + z**2 / (2 * n) + side) / (1 + z**2 / n) for side in (-half, half))
    assert row.share == f"{abs(low):.2f} to {high:.2f}"
    assert row.verdict == ("held" if low > 0.5 else "not held" if high < 0.5 else "undecided")


def test_no_run_is_counted_twice():
    table = some_claims().table
    with pytest.raises(ValueError, match="expected every run once"):
        verdicts(pd.concat([table, table.iloc[-1:]]))


def test_figures_with_numbers_and_names_are_judged_together():
    for figure in (9, "points"):
        some_claims(figure).save()
    paths = [figure_folder() / f"claims_figure_{figure}.json" for figure in (9, "points")]
    table = pd.concat(map(pd.read_json, paths))
    assert [figure for figure, _ in verdicts(table).index] == [9] * 3 + ["points"] * 3
    assert summarise(table).held.tolist() == ["2 of 3", "16 of 16", "0 of 6"] * 2


@pytest.mark.parametrize("claim", ["a | b", "two\nlines", '<b>"bold"</b> & more', "λ ≤ 1" * 30])
def test_claims_are_written_read_back_and_shown(claim):
    claims = some_claims()
    claims.add(claim, [1 / 3, 1e-12, 4], at_most=0.4, authors="1 | <2>")
    claims.save()
    path = figure_folder() / "claims_figure_9.json"
    saved = pd.read_json(path)
    assert np.allclose(saved.value, claims.table.value, rtol=1e-12)
    assert summarise(saved).equals(summarise(claims.table))
    assert ("λ ≤ 1" in path.read_text(encoding="utf-8")) == ("λ" in claim)
    shown = summarise(claims.table).to_html()
    assert shown.count("<tr") == 2 + 4
    assert "<b>" not in shown
    for line in claim.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split("\n"):
        assert line in shown


def test_claims_on_a_full_disk_leave_the_earlier_ones():
    resource = pytest.importorskip("resource")
    some_claims().save()
    path = figure_folder() / "claims_figure_9.json"
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    more = some_claims()
    more.add("new", [1.0])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # no file may be longer
    try:
        with pytest.raises(OSError, match="too large"):
            more.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(figure_folder().iterdir()) == [path]


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], 3.0, [1.0, math.nan], [math.inf], ["False"]])
def test_values_that_are_no_numbers(values):
    claims = some_claims()
    with pytest.raises(ValueError, match=r"expected|could not convert"):
        claims.add("bad", values)
    assert len(claims.table) == 25


@pytest.mark.parametrize(
    ("claim", "bounds"),
    [
        ("short", {}),  # it is there already
        ("new", {"at_least": math.nan}),
        ("new", {"at_most": math.nan}),
        ("new", {"at_least": 1, "at_most": 0}),
    ],
)
def test_claims_that_make_no_sense(claim, bounds):
    claims = some_claims()
    with pytest.raises(ValueError, match="expected"):
        claims.add(claim, [1.0], **bounds)
    assert len(claims.table) == 25


def test_no_claims_are_not_saved():
    with pytest.raises(ValueError, match="No objects"):
        Claims(1, 0).save()


def test_figures_are_written_twice_and_always_alike():
    fig, written = plt.figure(), []
    for _ in range(2):
        save_figure(fig, "figure")
        written.append({path.name: path.read_bytes() for path in figure_folder().iterdir()})
    files, again = written
    assert files == again
    assert sorted(files) == ["figure.pdf", "figure.png"]
    assert files["figure.png"].startswith(b"\x89PNG")
    assert files["figure.pdf"].startswith(b"%PDF")


def test_a_relative_folder_starts_at_the_module(monkeypatch, tmp_path):
    monkeypatch.setattr(bimt, "__file__", str(tmp_path / "bimt_utils.py"))
    for value, wanted in (("elsewhere/deep", "elsewhere/deep"), ("", "figures")):
        monkeypatch.setenv("BIMT_FIGURES", value)
        assert figure_folder() == tmp_path / wanted
        assert figure_folder().is_dir()
    monkeypatch.delenv("BIMT_FIGURES")
    assert figure_folder() == tmp_path / "figures"


def test_a_file_where_the_folder_should_be(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("BIMT_FIGURES", str(tmp_path / "file"))
    for call in (lambda: save_figure(plt.figure(), "nothing"), some_claims().save):
        with pytest.raises((OSError, ValueError), match="file"):
            call()
    assert (tmp_path / "file").read_text(encoding="utf-8") == "not a folder"


def test_records_stand_beside_claims_and_are_not_judged(tmp_path, monkeypatch):
    monkeypatch.setenv("BIMT_FIGURES", str(tmp_path))
    claims = Claims("a name", 3)
    claims.add("at least one", [1.0], at_least=1)
    claims.record("an error", [0.25])
    claims.save()
    table = pd.read_json(tmp_path / "claims_figure_a_name.json")
    assert table.value.tolist() == [1.0, 0.25]
    assert table.held.isna().tolist() == [False, True]
    for same in (claims.table, table):
        assert summarise(same).held.tolist() == ["1 of 1"]
        assert verdicts(same).index.get_level_values("claim").tolist() == ["at least one"]
