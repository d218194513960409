"""Every notebook runs to its end with another seed, few neurons and a short training, as papermill
would run it: with a cell of new values after the one tagged `parameters`; and so it does when the
first training is interrupted half-way. Collected by `pytest`, not by `pytest tests`."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
OVERRIDES = "SEED, RUNS, STEPS, DEVICE, FRAMES, WIDTH, HIDDEN = 7, 1, 30, 'cpu', 2, 6, 4"
INTERRUPT = """
LAMB = 0.01  # a plain number in place of phases
import itertools

def interrupted_once(usual_step, count):  # names of its own: notebooks have a `count`, too
    def step(*args, **kwargs):
        if next(count) == 17:
            raise KeyboardInterrupt
        return usual_step(*args, **kwargs)
    return step

bimt.PricedAdam.step = interrupted_once(bimt.PricedAdam.step, itertools.count())
"""


def run_with(path, cell):
    """Run a notebook with one more cell after its parameters; returns all that it printed."""
    notebook = nbformat.read(path, as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    tagged = next(i for i, tag in enumerate(tags) if "parameters" in tag)
    notebook.cells.insert(tagged + 1, nbformat.v4.new_code_cell(cell))
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # raises CellExecutionError where a cell fails
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_with_other_parameters(path):
    run_with(path, OVERRIDES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_interrupted_training_stays_usable(path):
    printed = run_with(path, OVERRIDES + "\n" + INTERRUPT)
    assert "interrupted after 17 of" in printed
