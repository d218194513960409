"""The sweep, on small notebooks of its own: what it keeps, what it refuses, on a Dask cluster that
loses a worker, and taken up again. Collected by `pytest`, not by `pytest tests`."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from dask.distributed import Client, LocalCluster
from nbformat.v4 import new_code_cell, new_notebook

import sweep

PARAMETERS = """
SEED = 0  # not a parameter: y0, distance
A, (Y0, B) = 1.0, (0.1, 2)
RUNS: int = 1
NAME = "λ"
LAMBS = [10**-power for power in range(3)]
LAMBS[B] = 0.5
"""
SAVE = """
import json, os, pathlib
values = {"SEED": SEED, "A": A, "Y0": Y0, "B": B, "RUNS": RUNS, "NAME": NAME}
rows = [{"figure": 4, "claim": key, "seed": SEED, "value": repr(v)} for key, v in values.items()]
path = pathlib.Path(os.environ["BIMT_FIGURES"], "claims_figure_4.json")
path.write_text(json.dumps(rows), encoding="utf-8")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of the notebooks; results go to its `results`."""
    monkeypatch.setattr(sweep, "NOTEBOOKS", tmp_path)
    return tmp_path


def write(path, *cells):
    """A notebook: parameters, then `cells`, then claims."""
    tagged = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[tagged, *map(new_code_cell, [*cells, SAVE])])
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "-"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)


def run(folder, seed, **parameters):
    return sweep.run("small", seed, folder / "results", **parameters)


def saved(result):
    """What the notebook had as its parameters, name -> repr."""
    return {row["claim"]: row["value"] for row in json.loads(result.read_text(encoding="utf-8"))}


def test_a_killed_worker_loses_nothing(folder):
    started = "import time\npathlib.Path(f'started_{SEED}_{time.time_ns()}').touch()\ntime.sleep(2)"
    write(folder / "small.ipynb", f"import pathlib\n{started}")

    def job(seed):
        sweep.NOTEBOOKS = folder  # in the worker
        return run(folder, seed)

    workers = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**workers) as cluster, Client(cluster) as client:
        jobs = client.map(job, [1, 2, 3])
        while not list(folder.glob("started_*")):
            assert not any(job.done() for job in jobs)
            time.sleep(0.05)
        busy = {job: worker for worker, tasks in client.processing().items() for job in tasks}
        seed = next(folder.glob("started_*")).name.split("_")[1]
        victim = busy[jobs[int(seed) - 1].key]
        os.kill(client.run(os.getpid, workers=[victim])[victim], signal.SIGKILL)
        results = client.gather(jobs)
    assert len(list(folder.glob(f"started_{seed}_*"))) >= 2  # it was under way and began again
    assert results == [folder / "results" / f"small_seed_{seed}.json" for seed in (1, 2, 3)]
    assert sorted((folder / "results").iterdir()) == results
    frame = pd.concat(map(pd.read_json, results))
    assert frame.groupby("seed").size().to_dict() == {1: 6, 2: 6, 3: 6}
    before = [path.stat().st_mtime_ns for path in results]
    assert [run(folder, seed) for seed in (1, 2, 3)] == results
    assert before == [path.stat().st_mtime_ns for path in results]  # nothing is computed twice


def test_parameters_reach_the_notebook(folder):
    write(folder / "small.ipynb")
    result = run(folder, 3, Y0=-5.0, RUNS=2, NAME="≤ b", B=[1, -2])
    assert result.name.startswith("small_seed_3_B_~1~-2~_NAME_~b~_RUNS_2_Y0_-5.0~")
    wanted = {"SEED": "3", "A": "1.0", "Y0": "-5.0", "B": "[1, -2]", "RUNS": "2", "NAME": "'≤ b'"}
    assert saved(result) == wanted


def test_equal_parameters_are_one_result(folder, monkeypatch):
    def claims_alone(*_, **__):  # no kernel, which would take seconds
        Path(os.environ["BIMT_FIGURES"], "claims_figure_4.json").write_text("[]")
        return new_notebook()

    monkeypatch.setattr("sweep.papermill.execute_notebook", claims_alone)
    write(folder / "small.ipynb")
    result = run(folder, 1, RUNS=2, A=0.5)
    modified = result.stat().st_mtime_ns
    for seed in (np.int64(1), np.uint8(1), np.array(1)):
        assert run(folder, seed, A=np.float64(0.5), RUNS=np.int64(2)) == result
    assert result.stat().st_mtime_ns == modified
    others = [{"B": [1, 2]}, {"B": [-1, 2]}, {"B": -1}, {"B": 1}, {"B": "1"}, {"RUNS": 1}]
    others += [{"B": [[1], [2]]}, {"NAME": "é"}, {"NAME": "ü"}, {"NAME": "None"}, {"NAME": None}]
    names = {run(folder, 1, **other).name for other in others}
    assert len(names) == len(others)


def test_numbers_of_numpy_stay_numbers(folder):
    write(folder / "small.ipynb")
    result = run(folder, np.int64(4), A=np.float64(0.5), B=(0, np.int64(1)), RUNS=np.int32(7))
    assert result == run(folder, 4, A=0.5, B=np.arange(2), RUNS=7)
    assert result.name.startswith("small_seed_4_A_0.5_B_~0~1~_RUNS_7~")
    assert saved(result) == {
        **{"SEED": "4", "A": "0.5", "B": "[0, 1]", "RUNS": "7"},
        **{"Y0": "0.1", "NAME": "'λ'"},
    }


@pytest.mark.parametrize("name", ["RUN", "SEED", "y0", "distance", "power", "range"])
def test_a_parameter_that_the_notebook_does_not_have(folder, name):
    write(folder / "small.ipynb")
    with pytest.raises(ValueError, match=rf"expected parameters among .*, got \['{name}'\]"):
        run(folder, 1, **{name: 1})
    assert [path.name for path in folder.iterdir()] == ["small.ipynb"]


@pytest.mark.parametrize("seed", [1.5, "1", None])
def test_a_seed_that_is_no_whole_number(folder, seed):
    write(folder / "small.ipynb")
    with pytest.raises(TypeError, match="integer"):
        run(folder, seed)


def test_a_run_that_fails_leaves_no_result(folder):
    write(folder / "small.ipynb", "raise OSError('no such thing')")
    with pytest.raises(Exception, match="no such thing"):
        run(folder, 1)
    assert not list((folder / "results").iterdir())


TRAINING = """
import sys
sys.path[:0] = {path}
import bimt_utils as bimt

