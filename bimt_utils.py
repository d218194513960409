"""Brain-Inspired Modular Training (BIMT) in one module.

Liu, Gan and Tegmark, "Seeing is Believing: Brain-Inspired Modular Training for Mechanistic
Interpretability", arXiv 2305.08746 (2023). "The paper" below is this one; "ours" marks what it
does not contain. BIMT has three ingredients:

1. Neurons have places, in the unit interval or square, so every weight is a wire with a length.
2. Wires cost. Training minimises loss + lamb * cost, and a wire costs |w| * (A * distance + y0):
   an L1 penalty that grows with the length of the wire.
3. Neurons swap. Every `swap_every` steps, neurons of one row trade places where that shortens the
   wiring. The network computes the same function; gradient descent cannot make such moves.

Every model holds `runs` independent networks in one tensor (seeds, ablations, or both), because,
for networks this small, calling torch costs more than the arithmetic. An argument that would give
a wrong result raises a ValueError that says what was expected.

Glossary, paper -> here: lambda -> `lamb`; A -> `A`; y0, the distance between neighbouring rows ->
`y0`; d_ij -> `EmbeddedLinear.distance`; neurons tried per swap, k -> `top_k`; steps between swaps,
S -> `swap_every`.
"""

import copy
import io
import os
import subprocess
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import imageio_ffmpeg
import ipywidgets as widgets
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import torch
from IPython import display, get_ipython
from matplotlib.animation import FFMpegWriter
from matplotlib.collections import LineCollection
from torch import nn


def _require(condition, expected, got):
    if not condition:
        raise ValueError(f"expected {expected}, got {got}")


# ---------------------------------------------------------------- models (paper, section 2)
def line(n):
    """Places of `n` neurons in a row, (n, 1): neuron i sits at (i + 1/2) / n."""
    return ((torch.arange(n) + 0.5) / n)[:, None]


class EmbeddedLinear(nn.Module):
    """`runs` linear layers between rows of neurons at `in_places` (n, d) and `out_places` (m, d).

    With `in_folds=2`, two blocks of inputs (two tokens, say) share the same n places: feature
    f * n + i sits at place i; `out_folds` does the same for outputs. `weight` (runs, out, in) and
    `bias` (runs, out) are drawn from `generator` as in `nn.Linear`; `distance` (out, in) is the
    Manhattan length of every wire."""

    def __init__(self, in_places, out_places, *, in_folds=1, out_folds=1, runs=1, generator=None):
        super().__init__()
        self.in_folds, self.out_folds = in_folds, out_folds
        distance = torch.cdist(out_places, in_places, p=1).repeat(out_folds, in_folds)
        self.in_places, self.out_places = in_places, out_places
        self.register_buffer("distance", distance, persistent=False)
        bound = distance.shape[1] ** -0.5
        weight = torch.empty(runs, *distance.shape).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(runs, len(distance)).uniform_(-bound, bound, generator=generator)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        """(runs, batch, in) -> (runs, batch, out)."""
        return torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))

    def sizes(self):
        """|w| added up over folds, (runs, m, n), in double precision on the CPU."""
        sizes = self.weight.detach().cpu().double().abs()
        _require(sizes.isfinite().all(), "finite weights", "some that are not")
        sizes = sizes.unflatten(1, (self.out_folds, -1)).sum(1)
        return sizes.unflatten(2, (self.in_folds, -1)).sum(2)


@dataclass(eq=False)
class NeuronGroup:
    """Neurons that trade places with each other, at `places` (n, d). `ends` lists (layer, axis):
    they are the outputs (axis 1 of the weight) or inputs (axis 2) of that layer. Moving them
    permutes all `axes`, a list of (tensor, axis, folds). A group not `movable` is never swapped."""

    places: torch.Tensor
    movable: bool = True
    ends: list = field(default_factory=list)
    axes: list = field(default_factory=list)


