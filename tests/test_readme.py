"""The README tells what the committed runs gave, its example runs, its links lead somewhere."""

import re
import subprocess

import pandas as pd
import pytest
from readme import NOTEBOOKS, README, ROOT, all_runs, cells, margins, markdown, shown_by, written

from bimt_utils import summarise


def changed_here():
    status = ["git", "status", "--porcelain", "figures", "notebooks"]
    return subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def broken_links(text):
    """Targets of the links in a Markdown text, relative to the repository, that do not exist."""
    found = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"|href=\"([^\"]+)\"", text)
    targets = [next(filter(None, groups)) for groups in found]
    inside = [t.split("#")[0] for t in targets if not t.startswith("https://")]
    return [target for target in inside if target and not (ROOT / target).exists()]


def test_readme_tells_what_the_runs_gave():
    if changed_here():
        pytest.skip("figures were made anew here; python tests/readme.py updates the README")
    assert README.read_text() == written(README.read_text())


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_claims_are_those_that_the_notebook_shows(notebook):  # defect 19
    outputs = [out for cell in cells(notebook) for out in cell.get("outputs", [])]
    shown = ["".join(out.get("data", {}).get("text/html", "")) for out in outputs]
    assert any(summarise(shown_by(notebook)).to_html() in html for html in shown)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_dots_are_to_the_right_of_the_line_where_the_claim_held(notebook):
    for _, part in all_runs(notebook).groupby("claim"):
        assert ((margins(part, part.value.to_numpy()) >= 0) == part.held).all()


def test_readme_examples_run_as_printed(monkeypatch):
    monkeypatch.chdir(ROOT)
    first, sweep, read = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(first, names)
    assert names["model"].runs == 8
    exec(sweep, {"__name__": "imported"})  # notebooks/test_sweep.py tries it
    exec(read, names)
    assert {"figure", "seed", "run", "claim", "value", "held"} <= {*names["table"].columns}


def test_links_of_the_readme_lead_somewhere():
    assert broken_links(README.read_text()) == []


@pytest.mark.parametrize("link", ["[a](nowhere.md#part)", "[a](nowhere.md)", '<img src="no.png">'])
def test_a_broken_link_is_found(link):  # defect 18
    assert broken_links(link)


def test_markdown_escapes_what_would_break_a_table():  # defect 16
    table = markdown(pd.DataFrame({"claim": ["|w| falls\nfast"]}))
    assert table.splitlines()[-1] == r"| \|w\| falls fast |"
