"""Run a notebook with another seed through papermill, keep its claims, and judge those of all runs.

    python notebooks/sweep.py permutation_S4_3.3 4 RUNS=6

writes figures/sweep/permutation_S4_3.3_seed_4_RUNS_6.json. A result that is there is not computed
twice, and a run that is cut short leaves no result, so a sweep can be stopped and taken up again.
Values are YAML: write 0.001, as 1e-3 is text there.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pandas as pd
import papermill
import yaml
from scipy.stats import binomtest

NOTEBOOKS = Path(__file__).resolve().parent
RESULTS = NOTEBOOKS.parent / "figures" / "sweep"


def run(notebook, seed, folder=RESULTS, **parameters):
    """Run `notebook` (its name) with SEED = seed and other `parameters`; return the path of its
    claims, a JSON file in `folder`. One run at a time per process: meanwhile it sets
    BIMT_FIGURES."""
    source = NOTEBOOKS / f"{notebook}.ipynb"
    cells = json.loads(source.read_text())["cells"]
    tagged = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    for key in parameters:
        if key == "SEED" or not re.search(rf"\b{key}\b", "".join(tagged["source"])):
            raise ValueError(f"expected a parameter of {notebook} other than SEED, got {key}")
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    name = "_".join([notebook, "seed", str(seed), *(f"{k}_{v}" for k, v in parameters.items())])
    result = folder / f"{re.sub('[^A-Za-z0-9._]+', '-', name)}.json"
    if not result.exists():
        with (
            tempfile.TemporaryDirectory() as figures,
            mock.patch.dict(os.environ, BIMT_FIGURES=figures),
        ):
            parameters = {"SEED": seed, **parameters}
            papermill.execute_notebook(source, None, parameters, cwd=NOTEBOOKS, progress_bar=False)
            (claims,) = Path(figures).glob("claims_figure_*.json")
            part = result.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(claims.read_bytes())
            os.replace(part, result)
    return result


def verdicts(table):
    """What all runs say about every claim of a table of claims: "share" is the 90 % Wilson interval
    of the share of runs in which it held; the verdict is "held" where it lies above one half,
    "not held" where it lies below, else "undecided". ValueError if a run is there twice."""
    if table.duplicated(["figure", "claim", "seed", "run"]).any():
        raise ValueError("expected every run once, got some run of a seed twice")
    parts = table.groupby(["figure", "claim"], sort=False).held
    rows = {}
    for claim, held in parts:
        share = binomtest(int(held.sum()), len(held)).proportion_ci(0.9, method="wilson")
        verdict = "held" if share.low > 0.5 else "not held" if share.high < 0.5 else "undecided"
        rows[claim] = {"share": f"{share.low:.2f} to {share.high:.2f}", "verdict": verdict}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["figure", "claim"])


if __name__ == "__main__":
    name, seed, *pairs = sys.argv[1:]
    values = dict(pair.split("=", 1) for pair in pairs)
    print(run(name, int(seed), **{key: yaml.safe_load(value) for key, value in values.items()}))