class EmbeddedModel(nn.Module):
    """`runs` independent networks whose neurons have places: the base of every architecture.

    `layers` are its `EmbeddedLinear`s; the first reads the inputs, the last writes the outputs. A
    subclass defines two methods; the rest follows from them:
    rows(x): the values of every row after the input, a list; last the outputs in task order
    wires(): a list of (layer, name of the row it reads, name of the row it writes) in forward
             order; (None, a, b) says that row b is the next stage of the residual stream a, and
             comes before the layers that write to b

    Integer buffers `in_perm` and `out_perm` (runs, n) tell which input feature or output sits in
    each slot. `embedding` is (runs, tokens, dim) or None; `frozen` holds numbers of rows. Models
    are deep-copied, so detach what you store in one."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        ends = {"in_perm": self.layers[0].in_places, "out_perm": self.layers[-1].out_places}
        for name, places in ends.items():
            self.register_buffer(name, torch.arange(len(places)).repeat(self.runs, 1))
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
        """Row name -> `NeuronGroup`, from input to output; the stages of a stream share one.
        ValueError for wires along which neurons cannot be permuted."""
        groups, already_read, wires = {}, set(), self.wires()
        for layer, read, written in wires:
            already_read.add(read)
            fits = (read in groups or (layer and not groups)) and written not in already_read
            fits = fits and (layer or written not in groups)
            _require(fits, "wires in forward order, every stage with one source", wires)
            if layer is None:
                groups[written] = groups[read]
                continue
            inputs = groups.setdefault(read, NeuronGroup(layer.in_places))
            outputs = groups.setdefault(written, NeuronGroup(layer.out_places))
            _require(inputs is not outputs, "a layer to join two groups", f"one that {read} is in")
            inputs.ends.append((layer, 2))
            outputs.ends.append((layer, 1))
            inputs.axes.append((layer.weight, 2, layer.in_folds))
            outputs.axes += [(p, 1, layer.out_folds) for p in (layer.weight, layer.bias)]
        rows, used = [*groups.values()], [layer.weight.data_ptr() for layer, *_ in wires if layer]
        fits = sorted(used) == sorted({layer.weight.data_ptr() for layer in self.layers})
        fits = fits and rows[-1].ends == [(self.layers[-1], 1)]
        _require(fits, "every layer, with weights of its own, in one wire; outputs last", wires)
        rows[0].axes.append((self.in_perm, 1, 1))
        rows[-1].axes.append((self.out_perm, 1, 1))
        if self.embedding is not None:
            rows[0].axes.append((self.embedding, 2, 1))
        for number in self.frozen:
            rows[number].movable = False
        return groups

    def pick(self, run):
        """A copy with one run (an int) or with several (a list of ints; repeats are allowed)."""
        twin = copy.deepcopy(self)
        own = [*twin.layers.parameters(), twin.in_perm, twin.out_perm]
        for tensor in own if twin.embedding is None else [*own, twin.embedding]:
            tensor.data = tensor.data[torch.as_tensor(run).view(-1)]
        return twin

    def read_inputs(self, x):
        """Inputs in task order, (batch, n) or with an axis for runs in front, or integer tokens
        (batch, folds) for an embedding -> (runs, batch, n), every feature in its slot."""
        if self.embedding is not None:
            tokens = torch.as_tensor(x, device=self.embedding.device)
            return self.embedding.index_select(1, tokens.flatten()).view(self.runs, len(tokens), -1)
        first = self.layers[0]
        x, n = torch.as_tensor(x).to(first.weight), first.weight.shape[2]
        _require(x.shape[-1] == n, f"x (batch, {n}), or with runs in front", tuple(x.shape))
        x = x.expand(self.runs, -1, -1)
        moved = (self.in_perm.diff() != 1).any()  # false only for 0, 1, 2, ...
        return _rearranged(x, 2, self.in_perm, first.in_folds) if moved else x

    def write_outputs(self, values):
        """The last layer on (runs, batch, n), its outputs put back in task order."""
        layer, slots = self.layers[-1], self.out_perm.argsort(1)
        parts = (layer.weight, layer.bias)
        weight, bias = (_rearranged(p, 1, slots, layer.out_folds) for p in parts)
        return torch.baddbmm(bias[:, None], values, weight.transpose(1, 2))


class EmbeddedMLP(EmbeddedModel):
    """`runs` multilayer perceptrons with SiLU activations whose neurons have places.

    shape:     features per row, input to output, e.g. (4, 20, 20, 2)
    in_folds:  blocks of input features that share one row of places
    embedding: (tokens, dim) for token inputs, drawn from N(0, 1); in_folds * dim == shape[0]
    places:    one (n, d) tensor per row, default `line(n)`; the input row has shape[0] / in_folds
    frozen:    numbers of the rows that never swap (0 is the input)

    Rows are called "input", "A1", "A2", ..., "output". The columns of an embedding move;
    `in_perm` tells which of them a slot now holds."""

    def __init__(self, shape, runs=1, *, in_folds=1, embedding=None, places=None, frozen=(),
                 generator=None):  # fmt: skip
        places = [line(n) for n in (shape[0] // in_folds, *shape[1:])] if places is None else places
        counts = [len(places[0]) * in_folds, *map(len, places[1:])]
        _require(counts == list(shape), f"places for rows of {list(shape)}", counts)
        folds = [in_folds] + [1] * (len(shape) - 2)
        super().__init__(
            EmbeddedLinear(*ends, in_folds=f, runs=runs, generator=generator)
            for *ends, f in zip(places, places[1:], folds, strict=False)
        )
        self.shape, self.frozen = tuple(shape), tuple(frozen)
        if embedding is not None:
            drawn = torch.empty(runs, *embedding).normal_(generator=generator)
            self.embedding = nn.Parameter(drawn)

    def rows(self, x):
        """Inputs as in `read_inputs` -> the values (runs, batch, n) of every row after the input,
        neuron by slot: hidden rows after their activation, then the outputs in task order."""
        rows = [self.read_inputs(x)]
        for layer in self.layers[:-1]:
            rows.append(nn.functional.silu(layer(rows[-1])))
        return [*rows[1:], self.write_outputs(rows[-1])]

    def wires(self):
        names = ["input", *(f"A{i}" for i in range(1, len(self.layers))), "output"]
        return list(zip(self.layers, names, names[1:], strict=False))


def _rearranged(tensor, axis, order, folds=1):
    """`tensor` (runs, ...) along `axis`, in every fold: slot s gets what is in slot order[r, s]."""
    index = torch.cat([order + fold * order.shape[1] for fold in range(folds)], 1).to(tensor.device)
    index = index.view(len(index), *[1] * (axis - 1), -1, *[1] * (tensor.ndim - axis - 1))
    return tensor.gather(axis, index.expand_as(tensor))


def _per_run(model, name, value, ndim=1):
    """`value`, a number or (runs,), not negative, as a tensor like the weights of `model` with
    `ndim` axes, the first for runs."""
    weight = model.layers[0].weight
    value = torch.as_tensor(value, dtype=weight.dtype, device=weight.device)
    fits = value.shape in ((), (model.runs,)) and bool(((value >= 0) & (value < torch.inf)).all())
    _require(fits, f"{name}, finite and not negative, as a number or ({model.runs},)", value)
    return value.view(-1, *[1] * (ndim - 1))


# ---------------------------------------------------------------- cost (paper, section 2)
def connection_prices(model, A=1.0, y0=0.1, *, A_last=None, biases=True, reduce="sum"):
    """What one unit of |p| costs, parameter p -> price, a tensor that broadcasts to it.

    A weight of length d costs A * d + y0; a bias, and an entry of an embedding, costs y0. `A`, the
    price per unit length, and `y0`, a fixed price per connection, are numbers or (runs,); `A_last`
    replaces A in the last layer. With `biases=False` biases are free. `reduce="mean"` averages
    within each tensor, as the authors do for larger networks."""
    A, y0 = _per_run(model, "A", A, ndim=3), _per_run(model, "y0", y0, ndim=3)
    A_last = A if A_last is None else _per_run(model, "A_last", A_last, ndim=3)
    slopes = [A] * (len(model.layers) - 1) + [A_last]
    prices = {}
    for layer, A in zip(model.layers, slopes, strict=True):
        prices[layer.weight] = A * layer.distance + y0
    if biases:
        prices |= {layer.bias: y0[:, 0] for layer in model.layers}
    if model.embedding is not None:
        prices[model.embedding] = y0
    return {p: price / {"sum": 1, "mean": p[0].numel()}[reduce] for p, price in prices.items()}


def connection_cost(model, A=1.0, y0=0.1, **options):
    """Connection cost of every run, (runs,), with the arguments of `connection_prices`: the sum of
    price * |p|. In a training loop of your own, add lamb times it to the loss."""
    return _total(connection_prices(model, A, y0, **options))


def _total(prices):
    return sum((price * p.abs()).flatten(1).sum(1) for p, price in prices.items())


# ---------------------------------------------------------------- swaps (paper, algorithm 1)
@torch.no_grad()
def swap_neurons(model, top_k=5, *, reduce="sum"):
    """Let neurons trade places where that shortens the wiring; outputs do not change.

    Row by row from input to output, the slots are ranked once by the sum of |w| of their neuron's
    wires. For each of the first `top_k` slots, a number or (runs,), its neuron trades places with
    the neuron of the group that shortens the wiring most, if any does. Distance counts, A does not.
    `reduce` should be the one of `connection_prices`."""
    top_k = np.array(_per_run(model, "top_k", top_k).tolist())
    for group in dict.fromkeys(model.groups().values()):
        if group.movable:
            order = _trade(*_slot_costs(group, reduce), top_k)
            moved = [_rearranged(t, axis, order, folds) for t, axis, folds in group.axes]
            # a single call: an interrupt between two would leave half a move
            torch._foreach_copy_([tensor for tensor, *_ in group.axes], moved)


def _slot_costs(group, reduce):
    """With the other groups held fixed, the cost is linear in where the neurons of one group sit:
    C[neuron, slot] = sum over layers of |w|[neuron] @ price[slot]. Returns C (runs, n, n) and the
    sum of |w| of every neuron's wires (runs, n)."""
    table, score = 0.0, 0.0
    for layer, axis in group.ends:
        size, price = layer.sizes(), layer.distance.cpu().double()
        price = price / {"sum": 1, "mean": price.numel()}[reduce]
        price = price[: size.shape[1], : size.shape[2]]  # folds share their places
        if axis == 2:
            size, price = size.transpose(1, 2), price.T
        table, score = table + size @ price.T, score + size.sum(2)
    return table.numpy(), score.numpy()


