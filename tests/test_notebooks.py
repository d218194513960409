"""What every committed notebook has to be, read from its JSON."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LINES = {"incontext_3.4": 270, "mnist_3.5": 270}  # these define a model, a loader and a picture


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def cells(notebook, kind=None):
    found = json.loads(notebook.read_text())["cells"]
    return [cell for cell in found if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def lines_of_code(cell):
    lines = [line.strip() for line in source(cell).splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def test_opens_with_the_figure_and_ends_with_an_exercise(notebook):
    first, *_, last = cells(notebook)
    assert first["cell_type"] == last["cell_type"] == "markdown"
    assert source(first).startswith("# Figure ")
    assert source(last).startswith("## Exercise")


def test_one_parameter_cell_with_the_common_names(notebook):
    tags = [cell["metadata"].get("tags", []) for cell in cells(notebook, "code")]
    (number,) = [i for i, found in enumerate(tags) if "parameters" in found]
    names = {line.split(" = ")[0] for line in source(cells(notebook, "code")[number]).splitlines()}
    assert {"SEED", "RUNS", "STEPS", "DEVICE"} <= names


def test_ran_from_top_to_bottom_without_complaint(notebook):
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


def test_is_read_in_ten_minutes(notebook):
    code = cells(notebook, "code")
    assert len(cells(notebook)) <= 30
    assert 2 * len(cells(notebook, "markdown")) >= len(code)
    assert max(len(source(cell).splitlines()) for cell in code) <= 25
    assert sum(map(lines_of_code, code)) <= LINES.get(notebook.stem, 200)
    assert notebook.stat().st_size < 1.5e6


def test_widgets_have_their_state(notebook):
    widgets = json.loads(notebook.read_text())["metadata"].get("widgets")
    assert widgets is None or widgets["application/vnd.jupyter.widget-state+json"]["state"]
