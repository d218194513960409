"""The page of evidence and the README: made from the results, links that lead somewhere, code that
runs."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import page

HERE = page.ROOT


def changed_here():
    status = ["git", "status", "--porcelain", "figures", "notebooks"]
    done = subprocess.run(status, cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout


def read(path):
    return path.read_text(encoding="utf-8")


def test_page_and_readme_tell_what_the_runs_gave():
    if changed_here():
        pytest.skip("figures were made anew here; python notebooks/page.py updates the texts")
    results = page.measurements()
    assert read(page.PAGE) == page.page(read(page.PAGE), results)
    overview = page.overview(results)
    assert read(page.README) == page.between(read(page.README), "overview", overview)


def test_every_quantity_of_the_authors_is_measured_here():
    missing = {*page.authors().claim} - {*page.measurements().claim}
    assert not missing


def test_the_authors_numbers_are_complete():
    theirs = page.authors()
    assert len(theirs) == theirs.groupby(["claim", "seed"]).ngroups == 286
    first = theirs[(theirs.claim == "independence: test MSE") & (theirs.seed == 0)]
    assert first.value.item() == 0.00747278


def table(**columns):
    fixed = {"figure": "3", "seed": 0, "run": range(4), "at_least": 0.0, "at_most": 1.0}
    fixed["authors"] = "-"
    return pd.DataFrame(fixed | columns)


def test_every_panel_of_the_picture_has_data():
    assert {*page.DRAWN} <= {*page.authors().claim}


def test_comparison_by_hand():
    theirs = table(claim="error", value=[1.0, 2.0, 3.0, 4.0], held=None)
    far = table(claim="error", value=[11.0, 12.0, 13.0, 14.0], held=None)
    row = page.comparison(theirs, far).iloc[0].tolist()
    # of the 70 ways to choose four ranks of eight, two are as extreme
    assert row == ["error", "2.5 [1, 4], 4", "12.5 [11, 14], 4", f"{2 / 70:.3f}"]
    assert page.comparison(theirs, theirs).p[0] == "1.000"


def test_single_precision_breaks_no_ties():
    theirs = table(claim="accuracy", value=[0.995, 0.995, 0.99, 1], held=None)
    ours = theirs.assign(value=theirs.value.astype(np.float32).astype(float))
    assert page.comparison(theirs, ours).p[0] == "1.000"


def test_data_of_the_authors_are_not_compared_with_themselves():
    ours = pd.concat([table(figure=f, seed=s, value=s) for f in ("3", "4") for s in (0, 5)])
    kept = page.independent(ours)[["figure", "seed"]].drop_duplicates()
    assert kept.to_numpy().tolist() == [["3", 0], ["3", 5], ["4", 5]]


def test_yes_and_no_are_counted():
    assert page.in_short("a: reads right", pd.Series([1.0, 0.0, 1.0])) == "2 of 3"
    assert page.in_short("a: modules", pd.Series([0.5, 1.0])) == "0.75 [0.5, 1], 2"


def test_claims_are_counted_and_records_are_not():
    claims = table(claim="holds", value=0.5, held=[True, True, True, False])
    both = pd.concat([claims, table(claim="a number", value=3.0, held=None)])
    assert page.judged(both)[["claim", "holds"]].to_numpy().tolist() == [["holds", "3 of 4"]]


def test_modularity_shows_medians():
    kinds = {"BIMT": 0.5, "L1": 0.3, "none": 0.1, "shuffled": 0.4}
    rows = [
        table(claim=f"Q of {kind}: task", value=value + np.array([0, 0, 0.01, -0.2]), held=None)
        for kind, value in kinds.items()
    ]
    shown = page.modularity(pd.concat(rows)).iloc[0].tolist()
    assert shown == ["3", "task", "0.50", "0.30", "0.10", "0.40", 4]
    swaps = table(figure="7", claim="Q of swaps: ", value=0.5, held=None)
    shown = page.modularity(pd.concat([*rows, swaps])).iloc[1].tolist()
    assert shown == ["7", "in context", "0.50", "-", "-", "-", 4]


def test_points_in_the_order_of_their_number():
    rows = [
        table(claim=f"independence, {points} points, {kind}: {what}", value=value, held=None)
        for points, kind in [("1,000", "BIMT"), ("30", "BIMT"), ("30", "none")]
        for what, value in {"error": [1, 2, 4, 9], "right": [1, 0, 0, 1]}.items()
    ]
    other = table(claim="independence, 1,000 points: two modules", value=1, held=True)
    shown = page.points(pd.concat([*rows, other], ignore_index=True))
    assert shown.columns.tolist() == ["formula", "points", "BIMT", "none"]
    assert shown.to_numpy().tolist() == [
        ["independence", 30, "3, 2 of 4", "3, 2 of 4"],
        ["independence", 1000, "3, 2 of 4", "-"],
    ]


def test_readme_is_short_and_its_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    text = read(page.README)
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(text.splitlines()) <= 150
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    names = {}
    exec(example, names)
    assert names["model"].runs == 8
    assert "loss of each network" in capsys.readouterr().out


def test_the_example_of_the_page_is_a_program(monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])  # it adds a folder
    (example,) = re.findall(r"```python\n(.*?)```", read(page.PAGE), re.DOTALL)
    exec(example, {"__name__": "imported"})  # notebooks/test_sweep.py tries it


def test_every_count_in_the_readme_is_on_the_page():
    counts = {*re.findall(r"\d+ of \d+", read(page.README))}
    assert counts
    assert counts <= {*re.findall(r"\d+ of \d+", read(page.PAGE))}


def broken_links(text, folder):
    """Targets of the links in a Markdown text that do not exist, seen from its folder."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    inside = [target.split("#")[0] for target in targets if not target.startswith("https://")]
    return [target for target in inside if target and not (folder / target).exists()]


@pytest.mark.parametrize("path", [page.README, page.PAGE], ids=lambda path: path.parent.name)
def test_links_lead_somewhere(path):
    assert broken_links(read(path), path.parent) == []


@pytest.mark.parametrize("link", ["[a](nowhere.md#part)", "[a](nowhere.md)"])
def test_a_broken_link_is_found(link):
    assert broken_links(link, HERE)


def test_markdown_escapes_what_would_break_a_table():
    text = page.markdown(pd.DataFrame({"claim": ["|w| falls\nfast"]}))
    assert text.splitlines()[-1] == r"| \|w\| falls fast |"
