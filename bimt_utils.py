"""Brain-Inspired Modular Training (BIMT) in one module.

Liu, Gan and Tegmark, "Seeing is Believing: Brain-Inspired Modular Training for Mechanistic
Interpretability", arXiv 2305.08746 (2023). "The paper" below is this one; "ours" marks what it
does not contain. BIMT has three ingredients:

1. Neurons have places. Each row of neurons (input, hidden, output) lies in the unit interval or
   the unit square, so every weight is a wire with a length.
2. Wires cost. Training minimises prediction loss + lamb * connection cost, and every weight w pays
   |w| * (A * distance + y0): an L1 penalty that grows with the length of the wire.
3. Neurons swap. Every `swap_every` steps, neurons of one row trade places where that shortens the
   wiring. The network computes the same function; gradient descent cannot make such moves.

Every model holds `runs` independent networks in one tensor (seeds, ablations, or both), because,
for networks this small, calling torch costs more than the arithmetic. A wrong argument raises a
ValueError that says what was expected, unless Python or torch rejects it first.

Glossary, paper -> here: lambda -> `lamb`; A -> `A`; y0, the distance between neighbouring rows ->
`y0`; d_ij -> `EmbeddedLinear.distance`; number of neurons tried per swap, k -> `top_k`; steps
between swaps, S -> `swap_every`; connection cost -> `connection_cost`.
"""

import copy
import io
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
import ipywidgets as widgets
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from IPython import get_ipython
from IPython.display import Pretty, display
from matplotlib.animation import FFMpegWriter, PillowWriter
from matplotlib.collections import LineCollection
from torch import nn


def _require(condition, expected, got):
    if not condition:
        raise ValueError(f"expected {expected}, got {got}")


def _require_finite(model):
    finite = all(p.isfinite().all() for p in model.parameters())
    _require(finite, "finite weights", "some that are not")


def _require_counts(least, **counts):
    for name, value in counts.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        fits = whole and value >= least
        _require(fits, f"{name} to be a whole number of at least {least}", repr(value))


# ---------------------------------------------------------------- places (paper, section 2)


def line(n):
    """Places of `n` neurons in a row, (n, 1): neuron i sits at (i + 1/2) / n."""
    _require_counts(1, n=n)
    return ((torch.arange(n) + 0.5) / n)[:, None]


# ---------------------------------------------------------------- models (paper, section 2)


class EmbeddedLinear(nn.Module):
    """`runs` linear layers between rows of neurons at `in_places` (n, d) and `out_places` (m, d).

    With `in_folds=2`, two blocks of inputs (two tokens, say) share the same n places: feature
    f * n + i sits at place i; `out_folds` does the same for outputs. `weight` (runs, out, in) and
    `bias` (runs, out) are drawn from `generator` as in `nn.Linear`; `distance` (out, in) is the
    Manhattan length of every wire.
    """

    def __init__(self, in_places, out_places, *, in_folds=1, out_folds=1, runs=1, generator=None):
        super().__init__()
        _require_counts(1, in_folds=in_folds, out_folds=out_folds, runs=runs)
        a, b = (torch.as_tensor(p).to(torch.get_default_dtype()) for p in (in_places, out_places))
        fits = a.ndim == b.ndim == 2 and a.shape[1:] == b.shape[1:] and a.numel() * b.numel()
        fits = fits and bool(a.isfinite().all() and b.isfinite().all())
        _require(fits, "finite places (n, d) and (m, d)", (a, b))
        self.in_folds, self.out_folds = in_folds, out_folds
        distance = (b[:, None] - a).abs().sum(-1).repeat(out_folds, in_folds)
        for name, buffer in {"in_places": a, "out_places": b, "distance": distance}.items():
            self.register_buffer(name, buffer.clone(), persistent=False)
        bound = 1 / math.sqrt(distance.shape[1])
        weight = torch.empty(runs, *distance.shape).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(runs, len(distance)).uniform_(-bound, bound, generator=generator)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        """(runs, batch, in) -> (runs, batch, out)."""
        return torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))


@dataclass(eq=False)
class NeuronGroup:
    """Neurons that trade places with each other. They are outputs of the layers `writers` (also
    of an embedding (runs, tokens, dim)) and inputs of the layers `readers`; the permutation buffer
    `label` (runs, n) rides along. A group that is not `movable` is never swapped."""

    writers: list = field(default_factory=list)
    readers: list = field(default_factory=list)
    label: torch.Tensor | None = None
    movable: bool = True

    @property
    def places(self):
        """Where the slots are, (n, d)."""
        return self.readers[0].in_places if self.readers else self.writers[-1].out_places

    def layers(self):
        """Every (layer, axis of its weight, folds) along which the neurons lie."""
        written = [m for m in self.writers if isinstance(m, EmbeddedLinear)]
        return [(m, 1, m.out_folds) for m in written] + [(m, 2, m.in_folds) for m in self.readers]

    def axes(self):
        """Every (tensor, axis, folds) that has to be permuted when the neurons move."""
        layers = self.layers()
        found = [(layer.weight, axis, folds) for layer, axis, folds in layers]
        found += [(layer.bias, 1, folds) for layer, axis, folds in layers if axis == 1]
        found += [(tensor, 2, 1) for tensor in self.writers if isinstance(tensor, torch.Tensor)]
        return found + ([] if self.label is None else [(self.label, 1, 1)])