def _trade(table, score, top_k):
    """The neuron that ends in each slot, (runs, n). If the neurons in slots j and k trade places,
    the cost changes by C[j, k] + C[k, j] - C[j, j] - C[k, k]."""
    run, order = np.arange(len(table)), np.tile(np.arange(table.shape[1]), (len(table), 1))
    rounding = 1e-12 * table.trace(axis1=1, axis2=2)  # of the whole cost
    ranked = (-score).argsort(axis=1, kind="stable")[:, : int(top_k.max())]
    for rank, slot in enumerate(ranked.T):
        stay = table.diagonal(axis1=1, axis2=2)
        change = table[run, slot] + table[run, :, slot] - (stay + stay[run, slot][:, None])
        best = change.min(1)  # at most 0: staying is one of the choices
        first = (change <= (best + rounding)[:, None]).argmax(1)
        other = np.where((best < -rounding) & (rank < top_k), first, slot)
        for rows in (table, order):  # now row s of the table is about the neuron in slot s
            rows[run, slot], rows[run, other] = rows[run, other], rows[run, slot]
    return torch.from_numpy(order)


# ---------------------------------------------------------------- training (paper, section 3)
def mse_loss(outputs, targets):
    """Mean squared error of every run, (runs,), of outputs (runs, batch, out) for targets of the
    same shape or (batch, out)."""
    return (outputs - _expanded(targets, outputs.shape)).square().flatten(1).mean(1)


