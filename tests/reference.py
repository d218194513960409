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


def line(n):
    return bimt.line(n).double()


class Stream(bimt.EmbeddedModel):
    """An architecture of its own: input -> stream -> a row of two folds -> stream -> output."""

    def __init__(self, n_in=3, width=4, hidden=3, n_out=2, runs=1, seed=0):
        draw = {"runs": runs, "generator": generator(seed)}
        first, stream, row, last = map(line, (n_in, width, hidden, n_out))
        embed = bimt.EmbeddedLinear(first, stream, **draw)
        up = bimt.EmbeddedLinear(stream, row, out_folds=2, **draw)
        down = bimt.EmbeddedLinear(row, stream, in_folds=2, **draw)
        super().__init__([embed, up, down, bimt.EmbeddedLinear(stream, last, **draw)])
        self.double()

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


class Gated(bimt.EmbeddedModel):
    """Two layers in parallel between the same rows, and outputs of two folds."""

    def __init__(self, n_in=3, hidden=4, n_out=2, runs=1, seed=0):
        draw = {"runs": runs, "generator": generator(seed)}
        first, row, last = map(line, (n_in, hidden, n_out))
        gate, up = (bimt.EmbeddedLinear(first, row, **draw) for _ in range(2))
        super().__init__([gate, up, bimt.EmbeddedLinear(row, last, out_folds=2, **draw)])
        self.double()

    def rows(self, x):
        gate, up, _ = self.layers
        x = self.read_inputs(x)
        hidden = torch.sigmoid(gate(x)) * up(x)
        return [hidden, self.write_outputs(hidden)]

    def wires(self):
        gate, up, down = self.layers
        return [(gate, "input", "A1"), (up, "input", "A1"), (down, "A1", "output")]


def ring(n):
    """Places of `n` neurons on a circle."""
    angle = 2 * torch.pi * bimt.line(n)
    return torch.cat([angle.cos(), angle.sin()], 1)


@st.composite
def models(draw, most=5, max_runs=3, kinds=("plain", "folds", "tokens", "ring", "stream", "gated")):
    """Small networks of every kind, in double precision."""
    kind, n = draw(st.sampled_from(kinds)), st.integers(1, most)
    runs, seed = draw(st.integers(1, max_runs)), draw(st.integers(0, 1000))
    if kind == "stream":
        return Stream(draw(n), draw(n), draw(n), draw(n), runs, seed)
    if kind == "gated":
        return Gated(draw(n), draw(n), draw(n), runs, seed)
    shape = draw(st.lists(n, min_size=2, max_size=4))
    folds = draw(st.integers(1, 3)) if kind in ("folds", "tokens") else 1
    return bimt.EmbeddedMLP(
        (shape[0] * folds, *shape[1:]),
        runs,
        in_folds=folds,
        embedding=(draw(n), shape[0]) if kind == "tokens" else None,
        places=[ring(n).double() if kind == "ring" else line(n) for n in shape],
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


def plain_network(*shape):
    """nn.Linear layers with SiLU between them."""
    pairs = ((nn.Linear(*ends), nn.SiLU()) for ends in itertools.pairwise(shape))
    return nn.Sequential(*list(itertools.chain(*pairs))[:-1])


def train_plainly(network, x, y, *, steps, lr, phases, A, y0, swap_every=0, top_k=0):
    """The paper's training of one network of nn.Linear layers on mean squared error, in place, and
    written without bimt_utils. phases: {first step: (lamb, whether biases pay)}. Neurons of the
    first and last row take their column of x and y along; returns x and y."""
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    distances = [
        [[abs((j + 0.5) / m - (i + 0.5) / n) for i in range(n)] for j in range(m)]
        for m, n in (layer.weight.shape for layer in layers)
    ]
    lengths = [torch.tensor(rows, dtype=x.dtype) for rows in distances]
    x, y = x.clone(), y.clone()
    prices = [A * length + y0 for length in lengths]
    adam = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        if step in phases:
            lamb, biases_pay = phases[step]
        objective = nn.functional.mse_loss(network(x), y)
        for layer, price in zip(layers, prices, strict=True):
            objective = objective + lamb * (layer.weight.abs() * price).sum()
            if biases_pay:
                objective = objective + lamb * y0 * layer.bias.abs().sum()
        adam.zero_grad()
        objective.backward()
        adam.step()
        if swap_every and (step + 1) % swap_every == 0:
            swap_plainly(layers, lengths, x, y, top_k)
    return x, y


@torch.no_grad()
def swap_plainly(layers, lengths, x, y, top_k):
    """The paper's swaps in a network of nn.Linear layers: trade, measure all wires, trade back."""
    rows = [[(x, 1)], *([(layer.weight, 0), (layer.bias, 0)] for layer in layers)]
    rows[-1].append((y, 1))
    for row, layer in zip(rows, layers, strict=False):
        row.append((layer.weight, 1))

    def trade(row, j, k):
        for tensor, axis in row:
            order = list(range(tensor.shape[axis]))
            order[j], order[k] = k, j
            tensor.copy_(tensor.index_select(axis, torch.tensor(order)))

    def cost_after(row, j, k):
        trade(row, j, k)
        pairs = zip(layers, lengths, strict=True)
        cost = sum((layer.weight.abs() * length).sum().item() for layer, length in pairs)
        trade(row, j, k)
        return cost

    weights = [layer.weight for layer in layers]
    for row in rows:
        sizes = [t.abs().sum(1 - axis) for t, axis in row if any(t is w for w in weights)]
        score = sum(sizes).tolist()
        for j in sorted(range(len(score)), key=lambda slot: -score[slot])[:top_k]:
            costs = [cost_after(row, j, k) for k in range(len(score))]
            if min(costs) < costs[j] - 1e-12:
                trade(row, j, costs.index(min(costs)))


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
    for tensor, axis, folds in group.axes:
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
        for (layer, axis), slot in itertools.product(group.ends, range(n)):
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
                before = graph.get_edge_data((read, i), (written, j), {"weight": 0})
                graph.add_edge((read, i), (written, j), weight=before["weight"] + weight)
    return graph


def live_by_paths(model, run):
    """The graph of the neurons on a path from an input that is not zero to an output."""
    graph = graph_by_loops(model, run)
    starts, ends = ({node for node in graph if node[0] == end} for end in ("input", "output"))
    if model.embedding is not None:
        starts = {(row, i) for row, i in starts if model.embedding[run, :, i].any()}
    fed = starts.union(*(nx.descendants(graph, node) for node in starts))
    return graph.subgraph(fed & ends.union(*(nx.ancestors(graph, node) for node in ends)))
