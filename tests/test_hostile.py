"""Whatever is passed to a public name, it works or is refused: never a result that is not finite,
never a value that the documentation does not allow, and no network that is left half-changed."""

import inspect
from functools import partial

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import bimt_utils as bimt

matplotlib.use("Agg")
RUNS, NAN = 2, float("nan")
MODEL = bimt.EmbeddedMLP((3, 4, 2), RUNS, generator=ref.generator())
X, Y = torch.rand(6, 3, generator=ref.generator()), torch.rand(6, 2, generator=ref.generator())
CLASSES = torch.tensor([0, 1, 1])
# what Python and torch raise for a wrong argument; a NameError, say, would be a fault of ours
REFUSALS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError)


def loss_fn(model):
    return bimt.mse_loss(model(X), Y)


HISTORY = bimt.train(MODEL.pick([0, 1]), loss_fn, steps=3, lr=1e-3, lamb=1e-3)
numbers = st.one_of(st.integers(-3, 30), st.floats(-2, 2, width=16), st.sampled_from([NAN, np.inf]))
entries = st.sampled_from([-1.0, 0.0, 0.5, 3.0, NAN, np.inf])
tensors = st.lists(entries, max_size=4).map(torch.tensor)
counts = st.lists(st.integers(-2, 3), max_size=3).map(torch.tensor)
lists = st.lists(st.one_of(numbers, st.tuples(numbers, numbers)), max_size=4)
words = st.sampled_from(["", "sum", "mean", "greedy", "loss", "input", "A1"])
anything = st.one_of(st.none(), st.booleans(), numbers, tensors, counts, lists, words)

# ---------------------------------------------------------------- what the documentation allows


def plain(value):
    """Without tensors, and one number in place of a list of one."""
    value = value.tolist() if isinstance(value, torch.Tensor) else value
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def size(value):
    """A finite number that is not negative."""
    return isinstance(value, int | float) and 0 <= value < np.inf


def whole(value, least=0):
    value = plain(value)
    return size(value) and value >= least and value == int(value)


def per_run(kind, value):
    value = plain(value)
    return kind(value) or (isinstance(value, list) and len(value) == RUNS and all(map(kind, value)))


sizes = partial(per_run, size)


def run(value):
    value = plain(value)
    return isinstance(value, int) and -RUNS <= value < RUNS


def classes(value):
    return value.shape == CLASSES.shape and bool((value >= 0).all())


FINE = {  # name -> argument -> a value that works, and which others do; None: not tested here
    "line": {"n": (3, size)},
    "EmbeddedLinear": {
        "in_places": (bimt.line(2), None),
        "out_places": (bimt.line(3), None),
        "in_folds": (2, partial(whole, least=1)),
        "out_folds": (1, partial(whole, least=1)),
        "runs": (2, whole),
    },
    "EmbeddedMLP": {
        "shape": ((4, 3, 2), lambda shape: plain(shape) == [4, 3, 2]),
        "runs": (2, whole),
        "in_folds": (2, lambda folds: folds == 2),
        "embedding": ((5, 2), lambda pair: pair is None or (pair[1] == 2 and whole(pair[0]))),
        "places": ([bimt.line(2), bimt.line(3), bimt.line(2)], lambda places: places is None),
        "frozen": ((0,), lambda rows: all(-3 <= plain(row) < 3 for row in rows)),
    },
    "connection_prices": {
        "model": (MODEL, None),
        "A": (1.0, sizes),
        "y0": (0.1, sizes),
        "A_last": (0.0, lambda value: value is None or sizes(value)),
        "biases": (True, None),
        "reduce": ("sum", ["sum", "mean"].__contains__),
    },
    "connection_cost": {"model": (MODEL, None), "A": (1.0, sizes), "y0": (0.1, sizes)},
    "swap_neurons": {
        "model": (MODEL, None),
        "top_k": (2, sizes),
        "reduce": ("sum", ["sum", "mean"].__contains__),
    },
    "mse_loss": {"outputs": (torch.zeros(2, 6, 2), None), "targets": (Y, lambda _: False)},
    "cross_entropy": {"outputs": (torch.zeros(2, 3, 2), None), "classes": (CLASSES, classes)},
    "accuracy": {"outputs": (torch.zeros(2, 3, 2), None), "classes": (CLASSES, classes)},
    "train": {
        "model": (MODEL, None),
        "loss_fn": (loss_fn, None),
        "steps": (2, partial(whole, least=1)),
        "lr": (1e-3, lambda rate: rate >= 0),
        "lamb": (1e-3, sizes),
        "prices": (bimt.connection_prices, lambda _: False),
        "swap_every": (1, lambda steps: steps >= 0),
        "snapshots": (2, partial(whole, least=1)),
        "metrics": (None, lambda metrics: not metrics),
    },
    "prune": {"model": (MODEL, None), "threshold": (0.1, sizes)},
    "prune_threshold": {
        "model": (MODEL, None),
        "loss_fn": (loss_fn, None),
        "tolerance": (0.1, sizes),
    },
    "graph": {"model": (MODEL, None), "run": (0, run)},
    "modules": {
        "model": (MODEL, None),
        "run": (0, run),
        "rows": (
            ["input", "A1"],
            lambda rows: rows is None or {*rows} <= {"input", "A1", "output"},
        ),
    },
    "inputs_read": {"model": (MODEL, None), "run": (0, run)},
    "plot_network": {
        "model": (MODEL, None),
        "run": (0, run),
        "in_labels": ("abc", lambda labels: labels is None or len(labels) == 3),
        "out_labels": ("yz", lambda labels: labels is None or len(labels) == 2),
        "strongest": (3, lambda count: count is None or whole(count)),
    },
    "plot_curves": {
        "history": (HISTORY, None),
        "name": ("loss", ["loss", "cost", "objective"].__contains__),
    },
}
TESTED = [(name, key) for name, fine in FINE.items() for key in fine if fine[key][1]]


