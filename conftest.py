"""Test runs work like a user's notebook, but in a folder and with threads of their own."""

import os
import tempfile
from pathlib import Path

# Kernels, also those of notebooks that tests write elsewhere, inherit the environment, not pytest's
# import path.
ROOT = Path(__file__).parent
PLACES = [str(ROOT), str(ROOT / "notebooks"), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, PLACES))
# Tests never touch the committed figures; this folder goes when the tests end.
FIGURES = tempfile.TemporaryDirectory(prefix="bimt-figures-")
os.environ["BIMT_FIGURES"] = FIGURES.name
# Two workers side by side, one thread each.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
# As in the notebooks, and before anything imports torch.
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")  # the same bits on every x86 processor
os.environ.setdefault("MKL_CBWR", "AVX2")  # the same for Intel's matrix products


def pytest_collection_modifyitems(items):
    """The slowest files first and the unit tests last, so that the two workers end together."""
    slow = ("modular_addition", "test_other_parameters", "incontext", "mnist", "points")

    def late(item):
        return not item.path.name.startswith(slow), item.path.parent.name == "tests"

    items.sort(key=late)
