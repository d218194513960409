"""The page of evidence, figures/README.md, and the README's table, made from all results.

`python notebooks/page.py` writes them again, and the picture figures/authors.png.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from scipy.stats import mannwhitneyu

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from bimt_utils import whole_file  # noqa: E402
from evidence import summarise, verdicts  # noqa: E402

FIGURES = ROOT / "figures"
README, PAGE = ROOT / "README.md", FIGURES / "README.md"
NOTEBOOKS = {
    "3": "symbolic_formulas_3.1",
    "4": "two_moon_3.2",
    "5": "modular_addition_3.3",
    "6": "permutation_S4_3.3",
    "7": "incontext_3.4",
    "8": "mnist_3.5",
    "points": "further/points",
    "learn first": "further/learn_first",
    "exact": "further/exact_zeros",
}
# What the figures with one task train on.
TASKS = {"4": "two moons", "5": "modular addition", "6": "S4", "7": "in context", "8": "MNIST"}


def measurements():
    """Everything that the notebooks and the sweep measured, one row per quantity and run; "held" is
    missing where there is no claim."""
    files = [*FIGURES.glob("claims_*.json"), *(FIGURES / "sweep").glob("*.json")]
    table = pd.concat(map(pd.read_json, sorted(files)), ignore_index=True)
    return table.astype({"figure": str})


def authors():
    """What the authors' code gave: figure, seed, claim ("task: quantity") and value."""
    found = json.loads((FIGURES / "authors.json").read_text(encoding="utf-8"))
    rows = [
        {"figure": str(of["figure"]), "seed": of["seed"], "claim": f"{of['task']}: {name}"}
        | {"value": float(value)}
        for of in found["results"]
        for name, value in of.items()
        if name not in ("figure", "task", "seed")
    ]
    return pd.DataFrame(rows).sort_values("figure", kind="stable")


def independent(ours):
    """Our results without seed 0 of two moons: half of its data sets are the authors'."""
    return ours[(ours.figure != "4") | (ours.seed != 0)]


