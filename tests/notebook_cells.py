"""Names that a committed notebook defines, without its training and its figures.

Nothing imports a notebook, so the tests read its JSON and execute what they need of it.
"""

import ast
import json
import sys
from pathlib import Path

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def cells(stem):
    """The cells of the notebook of this name, which lies in notebooks/ or in a folder within."""
    (path,) = NOTEBOOKS.rglob(f"{stem}.ipynb")
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def definitions(stem, before="## Training", **parameters):
    """All code cells ahead of the heading `before`, and of the later ones only the imports, the
    functions and the lists of constants. `parameters` replace the notebook's, as papermill does."""
    names, ahead, path = {"__name__": stem}, True, sys.path[:]
    for number, cell in enumerate(cells(stem)):
        text, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code":
            tree = ast.parse(text)
            tree.body = [node for node in tree.body if ahead or _defines(node)]
            exec(compile(tree, f"{stem}, cell {number}", "exec"), names)
            names |= parameters if "parameters" in tags else {}
        ahead = ahead and not text.startswith(before)
    sys.path[:] = path  # the first cell adds to it
    assert not ahead, f"{stem} has no heading {before!r}"
    return names


def _defines(node):
    if isinstance(node, ast.Assign):
        constant = ast.List | ast.Constant | ast.Load
        named = all(isinstance(target, ast.Name) for target in node.targets)
        return named and all(isinstance(part, constant) for part in ast.walk(node.value))
    return isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