def cross_entropy(outputs, classes):
    """Cross-entropy of every run, (runs,), of outputs (runs, batch, out) for classes, integers
    (batch,) or (runs, batch)."""
    wanted = _expanded(classes, outputs.shape[:2], least=0)  # torch would leave -100 out
    each = nn.functional.cross_entropy(outputs.flatten(0, 1), wanted.flatten(), reduction="none")
    return each.view(len(outputs), -1).mean(1)


def accuracy(outputs, classes):
    """Share of correct answers of every run, (runs,); arguments as in `cross_entropy`."""
    right = outputs.argmax(2) == _expanded(classes, outputs.shape[:2], least=0)
    return right.to(outputs.dtype).mean(1)


def _expanded(targets, shape, least=None):
    """`targets` for every run; broadcasting anything else would compare the wrong things."""
    fits = targets.shape in (shape, shape[1:]) and (least is None or (targets >= least).all())
    _require(fits, f"targets {tuple(shape)} or {tuple(shape[1:])}, classes from 0", targets)
    return targets.expand(shape)


class L1AdamW(torch.optim.AdamW):
    """torch's AdamW for a weighted L1 penalty, the paper's optimizer, without weight decay."""

    def __init__(self, parameters, lr, weight_decay=0.0):
        super().__init__(parameters, lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, prices):
        """Minimise loss + sum of price * |p|, `prices` being {p: price}; p.grad holds the gradient
        of the loss alone."""
        for p, price in prices.items():
            p.grad += price * p.sign()
        super().step()


