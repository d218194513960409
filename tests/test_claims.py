"""Claims, their summary, and the folder that figures and claims go to."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep import verdicts

import bimt_utils as bimt
from bimt_utils import Claims, figure_folder, save_figure, summarise


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BIMT_FIGURES", str(tmp_path / "figures"))
    yield
    plt.close("all")


def some_claims():
    claims = Claims(9, 5)
    claims.add("short", [0.1, 0.3, 0.2], at_most=0.25, authors=0.15)
    claims.add("exact", np.linspace(0.9, 1, 16), at_least=0.9, at_most=1)
    claims.add("never", [1, 2, 3, 4, 5, 6], at_least=7)
    return claims


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


@pytest.mark.parametrize("claim", ["a | b", "two\nlines", '<b>"bold"</b> & more', "λ ≤ 1" * 30])
def test_claims_are_written_read_back_and_shown(claim):  # defect 16
    claims = some_claims()
    claims.add(claim, [1 / 3, 1e-12, 4], at_most=0.4, authors="1 | <2>")
    claims.save()
    saved = pd.read_json(figure_folder() / "claims_figure_9.json")
    assert np.allclose(saved.value, claims.table.value, rtol=1e-12)
    assert summarise(saved).equals(summarise(claims.table))
    shown = summarise(claims.table).to_html()
    assert shown.count("<tr") == 2 + 4
    assert "<b>" not in shown
    for line in claim.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split("\n"):
        assert line in shown


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], 3.0, [1.0, math.nan], [math.inf], ["False"]])
def test_values_that_are_no_numbers(values):  # defect 17
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


@pytest.mark.parametrize("name", ["../up", "/absolute", "", "a/b"])
def test_names_that_lead_elsewhere(name, tmp_path):  # defect 32
    with pytest.raises(ValueError, match="expected"):
        save_figure(plt.figure(), name)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_relative_folder_starts_at_the_module(monkeypatch, tmp_path):
    monkeypatch.setattr(bimt, "__file__", str(tmp_path / "bimt_utils.py"))
    for value, wanted in (("elsewhere/deep", "elsewhere/deep"), ("", "figures")):
        monkeypatch.setenv("BIMT_FIGURES", value)
        assert figure_folder() == tmp_path / wanted
        assert figure_folder().is_dir()
    monkeypatch.delenv("BIMT_FIGURES")
    assert figure_folder() == tmp_path / "figures"


@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_a_folder_that_cannot_be_written_to_is_named(kind, monkeypatch, tmp_path):  # defect 33
    if kind == "read-only":
        monkeypatch.setattr(bimt.os, "access", lambda path, mode: False)
    else:
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv("BIMT_FIGURES", str(tmp_path / "file"))
    for call in (lambda: save_figure(plt.figure(), "nothing"), some_claims().save):
        with pytest.raises(ValueError, match="BIMT_FIGURES"):
            call()
