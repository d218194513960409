"""A notebook with another seed, through papermill; only its claims are kept.

    python notebooks/sweep.py two_moon_3.2 1 RUNS=16

writes figures/sweep/two_moon_3.2_seed_1.json. A result that is there is not computed twice, and a
run that is cut short leaves no result, so a sweep can be stopped and taken up again.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import papermill

NOTEBOOKS = Path(__file__).resolve().parent
RESULTS = NOTEBOOKS.parent / "figures" / "sweep"


def run(notebook, seed, folder=RESULTS, **parameters):
    """The claims of `notebook` (its name) with SEED = seed and other `parameters`, a JSON file in
    `folder`. Sets BIMT_FIGURES in this process."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"{notebook}_seed_{seed}.json"
    if not result.exists():
        with tempfile.TemporaryDirectory() as figures:
            os.environ["BIMT_FIGURES"] = figures
            source, parameters = NOTEBOOKS / f"{notebook}.ipynb", {"SEED": seed, **parameters}
            papermill.execute_notebook(source, None, parameters, cwd=NOTEBOOKS, progress_bar=False)
            (claims,) = Path(figures).glob("claims_figure_*.json")
            part = result.with_suffix(f".{os.getpid()}.part")
            part.write_bytes(claims.read_bytes())
            os.replace(part, result)
    return result


if __name__ == "__main__":
    name, seed, *pairs = sys.argv[1:]
    values = {key: json.loads(value) for key, value in (pair.split("=") for pair in pairs)}
    print(run(name, int(seed), **values))
