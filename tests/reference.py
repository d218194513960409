"""Slow, plain implementations that the tests and the benchmark compare with."""

import itertools

import torch

from bimt_utils import EmbeddedLinear


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weight_axes(model):
    """Every (id of a tensor, axis) along which neurons lie: each belongs to one row."""
    axes = [(id(m.weight), axis) for m in model.layers for axis in (1, 2)]
    axes += [(id(m.bias), 1) for m in model.layers]
    axes += [(id(model.in_perm), 1), (id(model.out_perm), 1)]
    if model.embedding is not None:
        axes.append((id(model.embedding), 2))
    return axes


def cost_by_loops(model, run, A, y0, A_last=None, biases=True, reduce="sum"):
    """The wiring cost of one run, one weight at a time."""
    layers, total = model.layers, 0.0
    for number, layer in enumerate(layers):
        slope = A if A_last is None or number < len(layers) - 1 else A_last
        n_out, n_in = layer.weight.shape[1:]
        a, b = layer.in_places, layer.out_places
        cost = 0.0
        for j, i in itertools.product(range(n_out), range(n_in)):
            ends = zip(b[j % len(b)].tolist(), a[i % len(a)].tolist(), strict=True)
            distance = sum(abs(p - q) for p, q in ends)
            cost += abs(layer.weight[run, j, i].item()) * (slope * distance + y0)
        total += cost / (n_out * n_in) if reduce == "mean" else cost
        if biases:
            cost = sum(y0 * abs(layer.bias[run, j].item()) for j in range(n_out))
            total += cost / n_out if reduce == "mean" else cost
    if model.embedding is not None:
        values = model.embedding[run].flatten().tolist()
        cost = sum(y0 * abs(value) for value in values)
        total += cost / len(values) if reduce == "mean" else cost
    return total


def distance_cost(model, run, reduce="sum"):
    """The distance part of the wiring cost of one run, in double precision."""
    total = 0.0
    for layer in model.layers:
        cost = (layer.weight[run].detach().abs().double() * layer.distance.double()).sum().item()
        total += cost / layer.distance.numel() if reduce == "mean" else cost
    return total


def trade(group, run, j, k):
    """Let the neurons in slots j and k of one run trade places, fold by fold."""
    for tensor, axis, folds in group.axes():
        row = tensor[run].detach()
        n = row.shape[axis - 1] // folds
        for fold in range(folds):
            a, b = fold * n + j, fold * n + k
            first, second = row.select(axis - 1, a).clone(), row.select(axis - 1, b).clone()
            row.select(axis - 1, a).copy_(second)
            row.select(axis - 1, b).copy_(first)


def score_of_slot(group, run, slot):
    """Sum of |w| of everything written to and read from one slot."""
    total = 0.0
    n = len(group.places)
    for layer in group.writers:
        if isinstance(layer, EmbeddedLinear):
            total += sum(
                layer.weight[run, slot + f * n].abs().double().sum().item()
                for f in range(layer.out_folds)
            )
    for layer in group.readers:
        total += sum(
            layer.weight[run, :, slot + f * n].abs().double().sum().item()
            for f in range(layer.in_folds)
        )
    return total


def trade_blocks(group, run, j, k, size):
    """Let the blocks of `size` neurons that start in slots j * size and k * size trade places."""
    for offset in range(size):
        trade(group, run, j * size + offset, k * size + offset)


def greedy_by_search(model, run, top_k, reduce="sum"):
    """The paper's swap by brute force: trade, measure the whole cost again, trade back. Neurons
    stay in their head; then heads do the same."""
    for group in model.groups():
        if group.movable:
            size = len(group.places) // group.heads
            _trade_greedily(model, group, run, top_k, reduce, 1, size)
            if group.heads > 1:
                _trade_greedily(model, group, run, top_k, reduce, size, len(group.places))


def _trade_greedily(model, group, run, top_k, reduce, size, within):
    """Blocks of `size` neurons trade places within each `within` neurons."""
    count = len(group.places) // size
    scores = [
        sum(score_of_slot(group, run, block * size + offset) for offset in range(size))
        for block in range(count)
    ]
    for j in sorted(range(count), key=lambda block: -scores[block])[:top_k]:
        allowed = [k for k in range(count) if k * size // within == j * size // within]
        costs = {}
        for k in allowed:
            trade_blocks(group, run, j, k, size)
            costs[k] = distance_cost(model, run, reduce)
            trade_blocks(group, run, j, k, size)
        best = next(k for k in allowed if costs[k] <= min(costs.values()) + 1e-12)
        if costs[best] < costs[j] - 1e-12:
            trade_blocks(group, run, j, best, size)


def keeps_heads(order, heads):
    """Whether an arrangement keeps the neurons of every head together."""
    size = len(order) // heads
    blocks = [order[first : first + size] for first in range(0, len(order), size)]
    return all(len({neuron // size for neuron in block}) == 1 for block in blocks)


def optimal_by_search(model, run, reduce="sum", skipped=()):
    """Every row in turn takes the best of all its arrangements that keep heads together."""
    for group in model.groups():
        if group.name in skipped:
            continue
        n = len(group.places)
        best, lowest = None, distance_cost(model, run, reduce) - 1e-12
        saved = model.pick(run)
        for order in itertools.permutations(range(n)):
            if not keeps_heads(order, group.heads):
                continue
            arranged = saved.pick(0)
            arrange(next(g for g in arranged.groups() if g.name == group.name), 0, order)
            cost = distance_cost(arranged, 0, reduce)
            if cost < lowest:
                best, lowest = order, cost
        if best is not None:
            arrange(group, run, best)


def arrange(group, run, order):
    """Put neuron order[slot] into every slot of one run."""
    for tensor, axis, folds in group.axes():
        row = tensor[run].detach()
        n = row.shape[axis - 1] // folds
        index = torch.cat([torch.as_tensor(order) + f * n for f in range(folds)])
        row.copy_(row.index_select(axis - 1, index))
