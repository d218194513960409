"""The README's numbers are those of the committed notebooks and claims.

`python tests/test_readme.py` writes them into the README again.
"""

import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from bimt_utils import claims_table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def minutes(notebook):
    """How long the stored run of a notebook took."""
    cells = json.loads(notebook.read_text())["cells"]
    times = [cell["metadata"].get("execution", {}) for cell in cells]
    stamps = [datetime.fromisoformat(stamp) for cell in times for stamp in cell.values()]
    return (max(stamps) - min(stamps)).total_seconds() / 60


def figure_of(notebook):
    """The number in the notebook's title, "# Figure 3: ..."."""
    title = "".join(json.loads(notebook.read_text())["cells"][0]["source"])
    return int(re.match(r"# Figure (\d)", title)[1])


def claims_of(figure):
    return json.loads((ROOT / "figures" / f"claims_figure_{figure}.json").read_text())["claims"]


def overview():
    """One row per figure: its first claim for which there is an authors' number."""
    lines = [
        "| figure | notebook | minutes | claim | ours: median [min, max] | authors | claims held |",
        "|---|---|---|---|---|---|---|",
    ]
    for notebook in sorted(NOTEBOOKS, key=figure_of):
        figure = figure_of(notebook)
        rows = claims_of(figure)
        first = next(row for row in rows if row["authors"])
        held = sum(2 * row["held"] > row["runs"] for row in rows)
        lines.append(
            f"| [{figure}](figures/figure_{figure}.png) | [{notebook.stem}](notebooks/"
            f"{notebook.name}) | {minutes(notebook):.1f} | {first['claim']} | "
            "{median:.3g} [{min:.3g}, {max:.3g}]".format(**first)
            + f" | {first['authors']} | {held} of {len(rows)} |"
        )
    return "\n".join(lines)


def all_claims():
    figures = sorted(map(figure_of, NOTEBOOKS))
    return "\n\n".join(f"**Figure {n}**\n\n{claims_table(claims_of(n))}" for n in figures)


def written(text):
    """The README's text with the generated parts made anew."""
    for name, part in (("overview", overview()), ("claims", all_claims())):
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, after = text[: text.index(start)], text[text.index(end) :]
        text = before + start + part + after
    return text


def test_readme_tells_what_the_runs_gave():
    status = ["git", "status", "--porcelain", "figures", "notebooks"]
    changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=False)
    if changed.stdout:
        pytest.skip("figures were made anew here; python tests/test_readme.py updates the README")
    assert README.read_text() == written(README.read_text())


def test_readme_example_runs_as_printed():
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    names = {}
    exec(code, names)
    assert names["model"].runs == 8


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", README.read_text()):
        path = next(filter(None, target))
        assert path.startswith("https://") or (ROOT / path).exists(), path


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
