"""Whatever is passed to a public name, it works or is refused in a sentence: no other kind of
error, and no result that is not finite."""

import inspect

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bimt_utils as bimt

matplotlib.use("Agg")
MODEL = bimt.EmbeddedMLP((3, 4, 2), 2, generator=ref.generator())
X, Y = torch.rand(6, 3, generator=ref.generator()), torch.rand(6, 2, generator=ref.generator())


def loss_fn(model):
    return bimt.mse_loss(model(X), Y)


HISTORY = bimt.train(MODEL.pick([0, 1]), loss_fn, steps=3, lr=1e-3, lamb=1e-3)
numbers = st.one_of(st.integers(-3, 30), st.floats(-2, 2), st.sampled_from([np.nan, np.inf]))
entries = st.sampled_from([-1.0, 0.0, 0.5, 3.0, float("nan"), float("inf")])
tensors = st.lists(entries, max_size=4).map(torch.tensor)
lists = st.lists(st.one_of(numbers, st.tuples(numbers, numbers)), max_size=4)
words = st.sampled_from(["", "mean", "greedy", "loss", "input", "A1", "../x", "x.mp4"])
anything = st.one_of(st.none(), st.booleans(), numbers, tensors, lists, words)
FINE = {  # name -> arguments that work
    "line": {"n": 3},
    "EmbeddedLinear": {"in_places": bimt.line(2), "out_places": bimt.line(3), "in_folds": 2,
        "out_folds": 1, "runs": 2},
    "EmbeddedMLP": {"shape": (4, 3, 2), "runs": 2, "in_folds": 2, "embedding": (5, 2),
        "places": [bimt.line(2), bimt.line(3), bimt.line(2)], "frozen": (0,)},
    "connection_cost": {"model": MODEL, "A": 1.0, "y0": 0.1, "A_last": 0.0, "reduce": "sum"},
    "swap_neurons": {"model": MODEL, "top_k": 2, "reduce": "sum",
        "mask": torch.tensor([True, False])},
    "mse_loss": {"outputs": torch.zeros(2, 6, 2), "targets": Y},
    "cross_entropy": {"outputs": torch.zeros(2, 3, 2), "classes": torch.tensor([0, 1, 1])},
    "accuracy": {"outputs": torch.zeros(2, 3, 2), "classes": torch.tensor([0, 1, 1])},
    "train": {"model": MODEL, "loss_fn": loss_fn, "steps": 2, "lr": 1e-3, "lamb": 1e-3,
        "swap_every": 1, "exact": True, "snapshots": 2},
    "prune": {"model": MODEL, "threshold": 0.1},
    "prune_threshold": {"model": MODEL, "loss_fn": loss_fn, "tolerance": 0.1},
    "modules": {"model": MODEL, "run": 0, "rows": ["input", "A1"]},
    "inputs_read": {"model": MODEL, "run": 0},
    "newman_modularity": {"model": MODEL, "run": 0, "seed": 1},
    "plot_network": {"model": MODEL, "run": 0, "in_labels": "abc", "out_labels": "yz",
        "strongest": 3, "width": 1.0, "dot": 4, "fontsize": 8},
    "plot_curves": {"history": HISTORY, "name": "loss"},
    "figure_folder": {"name": "x.png"},
}  # fmt: skip
KEPT = ("model", "history", "loss_fn", "outputs")  # checked elsewhere
PLACES = [(name, argument) for name, fine in FINE.items() for argument in fine]


def finite(result):
    if isinstance(result, torch.Tensor):
        return bool(result.isfinite().all())
    if isinstance(result, torch.nn.Module):
        return all(p.isfinite().all() for p in result.parameters())
    return not isinstance(result, float) or np.isfinite(result)


@pytest.mark.parametrize("name", FINE)
def test_the_arguments_below_work(name):
    assert finite(getattr(bimt, name)(**FINE[name]))
    assert {*FINE[name]} <= {*inspect.signature(getattr(bimt, name)).parameters}
    plt.close("all")


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, argument in PLACES if argument not in KEPT]
)
@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.data())
def test_a_wrong_argument_is_refused_or_does_no_harm(name, argument, data):
    fine = {
        key: value.pick([0, 1]) if value is MODEL else value for key, value in FINE[name].items()
    }
    value = data.draw(anything)
    before = fine["model"].state_dict() if "model" in fine else {}
    before = {key: tensor.clone() for key, tensor in before.items()}
    error = result = None
    try:
        result = getattr(bimt, name)(**fine | {argument: value})
    except (ValueError, TypeError) as raised:
        error = raised
    except RuntimeError as raised:  # what torch itself says about None
        error = raised if "Could not infer dtype" in str(raised) else None
        if error is None:
            raise
    plt.close("all")
    assert finite(result)
    for key, tensor in before.items():
        assert not error or torch.equal(tensor, fine["model"].state_dict()[key])
