"""Slow, plain implementations that the tests and the benchmark compare with, and small models."""

import itertools
import sys

import networkx as nx
import torch
from hypothesis import strategies as st
from torch import nn

import bimt_utils as bimt


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- small models


class Stream(bimt.EmbeddedModel):
    """An architecture of its own: input -> stream -> a row of two folds -> stream -> output."""

    def __init__(self, n_in=3, width=4, hidden=3, n_out=2, runs=1, seed=0):
        draw = {"runs": runs, "generator": generator(seed)}
        first, stream, row, last = map(bimt.line, (n_in, width, hidden, n_out))
        embed = bimt.EmbeddedLinear(first, stream, **draw)
        up = bimt.EmbeddedLinear(stream, row, out_folds=2, **draw)
        down = bimt.EmbeddedLinear(row, stream, in_folds=2, **draw)
        super().__init__([embed, up, down, bimt.EmbeddedLinear(stream, last, **draw)])

    def rows(self, x):
        embed, up, down, _ = self.layers
        stream = embed(self.read_inputs(x))
        row = torch.tanh(up(stream))
        added = stream + down(row)
        return [stream, row, added, self.write_outputs(added)]

    def wires(self):
        embed, up, down, output = self.layers
        ends = [(embed, "input", "Embed"), (output, "Res1", "output")]
        row = [(up, "Embed", "A1"), (None, "Embed", "Res1"), (down, "A1", "Res1")]
        return [ends[0], *row, ends[1]]


def ring(n):
    """Places of `n` neurons on a circle."""
    angle = 2 * torch.pi * bimt.line(n)
    return torch.cat([angle.cos(), angle.sin()], 1)


@st.composite
def models(draw, most=5, max_runs=3, kinds=("plain", "folds", "tokens", "ring", "stream")):
    """Small networks of every kind, in double precision."""
    kind, n = draw(st.sampled_from(kinds)), st.integers(1, most)
    runs, seed = draw(st.integers(1, max_runs)), draw(st.integers(0, 1000))
    if kind == "stream":
        return Stream(draw(n), draw(n), draw(n), draw(n), runs, seed).double()
    shape = draw(st.lists(n, min_size=2, max_size=4))
    folds = draw(st.integers(1, 3)) if kind in ("folds", "tokens") else 1
    return bimt.EmbeddedMLP(
        (shape[0] * folds, *shape[1:]),
        runs,
        in_folds=folds,
        embedding=(draw(n), shape[0]) if kind == "tokens" else None,
        places=[ring(n) for n in shape] if kind == "ring" else None,
        frozen=draw(st.sets(st.integers(0, len(shape) - 1), max_size=1)),
        generator=generator(seed),
    ).double()


@torch.no_grad()
def thinned(model, seed, share=0.6):
    """The same model with this share of its parameters set to zero."""
    for p in model.parameters():
        p[torch.rand(p.shape, generator=generator(seed)) < share] = 0
    return model


def some_input(model, batch=7):
    folds = model.layers[0].in_folds
    if model.embedding is not None:
        return torch.randint(model.embedding.shape[1], (batch, folds), generator=generator(1))
    return torch.randn(batch, folds * model.in_perm.shape[1], generator=generator(1)).double()


