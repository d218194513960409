"""What every committed notebook has to be, read from its JSON."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def cells(notebook, kind):
    found = json.loads(notebook.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def test_opens_with_the_figure_it_makes(notebook):
    first = json.loads(notebook.read_text())["cells"][0]
    assert first["cell_type"] == "markdown"
    assert source(first).startswith("# Figure ")


def test_one_parameter_cell_with_the_common_names(notebook):
    tagged = [
        cell for cell in cells(notebook, "code") if "parameters" in cell["metadata"].get("tags", [])
    ]
    assert len(tagged) == 1
    names = {line.split(" = ")[0] for line in source(tagged[0]).splitlines()}
    assert {"SEED", "RUNS", "STEPS", "DEVICE"} <= names


def test_ran_from_top_to_bottom_without_complaint(notebook):
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


def test_tells_a_story_in_short_cells(notebook):
    code = cells(notebook, "code")
    assert 2 * len(cells(notebook, "markdown")) >= len(code)
    assert max(len(source(cell).splitlines()) for cell in code) <= 45
    assert source(cells(notebook, "markdown")[-1]).startswith("## Exercise")


def test_is_small(notebook):
    assert notebook.stat().st_size < 1.5e6


def test_widgets_have_their_state(notebook):
    widgets = json.loads(notebook.read_text())["metadata"].get("widgets")
    assert widgets is None or widgets["application/vnd.jupyter.widget-state+json"]["state"]
