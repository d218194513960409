"""The README's tables and its picture of all claims, made from the results of all runs.

`python tests/readme.py` writes them again.
"""

import json
import re
import sys
from datetime import datetime
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "notebooks"))

from sweep import verdicts

from bimt_utils import NEGATIVE, POSITIVE, summarise

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


def shown_by(notebook):
    """The claims of the committed run, one row per claim and run."""
    return pd.read_json(ROOT / "figures" / f"claims_figure_{figure_of(notebook)}.json")


def all_runs(notebook):
    """The claims of the committed run together with those of the sweep."""
    files = sorted((ROOT / "figures" / "sweep").glob(f"{notebook.stem}_seed_*.json"))
    return pd.concat([shown_by(notebook), *map(pd.read_json, files)], ignore_index=True)


def judged(table):
    """One row per claim: what all its runs say."""
    return summarise(table).join(verdicts(table)).reset_index()


def by_figure():
    return sorted(NOTEBOOKS, key=figure_of)


def markdown(frame):
    rows = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    escaped = [[str(entry).replace("|", r"\|").replace("\n", " ") for entry in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def overview():
    """One row per figure: the first claim for which there is an authors' number."""
    rows = []
    for notebook in by_figure():
        figure, runs = figure_of(notebook), all_runs(notebook)
        claims = judged(runs)
        first = claims[claims.authors != "-"].iloc[0]
        rows.append({
            "figure": f"[{figure}](figures/figure_{figure}.png)",
            "notebook": f"[{notebook.stem}](notebooks/{notebook.name})",
            "minutes": f"{minutes(notebook):.1f}",
            "seeds": runs.groupby("claim").size().max(),
            "claim": first.claim,
            "authors": first.authors,
            "ours: median [lowest, highest]": first.ours,
            "held": (claims.verdict == "held").sum(),
            "not held": (claims.verdict == "not held").sum(),
            "undecided": (claims.verdict == "undecided").sum(),
        })  # fmt: skip
    return markdown(pd.DataFrame(rows))


def all_claims():
    tables = [judged(all_runs(n)).drop(columns="figure") for n in by_figure()]
    texts = zip(map(figure_of, by_figure()), map(markdown, tables), strict=True)
    return "\n\n".join(f"**Figure {figure}**\n\n{table}" for figure, table in texts)


def margins(part, values):
    """By how much values satisfy (above 0) or miss a claim: in decades where they span several."""
    low, high = (part[name].astype(float).iloc[0] for name in ("at_least", "at_most"))
    if np.nanmin([part.value.min(), low, high]) > 0 and part.value.max() > 10 * part.value.min():
        low, high, values = (np.log10(np.maximum(x, 1e-300)) for x in (low, high, values))
    return np.fmin(values - low, high - values)  # a missing bound is NaN


def picture():
    """Every claim a row, every run a dot: on the line or to its right the claim holds."""
    parts = [part for n in by_figure() for _, part in all_runs(n).groupby("claim", sort=False)]
    fig, ax = plt.subplots(figsize=(11, 0.19 * len(parts) + 1), layout="constrained")
    colors = {"held": POSITIVE, "not held": NEGATIVE, "undecided": "#999999"}
    for row, part in enumerate(parts):
        color = colors[verdicts(part).verdict.iloc[0]]
        theirs = pd.to_numeric(part.authors.iloc[:1], errors="coerce").to_numpy()
        ours, theirs = margins(part, part.value.to_numpy()), margins(part, theirs)
        size = np.nanmax(np.abs([*ours, *theirs])) or 1
        ax.plot(ours / size, [row] * len(ours), "o", color=color, ms=4, alpha=0.4, mew=0)
        ax.plot(theirs / size, [row], "D", color="black", ms=4, mfc="none")
        if row == 0 or part.figure.iloc[0] != parts[row - 1].figure.iloc[0]:
            ax.axhline(row - 0.5, color="0.8", lw=0.8)
    ax.axvline(0, color="black", lw=0.8)
    names = [f"{part.figure.iloc[0]}  {part.claim.iloc[0]}" for part in parts]
    ax.set_yticks(range(len(parts)), names, fontsize=7)
    ax.set(xlim=(-1.05, 1.05), ylim=(len(parts) - 0.5, -0.5), xticks=[])
    ax.set_title(
        "a claim fails to the left of the line and holds on it or to its right", fontsize=9
    )
    for name, color in colors.items():
        ax.plot([], [], "o", color=color, label=name)
    ax.plot([], [], "D", color="black", mfc="none", label="authors")
    fig.legend(loc="outside lower center", ncols=4, fontsize=8)
    return fig


def written(text):
    """The README's text with the generated parts made anew."""
    for name, part in (("overview", overview()), ("claims", all_claims())):
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, after = text[: text.index(start)], text[text.index(end) :]
        text = before + start + part + after
    return text


if __name__ == "__main__":
    picture().savefig(ROOT / "figures" / "claims.png", dpi=130)
    README.write_text(written(README.read_text()))