calls = []
def loss(model):
    calls.append(1)
    if len(calls) == 4:
        raise KeyboardInterrupt
    return model.layers[0].weight.square().sum((1, 2))

history = bimt.train(bimt.EmbeddedMLP((2, 2)), loss, steps=9, lr=0.1, lamb=0.1)
"""
NO_DATA = "print('loading')\nprint('NOTICE: no MNIST in data, so these are the small digits')"


@pytest.mark.parametrize(
    ("cell", "line"),
    [
        (TRAINING.format(path=sys.path), "NOTICE: interrupted after 3 of 9 steps"),
        (NO_DATA, "NOTICE: no MNIST in data, so these are the small digits"),
        ("import sys\nsys.stdout.write('one')\nprint('\\nNOTICE: two')", "NOTICE: two"),
    ],
    ids=["interrupted", "other data", "split"],
)
def test_a_result_that_is_not_the_full_thing_is_not_kept(folder, cell, line):
    write(folder / "small.ipynb", cell, "1 + 1")
    with pytest.raises(RuntimeError, match=line):
        run(folder, 1)
    assert not list((folder / "results").iterdir())


def test_other_words_about_a_notice_are_none(folder):
    write(folder / "small.ipynb", "print('no NOTICE here')\nprint('Notice')\n'NOTICE'")
    assert run(folder, 1).exists()


def test_a_full_disk_leaves_no_half_file(folder, monkeypatch):
    write(folder / "small.ipynb")
    usual = Path.write_bytes

    def half(path, data):
        usual(path, data[: len(data) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="no space left"):
        run(folder, 1)
    assert not list((folder / "results").iterdir())


def test_notebooks_in_further_run_there(folder):
    write(folder / "further" / "points.ipynb", "open('here', 'w').close()")
    result = sweep.run("points", 2, folder / "results")
    assert result.name == "points_seed_2.json"
    assert (folder / "further" / "here").exists()
    modified = result.stat().st_mtime_ns
    assert sweep.run("further/points", 2, folder / "results") == result
    assert result.stat().st_mtime_ns == modified


def test_kernels_use_the_same_instructions_everywhere(folder, monkeypatch):
    names = ["ATEN_CPU_CAPABILITY", "MKL_CBWR"]
    given = {
        "avx2": {},
        "default": {"ATEN_CPU_CAPABILITY": "default"},
    }  # a reader's own choice stays
    for wanted, variables in given.items():
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        importlib.reload(sweep)
        monkeypatch.setattr(sweep, "NOTEBOOKS", folder)
        write(folder / "small.ipynb", f"import os\nNAME = [os.environ[name] for name in {names}]")
        result = sweep.run("small", 1, folder / wanted)
        assert saved(result)["NAME"] == repr([wanted, "AVX2"])


def python(*arguments, env):
    command = [sys.executable, *map(str, arguments)]
    env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_the_command_in_an_ascii_locale(folder):
    write(folder / "small.ipynb", "# ≤")
    code = f"""
import pathlib, runpy, sys, sweep
sweep.NOTEBOOKS = pathlib.Path({str(folder)!r})
print(sweep.run("small", 1, sweep.NOTEBOOKS / "results", RUNS=3).name)
"""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = python("-c", code, env={**os.environ, **ascii_only})
    assert done.stdout == "small_seed_1_RUNS_3.json\n", done.stderr
    assert saved(folder / "results" / "small_seed_1_RUNS_3.json")["NAME"] == "'λ'"


def test_the_command_needs_a_notebook_that_exists():
    script = Path(sweep.__file__)
    done = python(script, "no_such_notebook", "1", "DEVICE=cpu", env=os.environ)
    assert done.returncode
    assert "no_such_notebook" in done.stderr