class EmbeddedModel(nn.Module):
    """`runs` independent networks whose neurons have places: the base of every architecture.

    `layers` are its `EmbeddedLinear`s in forward order; the first reads the inputs, the last
    writes the outputs. A subclass defines two methods, and nothing else needs to know it:
    rows(x): the values of every row after the input, a list; last the outputs in task order
    wires(): a list of (layer, name of the row it reads, name of the row it writes) in forward
             order; (None, a, b) says that row b is the next stage of the residual stream a

    Integer buffers `in_perm` and `out_perm` (runs, n) tell which input feature or output sits in
    each slot. `embedding` is (runs, tokens, dim) or None; `frozen` holds numbers of rows.
    """

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        n_in, n_out = len(self.layers[0].in_places), len(self.layers[-1].out_places)
        self.register_buffer("in_perm", torch.arange(n_in).repeat(self.runs, 1))
        self.register_buffer("out_perm", torch.arange(n_out).repeat(self.runs, 1))
        self.register_parameter("embedding", None)
        self.frozen = ()

    @property
    def runs(self):
        """The number of independent networks."""
        return len(self.layers[0].weight)

    def forward(self, x):
        """Outputs in task order: the last of `rows(x)`."""
        return self.rows(x)[-1]

    def groups(self):
        """Row name -> `NeuronGroup`, from input to output; the stages of a stream share one."""
        groups, first = {}, {}  # first: stage of a stream -> its first stage
        for layer, read, written in self.wires():
            if layer is None:
                first[written] = first.get(read, read)
        for layer, read, written in self.wires():
            for name in (read, written):
                groups[name] = groups.get(name) or groups.get(first.get(name)) or NeuronGroup()
            if layer is not None:
                groups[read].readers.append(layer)
                groups[written].writers.append(layer)
        rows = list(groups.values())
        apart = rows[0] is not rows[-1]
        _require(apart, "inputs and outputs in groups of their own", "one group for both")
        rows[0].label, rows[-1].label = self.in_perm, self.out_perm
        rows[0].writers += [] if self.embedding is None else [self.embedding]
        for number in self.frozen:
            rows[number].movable = False
        return groups

    def pick(self, run):
        """A copy with one run (an int) or with several (a list of ints; repeats are allowed)."""
        wanted = torch.as_tensor(run)
        fits = wanted.ndim < 2 and wanted.numel() and wanted.dtype == torch.int64
        inside = fits and {*wanted.view(-1).tolist()} <= {*range(-self.runs, self.runs)}
        _require(inside, f"a run below {self.runs} or a list of such", run)
        twin = copy.deepcopy(self)
        for tensor in twin.state_dict(keep_vars=True).values():
            tensor.data = tensor.data[wanted.view(-1).to(tensor.device)]
        return twin

    def read_inputs(self, x, ndim=2):
        """Inputs in task order, of `ndim` axes or one more for runs in front -> (runs, ..., n),
        every feature moved to its slot."""
        x, folds = torch.as_tensor(x).to(self.layers[0].weight), self.layers[0].in_folds
        n, shared = folds * self.in_perm.shape[1], x.ndim == ndim
        fits = x.shape[-1:] == (n,) and (shared or (x.ndim == ndim + 1 and len(x) == self.runs))
        expected = f"x of {ndim} axes, the last {n}, or with {self.runs} runs in front"
        _require(fits, expected, tuple(x.shape))
        x = x.expand(self.runs, *x.shape) if shared else x
        moved = (self.in_perm.diff() != 1).any()  # false only for 0, 1, 2, ...
        return _rearranged(x, x.ndim - 1, self.in_perm, folds) if moved else x

    def write_outputs(self, values):
        """The last layer on (runs, batch, n), its outputs put back in task order."""
        layer, slots = self.layers[-1], self.out_perm.argsort(1)
        weight, bias = (_rearranged(p, 1, slots) for p in (layer.weight, layer.bias))
        return torch.baddbmm(bias[:, None], values, weight.transpose(1, 2))


