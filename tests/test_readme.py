"""The README's tables are those of the committed runs.

`python tests/test_readme.py` writes them into the README again.
"""

import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from bimt_utils import summarise

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(notebook):
    return json.loads(notebook.read_text())["cells"]


def minutes(notebook):
    """How long the stored run of a notebook took."""
    times = [cell["metadata"].get("execution", {}) for cell in cells(notebook)]
    stamps = [datetime.fromisoformat(stamp) for cell in times for stamp in cell.values()]
    return (max(stamps) - min(stamps)).total_seconds() / 60


def figure_of(notebook):
    """The number in the notebook's title, "# Figure 3: ..."."""
    return int(re.match(r"# Figure (\d)", "".join(cells(notebook)[0]["source"]))[1])


def claims_of(figure):
    return summarise(pd.read_json(ROOT / "figures" / f"claims_figure_{figure}.json"))


def markdown(frame):
    rows = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    escaped = [[str(entry).replace("|", r"\|").replace("\n", " ") for entry in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def overview():
    """One row per figure: the first claim for which there is an authors' number."""
    rows = []
    for notebook in sorted(NOTEBOOKS, key=figure_of):
        figure = figure_of(notebook)
        claims = claims_of(figure)
        first = claims[claims.authors != "-"].iloc[0]
        rows.append({
            "figure": f"[{figure}](figures/figure_{figure}.png)",
            "notebook": f"[{notebook.stem}](notebooks/{notebook.name})",
            "minutes": f"{minutes(notebook):.1f}",
            "claim": first.claim,
            "authors": first.authors,
            "ours: median [lowest, highest]": first.ours,
            "held": (claims.verdict == "held").sum(),
            "not held": (claims.verdict == "not held").sum(),
            "undecided": (claims.verdict == "undecided").sum(),
        })  # fmt: skip
    return markdown(pd.DataFrame(rows))


def all_claims():
    figures = sorted(map(figure_of, NOTEBOOKS))
    return "\n\n".join(f"**Figure {n}**\n\n{markdown(claims_of(n))}" for n in figures)


def written(text):
    """The README's text with the generated parts made anew."""
    for name, part in (("overview", overview()), ("claims", all_claims())):
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, after = text[: text.index(start)], text[text.index(end) :]
        text = before + start + part + after
    return text


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
        pytest.skip("figures were made anew here; python tests/test_readme.py updates the README")
    assert README.read_text() == written(README.read_text())


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_claims_are_those_that_the_notebook_shows(notebook):  # defect 19
    outputs = [out for cell in cells(notebook) for out in cell.get("outputs", [])]
    shown = ["".join(out.get("data", {}).get("text/html", "")) for out in outputs]
    with pd.option_context("display.max_colwidth", None):
        assert claims_of(figure_of(notebook)).to_html(index=False) in shown


def test_readme_example_runs_as_printed():
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    assert names["model"].runs == 8


def test_links_of_the_readme_lead_somewhere():
    assert broken_links(README.read_text()) == []


@pytest.mark.parametrize("link", ["[a](nowhere.md#part)", "[a](nowhere.md)", '<img src="no.png">'])
def test_a_broken_link_is_found(link):  # defect 18
    assert broken_links(link)


def test_markdown_escapes_what_would_break_a_table():  # defect 16
    table = markdown(pd.DataFrame({"claim": ["|w| falls\nfast"]}))
    assert table.splitlines()[-1] == r"| \|w\| falls fast |"


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