@dataclass
class History:
    """What `train` saw of `model`: `history["loss"]`, `["cost"]`, `["objective"]` (loss + lamb *
    cost) and every metric, each (logs, runs), at `history.steps`. `phases` are the steps after 0 at
    which lamb changes; `snapshots` holds step -> `state_dict`, which `at` puts into a copy,
    `model`."""

    model: EmbeddedModel
    phases: list
    log: list = field(default_factory=list)
    snapshots: dict = field(default_factory=dict)

    @property
    def steps(self):
        return [step for step, _ in self.log]

    def __getitem__(self, name):
        return torch.stack([values[name] for _, values in self.log])

    def at(self, step):
        """The networks at the snapshot nearest to `step`: always the same object, with other
        weights."""
        nearest = min(self.snapshots, key=lambda kept: abs(kept - step))
        self.model.load_state_dict(self.snapshots[nearest])
        return self.model

    def keep(self, step, model):
        """Take a snapshot of `model` after `step` steps."""
        self.snapshots[step] = {name: t.cpu().clone() for name, t in model.state_dict().items()}


def train(model, loss_fn, *, steps, lr, lamb, prices=connection_prices, optimizer=L1AdamW,
          swap=swap_neurons, swap_every=200, metrics=None, snapshots=1,
          label="training"):  # fmt: skip
    """Minimise loss + lamb * cost with swaps (the paper); returns a `History`.

    loss_fn:    loss_fn(model) -> (runs,)
    lamb:       a number or (runs,), or phases [(fraction of training, value), ...] from fraction 0
    prices:     prices(model) -> {parameter: price}, constant within a phase, or phases of such
    optimizer:  optimizer(parameters, lr) makes an object whose step(prices) minimises loss + sum of
                price * |p|, lamb being part of the prices, from the loss's gradients p.grad
    swap:       swap(model), called every `swap_every` steps (0: never); moments stay in their slots
    metrics:    name -> metric(model) -> (runs,), evaluated at up to 101 steps, without gradients
    snapshots:  number of snapshots after the first

    `functools.partial` gives `prices`, `optimizer` and `swap` their arguments. The model is trained
    in place. Ctrl-C returns what there is; an exception carries it as `error.history`. A loss that
    is not finite raises FloatingPointError, which names run and step."""
    fits = min(steps, snapshots) > 0 and min(swap_every, lr) >= 0
    _require(fits, "steps and snapshots above 0, swap_every and lr not below", (steps, lr))
    lambs, tariffs = _phases("lamb", lamb, steps), _phases("prices", prices, steps)
    lambs = {start: _per_run(model, "lamb", value) for start, value in lambs.items()}
    history, step, began = History(copy.deepcopy(model), [*lambs][1:]), 0, time.perf_counter()
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr)
    logged, filmed = ({round(k * steps / n) for k in range(n + 1)} for n in (100, snapshots))
    shown = display.display(display.Pretty(label), display_id=True) if get_ipython() else None
    try:
        for step in range(steps + 1):
            if swap_every and step and step % swap_every == 0:
                swap(model)
            if step in lambs or step in tariffs:
                lamb, prices = lambs.get(step, lamb), tariffs.get(step, prices)
                charged = _charged(prices(model), lamb)
            loss = loss_fn(model)
            if not loss.isfinite().all():
                run = (~loss.isfinite()).nonzero().flatten().tolist()
                raise FloatingPointError(f"the loss is not finite in run {run} at step {step}")
            if step in logged:
                history.log.append((step, _measured(model, loss, lamb, prices, metrics or {})))
                if shown:
                    shown.update(display.Pretty(f"{label}: {step:,} of {steps:,} steps"))
            if step in filmed:
                history.keep(step, model)
            if step < steps:
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)  # what the loss does not use is charged, too
                loss.sum().backward()  # the gradient of the loss; the optimizer adds lamb * cost
                optimizer.step(charged)
        text = f"{label}: {steps:,} steps, {time.perf_counter() - began:.1f} s"
        shown.update(display.Pretty(text)) if shown else print(text)
    except BaseException as error:
        history.keep(step, model)
        error.history = history
        if not isinstance(error, KeyboardInterrupt):
            raise
        print(f"NOTICE: interrupted after {step} of {steps} steps; the history has what there is")
    return history


