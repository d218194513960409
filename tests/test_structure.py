"""Pruning, modules and the other measures of structure, on networks wired by hand."""

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import arrange

from bimt_utils import (
    EmbeddedMLP,
    inputs_read,
    line,
    live_neurons,
    mean_wire,
    modules,
    mse_loss,
    newman_modularity,
    prune_threshold,
    pruned,
    shuffled,
    wiring_graph,
    wiring_length,
)


def wired(shape, *layers, **kwargs):
    """A network with the weights {(out, in): value} of each layer, everything else zero."""
    model = EmbeddedMLP(shape, **kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for layer, wires in zip(model.layers, layers, strict=True):
            for (j, i), value in wires.items():
                layer.weight[0, j, i] = value
    return model


def two_parts():
    """Inputs 0 and 2 make output 1, input 1 makes output 0; dead ends at A1:3 and A1:4."""
    first = {(0, 0): 1.0, (1, 2): -2.0, (2, 1): 0.5, (3, 1): 1.0}
    second = {(1, 0): 1.0, (1, 1): 1.0, (0, 2): -1.0, (0, 4): 3.0}
    return wired((3, 5, 2), first, second)


def test_modules_by_hand():
    parts = modules(two_parts())
    assert parts == [
        {("input", 0), ("input", 2), ("A1", 0), ("A1", 1), ("output", 1)},
        {("input", 1), ("A1", 2), ("output", 0)},
    ]
    assert live_neurons(two_parts()) == {"input": [0, 1, 2], "A1": [0, 1, 2], "output": [0, 1]}
    assert inputs_read(two_parts()) == [{1}, {0, 2}]


def test_threshold_cuts_what_is_at_most_as_large():
    assert len(modules(two_parts(), threshold=0.49)) == 2
    assert modules(two_parts(), threshold=0.5)[0] >= {("input", 0), ("output", 1)}
    assert len(modules(two_parts(), threshold=0.5)) == 1
    assert inputs_read(two_parts(), threshold=0.5) == [set(), {0, 2}]
    assert modules(two_parts(), threshold=5) == []
    assert newman_modularity(two_parts(), threshold=5) == 0


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_what_an_output_reads_does_not_depend_on_the_places(seed):
    model = two_parts()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in model.groups():
            arrange(group, 0, torch.randperm(len(group.places), generator=generator))
    assert inputs_read(model) == [{1}, {0, 2}]
    assert sorted(map(len, modules(model))) == [3, 5]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0, 0.5))
def test_live_neurons_equal_those_on_simple_paths(seed, threshold):
    model = EmbeddedMLP((2, 4, 3, 2), generator=torch.Generator().manual_seed(seed))
    whole = wiring_graph(model, threshold=threshold, live=False)
    on_paths = set()
    for i in range(2):
        for j in range(2):
            for path in nx.all_simple_paths(whole, ("input", i), ("output", j)):
                on_paths |= set(path)
    assert set(wiring_graph(model, threshold=threshold)) == on_paths


def test_folds_of_one_place_are_one_neuron():
    model = wired((4, 2, 1), {(0, 1): 1.0, (0, 3): -2.0}, {(0, 0): 1.0}, in_folds=2)
    graph = wiring_graph(model)
    assert graph.edges[("input", 1), ("A1", 0)]["weight"] == 3.0
    assert inputs_read(model) == [{1}]


def test_modules_below_the_output():
    meet = wired((2, 2, 1), {(0, 0): 1.0, (1, 1): 1.0}, {(0, 0): 1.0, (0, 1): 1.0})
    assert len(modules(meet)) == 1
    assert modules(meet, rows=["input", "A1"]) == [
        {("input", 0), ("A1", 0)},
        {("input", 1), ("A1", 1)},
    ]


def test_an_input_without_embedding_is_dead():
    model = wired(
        (2, 2, 1), {(0, 0): 1.0, (1, 1): 1.0}, {(0, 0): 1.0, (0, 1): 1.0}, embedding=(3, 2)
    )
    with torch.no_grad():
        model.embedding[0, 1, 0] = 0.5
    assert live_neurons(model) == {"input": [0], "A1": [0], "output": [0]}
    assert live_neurons(model, threshold=0.6)["A1"] == []


def test_lengths_by_hand():
    model = wired((2, 1), {(0, 0): 3.0, (0, 1): -1.0})
    assert wiring_length(model).item() == pytest.approx(4 * 0.25)
    assert mean_wire(model).item() == pytest.approx(0.25)
    longer = wired((2, 1), {(0, 0): 3.0, (0, 1): -1.0}, places=[4 * line(2), line(1)])
    assert wiring_length(longer).item() == pytest.approx(3 * 0.5 + 2.5)


def test_newman_modularity_of_two_equal_parts():
    model = wired((2, 2, 2), {(0, 0): 1.0, (1, 1): 1.0}, {(0, 0): 1.0, (1, 1): 1.0})
    assert newman_modularity(model) == pytest.approx(0.5)


def test_pruning_restores_even_after_an_error():
    model = EmbeddedMLP((4, 6, 2), runs=2, generator=torch.Generator().manual_seed(0))
    before = [p.clone() for p in model.parameters()]

    def use():
        with pruned(model, torch.tensor([0.1, 10.0])):
            assert all((p[1] == 0).all() for p in model.parameters())
            assert all(((p[0].abs() > 0.1) | (p[0] == 0)).all() for p in model.parameters())
            assert any((p[0] != 0).any() for p in model.parameters())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        use()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def test_prune_threshold_stops_where_the_loss_rises():
    """One wire of size 0.3 does all the work, faint ones do next to none."""
    model = wired((2, 2, 1), {(0, 0): 1.0, (1, 1): 0.01}, {(0, 0): 0.3, (0, 1): 0.01})
    x = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    y = model(x)[0].detach() + 0.01

    def loss_fn(m):
        return mse_loss(m(x), y)

    threshold = prune_threshold(model, loss_fn, tolerance=0.5).item()
    assert 0.01 < threshold < 0.3
    with pruned(model, threshold):
        assert loss_fn(model).item() <= 1.5e-4
    assert prune_threshold(model, loss_fn, 0.5, candidates=[0.5, 0.6]).item() == 0


def test_shuffling_keeps_the_weights_of_each_layer():
    model = EmbeddedMLP((4, 6, 2), runs=2, generator=torch.Generator().manual_seed(0))
    null = shuffled(model, torch.Generator().manual_seed(1))
    for ours, theirs in zip(model.layers, null.layers, strict=True):
        for run in range(2):
            a, b = ours.weight[run].flatten(), theirs.weight[run].flatten()
            assert torch.equal(a.sort().values, b.sort().values)
            assert not torch.equal(a, b)


def test_threshold_per_run_has_the_right_length():
    model = EmbeddedMLP((4, 6, 2), runs=2)
    with pytest.raises(ValueError, match="threshold has shape"), pruned(model, torch.ones(3)):
        pass
    assert modules(model, 1, torch.tensor([9.0, 0.0])) == modules(model, 1)
    assert modules(model, 0, torch.tensor([9.0, 0.0])) == []
    with pytest.raises(ValueError, match="threshold has shape"):
        modules(model, 0, torch.ones(3))
