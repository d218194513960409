"""Newman's modularity and the shuffled null, against plain loops and networkx."""

import copy
import itertools
from collections import Counter
from statistics import fmean

import networkx as nx
import pytest
import reference as ref
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networkx.algorithms.community import louvain
from sympy.utilities.iterables import multiset_partitions

import bimt_utils as bimt
import evidence
from evidence import newman_modularity, null_modularity, shuffled

SEEDS = st.integers(0, 1000)
few = settings(deadline=None, max_examples=40)


def wired(*layers):
    """A network with the weights {(out, in): value} of each layer, everything else zero."""
    sizes = [1 + max(i for _, i in layers[0]), *(1 + max(j for j, _ in wires) for wires in layers)]
    model = bimt.EmbeddedMLP(sizes)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for layer, wires in zip(model.layers, layers, strict=True):
            for (j, i), value in wires.items():
                layer.weight[0, j, i] = value
    return model


def modularity_by_loops(graph, communities):
    """Newman's Q: the share of weight inside communities less what chance would put there."""
    total = sum(weight for _, _, weight in graph.edges(data="weight"))
    q = 0.0
    for part in communities:
        inside = sum(w for a, b, w in graph.edges(data="weight") if a in part and b in part)
        strength = sum(w for a, b, w in graph.edges(data="weight") for end in (a, b) if end in part)
        q += inside / total - (strength / (2 * total)) ** 2
    return q


@pytest.mark.parametrize("model", [bimt.EmbeddedMLP((6, 6, 6), 2), ref.Stream(6, 6, 6, 6, 2)])
def test_newman_modularity_of_three_parts(model):
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
        assert modularity == pytest.approx(modularity_by_loops(graph, found))
        assert modularity >= modularity_by_loops(graph, planted) - 1e-6 > 0.5


def test_newman_modularity_by_hand():
    pair = {(0, 0): 1.0, (1, 1): 1.0}
    assert newman_modularity(wired(pair, pair)) == pytest.approx(0.5)
    assert newman_modularity(wired({(0, 0): 3.0, (1, 1): 1.0})) == pytest.approx(
        1 - 0.75**2 - 1 / 16
    )
    assert newman_modularity(wired({(0, 0): 1.0})) == pytest.approx(0.0)
    nothing = bimt.prune(bimt.EmbeddedMLP((8, 6, 2), in_folds=2, embedding=(5, 4)), 10.0)
    assert newman_modularity(nothing) == 0.0
    assert null_modularity(nothing, draws=2) == 0.0


@few
@given(ref.models(most=2), SEEDS)
def test_newman_modularity_of_small_networks_is_that_of_a_good_partition(model, seed):
    live = ref.live_by_paths(ref.thinned(model, seed, 0.2), 0).to_undirected()
    assume(live.size("weight") and len(live) <= 6)
    every = [modularity_by_loops(live, parts) for parts in multiset_partitions(sorted(live))]
    found = newman_modularity(model, 0, seed)
    assert min(abs(found - q) for q in every) < 1e-9
    assert found > max(every) - 0.1
    assert found >= -1e-6  # all in one community have 0
    assert found == newman_modularity(model, 0, seed) == newman_modularity(model.pick(0), 0, seed)


def test_equal_weights_do_not_send_louvain_round_in_circles(monkeypatch):
    """With weights of exactly 1/3 and seed 758, networkx 3.6.1 moves two neurons to and fro for
    ever. A limit on its steps stands for the test's patience."""
    ends = [(0, 2), (0, 3), (0, 4), (1, 2), (1, 4), (2, 4), (3, 4)]
    network = nx.DiGraph([(a, b, {"weight": 1 / 3}) for a, b in ends])
    usual_step = louvain._neighbor_weights

    def step(*args):
        assert next(steps) < 1000
        return usual_step(*args)

    monkeypatch.setattr(louvain, "_neighbor_weights", step)
    monkeypatch.setattr(evidence, "graph", lambda model, run: network)
    every = [modularity_by_loops(network, parts) for parts in multiset_partitions(range(5))]
    for seed in range(1000):
        steps = itertools.count()
        found = newman_modularity(None, seed=seed)
        assert min(abs(found - q) for q in every) < 1e-9  # Q is that of the weights without noise


