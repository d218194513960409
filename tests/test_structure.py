"""Pruning, live neurons, modules and the other measures, against searches in plain graphs."""

import copy

import networkx as nx
import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bimt_utils as bimt
from bimt_utils import inputs_read, modules, newman_modularity, prune

SEEDS = st.integers(0, 1000)
few = settings(deadline=None, max_examples=40)


def new_model(runs=2, **kwargs):
    return bimt.EmbeddedMLP((4, 6, 2), runs, generator=ref.generator(), **kwargs)


def wired(*layers):
    """A network with the weights {(out, in): value} of each layer, everything else zero."""
    sizes = [1 + max(ends) for ends in zip(*layers[0], strict=True)][::-1]
    model = bimt.EmbeddedMLP((*sizes, *(1 + max(j for j, _ in wires) for wires in layers[1:])))
    for p in model.parameters():
        p.data.zero_()
    for layer, wires in zip(model.layers, layers, strict=True):
        for place, value in wires.items():
            layer.weight.data[0, *place] = value
    return model


def two_parts():
    """Inputs 0 and 2 make output 1, input 1 makes output 0; dead ends at A1:3 and A1:4."""
    first = {(0, 0): 1.0, (1, 2): -2.0, (2, 1): 0.5, (3, 1): 1.0, (4, 0): 0.0}
    return wired(first, {(1, 0): 1.0, (1, 1): 1.0, (0, 2): -1.0, (0, 4): 3.0})


def test_structure_by_hand():
    model = two_parts()
    parts = [
        {("input", 0), ("input", 2), ("A1", 0), ("A1", 1), ("output", 1)},
        {("input", 1), ("A1", 2), ("output", 0)},
    ]
    assert modules(model) == parts
    assert inputs_read(model) == [{1}, {0, 2}]
    model.layers[0].bias.data[0, 4] = 1.0  # a neuron that only hands on its bias is not live
    assert bimt.live_neurons(model)["A1"].tolist() == [[True, True, True, False, False]]
    assert modules(prune(model, 0.5)) == parts[:1]
    assert inputs_read(prune(model, 0.5)) == [set(), {0, 2}]
    assert modules(prune(model, 5.0)) == []
    meet = wired({(0, 0): 1.0, (1, 1): 1.0}, {(0, 0): 1.0, (0, 1): 1.0})
    assert len(modules(meet)) == 1
    assert modules(meet, rows=["A1"]) == [{("A1", 0)}, {("A1", 1)}]


@few
@given(ref.models(), SEEDS, st.floats(0.2, 0.9))
def test_structure_of_sparse_networks_equals_a_search_in_a_graph(model, seed, share):
    ref.arrange_at_random(ref.thinned(model, seed, share), seed)
    live = bimt.live_neurons(model)
    for run in range(model.runs):
        graph = ref.live_by_paths(model, run)
        slots = {row: mask[run].nonzero().flatten().tolist() for row, mask in live.items()}
        assert {(row, slot) for row in slots for slot in slots[row]} == set(graph)
        rows = list(live)[: 1 + seed % len(live)]
        for some in (None, rows):
            known, found = some or list(live), modules(model, run, some)
            part = graph.subgraph(node for node in graph if node[0] in known).to_undirected()
            wanted = list(nx.connected_components(part))
            assert sorted(map(sorted, found)) == sorted(map(sorted, wanted))
            assert list(map(len, found)) == sorted(map(len, wanted), reverse=True)
        read = inputs_read(model, run)
        for slot, output in enumerate(model.out_perm[run].tolist()):
            node = ("output", slot)
            above = nx.ancestors(graph, node) if node in graph else set()
            slots = [slot for row, slot in above if row == "input"]
            assert read[output] == set(model.in_perm[run, slots].tolist())
    assert inputs_read(model, -1) == read