def _phases(name, phases, steps):
    """[(fraction, value), ...] or one value for all time -> {first step: value, ...}."""
    phases = phases if isinstance(phases, list | tuple) else [(0, phases)]
    starts = [fraction for fraction, _ in phases]
    rising = starts == sorted({*starts}) and starts[:1] == [0] and starts[-1] <= 1
    _require(rising, f"phases of {name} at rising fractions from 0 to 1", starts)
    return {int(fraction * steps + 1e-9): value for fraction, value in phases}


def _charged(prices, lamb):
    """lamb * price of every parameter that trains."""
    _require(all((c >= 0).all() for c in prices.values()), "prices of at least 0", "a lower one")
    each = {p: lamb.view(-1, *[1] * (p.ndim - 1)) for p in prices if p.requires_grad}
    return {p: lamb * prices[p] for p, lamb in each.items()}


@torch.no_grad()
def _measured(model, loss, lamb, prices, metrics):
    cost = _total(prices(model))
    measured = {name: metric(model) for name, metric in metrics.items()}
    values = dict(loss=loss, cost=cost, objective=loss + lamb * cost, **measured)
    for name, value in values.items():
        _require(value.shape == (model.runs,), f"{name} to be ({model.runs},)", tuple(value.shape))
    return {name: value.detach().cpu().clone() for name, value in values.items()}


# ---------------------------------------------------------------- structure (ours)
# These functions look at what is not zero: prune first.
@torch.no_grad()
def prune(model, threshold):
    """A copy whose parameters of size up to `threshold`, a number or (runs,), are zero."""
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p[p.abs() <= _per_run(model, "threshold", threshold, p.ndim)] = 0
    return twin


@torch.no_grad()
def prune_threshold(model, loss_fn, tolerance=0.05):
    """For every run the largest of 81 thresholds from 1e-4 to 1, (runs,), up to which pruning
    raises its loss, loss_fn(model) -> (runs,), by no more than the share `tolerance`; 0 where even
    the smallest raises it more."""
    loss = loss_fn(model)
    _require(loss.shape == (model.runs,), f"a loss ({model.runs},)", tuple(loss.shape))
    allowed = loss * (1 + _per_run(model, "tolerance", tolerance))
    best, fine = torch.zeros_like(loss), loss <= allowed
    for threshold in np.geomspace(1e-4, 1, 81).tolist():
        fine &= loss_fn(prune(model, threshold)) <= allowed
        best[fine] = threshold
    return best


@torch.no_grad()
def live_neurons(model):
    """Which neurons lie on a path from input to output, row name -> mask (runs, n) on the CPU, slot
    by slot. A neuron that no input reaches is not live, nor is an input whose embedding is zero."""
    wires, embedding = model.wires(), model.embedding
    inputs = model.in_perm >= 0 if embedding is None else (embedding != 0).any(1)
    fed, used = {wires[0][1]: inputs.cpu()}, {wires[-1][2]: model.out_perm.cpu() >= 0}
    for layer, read, written in wires:
        reached = layer.sizes() * fed[read][:, None] if layer else fed[read][..., None]
        fed[written] = (reached > 0).any(2) | fed.get(written, False)
    for layer, read, written in reversed(wires):
        needed = layer.sizes() * used[written][..., None] if layer else used[written][:, None]
        used[read] = (needed > 0).any(1) | used.get(read, False)
    return {name: fed[name] & used[name] for name in fed}


def graph(model, run=0):
    """The live part of one network, a `networkx.DiGraph`: nodes (row, slot), edge `weight` |w|,
    added up over folds and over layers between the same two rows; 0 within a residual stream."""
    model, graph, weights = model.pick(range(model.runs)[run]), nx.DiGraph(), Counter()
    live = {name: m[0].nonzero().flatten().tolist() for name, m in live_neurons(model).items()}
    for layer, read, written in model.wires():
        if layer is None:
            weights.update({((read, i), (written, i)): 0 for i in live[read]})
            continue
        for j, i in (size := layer.sizes()[0]).nonzero().tolist():
            weights[(read, i), (written, j)] += size[j, i].item()
    kept = [(*ends, w) for ends, w in weights.items() if all(i in live[row] for row, i in ends)]
    graph.add_weighted_edges_from(kept)  # networkx's subgraphs are in the order of the hash seed
    return graph