@few
@given(ref.models(), SEEDS)
def test_shuffling_keeps_weights_live_neurons_and_their_numbers_of_wires(model, seed):
    ref.thinned(model, seed)
    before, null = copy.deepcopy(model), shuffled(model, ref.generator(seed))
    assert ref.same_state(before, model)
    for live, other in zip(*(bimt.live_neurons(m).values() for m in (model, null)), strict=True):
        assert torch.equal(live, other)
    for layer, read, written in [wire for wire in model.wires() if wire[0] is not None]:
        other = null.layers[list(model.layers).index(layer)]
        for run in range(model.runs):
            live, ours, theirs = ref.live_by_paths(model, run), layer.weight[run], other.weight[run]
            assert torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values)
            for axis in (0, 1):
                assert torch.equal((ours != 0).sum(axis), (theirs != 0).sum(axis))
            for j, i in (ours != theirs).nonzero().tolist():
                assert (written, j % len(layer.out_places)) in live
                assert (read, i % len(layer.in_places)) in live
        other.weight.data = layer.weight.data
    assert ref.same_state(model, null)  # nothing but weights has changed


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_shuffling_is_random_and_repeatable(share):
    model = bimt.EmbeddedMLP((12, 12, 12), generator=ref.generator())
    model = ref.thinned(model, 0, share).pick([0, 0])
    nulls = [shuffled(model, ref.generator(seed)) for seed in (1, 1, 2)]
    assert ref.same_state(nulls[0], nulls[1])
    for layer in range(2):
        first, _, other = (null.layers[layer].weight for null in nulls)
        for different in (model.layers[layer].weight, other, first.flip(0)):
            assert not torch.equal(first, different)
            assert torch.equal(first != 0, different != 0) == (share == 0)


def test_shuffling_reaches_every_network_with_the_same_numbers_of_wires():
    """A ring of six wires between three neurons and three: six ways to leave one wire out each."""
    ring = {(j, i): 1.0 for j in range(3) for i in range(3) if j != i}
    model, random = wired(ring), ref.generator()
    nulls = [shuffled(model, random).layers[0].weight[0] for _ in range(300)]
    counts = Counter(tuple((null == 0).nonzero()[:, 1].tolist()) for null in nulls)
    assert set(counts) == set(itertools.permutations(range(3)))
    assert min(counts.values()) > 20  # 50 each, give or take 7


def test_the_null_is_the_mean_over_shuffled_copies_of_one_run():
    model = ref.thinned(bimt.EmbeddedMLP((8, 8, 8), 3, generator=ref.generator()), 0, 0.5)
    random, network = ref.generator(4), model.pick(1)
    draws = [newman_modularity(shuffled(network, random), seed=4) for _ in range(5)]
    assert len(set(draws)) > 1
    assert null_modularity(model, 1, draws=5, seed=4) == pytest.approx(fmean(draws))
    assert null_modularity(model, 1) == null_modularity(model.pick([2, 1]), 1)
    assert null_modularity(model, 0) != null_modularity(model, 1)


def test_modules_have_more_modularity_than_their_null():
    square = {(j, i): 1.0 for j in range(6) for i in range(6) if j // 2 == i // 2}
    model = wired(square, square)
    assert newman_modularity(model) == pytest.approx(1 - 1 / 3)
    assert null_modularity(model) < 0.6


def test_modularity_is_recorded_for_every_variant_and_for_the_null():
    runs_of = {"BIMT": [0, 1], "none": [2]}
    shape, draw = (4, 6, 2), [ref.generator(k) for k in range(2)]
    models = {f"task {k}": bimt.EmbeddedMLP(shape, 3, generator=g) for k, g in enumerate(draw)}
    claims = evidence.Claims(3, 0)
    evidence.record_modularity(claims, models, runs_of, seed=1)
    found = claims.table.set_index(["claim", "run"]).value
    for task, model in models.items():
        for variant, runs in runs_of.items():
            for place, run in enumerate(runs):
                wanted = evidence.newman_modularity(model, run, 1)
                assert found[f"Q of {variant}: {task}", place] == wanted
        null = evidence.null_modularity(model, 1, seed=1)
        assert found[f"Q of shuffled: {task}", 1] == null