def same_state(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def raising(error, call, function):
    """`function`, but its call number `call` raises."""
    calls = itertools.count(1)

    def wrapped(model):
        if next(calls) == call:
            raise error
        return function(model)

    return wrapped


def interrupted(call, place, within):
    """call() with Ctrl-C at the `place`-th line that it executes in functions of bimt_utils whose
    name starts with `within`: what it returns, or None if the interrupt came through; and whether
    there was such a line at all."""
    lines = itertools.count(1)

    def trace(frame, event, _):
        code = frame.f_code
        ours = code.co_filename.endswith("bimt_utils.py") and code.co_qualname.startswith(within)
        if ours and code.co_name[0] != "<" and event == "line" and next(lines) == place:
            raise KeyboardInterrupt
        return trace if ours else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call(), next(lines) > place
    except KeyboardInterrupt:
        return None, True
    finally:
        sys.settrace(before)


# ---------------------------------------------------------------- forward, cost and training


def plain_forward(model, run, x):
    """One run of an MLP, with the permutations applied to the activations."""
    if model.embedding is not None:
        x = model.embedding[run][x].flatten(1)
    else:
        x = x.unflatten(1, (model.layers[0].in_folds, -1))[:, :, model.in_perm[run]].flatten(1)
    for layer in model.layers:
        x = nn.functional.linear(x, layer.weight[run], layer.bias[run])
        x = x if layer is model.layers[-1] else nn.functional.silu(x)
    return x[:, model.out_perm[run].argsort()]


def cost_by_loops(model, run, A, y0, A_last=None, biases=True, reduce="sum"):
    """The connection cost of one run, one weight at a time."""
    paid = []
    for layer in model.layers:
        slope = A if A_last is None or layer is not model.layers[-1] else A_last
        a, b, weights = layer.in_places.tolist(), layer.out_places.tolist(), []
        for j, i in itertools.product(*map(range, layer.weight.shape[1:])):
            distance = sum(abs(p - q) for p, q in zip(b[j % len(b)], a[i % len(a)], strict=True))
            weights.append(abs(layer.weight[run, j, i].item()) * (slope * distance + y0))
        paid += [weights] + [[y0 * abs(value) for value in layer.bias[run].tolist()]] * biases
    if model.embedding is not None:
        paid.append([y0 * abs(value) for value in model.embedding[run].flatten().tolist()])
    return sum(sum(part) / (len(part) if reduce == "mean" else 1) for part in paid)


def train_by_loop(model, loss, prices, *, steps, lr, swap_every, top_k, exact=False):
    """Train in place on loss(model), a number, plus prices times sizes. prices(step) has one tensor
    for every parameter that trains; like Adam's moments, they belong to slots."""
    tensors = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(tensors, lr=lr, weight_decay=0.0)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in tensors]
    for step in range(steps):
        objective, priced = loss(model), list(zip(tensors, prices(step), strict=True))
        if not exact:
            objective = objective + sum((c * p.abs()).sum() for p, c in priced)
        adam.zero_grad()
        objective.backward()
        if not exact:
            adam.step()
        for (p, c), (m, v) in zip(priced, moments, strict=True) if exact else ():
            m[:] = 0.9 * m + 0.1 * p.grad
            v[:] = 0.999 * v + 0.001 * (p.grad + c * p.detach().sign()) ** 2
            d = torch.maximum((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8, c)
            q = p.detach() - lr * m / (1 - 0.9 ** (step + 1)) / d
            p.detach()[:] = q.sign() * (q.abs() - lr * c / d).clamp(min=0)
        for run in range(model.runs) if (step + 1) % swap_every == 0 else ():
            greedy_by_search(model, run, top_k)


# ---------------------------------------------------------------- swaps


def groups_of(model):
    """Every group once, from input to output; the stages of a stream share theirs."""
    return list(dict.fromkeys(model.groups().values()))


def all_axes(model):
    """Every (id of a tensor, axis) along which neurons lie: all but runs and tokens."""
    tensors = model.state_dict(keep_vars=True).values()
    axes = [(t, axis) for t in tensors for axis in range(1, t.ndim)]
    return [(id(t), axis) for t, axis in axes if t is not model.embedding or axis == 2]


def distance_cost(model, run, reduce="sum"):
    """The distance part of the connection cost of one run, in double precision."""
    lengths = [m.weight[run].detach().double().abs() * m.distance.double() for m in model.layers]
    return sum((length.mean() if reduce == "mean" else length.sum()).item() for length in lengths)


def arrange(group, run, order):
    """Put neuron order[slot] into every slot of one run, fold by fold."""
    for tensor, axis, folds in group.axes():
        row = tensor[run].detach()
        n = row.shape[axis - 1] // folds
        index = torch.cat([torch.as_tensor(order) + f * n for f in range(folds)])
        row.copy_(row.index_select(axis - 1, index))


def arrange_at_random(model, seed=0):
    for group, run in itertools.product(groups_of(model), range(model.runs)):
        arrange(group, run, torch.randperm(len(group.places), generator=generator(seed + run)))


def greedy_by_search(model, run, top_k, reduce="sum"):
    """The paper's swap by brute force: trade, measure the whole cost again, trade back."""
    for group in groups_of(model):
        n = len(group.places) if group.movable else 0
        scores = torch.zeros(n).double()
        for (layer, axis, _), slot in itertools.product(group.layers(), range(n)):
            weights = layer.weight[run].detach().double().abs()
            scores[slot] += (weights if axis == 1 else weights.T)[slot::n].sum()
        for j in scores.argsort(descending=True, stable=True)[:top_k].tolist():
            trades = [[{j: k, k: j}.get(slot, slot) for slot in range(n)] for k in range(n)]
            costs = []
            for trade in trades:
                arrange(group, run, trade)
                costs.append(distance_cost(model, run, reduce))
                arrange(group, run, trade)
            best = next(k for k in range(n) if costs[k] <= min(costs) + 1e-12)
            if costs[best] < costs[j] - 1e-12:
                arrange(group, run, trades[best])


# ---------------------------------------------------------------- structure


def graph_by_loops(model, run):
    """All neurons, as (row, slot), and all wires that are not zero."""
    graph, size = nx.DiGraph(), {name: len(row.places) for name, row in model.groups().items()}
    for layer, read, written in model.wires():
        m, n = size[written], size[read]
        for j, i in itertools.product(range(m), range(n)):
            graph.add_nodes_from([(read, i), (written, j)])
            weight = layer.weight[run, j::m, i::n].abs().sum().item() if layer is not None else 0
            if weight or (layer is None and i == j):
                graph.add_edge((read, i), (written, j), weight=weight)
    return graph


def live_by_paths(model, run):
    """The graph of the neurons on a path from an input that is not zero to an output."""
    graph = graph_by_loops(model, run)
    starts, ends = ({node for node in graph if node[0] == end} for end in ("input", "output"))
    if model.embedding is not None:
        starts = {(row, i) for row, i in starts if model.embedding[run, :, i].any()}
    fed = starts.union(*(nx.descendants(graph, node) for node in starts))
    return graph.subgraph(fed & ends.union(*(nx.ancestors(graph, node) for node in ends)))