def modules(model, run=0, rows=None):
    """Modules: the connected components of the live neurons, a list of sets of (row, slot), the
    largest first. `rows` names the rows to look at, default all: modules that meet only in the
    output are found by leaving that row out."""
    known = list(model.groups())
    rows = known if rows is None else [*rows]
    _require({*rows} <= {*known}, f"a list of {known}", rows)
    part = graph(model, run)
    part = part.subgraph(node for node in part if node[0] in rows)
    return sorted(nx.weakly_connected_components(part), key=lambda m: (-len(m), sorted(m)))


def inputs_read(model, run=0):
    """For every output, in task order, the set of input features (with folds: of the places that
    the folds share) that reach it."""
    live, (first, *_, last) = graph(model, run), model.groups()
    features, slots = model.in_perm[run].tolist(), model.out_perm[run].argsort().tolist()
    above = [nx.ancestors(live, (last, j)) if (last, j) in live else () for j in slots]
    return [{features[i] for row, i in nodes if row == first} for nodes in above]


@torch.no_grad()
def wiring_length(model):
    """Total length of the wiring, sum of |w| * distance, (runs,)."""
    return sum((m.weight.abs() * m.distance).flatten(1).sum(1) for m in model.layers)


# ---------------------------------------------------------------- pictures
POSITIVE, NEGATIVE = "#2040e0", "#e03020"


def plot_network(model, run=0, ax=None, *, in_labels=None, out_labels=None, strongest=None,
                 width=2.0, dot=12, fontsize=10):  # fmt: skip
    """Draw one network, inputs below: a dot at (the first coordinate of) every place; a line for
    every weight above a hundredth of its layer's largest, at most the `strongest` of each layer,
    blue if positive, red if negative, as wide as |w| / max |w| of its layer times `width` points.
    Folds are rows of dots with their own wires. Grey lines join the stages of a stream.
    `in_labels` and `out_labels`, in task order, follow the neurons. Returns the axes."""
    _require(strongest is None or strongest > 0, "strongest above 0", strongest)
    ax = plt.subplots(figsize=(5, 4))[1] if ax is None else ax
    model = model.pick(range(model.runs)[run])
    rows = model.groups()
    height = {name: y for y, name in enumerate(rows)}

    def dots(name, folds=(0,)):  # rows are 1 apart, folds a quarter
        x = rows[name].places[:, 0].tolist()
        return np.array([(place, height[name] - fold / 4) for fold in folds for place in x])

    for layer, read, written in model.wires():
        if layer is None:
            ax.vlines(dots(read)[:, 0], height[read], height[written], "0.85", lw=0.5, zorder=0)
            continue
        weight = layer.weight[0].detach().cpu().float().numpy()
        _require(np.isfinite(weight).all(), f"finite weights from {read} to {written}", "others")
        size = np.abs(weight) / (np.abs(weight).max() or 1)
        kept = size.argsort(axis=None, kind="stable")[::-1][:strongest][::-1]  # thick ones on top
        j, i = np.unravel_index(kept[size.flat[kept] > 0.01], size.shape)
        lower = dots(read, range(layer.in_folds))
        upper = dots(written, range(layer.out_folds)[::-1])
        style = {"linewidths": width * size[j, i], "capstyle": "butt"}
        style["colors"] = np.where(weight[j, i] > 0, POSITIVE, NEGATIVE)
        ax.add_collection(LineCollection(np.stack([lower[i], upper[j]], 1), **style))
        ax.scatter(*np.concatenate([lower, upper]).T, s=dot, c="black", lw=0, zorder=3)
    low, (first, *_, last) = -(model.layers[0].in_folds - 1) / 4, rows
    for labels, perm, name, y, va in (
        (in_labels, model.in_perm, first, low - 0.12, "top"),
        (out_labels, model.out_perm, last, height[last] + 0.12, "bottom"),
    ):
        _require(labels is None or len(labels) == perm.shape[1], f"a label for each {name}", labels)
        for (x, _), k in zip(dots(name), perm[0].tolist(), strict=True):
            ax.text(x, y, "" if labels is None else [*labels][k], ha="center", va=va, size=fontsize)
    for name in rows:
        ax.text(-0.03, height[name], name, ha="right", va="center", fontsize=fontsize)
    ax.set(xlim=(-0.02, 1.02), ylim=(low - 0.4, height[last] + 0.4))
    ax.axis("off")
    return ax


