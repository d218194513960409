"""Pruning, live neurons, modules and the other measures, against searches in plain graphs."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bimt_utils as bimt
from bimt_utils import graph, inputs_read, modules, prune

SEEDS = st.integers(0, 1000)
few = settings(deadline=None, max_examples=40)


def new_model(runs=2, **kwargs):
    return bimt.EmbeddedMLP((4, 6, 2), runs, generator=ref.generator(), **kwargs)


def wired(*layers):
    """A network with the weights {(out, in): value} of each layer, everything else zero."""
    sizes = [1 + max(i for _, i in layers[0]), *(1 + max(j for j, _ in wires) for wires in layers)]
    model = bimt.EmbeddedMLP(sizes)
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
    assert dict(graph(model).edges) == {
        (("input", 0), ("A1", 0)): {"weight": 1.0},
        (("input", 2), ("A1", 1)): {"weight": 2.0},
        (("input", 1), ("A1", 2)): {"weight": 0.5},
        (("A1", 0), ("output", 1)): {"weight": 1.0},
        (("A1", 1), ("output", 1)): {"weight": 1.0},
        (("A1", 2), ("output", 0)): {"weight": 1.0},
    }
    assert modules(prune(model, 0.5)) == parts[:1]
    assert inputs_read(prune(model, 0.5)) == [set(), {0, 2}]
    assert modules(prune(model, 5.0)) == []
    later = wired(
        dict.fromkeys([(0, 0), (1, 1), (2, 1)], 1.0), {(0, 0): 1.0, (1, 2): 1.0, (1, 1): 1.0}
    )
    assert list(map(len, modules(later))) == [4, 3]  # the largest first
    meet = wired({(0, 0): 1.0, (1, 1): 1.0}, {(0, 0): 1.0, (0, 1): 1.0})
    assert len(modules(meet)) == 1
    assert modules(meet, rows=["A1"]) == [{("A1", 0)}, {("A1", 1)}]


@few
@given(ref.models(), SEEDS, st.floats(0.2, 0.9))
def test_structure_of_sparse_networks_equals_a_search_in_a_graph(model, seed, share):
    ref.arrange_at_random(ref.thinned(model, seed, share), seed)
    live = bimt.live_neurons(model)
    for run in range(model.runs):
        wanted, ours = ref.live_by_paths(model, run), graph(model, run)
        slots = {row: mask[run].nonzero().flatten().tolist() for row, mask in live.items()}
        assert {(row, slot) for row in slots for slot in slots[row]} == set(wanted) == set(ours)
        assert set(ours.edges) == set(wanted.edges)
        for a, b, weight in wanted.edges(data="weight"):
            assert ours.edges[a, b]["weight"] == pytest.approx(weight)
        rows = list(live)[: 1 + seed % len(live)]
        for some in (None, rows):
            known, found = some or list(live), modules(model, run, some)
            part = wanted.subgraph(node for node in wanted if node[0] in known).to_undirected()
            parts = list(nx.connected_components(part))
            assert sorted(map(sorted, found)) == sorted(map(sorted, parts))
            assert list(map(len, found)) == sorted(map(len, parts), reverse=True)
        read = inputs_read(model, run)
        for slot, output in enumerate(model.out_perm[run].tolist()):
            node = ("output", slot)
            above = nx.ancestors(wanted, node) if node in wanted else set()
            slots = [slot for row, slot in above if row == "input"]
            assert read[output] == set(model.in_perm[run, slots].tolist())
    assert inputs_read(model, -1) == read


def test_edges_of_parallel_layers_and_of_folds_add_up():  # defect 6
    model = ref.Gated(runs=2)
    gate, up, down = (layer.weight.data[1] for layer in model.layers)
    up[2, 0] = 0  # the wire of the other layer stays
    gate[1, 2] = up[1, 2] = 0  # no wire at all
    network = graph(model, 1)
    for i, j in np.ndindex(3, 4):
        edge = network.get_edge_data(("input", i), ("A1", j))
        wanted = {"weight": pytest.approx(gate[j, i].abs().item() + up[j, i].abs().item())}
        assert edge == (None if (j, i) == (1, 2) else wanted)
    for j, k in np.ndindex(4, 2):
        wanted = down[k, j].abs().item() + down[k + 2, j].abs().item()
        assert network.edges[("A1", j), ("output", k)]["weight"] == pytest.approx(wanted)


def test_a_neuron_of_a_stream_leads_to_itself_without_a_weight():
    model = ref.Stream()
    _, up, down, _ = (layer.weight.data for layer in model.layers)
    down[:] = 0
    kept = [edge for edge in graph(model).edges(data="weight") if edge[0][0] == "Embed"]
    assert kept == [(("Embed", i), ("Res1", i), 0) for i in range(4)]  # and none to the dead A1
    up[:] = 0
    assert inputs_read(model) == [{0, 1, 2}] * 2


@few
@given(ref.models(kinds=("plain", "ring")), SEEDS)
def test_inputs_read_equal_the_jacobian(model, seed):
    ref.arrange_at_random(ref.thinned(model, seed), seed)
    x = ref.some_input(model, batch=1)
    slopes = torch.autograd.functional.jacobian(lambda x: model(x)[:, 0], x)[:, :, 0]
    for run in range(model.runs):
        wanted = [set(row.nonzero().flatten().tolist()) for row in slopes[run]]
        assert inputs_read(model, run) == wanted


def test_bad_input_gets_a_clear_error():
    model = new_model()
    for rows in ("inputA1", ["A7"], ["input", 1]):
        with pytest.raises(ValueError, match=r"expected a list of \['input', 'A1', 'output'\]"):
            modules(model, rows=rows)
    for threshold in (float("nan"), float("inf"), -0.1, torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(ValueError, match="expected threshold, finite and not negative"):
            prune(model, threshold)


@pytest.mark.parametrize("run", [2, -3, 0.5, None, "0", [0, 1]])
def test_a_run_that_is_not_there_is_refused(run):
    for call in (graph, modules, inputs_read, bimt.plot_network):
        with pytest.raises((IndexError, TypeError, RuntimeError, ValueError)):
            call(new_model(), run)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pruning_makes_a_copy(dtype):
    model = new_model(embedding=(5, 4)).to(dtype)
    before, pruned = copy.deepcopy(model), prune(model, torch.tensor([0.1, 10.0]))
    assert ref.same_state(before, model)
    for p, old in zip(pruned.parameters(), model.parameters(), strict=True):
        limit = torch.tensor(0.1, dtype=dtype)
        assert torch.equal(p[0], torch.where(old[0].abs() <= limit, 0, old[0]))
        assert not p[1].any()
    assert 0 < (pruned.layers[0].weight[0] == 0).sum() < 24
    assert not prune(wired({(0, 0): 0.5}), 0.5).layers[0].weight.any()


def test_a_threshold_has_the_precision_of_the_weights():  # defect 1
    model = wired({(0, 0): 1.0}).double()
    model.layers[0].weight.data[:] = 0.1
    assert not prune(model, 0.1).layers[0].weight.any()
    model.layers[0].weight.data += 1e-12
    assert prune(model, 0.1).layers[0].weight.any()


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 1.0, torch.tensor([0.05, 1.0])])
def test_prune_threshold_equals_a_search(tolerance):
    model = ref.Stream(runs=2).double()
    x, before = ref.some_input(model), copy.deepcopy(model)
    found = bimt.prune_threshold(model, lambda m: (m(x) - 1).square().mean((1, 2)), tolerance)
    for run, allowed in enumerate(torch.as_tensor(tolerance).expand(2).tolist()):
        single, best = model.pick(run), 0.0
        for threshold in np.geomspace(1e-4, 1, 81):
            losses = [(m(x) - 1).square().mean().item() for m in (single, prune(single, threshold))]
            if losses[1] > (1 + allowed) * losses[0] + 1e-12:
                break
            best = threshold
        assert found[run].item() == pytest.approx(best)
    assert found.shape == (2,)
    assert ref.same_state(before, model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("call", [1, 2, 40])
def test_an_interrupted_search_leaves_the_network(error, call):
    model = new_model()
    with pytest.raises(error):
        bimt.prune_threshold(model, ref.raising(error, call, bimt.wiring_length), 10.0)
    assert ref.same_state(model, new_model())


@pytest.mark.parametrize(
    ("loss", "tolerance"),
    [
        (torch.tensor(0.5), 0.05),
        (torch.tensor([0.5, 0.5, 0.5]), 0.05),
        (torch.tensor([0.5, 0.5]), float("nan")),
        (torch.tensor([0.5, 0.5]), -0.1),
    ],
)
def test_no_threshold_without_a_loss_for_every_run(loss, tolerance):
    with pytest.raises(ValueError, match="expected"):
        bimt.prune_threshold(new_model(), lambda model: loss, tolerance)


def test_wiring_length():
    model = wired({(0, 0): 3.0, (0, 1): -1.0})
    assert bimt.wiring_length(model).item() == pytest.approx(4 * 0.25)
    assert bimt.wiring_length(prune(model, 5.0)).item() == 0
    model = ref.Stream(runs=2)
    for run in range(2):
        wanted = ref.distance_cost(model, run)
        assert bimt.wiring_length(model)[run].item() == pytest.approx(wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    model = new_model()
    model.layers[1].weight.data[:, 0, 2] = bad
    for call in (bimt.live_neurons, graph, modules, inputs_read, bimt.plot_network):
        with pytest.raises(ValueError, match="expected finite weights"):
            call(model)


def test_what_belongs_to_the_user_is_left_alone():  # defect 8
    model = ref.Gated(runs=2)
    model.register_buffer("scale", torch.ones(2))
    model.extra = nn.Linear(3, 3).double()
    single = model.pick([1])
    assert single.runs == 1
    assert torch.equal(single.scale, model.scale)
    assert torch.equal(single.extra.weight, model.extra.weight)
    assert modules(model, 1) == modules(single)


def test_rows_may_come_from_a_generator():
    model = new_model()
    rows = [name for name in model.groups() if name != "output"]
    assert modules(model, 0, (name for name in rows)) == modules(model, 0, rows) != []


def test_the_graph_does_not_depend_on_the_hash_seed():
    program = """
import torch, bimt_utils as bimt
draw = torch.Generator().manual_seed(5)
model = bimt.EmbeddedMLP((20, 60, 60, 10), generator=draw)
for layer in model.layers:  # more than half of the neurons are dead
    layer.weight.data *= torch.rand(layer.weight.shape, generator=draw) < 0.05
model.layers[2].weight.data[:, :, 25:] = 0
print(list(bimt.graph(model).edges))
"""
    seen = set()
    for seed in ("0", "1"):
        settings = {**os.environ, "PYTHONHASHSEED": seed}
        root = Path(bimt.__file__).parent
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=settings, cwd=root, capture_output=True, check=True)
        seen.add(done.stdout)
    assert len(seen) == 1
