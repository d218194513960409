"""Test runs work like a user's notebook, but in a folder and with threads of their own."""

import os
import tempfile
from pathlib import Path

# Notebook kernels start in notebooks/ and inherit the environment, not pytest's import path.
ROOT = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
# Tests never touch the committed figures.
os.environ["BIMT_FIGURES"] = tempfile.mkdtemp(prefix="bimt-figures-")
# Two workers side by side, one thread each.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