class EmbeddedMLP(EmbeddedModel):
    """`runs` multilayer perceptrons with SiLU activations whose neurons have places.

    shape:     features per row, input to output, e.g. (4, 20, 20, 2)
    in_folds:  blocks of input features that share one row of places
    embedding: (tokens, dim) for token inputs, drawn from N(0, 1); in_folds * dim == shape[0]
    places:    one (n, d) tensor per row, default `line(n)`; the input row has shape[0] / in_folds
    frozen:    numbers of the rows that never swap (0 is the input)

    Rows are called "input", "A1", "A2", ..., "output". With an embedding, whose own columns move,
    `in_perm` tells which of the initial dimensions a slot now holds.
    """

    def __init__(self, shape, runs=1, *, in_folds=1, embedding=None, places=None, frozen=(),
                 generator=None):  # fmt: skip
        fits = isinstance(shape, tuple | list) and len(shape) > 1
        _require(fits, "a shape of at least two rows", shape)
        _require_counts(1, in_folds=in_folds, **{f"shape[{i}]": n for i, n in enumerate(shape)})
        counts = [shape[0] // in_folds, *shape[1:]]
        _require(counts[0] * in_folds == shape[0], f"in_folds to divide {shape[0]}", in_folds)
        places = [line(n) for n in counts] if places is None else list(places)
        _require([len(row) for row in places] == counts, f"places for rows of {counts}", places)
        fits = isinstance(frozen, tuple | list | set) and {*frozen} <= {*range(len(counts))}
        _require(fits, f"frozen to list rows below {len(counts)}", frozen)
        folds = [in_folds] + [1] * (len(counts) - 2)
        super().__init__(
            EmbeddedLinear(*ends, in_folds=f, runs=runs, generator=generator)
            for *ends, f in zip(places, places[1:], folds, strict=False)
        )
        self.shape, self.frozen = tuple(shape), tuple(frozen)
        if embedding is not None:
            fits = isinstance(embedding, tuple | list) and [*embedding[1:]] == counts[:1]
            _require(fits, f"embedding (tokens, {counts[0]})", embedding)
            _require_counts(1, tokens=embedding[0])
            drawn = torch.empty(runs, *embedding).normal_(generator=generator)
            self.embedding = nn.Parameter(drawn)

    def rows(self, x):
        """(batch, in) or (runs, batch, in) floats, or (batch, in_folds) integer tokens -> the
        values (runs, batch, n) of every row after the input, neuron by slot: hidden rows after
        their activation, then the outputs in task order."""
        rows = [self.read_inputs(x) if self.embedding is None else self._look_up(x)]
        for layer in self.layers[:-1]:
            rows.append(F.silu(layer(rows[-1])))
        return [*rows[1:], self.write_outputs(rows[-1])]

    def wires(self):
        names = ["input", *(f"A{i}" for i in range(1, len(self.layers))), "output"]
        return list(zip(self.layers, names, names[1:], strict=False))

    def _look_up(self, tokens):
        """Tokens (batch, folds) -> their embeddings side by side, (runs, batch, folds * dim)."""
        tokens, shape = torch.as_tensor(tokens, device=self.embedding.device), self.embedding.shape
        fraction = tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool
        folds = self.layers[0].in_folds
        fits = not fraction and tokens.ndim == 2 and tokens.shape[1] == folds
        _require(fits, f"integers (batch, {folds})", f"{tokens.dtype} {tuple(tokens.shape)}")
        known = ((tokens >= 0) & (tokens < shape[1])).all()
        _require(known, f"tokens from 0 to {shape[1] - 1}", tokens)
        found = self.embedding.index_select(1, tokens.long().flatten())
        return found.view(self.runs, len(tokens), folds * shape[2])


def _rearranged(tensor, axis, order, folds=1):
    """`tensor` (runs, ...) along `axis`, in every fold: slot s gets what is in slot order[r, s]."""
    n = order.shape[1]
    index = order if folds == 1 else torch.cat([order + f * n for f in range(folds)], 1)
    index = index.view(len(index), *[1] * (axis - 1), -1, *[1] * (tensor.ndim - axis - 1))
    return tensor.gather(axis, index.expand_as(tensor))


def _per_run(name, value, model, ndim=1):
    """`value`, a number or (runs,), finite and not negative, as a tensor of `ndim` axes, the first
    for runs."""
    value = torch.as_tensor(value)
    fits = value.shape in ((), (model.runs,)) and not value.is_complex()
    fits = fits and bool(((value >= 0) & (value < math.inf)).all())
    _require(fits, f"{name}, finite and not negative, as a number or ({model.runs},)", value)
    return value.to(model.layers[0].weight).view(-1, *[1] * (ndim - 1))


# ---------------------------------------------------------------- cost (paper, section 2)


def connection_cost(model, A=1.0, y0=0.1, *, A_last=None, biases=True, reduce="sum"):
    """Connection cost of every run, (runs,): every weight pays |w| * (A * distance + y0), every
    bias and every entry of an embedding y0 times its size.

    `A`, the price per unit length, and `y0`, a fixed price per connection, are numbers or (runs,),
    finite and not negative. `A_last` replaces A in the last layer. With `biases=False` biases are
    free. `reduce="mean"` averages within each tensor, as the authors do for larger networks.
    """
    _require(reduce in ("sum", "mean"), "reduce to be 'sum' or 'mean'", repr(reduce))
    A, y0 = _per_run("A", A, model, ndim=3), _per_run("y0", y0, model, ndim=3)
    A_last = A if A_last is None else _per_run("A_last", A_last, model, ndim=3)
    slopes = [A] * (len(model.layers) - 1) + [A_last]
    paid = [layer.weight.abs() * (a * layer.distance + y0)
            for layer, a in zip(model.layers, slopes, strict=True)]  # fmt: skip
    paid += [layer.bias.abs() * y0[:, 0] for layer in model.layers if biases]
    if model.embedding is not None:
        paid.append(model.embedding.abs() * y0)
    return sum(getattr(part.flatten(1), reduce)(1) for part in paid)


# ---------------------------------------------------------------- swaps (paper, algorithm 1)


@torch.no_grad()
def swap_neurons(model, top_k=5, *, reduce="sum", mask=None):
    """Let neurons trade places where that shortens the wiring; outputs do not change.

    Row by row from input to output, the slots are ranked once by the sum of |w| of their neuron's
    wires. For each of the first `top_k` slots, its neuron trades places with the neuron of the
    group that shortens the wiring most, if any does.

    `mask` (runs,) tells which networks are treated, default all; `reduce` should be the one of
    `connection_cost`. Returns by how much the sum (or mean) of |w| * distance fell, (runs,).
    """
    _require(reduce in ("sum", "mean"), "reduce to be 'sum' or 'mean'", repr(reduce))
    _require_counts(0, top_k=top_k)
    mask = torch.ones(model.runs, dtype=torch.bool) if mask is None else torch.as_tensor(mask).cpu()
    fits = mask.dtype == torch.bool and mask.shape == (model.runs,)
    _require(fits, f"a boolean mask ({model.runs},)", mask)
    _require_finite(model)
    fall = np.zeros(model.runs)
    for group in dict.fromkeys(model.groups().values()):
        both = {id(m) for m in group.writers} & {id(m) for m in group.readers}
        _require(not both, "every group at one end of a layer", "one at both")
        if group.movable:
            table, score = _slot_costs(group, reduce)
            order = _greedy(table, score, top_k)
            run, slot = np.arange(model.runs)[:, None], np.arange(order.shape[1])
            order[~mask.numpy()] = slot
            fall += (table[run, slot, slot] - table[run, order, slot]).sum(1)
            if (order != slot).any():
                _rearrange(group, torch.from_numpy(order).to(score.device))
    return torch.from_numpy(fall).to(model.layers[0].weight)


def _slot_costs(group, reduce):
    """With the other groups held fixed, the cost is linear in where the neurons of one group sit:
    C[neuron, slot] = sum over layers of |w|[neuron] @ price[slot]. Returns C (runs, n, n) and the
    sum of |w| of every neuron's wires (runs, n)."""
    n, table, score = len(group.places), 0.0, 0.0
    for layer, axis, _ in group.layers():
        size, price = layer.weight.double().abs(), layer.distance.double()
        price = price / (price.numel() if reduce == "mean" else 1)
        if axis == 2:
            size, price = size.transpose(1, 2), price.T
        size = size.unflatten(1, (-1, n)).sum(1)  # folds share their places
        table, score = table + size @ price[:n].T, score + size.sum(2)
    return table.cpu().numpy(), score


def _greedy(table, score, top_k):
    """The neuron that ends in each slot, (runs, n). Trading the neurons of slots j and k changes
    the cost by C[n_j, k] + C[n_k, j] - C[n_j, j] - C[n_k, k]."""
    run, n = np.arange(len(table)), table.shape[1]
    ranked = score.argsort(dim=1, descending=True, stable=True)[:, :top_k].cpu().numpy()
    order = np.tile(np.arange(n), (len(table), 1))
    rounding = 1e-12 * table.trace(axis1=1, axis2=2)[:, None]  # of the whole cost
    for slot in ranked.T:
        cost, mover = table[run[:, None], order, np.arange(n)], order[run, slot]
        change = table[run, mover] + table[run[:, None], order, slot[:, None]]
        change -= cost + cost[run, slot][:, None]
        change[run, slot] = 0  # staying is one of the choices
        best = change.min(1, keepdims=True)
        first = (change <= best + rounding).argmax(1)
        other = np.where((best < -rounding)[:, 0], first, slot)
        order[run, slot], order[run, other] = order[run, other], mover
    return order


def _rearrange(group, order):
    """Put neuron order[r, s] of every run r into slot s, in every tensor that knows the group."""
    moved = [(t, _rearranged(t, axis, order, folds)) for t, axis, folds in group.axes()]
    try:
        for tensor, values in moved:
            tensor.copy_(values)
    except BaseException:  # an interrupt half-way would leave a network that computes nonsense
        for tensor, values in moved:
            tensor.copy_(values)
        raise


# ---------------------------------------------------------------- training (paper, section 3)


def mse_loss(outputs, targets):
    """Mean squared error of every run, (runs,), of outputs (runs, batch, out) for targets of the
    same shape or (batch, out)."""
    return (outputs - _per_output(targets, outputs.shape)).square().flatten(1).mean(1)


def cross_entropy(outputs, classes):
    """Cross-entropy of every run, (runs,), of outputs (runs, batch, out) for classes, integers
    (batch,) or (runs, batch)."""
    wanted = _classes(classes, outputs)
    each = F.cross_entropy(outputs.flatten(0, 1), wanted.flatten(), reduction="none")
    return each.view(len(outputs), -1).mean(1)


def accuracy(outputs, classes):
    """Share of correct answers of every run, (runs,); arguments as in `cross_entropy`."""
    return (outputs.argmax(2) == _classes(classes, outputs)).to(outputs.dtype).mean(1)


def _classes(classes, outputs):
    classes, n = _per_output(classes, outputs.shape[:2]).to(outputs.device), outputs.shape[2]
    known = classes.dtype == torch.int64 and bool(((classes >= 0) & (classes < n)).all())
    _require(known, f"classes, int64, from 0 to {n - 1}", classes)
    return classes


def _per_output(targets, shape):
    fits = isinstance(targets, torch.Tensor) and targets.shape in (shape, shape[1:])
    got = f"{type(targets).__name__} {tuple(getattr(targets, 'shape', ()))}"
    _require(fits, f"targets, a tensor {tuple(shape)} or {tuple(shape[1:])}", got)
    return targets.expand(shape)


@dataclass
class History:
    """What `train` saw of `model`: `history["loss"]`, `["cost"]`, `["objective"]` (loss + lamb *
    cost) and every metric, each (logs, runs), at `history.steps`. `phases` are the steps after 0 at
    which lamb changes; `snapshots` holds step -> `state_dict`, on the CPU; `done` counts the steps
    made. `model` is a copy, which `at` fills with a snapshot."""

    model: EmbeddedModel
    phases: list
    log: list = field(default_factory=list)
    snapshots: dict = field(default_factory=dict)
    done: int = 0

    @property
    def steps(self):
        return [step for step, _ in self.log]

    def __getitem__(self, name):
        _require(self.log and name in self.log[0][1], "the name of a logged curve", repr(name))
        return torch.stack([values[name] for _, values in self.log])

    def at(self, step):
        """The networks at the snapshot nearest to `step`: always the same object, with other
        weights."""
        nearest = min(self.snapshots, key=lambda kept: abs(kept - step))
        self.model.load_state_dict(self.snapshots[nearest])
        return self.model

    def _keep(self, step, model):
        state = {name: t.cpu().clone() for name, t in model.state_dict().items()}
        self.snapshots.setdefault(step, state)  # an interrupt may come before `done` is counted


def train(model, loss_fn, *, steps, lr, lamb, cost=connection_cost, swap=swap_neurons,
          swap_every=200, exact=False, metrics=None, snapshots=1, label="training"):  # fmt: skip
    """Minimise loss + lamb * cost with swaps (the paper); returns a `History`.

    loss_fn:    loss_fn(model) -> (runs,)
    lamb:       a number or a tensor (runs,), or phases [(fraction of training, value), ...], the
                first from fraction 0
    cost:       cost(model) -> (runs,), linear in the sizes of the parameters, or phases of such
    swap:       swap(model), called after every `swap_every` steps (0: never); it may change the
                parameters in place, and Adam's moments stay with the slots
    exact:      whether to take the proximal step (ours), which reaches exact zeros, a boolean or
                (runs,): see `PricedAdam`
    metrics:    name -> metric(model) -> (runs,), evaluated at up to 101 steps, without gradients
    snapshots:  number of snapshots after the first

    `functools.partial` gives `cost` and `swap` their arguments. The model is trained in place.
    Ctrl-C returns what there is; an exception carries it as `error.history`. A loss that is not
    finite raises FloatingPointError, which names run and step.
    """
    _require_counts(1, steps=steps, snapshots=snapshots)
    _require_counts(0, swap_every=swap_every)
    _require(isinstance(lr, int | float) and 0 < lr < math.inf, "lr finite and above 0", lr)
    lambs, costs = _phases("lamb", lamb, steps), _phases("cost", cost, steps)
    lambs = {start: _per_run("lamb", value, model) for start, value in lambs.items()}
    history = History(copy.deepcopy(model), list(lambs)[1:])
    optimizer, began = PricedAdam(model, lr, exact), time.perf_counter()
    # once a block of nearly 32 MiB is freed, glibc keeps freed memory for the next step to use
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    logged, filmed = ({round(k * steps / n) for k in range(n + 1)} for n in (100, snapshots))
    shown = display(Pretty(label), display_id=True) if get_ipython() else None
    try:
        for step in range(steps + 1):
            if step in lambs or step in costs:
                lamb, cost = lambs.get(step, lamb), costs.get(step, cost)
                optimizer.prices = _prices(model, cost, lamb)
            loss = loss_fn(model)
            _check_loss(model, loss, step)
            if step in logged:
                history.log.append((step, _measured(model, loss, cost, lamb, metrics or {})))
                if shown:
                    shown.update(Pretty(f"{label}: {step:,} of {steps:,} steps"))
            if step in filmed:
                history._keep(step, model)
            if step == steps:
                break
            grads = torch.autograd.grad(loss.sum(), optimizer.parameters, materialize_grads=True)
            optimizer.step(grads)
            history.done = step + 1
            if swap_every and history.done % swap_every == 0:
                swap(model)
        text = f"{label}: {steps:,} steps, {time.perf_counter() - began:.1f} s"
        shown.update(Pretty(text)) if shown else print(text)
    except BaseException as error:
        history._keep(history.done, model)
        error.history = history
        if not isinstance(error, KeyboardInterrupt):
            raise
        print(f"interrupted after {history.done} of {steps} steps; the history has what there is")
    return history


class PricedAdam:
    """Adam for loss + sum of c |p|, with a price c >= 0 for every entry p of a parameter. With g
    the gradient of the loss alone, a step is

        h = g + c sign p                m <- b1 m + (1 - b1) h       v <- b2 v + (1 - b2) h^2
        d = sqrt(v_hat) + eps           p <- p - lr m_hat / d

    exact=False, the paper's subgradient step, hovers around zero. Its proximal form, exact=True
    (ours), reaches it: m averages g instead of h, d is at least c, and then all p shrink,
    p <- sign(p) max(|p| - lr c / d, 0). It is at rest where |g| <= c for p = 0 and g = -c sign p
    elsewhere. `exact` is a boolean or one per run, (runs,). `prices` is one vector, the c of all
    parameters that train; it is 0 until set.
    """

    def __init__(self, model, lr, exact=False):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.betas, self.eps, self.steps = lr, (0.9, 0.999), 1e-8, 0
        self.p = nn.utils.parameters_to_vector(self.parameters).detach()
        nn.utils.vector_to_parameters(self.p, self.parameters)  # now they are parts of self.p
        self.prices, self.m, self.v, *self.scratch = torch.zeros_like(self.p).repeat(6, 1)
        exact = torch.as_tensor(exact, device=self.p.device)
        fits = exact.dtype == torch.bool and exact.shape in ((), (model.runs,))
        _require(fits, f"exact to be a boolean or one per run, ({model.runs},)", exact)
        each, self.any_exact = exact.to(self.p).expand(model.runs), bool(exact.any())
        self.exact = torch.cat([each.repeat_interleave(p[0].numel()) for p in self.parameters])

    @torch.no_grad()
    def step(self, grads):
        """`grads` are the gradients of the loss, one for each of `parameters`."""
        self.steps += 1
        (b1, b2), c, p, (g, h, d) = self.betas, self.prices, self.p, self.scratch
        torch.cat([grad.flatten() for grad in grads], out=g)
        torch.sign(p, out=h).mul_(c).add_(g)
        self.v.mul_(b2).addcmul_(h, h, value=1 - b2)
        torch.sqrt(self.v, out=d).div_((1 - b2**self.steps) ** 0.5).add_(self.eps)
        if self.any_exact:
            h.lerp_(g, self.exact)
            floor = torch.mul(c, self.exact, out=g)  # the prices that shrink; g is used up
            d.clamp_(min=floor)
        self.m.lerp_(h, 1 - b1)
        p.addcdiv_(self.m, d, value=-self.lr / (1 - b1**self.steps))
        if self.any_exact:
            shrink = floor.mul_(self.lr).div_(d)
            p -= torch.abs(p, out=h).clamp_(max=shrink).copysign_(p)


def _prices(model, cost, lamb):
    """lamb times what `cost` charges per unit of size, one vector for all parameters that train. A
    weighted L1 is linear in |p|, so its prices are its gradient where all parameters are 1."""
    ones, paid = copy.deepcopy(model), cost(model)
    _require_per_run(model, {"cost(model)": paid})
    for p in ones.parameters():
        p.requires_grad_().data.fill_(1)
    slopes = torch.autograd.grad(cost(ones).sum(), list(ones.parameters()), materialize_grads=True)
    pairs = list(zip(slopes, model.parameters(), strict=True))
    linear = torch.allclose(sum((c * p.abs()).flatten(1).sum(1) for c, p in pairs), paid, rtol=1e-3)
    fits = linear and all((c >= 0).all() for c in slopes)
    _require(fits, "a cost that is a weighted sum of sizes, no weight negative", cost)
    trained = [c * lamb.view(-1, *[1] * (c.ndim - 1)) for c, p in pairs if p.requires_grad]
    return nn.utils.parameters_to_vector(trained)


def _phases(name, phases, steps):
    """[(fraction, value), ...] or one value for all time -> {first step: value, ...}."""
    phases = phases if isinstance(phases, list | tuple) else [(0, phases)]
    pairs = phases and all(isinstance(phase, list | tuple) and len(phase) == 2 for phase in phases)
    _require(pairs, f"{name}, not in a list, or phases [(fraction, {name}), ...]", phases)
    starts = [fraction for fraction, _ in phases]
    rising = starts == sorted({*starts}) and starts[0] == 0 and starts[-1] <= 1
    _require(rising, f"phases of {name} at rising fractions from 0 to 1", starts)
    return {int(fraction * steps + 1e-9): value for fraction, value in phases}


def _require_per_run(model, values):
    for name, value in values.items():
        fits = isinstance(value, torch.Tensor) and value.shape == (model.runs,)
        _require(fits, f"{name} to be a tensor ({model.runs},)", value)


def _check_loss(model, loss, step):
    _require_per_run(model, {"loss_fn(model)": loss})
    _require(loss.requires_grad, "a loss with a gradient", "one without")
    if not loss.isfinite().all():
        run = (~loss.isfinite()).nonzero().flatten().tolist()
        raise FloatingPointError(f"the loss is not finite in run {run} at step {step}")


@torch.no_grad()
def _measured(model, loss, cost, lamb, metrics):
    wiring = cost(model)
    values = {"loss": loss, "cost": wiring, "objective": loss + lamb * wiring}
    _require(not {*values} & {*metrics}, "metrics with names of their own", [*metrics])
    values |= {name: metric(model) for name, metric in metrics.items()}
    _require_per_run(model, values)
    return {name: value.detach().cpu() for name, value in values.items()}


# ---------------------------------------------------------------- structure (ours)
# These functions look at what is not zero: prune first, or train with exact=True.


@torch.no_grad()
def prune(model, threshold):
    """A copy of `model` whose weights, biases and embedding entries of size up to `threshold`, a
    number or (runs,), are zero."""
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p[p.abs() <= _per_run("threshold", threshold, model, p.ndim)] = 0
    return twin


@torch.no_grad()
def prune_threshold(model, loss_fn, tolerance=0.05):
    """For every run the largest of 81 thresholds from 1e-4 to 1, (runs,), up to which pruning
    raises its loss, loss_fn(model) -> (runs,), by no more than the share `tolerance`; 0 where even
    the smallest raises it more."""
    loss = loss_fn(model)
    _require_per_run(model, {"loss_fn(model)": loss})
    allowed = loss * (1 + _per_run("tolerance", tolerance, model))
    _require(allowed.isfinite().all(), "a finite loss in every run", loss)
    best, fine = torch.zeros_like(allowed), torch.ones_like(allowed, dtype=torch.bool)
    for threshold in np.geomspace(1e-4, 1, 81).tolist():
        fine &= loss_fn(prune(model, threshold)) <= allowed
        best[fine] = threshold
        if not fine.any():
            break
    return best


def _links(model):
    """All of `wires()`, as (row read, row written, sum of |w| over folds (runs, written, read),
    mask of the wires); a neuron of a stream leads to itself at the next stage, with weight 0."""
    _require_finite(model)
    for layer, read, written in model.wires():
        if layer is None:
            same = torch.eye(len(model.groups()[read].places), device=model.in_perm.device)
            same = same.expand(model.runs, -1, -1)
            yield read, written, 0 * same, same > 0
        else:
            size = layer.weight.detach().abs().unflatten(2, (layer.in_folds, -1)).sum(2)
            size = size.unflatten(1, (layer.out_folds, -1)).sum(1)
            yield read, written, size, size > 0


def live_neurons(model):
    """Which neurons lie on a path from input to output, row name -> mask (runs, n), slot by slot.
    A neuron that no input reaches is not live, nor is an input whose embedding is zero."""
    links = list(_links(model))
    inputs, outputs = torch.ones_like(model.in_perm) > 0, torch.ones_like(model.out_perm) > 0
    inputs = inputs if model.embedding is None else (model.embedding != 0).any(1)
    fed, used = {links[0][0]: inputs}, {links[-1][1]: outputs}
    for read, written, _, mask in links:
        fed[written] = (mask & fed[read][:, None]).any(2) | fed.get(written, False)
    for read, written, _, mask in reversed(links):
        used[read] = (mask & used[written][:, :, None]).any(1) | used.get(read, False)
    return {name: fed[name] & used[name] for name in fed}


def _graph(model, run):
    """The live part of a network, a `networkx.DiGraph`: nodes (row, slot), edge `weight` |w|."""
    _require_counts(-model.runs, run=run)
    model, graph = model.pick(run), nx.DiGraph()
    live = live_neurons(model)
    for name, mask in live.items():
        graph.add_nodes_from((name, slot) for slot in mask[0].nonzero().flatten().tolist())
    for read, written, size, mask in _links(model):
        both = mask[0] & live[written][0, :, None] & live[read][0]
        for j, i in both.nonzero().tolist():
            graph.add_edge((read, i), (written, j), weight=float(size[0, j, i]))
    return graph


def modules(model, run=0, rows=None):
    """Modules: the connected components of the live neurons, a list of sets of (row, slot), the
    largest first. `rows` names the rows to look at, default all: modules that meet only in the
    output are found by leaving that row out."""
    graph, known = _graph(model, run), list(model.groups())
    rows = known if rows is None else rows
    _require(isinstance(rows, list | tuple) and {*rows} <= {*known}, f"a list of {known}", rows)
    graph = graph.subgraph(node for node in graph if node[0] in rows)
    parts = nx.weakly_connected_components(graph)
    return sorted(parts, key=lambda part: (-len(part), sorted(part)))


def inputs_read(model, run=0):
    """For every output, in task order, the set of input features (with folds: of the places that
    the folds share) that reach it."""
    graph, (first, *_, last) = _graph(model, run), model.groups()
    features, slots = model.in_perm[run].tolist(), model.out_perm[run].argsort().tolist()
    above = [nx.ancestors(graph, (last, j)) if (last, j) in graph else () for j in slots]
    return [{features[i] for row, i in nodes if row == first} for nodes in above]


@torch.no_grad()
def wiring_length(model):
    """Total length of the wiring, sum of |w| * distance, (runs,)."""
    return sum((m.weight.abs() * m.distance).flatten(1).sum(1) for m in model.layers)


@torch.no_grad()
def mean_wire(model):
    """Length of the average wire, weighted by |w|, (runs,); 0 without wires."""
    total = sum(m.weight.abs().flatten(1).sum(1) for m in model.layers)
    return wiring_length(model) / total.clamp_min(torch.finfo(total.dtype).tiny)


def newman_modularity(model, run=0, seed=0):
    """Newman's Q of the best communities that Louvain's method finds in the live network, with |w|
    as weights: a float, 0 for a network without wires."""
    graph = _graph(model, run).to_undirected()
    if graph.size(weight="weight") == 0:
        return 0.0
    return nx.community.modularity(graph, nx.community.louvain_communities(graph, seed=seed))


@torch.no_grad()
def shuffled(model, generator=None):
    """A null model: a copy in which, layer by layer, the wires between live neurons exchange ends
    and weights at random. Every neuron keeps its numbers of wires, so all live ones stay live.
    `generator` lives on the CPU."""
    twin, live = copy.deepcopy(model), live_neurons(model)
    for layer, read, written in [wire for wire in twin.wires() if wire[0] is not None]:
        for run, weight in enumerate(layer.weight):
            to = live[written][run].repeat(layer.out_folds)
            wires = (weight * to[:, None] * live[read][run].repeat(layer.in_folds)).nonzero()
            order = torch.randperm(len(wires), generator=generator)
            values = weight[wires.unbind(1)][order.to(weight.device)]
            weight[wires.unbind(1)] = 0
            weight[_exchange_ends(wires.tolist(), generator)] = values
    return twin


def _exchange_ends(wires, generator):
    """Wires [to, from] after random exchanges of ends that make no wire double, as two tensors."""
    taken = {*map(tuple, wires)}
    dense = len({j for j, _ in wires}) * len({i for _, i in wires}) == len(wires)
    tries = 0 if dense else 10 * len(wires)  # where all are joined, nothing can be exchanged
    pairs = torch.randint(max(1, len(wires)), (tries, 2), generator=generator)
    for a, b in pairs.tolist():
        (j, i), (k, h) = wires[a], wires[b]
        if (j, h) not in taken and (k, i) not in taken:
            taken -= {(j, i), (k, h)}
            taken |= {(j, h), (k, i)}
            wires[a], wires[b] = [j, h], [k, i]
    return tuple(torch.tensor(wires, dtype=torch.long).view(-1, 2).T)


# ---------------------------------------------------------------- pictures

POSITIVE, NEGATIVE = "#2040e0", "#e03020"
FOLD = 0.25  # height between the folds of a row; rows are 1 apart


def plot_network(model, run=0, ax=None, *, in_labels=None, out_labels=None, strongest=None,
                 width=2.0, dot=12, fontsize=10):  # fmt: skip
    """Draw one network, inputs below: a dot at (the first coordinate of) every place; a line for
    every weight above a hundredth of its layer's largest, at most the `strongest` of each layer,
    blue if positive, red if negative, as wide as |w| / max |w| of its layer times `width` points.

    Folds are rows of dots with their own wires. Grey lines join the stages of a stream.
    `in_labels` and `out_labels`, in task order, follow the neurons. Returns the axes.
    """
    _require_finite(model)
    _require_counts(-model.runs, run=run)
    _require_counts(1, strongest=1 if strongest is None else strongest)
    ax, model = plt.subplots(figsize=(5, 4))[1] if ax is None else ax, model.pick(run)
    rows = model.groups()
    height = {name: y for y, name in enumerate(rows)}

    def dots(name, folds):
        x = rows[name].places[:, 0].tolist()
        return np.array([(place, height[name] - FOLD * fold) for fold in folds for place in x])

    for layer, read, written in model.wires():
        if layer is None:
            x = rows[read].places[:, 0].tolist()
            ax.vlines(x, height[read], height[written], "0.85", lw=0.5, zorder=0)
            continue
        ends = dots(read, range(layer.in_folds)), dots(written, range(layer.out_folds)[::-1])
        ax.add_collection(_lines(layer.weight[0], *ends, strongest, width))
        ax.scatter(*np.concatenate(ends).T, s=dot, c="black", lw=0, zorder=3)
    low, top = -FOLD * (model.layers[0].in_folds - 1), len(rows) - 1
    first, *_, last = rows
    texts = [(in_labels, model.in_perm, first, low - 0.12, "top")]
    texts += [(out_labels, model.out_perm, last, top + 0.12, "bottom")]
    for labels, perm, name, y, va in texts:
        if labels is not None:
            _require(len(labels) == perm.shape[1], f"{perm.shape[1]} labels of {name}", len(labels))
            for (x, _), item in zip(dots(name, [0]), perm[0].tolist(), strict=True):
                ax.text(x, y, labels[item], ha="center", va=va, fontsize=fontsize)
    for name in rows:
        ax.text(-0.03, height[name], name, ha="right", va="center", fontsize=fontsize)
    ax.set(xlim=(-0.02, 1.02), ylim=(low - 0.4, top + 0.4))
    ax.axis("off")
    return ax


def _lines(weight, lower, upper, strongest, width):
    """One layer's weights (out, in) as a `LineCollection`, thick lines on top."""
    weight = weight.detach().cpu().numpy()
    size = np.abs(weight)
    largest = size.max() or 1.0
    j, i = np.nonzero(size > 0.01 * largest)
    kept = size[j, i].argsort()[-(strongest or size.size) :]
    j, i = j[kept], i[kept]
    colors, widths = np.where(weight[j, i] > 0, POSITIVE, NEGATIVE), width * size[j, i] / largest
    ends = np.stack([lower[i], upper[j]], 1)
    return LineCollection(ends, linewidths=widths, colors=colors, capstyle="butt")


def plot_curves(history, name, ax=None, *, groups=None, colors=None, log=False):
    """Median over runs of `history[name]` with the range as a band, and the phases of lamb as
    dotted lines. `groups`, label -> list of runs, draws one such line each; `colors` names their
    colours. Returns the axes."""
    ax = plt.subplots(figsize=(5, 3))[1] if ax is None else ax
    values = history[name].numpy()
    for label, runs in (groups or {None: slice(None)}).items():
        part, color = values[:, runs], colors and colors[label]
        (drawn,) = ax.plot(history.steps, np.median(part, 1), label=label, color=color)
        band = {"alpha": 0.2, "color": drawn.get_color(), "lw": 0}
        ax.fill_between(history.steps, part.min(1), part.max(1), **band)
    for step in history.phases:
        ax.axvline(step, color="grey", ls=":", lw=1)
    ax.set(xlabel="step", ylabel=name, yscale="log" if log else "linear")
    return ax


def animate(history, draw, name, *, figsize=(6, 4), fps=12, dpi=100):
    """Film the snapshots into `figure_folder()`, as .mp4 (H.264) or .gif: draw(fig, model, step)
    draws one frame on an empty figure. Prints the size of the file. A film that fails leaves an
    earlier one as it was."""
    path = figure_folder(name)
    _require(path.suffix in (".mp4", ".gif"), "a name in .mp4 or .gif", name)
    part, fig = path.with_name(f"part-{os.getpid()}-{name}"), plt.figure(figsize=figsize)
    try:
        with plt.rc_context({"animation.ffmpeg_path": imageio_ffmpeg.get_ffmpeg_exe()}):
            mp4 = FFMpegWriter(fps, codec="h264", extra_args=["-pix_fmt", "yuv420p"])
            writer = mp4 if path.suffix == ".mp4" else PillowWriter(fps)
            with writer.saving(fig, part, dpi):
                for step in sorted(history.snapshots):
                    fig.clear()
                    draw(fig, history.at(step), step)
                    writer.grab_frame()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        plt.close(fig)
    print(f"{name}: {path.stat().st_size / 1e6:.2f} MB")


def explore(history, draw, *, figsize=(6, 4), dpi=80):
    """A widget: a slider with a play button over the snapshots, each drawn by draw(fig, model,
    step). Its first child holds the button and the slider."""
    steps = sorted(history.snapshots)
    play = widgets.Play(max=len(steps) - 1, interval=300, description="play")
    slider = widgets.SelectionSlider(options=steps, value=steps[-1], description="step")
    picture = widgets.Image(format="png", layout={"width": f"{dpi * figsize[0]:.0f}px"})

    def show(_=None):
        fig, png = plt.figure(figsize=figsize), io.BytesIO()
        draw(fig, history.at(slider.value), slider.value)
        fig.savefig(png, dpi=dpi)
        plt.close(fig)
        picture.value = png.getvalue()

    play.observe(lambda change: setattr(slider, "index", change.new), "value")
    slider.observe(show, "value")
    show()
    return widgets.VBox([widgets.HBox([play, slider]), picture])


# ---------------------------------------------------------------- figures and claims


def figure_folder(name=""):
    """The folder for figures, videos and claims, made if missing, or the path of its file `name`.
    It is $BIMT_FIGURES, relative to this module's folder, or else `figures`."""
    plain = isinstance(name, str) and Path(name).name == name
    _require(plain, "the name of a file, without a folder", repr(name))
    folder = Path(__file__).parent / (os.environ.get("BIMT_FIGURES") or "figures")
    if not folder.is_file():
        folder.mkdir(parents=True, exist_ok=True)
    usable = folder.is_dir() and os.access(folder, os.W_OK)
    _require(usable, "BIMT_FIGURES to name a folder to write to", folder)
    return folder / name


def save_figure(fig, name):
    """Write `fig` as name.png and name.pdf into `figure_folder()`."""
    _require(name, "a name", repr(name))
    fig.savefig(figure_folder(f"{name}.png"), dpi=160, bbox_inches="tight")
    creation = {"CreationDate": None}  # the same figure is the same file
    fig.savefig(figure_folder(f"{name}.pdf"), bbox_inches="tight", metadata=creation)


class Claims:
    """Claims about one figure, tested in every run of a seed. `table` is a pandas frame with one
    row per claim and run."""

    def __init__(self, figure, seed):
        self.figure, self.seed, self.parts = figure, seed, {}

    def add(self, claim, values, *, at_least=-math.inf, at_most=math.inf, authors="-"):
        """One claim: our number in every run; it holds where the number lies within the bounds.
        `authors` is the authors' number, or what their picture shows."""
        values = np.asarray(values, dtype=float)
        fits = values.ndim == 1 and len(values) and np.isfinite(values).all()
        _require(fits, f"finite numbers, one per run, for {claim!r}", values)
        _require(at_least <= at_most, "at_least up to at_most", (at_least, at_most))
        _require(claim not in self.parts, "a claim that is not there yet", repr(claim))
        rows = {"figure": self.figure, "seed": self.seed, "run": range(len(values))}
        rows |= {"claim": claim, "authors": str(authors), "at_least": at_least, "at_most": at_most}
        rows |= {"value": values, "held": (at_least <= values) & (values <= at_most)}
        self.parts[claim] = pd.DataFrame(rows)

    @property
    def table(self):
        return pd.concat(self.parts.values(), ignore_index=True)

    def save(self):
        """Write `table` to claims_figure_N.json. `pandas.read_json` reads it back, with NaN for a
        missing bound."""
        path = figure_folder(f"claims_figure_{self.figure}.json")
        self.table.to_json(path, orient="records", indent=1, double_precision=15)


def summarise(table):
    """One row per claim of a table of `Claims`: the authors' number, ours as "median [lowest,
    highest]", and the number of runs in which the claim held."""
    parts = table.groupby(["figure", "claim"], sort=False)
    return parts.agg(
        authors=("authors", "first"),
        ours=("value", lambda v: f"{v.median():.3g} [{v.min():.3g}, {v.max():.3g}]"),
        held=("held", lambda held: f"{held.sum()} of {len(held)}"),
    )
