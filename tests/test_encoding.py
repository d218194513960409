"""Text files are UTF-8 whatever the machine's own encoding is."""

import os
import subprocess
import sys

from notebook_cells import NOTEBOOKS

CODE = f"""
import sys, warnings
sys.path += [{str(NOTEBOOKS.parent)!r}, {str(NOTEBOOKS)!r}]
import bimt_utils, evidence, page, sweep

for name in ("__main__", "bimt_utils", "evidence", "page", "sweep"):
    warnings.filterwarnings("error", category=EncodingWarning, module=name)
path = bimt_utils.figure_folder("claims_figure_9.json")

claims = evidence.Claims(9, 0)
claims.add("λ ≤ 1", [1.0], at_most=1)
claims.save()
assert "λ ≤ 1" in path.read_text(encoding="utf-8")

page.write(path, "λ ≥ 1")
assert path.read_text(encoding="utf-8") == "λ ≥ 1"
assert len(page.authors())

try:
    sweep.run("two_moon_3.2", 1, no_such_parameter=1)  # reads the notebook
except ValueError as error:
    assert "no_such_parameter" in str(error)

for careless in (path.read_text, lambda: path.write_text("a"), lambda: open(path)):
    try:
        careless()
    except EncodingWarning:
        continue
    raise AssertionError("this test would notice nothing")
"""


def test_reads_and_writes_utf8_where_only_ascii_is_understood(tmp_path):
    foreign = {"PYTHONUTF8": "0", "LC_ALL": "C", "BIMT_FIGURES": str(tmp_path)}
    foreign["PYTHONIOENCODING"] = "utf-8"  # for the code itself
    command = [sys.executable, "-X", "warn_default_encoding", "-"]
    done = subprocess.run(
        command,
        env=os.environ | foreign,
        input=CODE,
        encoding="utf-8",
        capture_output=True,
        check=False,
    )
    assert not done.returncode, done.stderr