def markdown(frame):
    rows = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    escaped = [[str(entry).replace("|", r"\|").replace("\n", " ") for entry in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def in_short(quantity, values):
    """Median [lowest, highest] and the number of networks; of yes and no, how many say yes."""
    if quantity.endswith("reads right"):
        return f"{int(values.sum())} of {len(values)}"
    numbers = [values.median(), values.min(), values.max()]
    median, low, high = (f"{number:.4g}" for number in numbers)
    return f"{median} [{low}, {high}], {len(values)}"


def comparison(theirs, ours):
    """One row per quantity: theirs, ours, and the two-sided p of Mann and Whitney's rank test. The
    numbers have six digits, as the authors' have here: further ones would break ties."""
    rows = []
    for quantity, their in theirs.groupby("claim", sort=False).value:
        our = ours[ours.claim == quantity].value.map("{:.6g}".format).astype(float)
        p = mannwhitneyu(their, our, alternative="two-sided").pvalue
        rows.append([quantity, in_short(quantity, their), in_short(quantity, our), f"{p:.3f}"])
    return pd.DataFrame(rows, columns=["quantity", "authors' code", "ours", "p"])


def judged(table):
    """One row per claim: in how many networks it holds, and the verdict."""
    found = summarise(table).join(verdicts(table)).reset_index().rename(columns={"held": "holds"})
    return found[["figure", "claim", "holds", "share", "verdict"]]


def modularity(table):
    """Newman's Q, medians over networks: a row per task, a column per kind of network, - where none
    was trained. The last column counts the BIMT networks."""
    rows = table[table.claim.str.startswith("Q of ")].reset_index()
    parts = rows.claim.str.extract(r"Q of (?P<kind>[^:]+): (?P<task>.*)")
    rows = rows.join(parts.replace({"kind": {"swaps": "BIMT"}}))
    rows["task"] = rows.task.where(rows.task != "", rows.figure.map(TASKS))
    of_kind = rows.groupby(["figure", "task", "kind"], sort=False).value
    shown = of_kind.median().unstack().reindex(columns=["BIMT", "L1", "none", "shuffled"])
    shown = shown.map("{:.2f}".format).replace("nan", "-")
    shown["networks"] = of_kind.count().unstack()["BIMT"].astype(int)
    return shown.reset_index().sort_values("figure", kind="stable")


def points(table):
    """What "points" recorded: a row per formula and number of training points, a column per kind of
    network with its median test error and the number of networks with the right structure."""
    pattern = r"(?P<formula>.*), (?P<points>[\d,]+) points, (?P<kind>.*): (?P<what>error|right)$"
    rows = table.join(table.claim.str.extract(pattern)).dropna(subset="what")
    rows["points"] = rows.points.str.replace(",", "").astype(int)
    kinds = {}
    for key, part in rows.groupby(["formula", "points", "kind"]):
        error, right = (part.value[part.what == what] for what in ("error", "right"))
        kinds[key] = f"{error.median():.2g}, {right.sum():.0f} of {len(right)}"
    shown = pd.Series(kinds).rename_axis(["formula", "points", ""]).unstack().fillna("-")
    return shown.reset_index()


def picture(theirs, ours, quantities):
    """Authors' dots beside ours, one panel per quantity."""
    fig, axes = plt.subplots(3, 4, figsize=(8, 6), layout="constrained")
    for ax, quantity in zip(axes.flat, quantities, strict=True):
        for place, (table, color) in enumerate(((theirs, "black"), (ours, "C0"))):
            values = table[table.claim == quantity].value
            ax.plot([place] * len(values), values, "o", color=color, alpha=0.4, mew=0)
            ax.plot([place - 0.25, place + 0.25], [values.median()] * 2, color=color)
        ax.set_xticks([0, 1], ["authors", "ours"])
        ax.set_xlim(-0.6, 1.6)
        ax.set_title(quantity.replace(": ", "\n"), fontsize=8)
        if "MSE" in quantity:
            ax.set_yscale("log")
    return fig


# ---------------------------------------------------------------- the two texts

# One panel per quantity of the picture.
DRAWN = [
    "independence: test MSE",
    "feature sharing: test MSE",
    "compositionality: test MSE",
    "independence: wiring length",
    "two moons: test loss",
    "modular addition: wiring length",
    "S4: test accuracy",
    "in context: MSE of y2 at the end",
    "MNIST: test accuracy after phase 1",
    "MNIST: test accuracy after phase 2",
    "MNIST: test accuracy after phase 3",
    "MNIST: wiring length",
]
# For the README: figure -> what the paper says, the claim that tests it, what we see.
SHORT = {
    "3": (
        "Independent parts of a formula become separate modules",
        "independence: falls into {x1, x3} and {x2, x4} (modules)",
        "two modules that read the right inputs",
    ),
    "4": (
        "Training prunes the network to a handful of neurons",
        "1 to 10 live neurons",
        "1 to 10 neurons of 40 left",
    ),
    "5": (
        "The network for modular addition splits into modules",
        "at least two separate modules",
        "two modules or more",
    ),
    "6": (
        "The neurons that are left are simple functions on the group",
        "most live embedding neurons are constant on cosets",
        "most of them are constant on cosets",
    ),
    "7": (
        "Single neurons of the transformer reveal the slope",
        "R² of w from the best neuron, at least 0.98",
        "one neuron that explains 98 % of the slope",
    ),
    "8": (
        "Neurons have local receptive fields",
        "receptive fields narrower than in none (p < 0.01): relative fall of median spread",
        "fields narrower than without a penalty",
    ),
}


def overview(table):
    """The README's table: one row per figure."""
    found = judged(table).set_index("claim")
    rows = []
    for figure, (paper, claim, seen) in SHORT.items():
        link = f"[{figure}](notebooks/{NOTEBOOKS[figure]}.ipynb)"
        rows.append([link, paper, seen, found.holds[claim]])
    columns = ["figure", "the paper says", "we see", "in how many networks"]
    return markdown(pd.DataFrame(rows, columns=columns))


def between(text, name, part):
    """`text` with `part` between the two comments that carry `name`."""
    start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    return text[: text.index(start) + len(start)] + part + text[text.index(end) :]


def page(text, table):
    """The page of evidence: `text` with all its tables made anew."""
    claims = judged(table)
    claims["figure"] = [f"[{name}](../notebooks/{NOTEBOOKS[name]}.ipynb)" for name in claims.figure]
    compared = comparison(authors(), independent(table))
    text = between(text, "comparison", markdown(compared))
    text = between(text, "claims", markdown(claims))
    text = between(text, "points", markdown(points(table)))
    return between(text, "modularity", markdown(modularity(table)))


def write(path, text):
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    results = measurements()
    with whole_file(FIGURES / "authors.png") as part:
        picture(authors(), independent(results), DRAWN).savefig(part, dpi=100)
    write(PAGE, page(PAGE.read_text(encoding="utf-8"), results))
    readme = README.read_text(encoding="utf-8")
    write(README, between(readme, "overview", overview(results)))