def plot_curves(history, name, ax=None, *, groups=None, colors=None, log=False):
    """Median over runs of `history[name]` with the range as a band, and the phases of lamb as
    dotted lines. `groups`, label -> list of runs, draws one such line each; `colors` names their
    colours. Returns the axes."""
    ax = plt.subplots(figsize=(5, 3))[1] if ax is None else ax
    values = history[name].double().numpy()
    for label, runs in (groups or {None: slice(None)}).items():
        part, color = values[:, runs], colors and colors[label]
        (drawn,) = ax.plot(history.steps, np.median(part, 1), label=label, color=color)
        band = {"alpha": 0.2, "color": drawn.get_color(), "lw": 0}
        ax.fill_between(history.steps, part.min(1), part.max(1), **band)
    for step in history.phases:
        ax.axvline(step, color="grey", ls=":", lw=1)
    ax.set(xlabel="step", ylabel=name, yscale="log" if log else "linear")
    return ax


def animate(history, draw, name, *, figsize=(6, 4), fps=12, dpi=100, gif_fps=8, gif_width=480):
    """Film the snapshots into `figure_folder()`, as name.mp4 (H.264) and, smaller, as name.gif:
    draw(fig, model, step) draws one frame on an empty figure. A film that fails leaves earlier ones
    as they were."""
    ffmpeg, fig = imageio_ffmpeg.get_ffmpeg_exe(), plt.Figure(figsize=figsize)
    film, gif = figure_folder(f"{name}.mp4"), figure_folder(f"{name}.gif")
    vf = f"tpad=stop_mode=clone:stop_duration=2,fps={gif_fps}:round=up,scale={gif_width}:-1"
    vf += ",split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"
    with whole_file(film) as part, whole_file(gif) as small:
        with plt.rc_context({"animation.ffmpeg_path": ffmpeg}):
            writer = FFMpegWriter(fps, codec="h264", extra_args=["-threads", "1"])  # same bytes
            with writer.saving(fig, part, dpi):
                for step in sorted(history.snapshots):
                    fig.clear()
                    draw(fig, history.at(step), step)
                    writer.grab_frame()
        command = [ffmpeg, "-nostdin", "-v", "error", "-i", part, "-vf", vf, small]
        subprocess.run(command, check=True)


def explore(history, draw, *, figsize=(6, 4), dpi=80):
    """A widget: slider and play button over the snapshots, each drawn by draw(fig, model, step)."""
    play = widgets.Play(max=len(history.snapshots) - 1, interval=300, description="play")
    slider = widgets.SelectionSlider(options=sorted(history.snapshots), index=play.max)
    picture = widgets.Image(format="png", layout={"width": f"{dpi * figsize[0]:.0f}px"})

    def show(_=None):
        fig, png = plt.Figure(figsize=figsize), io.BytesIO()
        draw(fig, history.at(slider.value), slider.value)
        fig.savefig(png, dpi=dpi)
        picture.value = png.getvalue()

    play.observe(lambda change: setattr(slider, "index", change.new), "value")
    slider.observe(show, "value")
    show()
    return widgets.VBox([widgets.HBox([play, slider]), picture])


def figure_folder(name=""):
    """The folder for figures, films and claims, made if missing, or the path of its file `name`.
    It is $BIMT_FIGURES, relative to this module's folder, or else `figures`."""
    folder = Path(__file__).parent / (os.environ.get("BIMT_FIGURES") or "figures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@contextmanager
def whole_file(path):
    """Write the file `path` as a whole or not at all: yields a path beside it to write to."""
    part = path.with_name(f"part-{os.getpid()}-{path.name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_figure(fig, name):
    """Write `fig` as name.png and name.pdf into `figure_folder()`."""
    for ending, metadata in {"png": None, "pdf": {"CreationDate": None}}.items():  # same bytes
        with whole_file(figure_folder(f"{name}.{ending}")) as part:
            fig.savefig(part, dpi=160, bbox_inches="tight", metadata=metadata)