def fine_arguments(name):
    values = {key: value for key, (value, _) in FINE[name].items()}
    return values | ({"model": MODEL.pick([0, 1])} if "model" in values else {})


def finite(result):
    if isinstance(result, dict):
        return all(map(finite, result.values()))
    if isinstance(result, torch.Tensor):
        return bool(result.isfinite().all())
    if isinstance(result, torch.nn.Module):
        return all(p.isfinite().all() for p in result.parameters())
    if isinstance(result, bimt.History):
        return finite(result.model) and all(finite(values) for _, values in result.log)
    return not isinstance(result, float) or np.isfinite(result)


@pytest.mark.parametrize("name", FINE)
def test_the_arguments_above_work(name):
    assert finite(getattr(bimt, name)(**fine_arguments(name)))
    assert {*FINE[name]} <= {*inspect.signature(getattr(bimt, name)).parameters}
    plt.close("all")


def call(name, arguments):
    result = getattr(bimt, name)(**arguments)
    if name == "EmbeddedMLP":  # some arguments are looked at where they are used
        bimt.swap_neurons(result)
        result(
            torch.zeros(4, 2, dtype=torch.long)
            if result.embedding is not None
            else torch.ones(1, 4)
        )
    return result


def check(name, key, value, call=call):
    """Call a function with one argument replaced."""
    arguments, allowed = fine_arguments(name), FINE[name][key][1]
    model, error, result = arguments.get("model"), None, None
    kept = model.state_dict() if model and key != "lr" else {}  # with lr = inf, training began
    before = {k: tensor.clone() for k, tensor in kept.items()}
    try:
        result = call(name, arguments | {key: value})
    except REFUSALS as raised:
        error = raised
    finally:
        plt.close("all")
    if error is None:
        try:
            fits = allowed(value)
        except REFUSALS:  # not even of the right kind
            fits = False
        assert fits, f"{name} accepts {key} = {value!r}"
        assert finite(result), f"{name} with {key} = {value!r} gives {result!r}"
    else:
        assert str(error)
        for k, tensor in before.items():
            assert torch.equal(tensor, kept[k]), f"{k} has changed"


@pytest.mark.parametrize(("name", "key"), TESTED)
@settings(deadline=None, max_examples=25, derandomize=True)
@given(anything)
@example(-1)
@example(NAN)
@example(np.inf)
@example([0, 1])
@example(torch.tensor([0.5, NAN]))
def test_a_wrong_argument_is_refused_or_does_no_harm(name, key, value):
    check(name, key, value)


def gives(result):
    return lambda name, arguments: result


def fails_half_way(name, arguments):
    arguments["model"].layers[0].weight.data += 1
    raise ValueError("too late")


def has_a_fault(name, arguments):
    raise NameError("no such name")


@pytest.mark.parametrize(
    ("name", "key", "value", "careless"),
    [
        ("swap_neurons", "top_k", -1, gives(None)),
        ("swap_neurons", "top_k", torch.tensor([1, 2, 3]), gives(None)),
        ("swap_neurons", "reduce", "greedy", gives(None)),
        ("connection_cost", "A", NAN, gives(torch.ones(2))),
        ("connection_cost", "A", 1.0, gives(torch.tensor([1.0, NAN]))),
        ("connection_prices", "y0", 1.0, gives({"weight": torch.tensor(NAN)})),
        ("line", "n", np.inf, gives(bimt.line(3))),
        ("mse_loss", "targets", 0.5, gives(torch.zeros(2))),
        ("graph", "run", 2, gives(None)),
        ("prune", "threshold", -0.1, fails_half_way),
        ("prune", "threshold", -0.1, has_a_fault),
    ],
)
def test_carelessness_is_noticed(name, key, value, careless):
    with pytest.raises((AssertionError, NameError)):
        check(name, key, value, careless)