@few
@given(ref.models(kinds=("plain", "ring")), SEEDS)
def test_inputs_read_equal_the_jacobian(model, seed):
    ref.arrange_at_random(ref.thinned(model, seed), seed)
    x = ref.some_input(model, batch=1)
    slopes = torch.autograd.functional.jacobian(lambda x: model(x)[:, 0], x)[:, :, 0]
    for run in range(model.runs):
        wanted = [set(row.nonzero().flatten().tolist()) for row in slopes[run]]
        assert inputs_read(model, run) == wanted


@pytest.mark.parametrize(
    "call",
    [
        *(lambda m, r=rows: modules(m, rows=r) for rows in ("inputA1", ["A7"], 3)),  # defect 27
        *(lambda m, r=run: inputs_read(m, r) for run in (True, 2, -3, 0.5)),  # defect 13
        lambda m: modules(m, True),
        lambda m: newman_modularity(m, True),
        *(lambda m, t=bad: prune(m, t) for bad in (float("nan"), -0.1, torch.ones(3))),  # defect 12
    ],
)
def test_bad_input_gets_a_clear_error(call):
    with pytest.raises(ValueError, match=r"(?s)^expected .*, got "):
        call(new_model())


def test_pruning_makes_a_copy():
    model = new_model(embedding=(5, 4))
    before, pruned = copy.deepcopy(model), prune(model, torch.tensor([0.1, 10.0]))
    assert ref.same_state(before, model)
    for p, old in zip(pruned.parameters(), model.parameters(), strict=True):
        assert torch.equal(p[0], torch.where(old[0].abs() <= 0.1, 0, old[0]))
        assert not p[1].any()
    assert 0 < (pruned.layers[0].weight[0] == 0).sum() < 24
    assert not prune(wired({(0, 0): 0.5}), 0.5).layers[0].weight.any()


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 1.0])
def test_prune_threshold_equals_a_search(tolerance):
    model = ref.Stream(runs=2).double()
    x, before = ref.some_input(model), copy.deepcopy(model)
    found = bimt.prune_threshold(model, lambda m: (m(x) - 1).square().mean((1, 2)), tolerance)
    for run in range(model.runs):
        single, best = model.pick(run), 0.0
        for threshold in np.geomspace(1e-4, 1, 81):
            losses = [(m(x) - 1).square().mean().item() for m in (single, prune(single, threshold))]
            if losses[1] > (1 + tolerance) * losses[0] + 1e-12:
                break
            best = threshold
        assert found[run].item() == pytest.approx(best)
    assert ref.same_state(before, model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("call", [1, 2, 40])
def test_an_interrupted_search_leaves_the_network(error, call):  # defect 1
    model = new_model()
    with pytest.raises(error):
        bimt.prune_threshold(model, ref.raising(error, call, bimt.wiring_length), 10.0)
    assert ref.same_state(model, new_model())


def test_lengths():
    model = wired({(0, 0): 3.0, (0, 1): -1.0})
    assert bimt.wiring_length(model).item() == pytest.approx(4 * 0.25)
    assert bimt.mean_wire(model).item() == pytest.approx(0.25)
    assert bimt.wiring_length(prune(model, 5.0)).item() == 0
    assert bimt.mean_wire(prune(model, 5.0)).item() == 0
    model = ref.Stream(runs=2)
    for run in range(2):
        length, layers = ref.distance_cost(model, run), model.layers
        weight = sum(layer.weight[run].abs().sum().item() for layer in layers)
        assert bimt.wiring_length(model)[run].item() == pytest.approx(length)
        assert bimt.mean_wire(model)[run].item() == pytest.approx(length / weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    model = new_model()
    model.layers[1].weight.data[:, 0, 2] = bad
    calls = [bimt.live_neurons, bimt.shuffled, modules, newman_modularity, bimt.plot_network]
    for call in [*calls, inputs_read]:
        with pytest.raises(ValueError, match="finite weights"):
            call(model)


@pytest.mark.parametrize("run", [2, -3, 0.5, None, True])
def test_a_run_that_is_not_there_is_refused(run):
    for call in (modules, newman_modularity, inputs_read, bimt.plot_network):
        with pytest.raises(ValueError, match="run"):
            call(new_model(), run)


@pytest.mark.parametrize(
    ("loss", "tolerance"),
    [
        (torch.tensor(0.5), 0.05),
        (torch.tensor([0.5, float("nan")]), 0.05),
        (torch.tensor([0.5, 0.5, 0.5]), 0.05),
        (torch.tensor([0.5, 0.5]), float("nan")),
        (torch.tensor([0.5, 0.5]), -0.1),
    ],
)
def test_no_threshold_without_a_loss_for_every_run(loss, tolerance):
    with pytest.raises(ValueError, match="expected"):
        bimt.prune_threshold(new_model(), lambda model: loss, tolerance)


@pytest.mark.parametrize("model", [bimt.EmbeddedMLP((6, 6, 6), 2), ref.Stream(6, 6, 6, 6, 2)])
def test_newman_modularity_of_three_parts_equals_that_of_networkx(model):
    part = torch.arange(6) // 2
    for layer in model.layers:
        draw = torch.rand(layer.weight.shape, generator=ref.generator(1)) + 0.5
        same = part.repeat(layer.out_folds)[:, None] == part.repeat(layer.in_folds)
        layer.weight.data = torch.where(same, draw, 0.02 * draw)
    for run in range(2):
        graph = ref.graph_by_loops(model, run).to_undirected()
        planted = [{node for node in graph if node[1] // 2 == part} for part in range(3)]
        found = nx.community.louvain_communities(graph, seed=3)
        modularity = newman_modularity(model, run, seed=3)
        assert modularity == pytest.approx(nx.community.modularity(graph, found))
        assert modularity >= nx.community.modularity(graph, planted) - 1e-6 > 0.5
    pair = {(0, 0): 1.0, (1, 1): 1.0}
    assert newman_modularity(wired(pair, pair)) == pytest.approx(0.5)
    assert newman_modularity(prune(model, 10.0)) == 0.0  # defect 4
    assert newman_modularity(prune(new_model(embedding=(5, 4)), 10.0)) == 0.0


@few
@given(ref.models(), SEEDS)
def test_shuffling_keeps_weights_live_neurons_and_their_numbers_of_wires(model, seed):
    ref.arrange_at_random(ref.thinned(model, seed), seed)
    before, null = copy.deepcopy(model), bimt.shuffled(model, ref.generator(seed))
    assert ref.same_state(before, model)
    for live, other in zip(*(bimt.live_neurons(m).values() for m in (model, null)), strict=True):
        assert torch.equal(live, other)
    for layer, read, written in [wire for wire in model.wires() if wire[0] is not None]:
        other = null.layers[list(model.layers).index(layer)]
        for run in range(model.runs):
            graph, ours, theirs = (
                ref.live_by_paths(model, run),
                layer.weight[run],
                other.weight[run],
            )
            assert torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values)
            for axis in (0, 1):
                assert torch.equal((ours != 0).sum(axis), (theirs != 0).sum(axis))
            for j, i in (ours != theirs).nonzero().tolist():
                assert (written, j % len(layer.out_places)) in graph
                assert (read, i % len(layer.in_places)) in graph
        other.weight.data = layer.weight.data
    assert ref.same_state(model, null)  # nothing but weights has changed


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_shuffling_is_random_and_repeatable(share):
    model = bimt.EmbeddedMLP((12, 12, 12), generator=ref.generator())
    model = ref.thinned(model, 0, share).pick([0, 0])
    nulls = [bimt.shuffled(model, ref.generator(seed)) for seed in (1, 1, 2)]
    assert ref.same_state(nulls[0], nulls[1])
    for layer in range(2):
        first, _, other = (null.layers[layer].weight for null in nulls)
        for different in (model.layers[layer].weight, other, first.flip(0)):
            assert not torch.equal(first, different)
            assert torch.equal(first != 0, different != 0) == (share == 0)
