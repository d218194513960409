"""The sweep over seeds: on a Dask cluster that loses a worker, and taken up again. Collected by
`pytest`, not by `pytest tests`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from dask.distributed import Client, LocalCluster
from sweep import NOTEBOOKS, run

CHEAP = {"RUNS": 1, "STEPS": 20, "FRAMES": 2}


def test_a_killed_worker_loses_nothing(tmp_path):
    workers = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**workers) as cluster, Client(cluster) as client:
        jobs = client.map(lambda seed: run("two_moon_3.2", seed, tmp_path, **CHEAP), [1, 2, 3])
        busy = {}
        while not any(busy.values()):
            time.sleep(0.1)
            busy = client.processing()
        time.sleep(3)  # in the middle of a notebook
        victim = next(address for address, tasks in busy.items() if tasks)
        os.kill(client.run(os.getpid, workers=[victim])[victim], signal.SIGKILL)
        results = client.gather(jobs)
    assert sorted(results) == sorted(Path(tmp_path).glob("two_moon_3.2_seed_*_STEPS_20_*.json"))
    frame = pd.concat(map(pd.read_json, results))
    claims = frame.claim.nunique()
    assert frame.groupby("seed").size().to_dict() == {1: claims, 2: claims, 3: claims}
    assert claims >= 10
    before = [path.stat().st_mtime_ns for path in results]
    assert [run("two_moon_3.2", seed, tmp_path, **CHEAP) for seed in (1, 2, 3)] == results
    assert before == [path.stat().st_mtime_ns for path in results]  # nothing is computed twice


def test_a_run_that_fails_leaves_no_result(tmp_path):
    with pytest.raises(Exception, match="steps to be a whole number"):
        run("two_moon_3.2", 1, tmp_path, STEPS=-1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["RUN", "SEED"])
def test_a_parameter_that_the_notebook_does_not_have(tmp_path, name):
    with pytest.raises(ValueError, match=f"expected a parameter of .*, got {name}"):
        run("two_moon_3.2", 1, tmp_path, **{name: 1})


def test_the_command_needs_a_notebook_that_exists(tmp_path):
    command = [sys.executable, NOTEBOOKS / "sweep.py", "no_such_notebook", "1", "DEVICE=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "no_such_notebook" in done.stderr
