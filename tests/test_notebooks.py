"""What every committed notebook has to be, read from its JSON, and the claims and films it made."""

import ast
import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "figures"
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
LINES = {"incontext_3.4": 190, "mnist_3.5": 190}  # these define a model, a loader and a picture
CLAIMS = {"3": 8}  # three tasks


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def read(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))


def cells(notebook, kind=None):
    return [cell for cell in read(notebook)["cells"] if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def code(notebook):
    return "\n".join(map(source, cells(notebook, "code")))


def tagged(notebook, tag):
    return [c for c in cells(notebook, "code") if tag in c["metadata"].get("tags", [])]


def lines_of_code(text):
    lines = [line.strip() for line in text.splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def careless_doubles(text):
    """Calls of .double() that do not follow .cpu() in the same chain: not every device has it."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "double":
            chain = [n.attr for n in ast.walk(node.func.value) if isinstance(n, ast.Attribute)]
            found += [] if "cpu" in chain else [ast.unparse(node)]
    return found


def test_all_notebooks_are_there():
    assert len(NOTEBOOKS) == 6 + 4


def test_opens_with_its_title_and_ends_with_an_exercise(notebook):
    first, *_, last = cells(notebook)
    assert first["cell_type"] == last["cell_type"] == "markdown"
    title = r"# \w" if notebook.parent.name == "further" else r"# Figure \d: \w"
    assert re.match(title, source(first))
    assert source(last).startswith("## Exercise")


def test_one_parameter_cell_with_the_common_names(notebook):
    (parameters,) = tagged(notebook, "parameters")
    names = [line.split(" = ")[0] for line in source(parameters).splitlines()]
    assert {"SEED", "RUNS", "STEPS", "DEVICE"} <= set(names)


def test_some_output_is_checked(notebook):
    checked = tagged(notebook, "nbval-check-output")
    assert checked
    assert all(cell["outputs"] for cell in checked)


def test_ran_from_top_to_bottom_without_complaint(notebook):
    ran = cells(notebook, "code")
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    outputs = [output for cell in ran for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    printed = "".join("".join(o["text"]) for o in outputs if o.get("name") == "stdout")
    assert "NOTICE" not in printed  # an interrupted training, or data that are missing


def test_is_read_in_ten_minutes(notebook):
    texts = list(map(source, cells(notebook, "code")))
    markdown = cells(notebook, "markdown")
    assert len(cells(notebook)) <= 20
    assert 2 * len(markdown) >= len(texts)
    assert sum(len(source(cell).split()) for cell in markdown) <= 900
    assert max(len(text.splitlines()) for text in texts) <= 25
    assert max(len(line) for text in texts for line in text.splitlines()) <= 100
    assert sum(map(lines_of_code, texts)) <= LINES.get(notebook.stem, 120)
    assert notebook.stat().st_size < 1.5e6


def test_asks_for_the_same_arithmetic_before_torch_is_imported(notebook):
    lines = source(cells(notebook, "code")[0]).splitlines()
    loads_torch = re.compile(r"(import|from) (torch|bimt_utils|evidence)\b")
    before = lines[: next(k for k, line in enumerate(lines) if loads_torch.match(line))]
    for setting in ('"ATEN_CPU_CAPABILITY", "avx2"', '"MKL_CBWR", "AVX2"'):
        assert any(line.startswith(f"os.environ.setdefault({setting})") for line in before)


def test_float64_only_on_the_cpu(notebook):
    assert not careless_doubles(code(notebook))


def test_careless_doubles_are_noticed():
    fine = "a.cpu().double(); a[0].detach().cpu()[1].double(); (a > 0).cpu().double().numpy()"
    assert not careless_doubles(fine)
    assert len(careless_doubles("a.double(); a.double().cpu(); f(a.mean(1)).double()")) == 3


def test_widgets_have_their_state(notebook):
    widgets = read(notebook)["metadata"].get("widgets")
    assert widgets is None or widgets["application/vnd.jupyter.widget-state+json"]["state"]
    views = "application/vnd.jupyter.widget-view+json"
    outputs = [output for cell in cells(notebook, "code") for output in cell["outputs"]]
    assert widgets or not any(views in output.get("data", {}) for output in outputs)


def test_pictures_in_the_text_are_there(notebook):
    text = "\n".join(map(source, cells(notebook, "markdown")))
    shown = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text) + re.findall(
        r"<img [^>]*src=\"([^\"]+)", text
    )
    for target in shown:
        path = (notebook.parent / target).resolve()
        assert path.parent == FIGURES, target
        assert path.exists(), target


@pytest.mark.parametrize("path", sorted(FIGURES.glob("*.gif")), ids=lambda path: path.stem)
def test_animated_pictures_are_small(path):
    assert path.stat().st_size <= 1e6
    with Image.open(path) as gif:
        assert gif.width <= 480
        assert gif.n_frames > 1


@pytest.mark.parametrize("path", sorted(FIGURES.glob("claims_*.json")), ids=lambda path: path.stem)
def test_few_claims(path):
    rows = json.loads(path.read_text(encoding="utf-8"))
    bounded = [row for row in rows if (row["at_least"], row["at_most"]) != (None, None)]
    figure = path.stem.removeprefix("claims_figure_")
    assert 0 < len({row["claim"] for row in bounded}) <= CLAIMS.get(figure, 7)
    assert {str(row["figure"]).replace(" ", "_") for row in rows} == {figure}
