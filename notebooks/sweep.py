"""Run a notebook with another seed or other parameters through papermill and keep its claims.

    python notebooks/sweep.py permutation_S4_3.3 4 RUNS=6

writes figures/sweep/permutation_S4_3.3_seed_4_RUNS_6.json. A result that is there is not
computed twice, and a run that fails or is cut short leaves none, so a sweep can be stopped and
taken up again. Values are YAML: write 0.001, as 1e-3 is text there.
"""

import ast
import hashlib
import json
import operator
import os
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
import papermill
import yaml

NOTEBOOKS = Path(__file__).resolve().parent
RESULTS = NOTEBOOKS.parent / "figures" / "sweep"
sys.path.append(str(NOTEBOOKS.parent))
# kernels inherit these; torch reads them when it is imported
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")  # the same bits on every x86 processor
os.environ.setdefault("MKL_CBWR", "AVX2")  # the same for Intel's matrix products

from bimt_utils import whole_file  # noqa: E402

# What the sweep measures beyond the notebook, in a last cell of its own.
MODULARITY = """
from evidence import record_modularity
if "runs_of" in globals():  # a notebook of the paper
    record_modularity(claims, pruned, runs_of, SEED)
    claims.save()
"""


def run(notebook, seed, folder=RESULTS, **parameters):
    """Run `notebook` (a name in notebooks/ or notebooks/further/) with SEED = seed and other
    `parameters`; return the path of its claims, a JSON file in `folder`.

    One run at a time per process: meanwhile it sets BIMT_FIGURES. ValueError for a parameter that
    the notebook does not have; RuntimeError if it says that its result is not the full thing.
    """
    source = NOTEBOOKS / f"{notebook}.ipynb"
    if not source.exists():
        source = NOTEBOOKS / "further" / f"{notebook}.ipynb"
    known = _assigned(source)
    known.remove("SEED")  # KeyError for a notebook without one
    if not known >= parameters.keys():
        raise ValueError(f"expected parameters among {sorted(known)}, got {[*parameters]}")
    # NumPy's numbers become Python's and tuples lists, as papermill would write them as text
    plain = json.loads(json.dumps(parameters, default=lambda value: value.tolist()))
    seed, others = operator.index(seed), sorted(plain.items())
    name = "_".join([source.stem, f"seed_{seed}", *(f"{key}_{v!r}" for key, v in others)])
    safe = re.sub("[^A-Za-z0-9._+-]+", "~", name)
    if safe != name:  # other values could look the same
        safe += f"~{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    result = Path(folder).resolve() / f"{safe}.json"
    if result.exists():
        return result
    result.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made, mock.patch.dict(os.environ, BIMT_FIGURES=made):
        longer, notebook = Path(made) / source.name, nbformat.read(source, as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(MODULARITY))
        nbformat.write(notebook, longer)
        parameters = {"SEED": seed, **plain}
        done = papermill.execute_notebook(
            longer, None, parameters, cwd=source.parent, progress_bar=False
        )
        _raise_notices(done)
        (claims,) = Path(made).glob("claims_figure_*.json")
        with whole_file(result) as part:
            part.write_bytes(claims.read_bytes())
    return result


def _assigned(source):
    """The names that the cell tagged `parameters` assigns."""
    cells = nbformat.read(source, as_version=4).cells
    (tagged,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    nodes = list(ast.walk(ast.parse(tagged.source)))
    targets = [node.target for node in nodes if isinstance(node, ast.AnnAssign)]
    targets += [t for node in nodes if isinstance(node, ast.Assign) for t in node.targets]
    names = [n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}  # not i of x[i] = 1


def _raise_notices(notebook):
    """A printed line that begins with NOTICE: a training was interrupted, or data are missing."""
    for cell in notebook.cells:
        printed = "".join(o.text for o in cell.get("outputs", []) if o.get("name") == "stdout")
        for line in printed.splitlines():
            if line.startswith("NOTICE"):
                raise RuntimeError(f"expected a full result, got {line!r}")


if __name__ == "__main__":
    name, seed, *pairs = sys.argv[1:]
    values = dict(pair.split("=", 1) for pair in pairs)
    print(run(name, int(seed), **{key: yaml.safe_load(value) for key, value in values.items()}))
