"""Every notebook runs to its end with another seed, few neurons and a short training, as papermill
would run it: with a cell of new values after the one tagged `parameters`; and so it does when its
first training is interrupted half-way. Collected by `pytest`, not by `pytest tests`."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parent.rglob("*.ipynb"))
OTHERS = """
SEED, RUNS, STEPS, DEVICE, FRAMES, WIDTH, HIDDEN = 20260101, 1, 30, "cpu", 2, 6, 4
BASELINES = ["L1", "none"]
"""
# a training of whatever optimizer gets Ctrl-C in its step 17; numbers in place of phases; and
# pruning leaves nothing
INTERRUPT = """
LAMB, TOLERANCE = 0.01, 1e9


def train_interrupted(model, loss_fn, *, optimizer=bimt.L1AdamW, **options):
    def counting(parameters, lr):
        made, taken = optimizer(parameters, lr), []
        usual_step = made.step

        def step(prices):
            if len(taken) == 17:
                raise KeyboardInterrupt
            taken.append(None)
            usual_step(prices)

        made.step = step
        return made

    bimt.train = usual_train
    return usual_train(model, loss_fn, optimizer=counting, **options)


usual_train, bimt.train = bimt.train, train_interrupted
"""


def run_with(path, cell):
    """Run a notebook with one more cell after its parameters; returns all that it printed."""
    notebook = nbformat.read(path, as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    tagged = next(i for i, tag in enumerate(tags) if "parameters" in tag)
    notebook.cells.insert(tagged + 1, nbformat.v4.new_code_cell(cell))
    place = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place)
    client.execute()  # raises CellExecutionError where a cell fails
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request, monkeypatch):
    monkeypatch.delenv("PYTHONPATH")  # a notebook finds its modules by itself
    return request.param


def test_runs_with_other_parameters(notebook):
    assert "interrupted" not in run_with(notebook, OTHERS)


def test_an_interrupted_training_stays_usable(notebook):
    printed = run_with(notebook, OTHERS + INTERRUPT)
    assert "NOTICE: interrupted after 17 of" in printed
