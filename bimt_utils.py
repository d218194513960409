"""Brain-Inspired Modular Training (BIMT) in one module.

Liu, Gan and Tegmark, "Seeing is Believing: Brain-Inspired Modular Training for Mechanistic
Interpretability", arXiv 2305.08746 (2023). "The paper" below is this one; "ours" marks what it
does not contain. The three ingredients:

1. Neurons have places. Each row of neurons (input, hidden, output) lies in the unit interval or
   the unit square, so that every weight is a wire with a length.
2. Wires cost. Training minimises prediction loss + lamb * wiring cost, and every weight w pays
   |w| * (A * distance + y0): an L1 penalty that grows with the length of the wire.
3. Neurons swap. Every `swap_every` steps, neurons of one row trade places where that shortens the
   wiring. The function of the network does not change; descent alone could never do this.

Every model holds `runs` independent networks in one tensor (seeds, ablations, or both), because
networks this small cost more in calls than in arithmetic.

Glossary, paper -> here: lambda -> `lamb`; A -> `A`; y0, the distance between neighbouring rows
-> `y0`; d_ij -> `EmbeddedLinear.distance`; number of neurons tried per swap, k -> `top_k`; steps
between swaps, S -> `swap_every`; connection cost -> `connection_cost`.
"""

import contextlib
import copy
import gzip
import io
import itertools
import json
import math
import os
import socket
import tempfile
import time
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import torch
import torch.nn.functional as F
from IPython import get_ipython
from IPython.display import display
from matplotlib.animation import FFMpegWriter, PillowWriter
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import fetch_openml, load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

# ---------------------------------------------------------------- places (paper, section 2)


def line(n):
    """Places of `n` neurons in a row, (n, 1): neuron i sits at (i + 1/2) / n."""
    _check_count("n", n)
    return ((torch.arange(n) + 0.5) / n)[:, None]


def grid(height, width=None):
    """Places of `height` x `width` neurons in the unit square, (n, 2), row-major, x fastest."""
    width = height if width is None else width
    y, x = torch.meshgrid(line(height)[:, 0], line(width)[:, 0], indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def ring(n, radius=0.25):
    """Places of `n` neurons on a circle around (1/2, 1/2), (n, 2), at angles 2 pi (i + 1/2) / n."""
    angle = 2 * math.pi * line(n)[:, 0]
    return 0.5 + radius * torch.stack([angle.cos(), angle.sin()], 1)


# ---------------------------------------------------------------- layer


class EmbeddedLinear(nn.Module):
    """`runs` linear layers between two rows of neurons that have places.

    `in_places` (n, d) and `out_places` (m, d) say where the neurons sit. With `in_folds=2` two
    blocks of inputs (two tokens, say) share the same n places: feature f * n + i sits at place i.

    Attributes: `weight` (runs, out, in) and `bias` (runs, out), drawn from `generator` like those
    of `nn.Linear`; buffer `distance` (out, in), the Manhattan length of every wire.

    Raises ValueError for `runs` or folds below 1 and for places of unlike dimension.
    """

    def __init__(self, in_places, out_places, *, in_folds=1, out_folds=1, runs=1, generator=None):
        super().__init__()
        for name, count in {"runs": runs, "in_folds": in_folds, "out_folds": out_folds}.items():
            _check_count(name, count)
        in_places, out_places = (
            torch.as_tensor(places, dtype=torch.get_default_dtype())
            for places in (in_places, out_places)
        )
        _check_places("in_places", in_places)
        _check_places("out_places", out_places, dims=in_places.shape[1])
        self.in_folds, self.out_folds = in_folds, out_folds
        self.register_buffer("in_places", in_places.clone(), persistent=False)
        self.register_buffer("out_places", out_places.clone(), persistent=False)
        distance = (out_places[:, None] - in_places[None]).abs().sum(-1)
        self.register_buffer("distance", distance.repeat(out_folds, in_folds), persistent=False)
        n_out, n_in = self.distance.shape
        bound = 1 / math.sqrt(n_in)
        weight = torch.empty(runs, n_out, n_in).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(runs, n_out).uniform_(-bound, bound, generator=generator)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        """(runs, batch, in) -> (runs, batch, out)."""
        return torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))


# ---------------------------------------------------------------- models


@dataclass(frozen=True, eq=False)
class NeuronGroup:
    """One row of neurons that can trade places: all that cost, swaps and pictures need to know.

    name:    what pictures call the row
    writers: layers whose outputs these neurons are (for token models, also the embedding)
    readers: layers whose inputs these neurons are
    label:   permutation buffer (runs, n) that rides along with the neurons, or None
    heads:   neurons only trade within their block of n / heads neurons; whole blocks trade, too
    movable: whether swaps may touch the row
    stages:  names of a stream after each of its writers, which pictures show one by one
    """

    name: str
    writers: tuple = ()
    readers: tuple = ()
    label: torch.Tensor | None = None
    heads: int = 1
    movable: bool = True
    stages: tuple = ()

    @property
    def places(self):
        """Where the slots of this row are, (n, d)."""
        if self.readers:
            return self.readers[0].in_places
        return self.writers[-1].out_places

    def axes(self):
        """Every (tensor, axis, folds) that has to be permuted when these neurons move."""
        for layer in self.writers:
            if isinstance(layer, EmbeddedLinear):
                yield from ((layer.weight, 1, layer.out_folds), (layer.bias, 1, layer.out_folds))
            else:
                yield layer, 2, 1  # an embedding, (runs, tokens, dim)
        for layer in self.readers:
            yield layer.weight, 2, layer.in_folds
        if self.label is not None:
            yield self.label, 1, 1


class EmbeddedModel(nn.Module):
    """What all models share. A subclass has `layers`, its `EmbeddedLinear`s in forward order."""

    def __init__(self):
        super().__init__()
        self.register_parameter("embedding", None)

    def groups(self):
        """The rows of neurons, a list of `NeuronGroup` from input to output."""
        raise NotImplementedError

    def rows(self, x):
        """The values of every row after the input, a list; the outputs come last."""
        raise NotImplementedError

    def forward(self, x):
        """Outputs in task order, the last of `rows`, with the same arguments and errors."""
        return self.rows(x)[-1]

    @property
    def runs(self):
        """How many independent networks this model holds."""
        return self.layers[0].weight.shape[0]

    def pick(self, run):
        """The same model with one run (an int) or with several (a list; repeats are allowed)."""
        rows = torch.as_tensor(run).reshape(-1)
        for row in rows.tolist() or [None]:
            _check_run(self, row)
        twin = copy.deepcopy(self)
        for name, tensor in self.state_dict(keep_vars=True).items():
            owner, _, leaf = name.rpartition(".")
            chosen = tensor.detach()[rows.to(tensor.device)]
            is_weight = isinstance(tensor, nn.Parameter)
            setattr(twin.get_submodule(owner), leaf, nn.Parameter(chosen) if is_weight else chosen)
        return twin

    def _per_run_input(self, x, axes):
        """Floats of shape (`axes`, in), or one such for every run, as (runs, ...)."""
        x = torch.as_tensor(x)
        n, ndim = self.in_perm.shape[1] * self.layers[0].in_folds, axes.count(",") + 2
        shared = x.ndim == ndim
        if x.shape[-1:] != (n,) or not (shared or (x.ndim == ndim + 1 and len(x) == self.runs)):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; allowed are ({axes}, {n}) "
                f"and ({self.runs}, {axes}, {n})"
            )
        x = x.to(self.layers[0].weight)  # the model's device and dtype
        return x.expand(self.runs, *x.shape) if shared else x

    def _task_layer(self, i):
        """Weight and bias of layer i; the model's inputs and outputs are put in task order here,
        in the small tensors of the first and last layer, and not in every batch."""
        layer = self.layers[i]
        weight, bias = layer.weight, layer.bias
        if i == len(self.layers) - 1:
            weight, bias = (_task_order(t, 1, self.out_perm) for t in (weight, bias))
        if i == 0 and self.embedding is None:
            weight = _task_order(weight, 2, self.in_perm, layer.in_folds)
        return weight, bias

    def _apply_layer(self, i, values):
        """Layer i on values (runs, batch, in)."""
        weight, bias = self._task_layer(i)
        return torch.baddbmm(bias[:, None], values, weight.transpose(1, 2))


class EmbeddedMLP(EmbeddedModel):
    """`runs` multilayer perceptrons whose neurons have places.

    shape:      features per row, input to output, e.g. (4, 20, 20, 2)
    in_folds:   blocks of input features that share one row of places
    embedding:  (tokens, dim) for token inputs, drawn from N(0, 1); in_folds * dim == shape[0]
    places:     one (n, d) tensor per row, default `line(n)`; the input row has shape[0] / in_folds
    frozen:     numbers of the rows that never swap (0 is the input)
    activation: applied after every layer but the last

    Attributes: `layers`; `embedding` (runs, tokens, dim) or None; `in_perm` and `out_perm`, integer
    buffers (runs, n): the input feature or output that sits in each slot. Inputs and outputs of
    the model stay in task order. With an embedding, whose own columns move, `in_perm` only tells
    which of the first model's dimensions a slot now holds.

    Raises ValueError when any of these does not fit.
    """

    def __init__(
        self,
        shape,
        runs=1,
        *,
        in_folds=1,
        embedding=None,
        places=None,
        frozen=(),
        activation=F.silu,
        generator=None,
    ):
        super().__init__()
        _check_sequence("shape", shape)
        _check_sequence("frozen", frozen)
        self.shape = tuple(shape)
        if len(self.shape) < 2:
            raise ValueError(f"shape is {self.shape}; at least two rows are needed")
        for n in self.shape:
            _check_count("shape", n)
        _check_count("runs", runs)
        _check_count("in_folds", in_folds)
        if self.shape[0] % in_folds:
            raise ValueError(f"in_folds is {in_folds}; it must divide shape[0] = {self.shape[0]}")
        counts = (self.shape[0] // in_folds, *self.shape[1:])
        if embedding is not None:
            self.embedding = _new_embedding(embedding, counts[0], runs, generator)
        self.frozen = tuple(frozen)
        if not set(self.frozen) <= set(range(len(counts))):
            raise ValueError(f"frozen is {self.frozen}; rows are 0 to {len(counts) - 1}")
        places = [line(n) for n in counts] if places is None else list(places)
        if len(places) != len(counts):
            raise ValueError(f"places has {len(places)} rows; shape has {len(counts)}")
        for i, (row, n) in enumerate(zip(places, counts, strict=True)):
            _check_places(f"places[{i}]", row, count=n)
        self.layers = nn.ModuleList(
            EmbeddedLinear(a, b, in_folds=folds, runs=runs, generator=generator)
            for a, b, folds in zip(places, places[1:], [in_folds] + [1] * len(counts), strict=False)
        )
        self.register_buffer("in_perm", torch.arange(counts[0]).repeat(runs, 1))
        self.register_buffer("out_perm", torch.arange(counts[-1]).repeat(runs, 1))
        self.activation = activation

    def rows(self, x):
        """(batch, in) or (runs, batch, in) floats, or (batch, in_folds) integer tokens -> a list
        of the values (runs, batch, n) of every row after the input: hidden rows after their
        activation, neuron by slot, then the outputs (runs, batch, out) in task order.
        Raises ValueError for another width or an unknown token."""
        rows, last = [self._check_input(x)], len(self.layers) - 1
        for i in range(len(self.layers)):
            if i == 0 and self.embedding is not None:
                values = self._read_tokens(rows[0])
            else:
                values = self._apply_layer(i, rows[-1])
            rows.append(self.activation(values) if i < last else values)
        return rows[1:]

    def groups(self):
        ends = {0: self.in_perm, len(self.layers): self.out_perm}
        start = () if self.embedding is None else (self.embedding,)
        names = ["input", *(f"A{i + 1}" for i in range(len(self.layers) - 1)), "output"]
        return [
            NeuronGroup(
                name,
                writers=(self.layers[i - 1],) if i else start,
                readers=tuple(self.layers[i : i + 1]),
                label=ends.get(i),
                movable=i not in self.frozen,
            )
            for i, name in enumerate(names)
        ]

    def _read_tokens(self, tokens):
        """W [E[a]; E[b]] = T_0[a] + T_1[b], with tables T_f = E W_f^T of (runs, tokens, hidden)."""
        weight, bias = self._task_layer(0)
        blocks = weight.unflatten(2, (self.layers[0].in_folds, -1)).unbind(2)
        tables = [self.embedding @ block.transpose(1, 2) for block in blocks]
        tables[0] = tables[0] + bias[:, None]
        return sum(t.index_select(1, tokens[:, f]) for f, t in enumerate(tables))

    def _check_input(self, x):
        if self.embedding is not None:
            x = torch.as_tensor(x)
            folds, tokens = self.layers[0].in_folds, self.embedding.shape[1]
            if x.ndim != 2 or x.shape[1] != folds or x.is_floating_point():
                raise ValueError(
                    f"x is {x.dtype} of shape {tuple(x.shape)}; "
                    f"allowed are integer tokens of shape (batch, {folds})"
                )
            if x.numel() and (x.min() < 0 or x.max() >= tokens):
                raise ValueError(
                    f"x has tokens {x.min()} to {x.max()}; allowed are 0 to {tokens - 1}"
                )
            return x.to(self.embedding.device)
        return self._per_run_input(x, "batch")


class EmbeddedTransformer(EmbeddedModel):
    """`runs` causal transformers whose neurons have places (paper, section 3.4). Like the authors'
    code: MLP rows 4 times as wide as the stream, tanh-GELU, no LayerNorm.

    Every block adds attention, then an MLP, to the residual stream.
    Queries, keys and values are three folds of one row of `width` neurons, in `heads` blocks.
    Token positions are known through the causal mask alone.

    Attributes: `layers`: embed, then (qkv, proj, up, down) per block, then output; `in_perm` and
    `out_perm` as in `EmbeddedMLP`; `embedding` is None.

    Raises ValueError for sizes below 1 and for `heads` that do not divide `width`.
    """

    def __init__(self, in_dim, out_dim, width=32, heads=1, blocks=2, runs=1, *, generator=None):
        super().__init__()
        sizes = {"in_dim": in_dim, "out_dim": out_dim, "width": width, "heads": heads}
        for name, count in {**sizes, "blocks": blocks, "runs": runs}.items():
            _check_count(name, count)
        if width % heads:
            raise ValueError(f"heads is {heads}; it must divide width = {width}")
        self.heads, self.blocks, stream = heads, blocks, line(width)
        block = [(stream, stream, 3), (stream, stream, 1)]
        block += [(stream, line(4 * width), 1), (line(4 * width), stream, 1)]
        ends = [(line(in_dim), stream, 1)], [(stream, line(out_dim), 1)]
        self.layers = nn.ModuleList(
            EmbeddedLinear(a, b, out_folds=folds, runs=runs, generator=generator)
            for a, b, folds in ends[0] + block * blocks + ends[1]
        )
        self.register_buffer("in_perm", torch.arange(in_dim).repeat(runs, 1))
        self.register_buffer("out_perm", torch.arange(out_dim).repeat(runs, 1))

    def rows(self, x):
        """(batch, tokens, in) or (runs, batch, tokens, in) -> a list of the values (runs, batch,
        tokens, n) of every row after the input: the stream (Embed), then attention, stream, MLP
        and stream of every block, then the outputs. An attention row is what its heads have
        collected. Raises ValueError for another shape."""
        x = self._per_run_input(x, "batch, tokens")
        batch, tokens = x.shape[1:3]
        stream = self._apply_layer(0, x.flatten(1, 2))
        rows = [stream]
        for first in range(1, len(self.layers) - 1, 4):
            seen = self._attend(self._apply_layer(first, stream), tokens)
            stream = stream + self._apply_layer(first + 1, seen)
            rows += [seen, stream]
            hidden = F.gelu(self._apply_layer(first + 2, stream), approximate="tanh")
            stream = stream + self._apply_layer(first + 3, hidden)
            rows += [hidden, stream]
        rows.append(self._apply_layer(len(self.layers) - 1, stream))
        return [values.unflatten(1, (batch, tokens)) for values in rows]

    def groups(self):
        embed, *inner, output = self.layers
        stream = NeuronGroup(
            "stream",
            writers=(embed, *inner[1::4], *inner[3::4]),
            readers=(*inner[::4], *inner[2::4], output),
            stages=("Embed", *(f"Res{i + 1}" for i in range(2 * self.blocks))),
        )
        rows = [NeuronGroup("input", readers=(embed,), label=self.in_perm), stream]
        for i in range(self.blocks):
            qkv, proj, up, down = inner[4 * i : 4 * i + 4]
            rows.append(NeuronGroup(f"Atn{i + 1}", (qkv,), (proj,), heads=self.heads))
            rows.append(NeuronGroup(f"MLP{i + 1}", (up,), (down,)))
        return [*rows, NeuronGroup("output", writers=(output,), label=self.out_perm)]

    def _attend(self, qkv, tokens):
        """Causal attention, (runs, batch * tokens, 3 * width) -> (runs, batch * tokens, width)."""
        parts = qkv.view(-1, tokens, 3, self.heads, qkv.shape[2] // (3 * self.heads))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return seen.transpose(1, 2).reshape(*qkv.shape[:2], -1)


def _task_order(tensor, axis, perm, folds=1):
    """`tensor` with what sits in slot s put at index perm[s] of `axis`."""
    if tensor.numel() > 100_000:  # where copying is dear, look whether there is anything to do
        straight = torch.arange(perm.shape[1], device=perm.device)
        if torch.equal(perm, straight.expand_as(perm)):
            return tensor
    index = _unfold(perm, folds)
    index = index[:, :, None] if axis == 1 and tensor.ndim == 3 else index
    index = index[:, None] if axis == 2 else index
    return torch.empty_like(tensor).scatter(axis, index.expand_as(tensor), tensor)


def _unfold(perm, folds):
    """A permutation of n places, (runs, n), as one of folds * n features."""
    if folds == 1:
        return perm
    n = perm.shape[1]
    return torch.cat([perm + f * n for f in range(folds)], 1)


def _new_embedding(size, dim, runs, generator):
    _check_sequence("embedding", size, length=2)
    _check_count(f"embedding {size}: tokens", size[0])
    if size[1] != dim:
        raise ValueError(
            f"embedding is {size}; allowed is (tokens, {dim}), so that the tokens fill shape[0]"
        )
    return nn.Parameter(torch.empty(runs, *size).normal_(generator=generator))


# ---------------------------------------------------------------- cost (paper, section 2)


def connection_cost(model, A=1.0, y0=0.1, *, A_last=None, biases=True, reduce="sum"):
    """Wiring cost of every run, (runs,): every weight pays |w| * (A * distance + y0), every bias
    and every entry of an embedding y0 times its size.

    `A_last` replaces A in the last layer. `biases=False` lets biases go free. `reduce="mean"`
    averages within each tensor instead of summing (the authors do so for their larger networks).
    `A`, `A_last` and `y0` are floats or tensors of shape (runs,).

    Raises ValueError for an unknown `reduce` and for tensors of another length.
    """
    A, y0 = _per_run("A", A, model), _per_run("y0", y0, model)
    A_last = A if A_last is None else _per_run("A_last", A_last, model)
    for name, price in (("A", A), ("A_last", A_last), ("y0", y0)):
        if price < 0 if isinstance(price, float) else (price < 0).any():
            raise ValueError(f"{name} is {price}; allowed are prices from 0")
    total = 0.0
    for layer in model.layers:
        slope = A_last if layer is model.layers[-1] else A
        price = _column(slope, 3) * layer.distance + _column(y0, 3)
        total = total + _reduced(layer.weight.abs() * price, reduce)
        if biases:
            total = total + y0 * _reduced(layer.bias.abs(), reduce)
    if model.embedding is not None:
        total = total + y0 * _reduced(model.embedding.abs(), reduce)
    return total


def _reduced(tensor, reduce):
    """Sum or mean over all but the first axis."""
    _check_choice("reduce", reduce, ("sum", "mean"))
    axes = tuple(range(1, tensor.ndim))
    return tensor.sum(axes) if reduce == "sum" else tensor.mean(axes)


def _per_run(name, value, model):
    """A setting given as a float or per run, ready to multiply tensors of shape (runs,)."""
    if isinstance(value, int | float):
        return float(value)
    value = torch.as_tensor(value)
    if value.ndim and value.shape != (model.runs,):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; allowed are a float and ({model.runs},)"
        )
    return value.to(model.layers[0].weight)


def _of_run(name, value, model, run):
    """The value of one run of a setting that is None, a float or per run."""
    _check_run(model, run)
    value = None if value is None else _per_run(name, value, model)
    return value[run].item() if isinstance(value, torch.Tensor) and value.ndim else value


def _column(value, ndim):
    """A float as it is, a (runs,) tensor with axes added behind."""
    if isinstance(value, torch.Tensor) and value.ndim:
        return value.view(-1, *[1] * (ndim - 1))
    return value


# ---------------------------------------------------------------- swaps (paper, algorithm 1)


@torch.no_grad()
def swap_neurons(model, top_k=5, *, reduce="sum", method="greedy", runs=None, optimizer=None):
    """Let neurons trade places where that shortens the wiring; outputs do not change.

    method="greedy" (the paper): row by row from input to output, the slots are ranked once by the
    sum of |w| of all wires of their neuron. For each of the first `top_k` slots, its neuron trades
    places with the one, of all neurons of the row, that shortens the wiring most, if any does. In
    a row with heads neurons stay in their head; then whole heads trade places in the same way.
    method="optimal" (ours): every row takes its best arrangement with the other rows held fixed, a
    linear assignment problem; `top_k` plays no part.

    runs:      boolean mask (runs,) of the networks to treat, default all
    optimizer: if given, Adam's moments move with their neurons (the authors leave them behind)
    reduce:    as in the loss; A, y0 and biases cannot change which swap is best

    Returns by how much the distance part of the cost, sum of |w| * distance, fell: (runs,).
    Raises ValueError for unknown names, negative `top_k`, a mask of another shape, non-finite
    weights, and for a layer with one group at both its ends.
    """
    _check_choice("method", method, ("greedy", "optimal"))
    _check_choice("reduce", reduce, ("sum", "mean"))
    _check_count("top_k", top_k, least=0)
    treated = _check_mask("runs", runs, model).cpu().numpy()
    _check_finite(model)
    saved = np.zeros(model.runs)
    for group in model.groups():
        if set(map(id, group.writers)) & set(map(id, group.readers)):
            raise ValueError(f"group {group.name} is at both ends of one layer; allowed is one end")
        if not group.movable:
            continue
        searches = [_optimal_order] if method == "optimal" else [_greedy_order]
        if method == "greedy" and group.heads > 1:
            searches.append(_greedy_heads)
        for search in searches:
            wires = list(_wires(group, reduce))
            order, gain = search(wires, group.heads, top_k)
            order[~treated], gain[~treated] = np.arange(order.shape[1]), 0
            saved += gain
            if (order != np.arange(order.shape[1])).any():
                _rearrange(group, torch.from_numpy(order).to(wires[0][0].device), optimizer)
    return torch.from_numpy(saved).to(model.layers[0].weight)


def _wires(group, reduce):
    """For every layer that touches a row, in double precision: |w| of its neurons' wires
    (runs, n, others), and what one unit of such a wire costs from each slot (n, others)."""
    n = len(group.places)
    layers = [m for m in group.writers if isinstance(m, EmbeddedLinear)]
    for layer, written in [(m, True) for m in layers] + [(m, False) for m in group.readers]:
        size, price = layer.weight.to(torch.float64, copy=True).abs_(), layer.distance.double()
        if reduce == "mean":
            price = price / price.numel()
        if not written:
            size, price = size.transpose(1, 2), price.T
        if size.shape[1] > n:  # folds share their places
            size = size.unflatten(1, (-1, n)).sum(1)
        yield size, price[:n]


def _greedy_order(wires, heads, top_k):
    """The neuron that ends in each slot, (runs, n), and the gain, (runs,).

    What neuron i would cost in slot s is linear in its wires: C[i, s] = |w|[i] @ price[s].
    So trading the neurons of slots j and k changes the cost by C[n_j, k] + C[n_k, j] - C[n_j, j] -
    C[n_k, k]. Only the ranked neurons' rows and the ranked slots' columns of C are ever asked for:
    a slot that still waits for its turn can only have received a ranked neuron.
    """
    score = sum(size.sum(2) for size, _ in wires)
    n_runs, n = score.shape
    run = np.arange(n_runs)
    ranked = score.argsort(dim=1, descending=True, stable=True)
    rank, top = ranked.argsort(1), ranked[:, :top_k]
    index = torch.arange(n_runs, device=top.device)[:, None], top
    rows = sum(w[index] @ p.T for w, p in wires)  # (runs, top_k, n)
    columns = sum(p[top] @ w.transpose(1, 2) for w, p in wires)  # (runs, top_k, n)
    cost = sum((w * p).sum(2) for w, p in wires)  # (runs, n): of each slot's neuron as it is
    rank, top, rows, columns, cost = (t.cpu().numpy() for t in (rank, top, rows, columns, cost))
    head = np.arange(n) * heads // n
    order = np.tile(np.arange(n), (n_runs, 1))
    gain, rounding = np.zeros(n_runs), 1e-12 * cost.sum(1)
    for turn, slot in enumerate(top.T):  # few and tiny steps: quicker on the CPU, without autograd
        mover = order[run, slot]
        there = rows[run, rank[run, mover]]
        back = columns[run[:, None], turn, order]
        change = there + back - cost - cost[run, slot][:, None]
        change[head != head[slot][:, None]] = np.inf
        change[run, slot] = 0  # staying is one of the choices
        best = change.min(1)
        other = (change <= (best + rounding)[:, None]).argmax(1)  # the first, if several
        other = np.where(best < -rounding, other, slot)
        moves = other != slot
        gain -= change[run, other]
        cost_slot, cost_other = back[run, other], there[run, other]
        order[run, slot], order[run, other] = order[run, other], mover
        cost[run[moves], slot[moves]] = cost_slot[moves]
        cost[run[moves], other[moves]] = cost_other[moves]
    return order, gain


def _greedy_heads(wires, heads, top_k):
    """As `_greedy_order`, but whole heads trade places, their neurons in the order they have."""
    whole = [
        (w.unflatten(1, (heads, -1)).flatten(2), p.unflatten(0, (heads, -1)).flatten(1))
        for w, p in wires
    ]
    order, gain = _greedy_order(whole, 1, top_k)
    size = wires[0][0].shape[1] // heads
    return (order[:, :, None] * size + np.arange(size)).reshape(len(order), -1), gain


def _optimal_order(wires, heads, _=None):
    """As `_greedy_order`, but the best arrangement of the whole row: of the neurons in every block
    that their head could take, then of the heads."""
    cost = sum(w @ p.T for w, p in wires).cpu().numpy()
    n = cost.shape[1]
    size, neuron = n // heads, np.arange(n // heads)
    order, gain = np.tile(np.arange(n), (len(cost), 1)), np.zeros(len(cost))
    for run, table in enumerate(cost):
        blocks = table.reshape(heads, size, heads, size).swapaxes(1, 2)
        slots = [[linear_sum_assignment(block)[1] for block in row] for row in blocks]
        price = [
            [block[neuron, slot].sum() for block, slot in zip(*pair, strict=True)]
            for pair in zip(blocks, slots, strict=True)
        ]
        blocks_taken = linear_sum_assignment(price)[1]
        fall = np.trace(table) - sum(price[h][g] for h, g in enumerate(blocks_taken))
        if fall > 1e-12 * np.trace(table):
            gain[run] = fall
            for h, g in enumerate(blocks_taken):
                order[run, g * size + slots[h][g]] = h * size + neuron
    return order, gain


def _rearrange(group, order, optimizer=None):
    """Put neuron order[r, s] of every run r into slot s, in every tensor that knows the row."""
    moved = []
    for tensor, axis, folds in group.axes():
        state = {} if optimizer is None else optimizer.state.get(tensor, {})
        moments = [m for m in state.values() if getattr(m, "shape", None) == tensor.shape]
        for values in (tensor, *moments):
            index = _unfold(order, folds)
            index = index.view(*index.shape, *[1] * (values.ndim - 2)).transpose(1, axis)
            moved.append((values, values.gather(axis, index.expand_as(values))))
    try:
        _copy_all(moved)
    except BaseException:  # an interrupt half-way would leave a network that computes nonsense
        _copy_all(moved)
        raise


def _copy_all(pairs):
    for target, values in pairs:
        target.copy_(values)


# ---------------------------------------------------------------- training (paper, section 3)


def mse_loss(outputs, targets):
    """Mean squared error of every run, (runs,), of outputs (runs, batch, out) for targets of the
    same shape or (batch, out)."""
    if targets.shape not in (outputs.shape, outputs.shape[1:]):
        shapes = tuple(outputs.shape), tuple(outputs.shape[1:])
        raise ValueError(f"targets has shape {tuple(targets.shape)}; allowed are {shapes}")
    return (outputs - targets.to(outputs)).square().mean((1, 2))


def cross_entropy(outputs, classes):
    """Cross-entropy of every run, (runs,), of outputs (runs, batch, out) for classes (batch,)
    or (runs, batch)."""
    wanted = classes.to(outputs.device).expand(len(outputs), -1).flatten()
    each = F.cross_entropy(outputs.flatten(0, 1), wanted, reduction="none")
    return each.view(len(outputs), -1).mean(1)


def accuracy(outputs, classes):
    """Share of right answers of every run, (runs,); arguments as in `cross_entropy`."""
    return (outputs.argmax(2) == classes.to(outputs.device)).to(outputs.dtype).mean(1)


@dataclass
class History:
    """What `train` saw.

    steps (logs,); losses, costs and objectives (loss + lamb * cost), each (logs, runs); metrics:
    name -> (logs, runs); snapshots: step -> state of the networks; phases: the steps at which lamb
    changes; seconds in all, swap_seconds of them in swaps; finished: False after an interrupt.
    Values are lists while training runs.
    """

    model: EmbeddedModel
    phases: list
    steps: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    costs: list = field(default_factory=list)
    objectives: list = field(default_factory=list)
    metrics: dict = field(default_factory=dict)
    snapshots: dict = field(default_factory=dict)
    seconds: float = 0.0
    swap_seconds: float = 0.0
    finished: bool = False

    def nearest(self, step):
        """The snapshot nearest to `step`."""
        return min(self.snapshots, key=lambda kept: abs(kept - step))

    def at(self, step):
        """The model as it was at snapshot `step`: always the same object, with other weights."""
        if step not in self.snapshots:
            raise ValueError(f"step is {step}; there are snapshots at {sorted(self.snapshots)}")
        self.model.load_state_dict(self.snapshots[step])
        return self.model

    @torch.no_grad()
    def log(self, step, model, loss, cost, lamb, metrics):
        """Add one line; all of it or, after an interrupt, nothing."""
        measured = {name: metric(model).cpu() for name, metric in metrics.items()}
        self.steps.append(step)
        self.losses.append(loss.detach().cpu())
        self.costs.append(cost.detach().cpu())
        self.objectives.append((loss + lamb * cost).detach().cpu())
        for name, values in measured.items():
            self.metrics.setdefault(name, []).append(values)

    def close(self):
        """Turn the lists into tensors (logs, runs)."""
        for name in ("losses", "costs", "objectives"):
            setattr(self, name, _stacked(getattr(self, name)))
        self.metrics = {name: _stacked(values) for name, values in self.metrics.items()}


def _stacked(values):
    return torch.stack(values) if values else torch.empty(0, 0)


def train(
    model,
    loss_fn,
    *,
    steps,
    lr,
    lamb,
    cost=connection_cost,
    swap_every=200,
    top_k=5,
    swap_runs=None,
    reduce="sum",
    carry_moments=False,
    swap=None,
    metrics=None,
    log_every=None,
    snapshot_every=None,
    snapshot_runs=None,
    label="training",
):
    """Minimise loss + lamb * cost by AdamW (no weight decay), with swaps; returns a `History`.

    model:          any `EmbeddedModel`; it is trained in place
    loss_fn:        loss_fn(model) -> (runs,), called once per step and once at the end
    steps, lr:      number of steps, learning rate
    lamb:           a value, or a list of phases (fraction of training, value), in order, the first
                    at fraction 0; a value is a float or a tensor (runs,)
    cost:           cost(model) -> (runs,), or a list of phases (fraction, callable)
    swap_every:     steps between swaps, 0 for never; `top_k` and `reduce` as in `swap_neurons`;
                    `swap_runs` is the mask (runs,) of the networks that swap
    carry_moments:  Adam's moments move with their neurons; the authors leave them behind
    swap:           swap(model, optimizer), called in place of all that
    metrics:        name -> metric(model) -> (runs,), evaluated without gradients
    log_every:      steps between lines of the history, default a hundredth of the training
    snapshot_every: steps between snapshots (on the CPU), default only the first and the last;
                    `snapshot_runs` lists the runs that they keep, default all
    label:          what the progress bar says

    Ctrl-C returns what there is. Raises FloatingPointError, naming run and step, for a loss that
    is not finite; ValueError for phases out of order and for tensors of another shape.
    """
    _check_count("steps", steps)
    _check_count("swap_every", swap_every, least=0)
    _check_count("top_k", top_k, least=0)
    _check_choice("reduce", reduce, ("sum", "mean"))
    lambs = [(at, _per_run("lamb", value, model)) for at, value in _phases("lamb", lamb, steps)]
    costs, swap_runs = _phases("cost", cost, steps), _check_mask("swap_runs", swap_runs, model)
    log_every, metrics = log_every or max(1, steps // 100), metrics or {}
    kept = list(range(model.runs)) if snapshot_runs is None else list(snapshot_runs)
    if swap is None:

        def swap(model, optimizer):
            carried = optimizer if carry_moments else None
            swap_neurons(model, top_k, reduce=reduce, runs=swap_runs, optimizer=carried)

    history = History(model.pick(kept), [at for at, _ in lambs[1:]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    began, done = time.perf_counter(), 0
    try:
        for step in tqdm(range(steps), label, ncols=80, file=_progress_line()):
            loss, wiring = loss_fn(model), phase_value(costs, step)(model)
            if step % log_every == 0:
                history.log(step, model, loss, wiring, phase_value(lambs, step), metrics)
            if step % (snapshot_every or steps) == 0:
                history.snapshots[step] = _state(model, kept)
            _check_losses(loss, wiring, model, step)
            _descend(optimizer, loss + phase_value(lambs, step) * wiring)
            done = step + 1
            if swap_every and (step + 1) % swap_every == 0:
                swaps_began = time.perf_counter()
                swap(model, optimizer)
                history.swap_seconds += time.perf_counter() - swaps_began
        with torch.no_grad():
            loss, wiring = loss_fn(model), phase_value(costs, steps)(model)
            _check_losses(loss, wiring, model, steps)
            history.log(steps, model, loss, wiring, phase_value(lambs, steps), metrics)
        history.finished = True
    except KeyboardInterrupt:
        print(f"interrupted after {done} of {steps} steps; what there is can be used")
    history.snapshots[done] = _state(model, kept)
    history.seconds = time.perf_counter() - began
    history.close()
    return history


class _DisplayLine:
    """Where tqdm writes in a notebook: one output that is replaced, so that what is saved is the
    last state and not every one."""

    handle = None

    def write(self, text):
        data = {"text/plain": text.strip("\r\n")}
        if data["text/plain"].strip():
            if self.handle is None:
                self.handle = display(data, raw=True, display_id=True)
            else:
                self.handle.update(data, raw=True)

    def flush(self):
        pass


def _progress_line():
    return _DisplayLine() if hasattr(get_ipython(), "kernel") else None


def phase_value(phases, step):
    """The value in force at `step`, of phases (first step, value) in order."""
    return [value for first, value in phases if first <= step][-1]


def _phases(name, phases, steps):
    """[(fraction, value), ...] or one value for all time -> [(first step, value), ...]."""
    if not isinstance(phases, list | tuple):
        phases = [(0, phases)]
    if not all(isinstance(phase, list | tuple) and len(phase) == 2 for phase in phases):
        raise ValueError(f"{name} is {phases}; allowed are a value and pairs (fraction, value)")
    fractions = [fraction for fraction, _ in phases]
    in_order = all(a < b for a, b in itertools.pairwise(fractions))
    if not phases or fractions[0] != 0 or not in_order or fractions[-1] > 1:
        raise ValueError(f"{name} has phases at {fractions}; allowed are rising fractions 0 to 1")
    return [(int(fraction * steps + 1e-9), value) for fraction, value in phases]


def _check_losses(loss, wiring, model, step):
    for name, value in (("loss_fn(model)", loss), ("cost(model)", wiring)):
        if value.shape != (model.runs,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; allowed is ({model.runs},)")
    if not math.isfinite((loss + wiring).sum().item()):
        run = (~(loss + wiring).isfinite()).nonzero().flatten().tolist()
        raise FloatingPointError(f"loss or cost is not finite in run {run} at step {step}")


def _descend(optimizer, objective):
    optimizer.zero_grad()
    objective.sum().backward()
    optimizer.step()


def _state(model, runs):
    """A copy of the state of some runs, on the CPU."""
    return {name: tensor.detach()[runs].cpu() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------- structure (ours)


@contextlib.contextmanager
def pruned(model, threshold):
    """Inside `with pruned(model, threshold):` all weights, biases and entries of an embedding of
    size up to `threshold`, a float or (runs,), are zero; afterwards they are back, so do not swap
    or train inside."""
    threshold = _per_run("threshold", threshold, model)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p[p.abs() <= _column(threshold, p.ndim)] = 0
    try:
        yield model
    finally:
        with torch.no_grad():
            _copy_all(zip(model.parameters(), before, strict=True))


@torch.no_grad()
def prune_threshold(model, loss_fn, tolerance=0.05, candidates=None):
    """For every run the largest threshold, (runs,), up to which pruning raises its loss,
    loss_fn(model) -> (runs,), by no more than the share `tolerance`. `candidates` are the
    thresholds tried, rising, default 81 from 1e-4 to 1."""
    candidates = np.geomspace(1e-4, 1, 81) if candidates is None else candidates
    allowed = loss_fn(model) * (1 + tolerance)
    best = torch.zeros_like(allowed)
    fine = torch.ones_like(allowed, dtype=torch.bool)
    for threshold in candidates:
        with pruned(model, float(threshold)):
            fine &= loss_fn(model) <= allowed
        best[fine] = float(threshold)
        if not fine.any():
            break
    return best


def wires_between(model):
    """Every layer with the rows at its ends: a list of (layer, group read, group written). A
    stream is another row, with another name, at every stage."""
    groups, stage, wires = model.groups(), Counter(), []

    def row(group):
        return replace(group, name=[group.name, *group.stages][stage[group] if group.stages else 0])

    for layer in model.layers:
        source = next(g for g in groups if any(layer is m for m in g.readers))
        target = next(g for g in groups if any(layer is m for m in g.writers))
        read = row(source)
        stage[target] += 1
        wires.append((layer, read, row(target)))
    return wires


def rows_of(model):
    """The rows that pictures and graphs show, name -> `NeuronGroup`, from input to output."""
    return {group.name: group for _, *ends in wires_between(model) for group in ends}


def wiring_graph(model, run=0, threshold=0.0, live=True):
    """One network as a `networkx.DiGraph`: nodes (row, slot), an edge for every |w| > threshold,
    its attribute `weight` the sum of |w| over folds. `live` keeps only what lies on a path from
    the input row (where its embedding is not pruned, too) to the output row. A neuron of a stream
    leads to itself in the next stage, by an edge of weight 0. `threshold` is a float or (runs,),
    here as in the functions below."""
    threshold = _of_run("threshold", threshold, model, run)
    groups = model.groups()
    graph = nx.DiGraph()
    for name, group in rows_of(model).items():
        graph.add_nodes_from((name, slot) for slot in range(len(group.places)))
    for group in groups:
        for before, after in itertools.pairwise(group.stages):
            for slot in range(len(group.places)):
                graph.add_edge((before, slot), (after, slot), weight=0.0)
    for layer, source, target in wires_between(model):
        size = layer.weight[run].detach().abs()
        size = torch.where(size > threshold, size, 0)
        size = size.view(layer.out_folds, len(target.places), layer.in_folds, -1).sum((0, 2))
        for j, i in size.nonzero().tolist():
            graph.add_edge((source.name, i), (target.name, j), weight=size[j, i].item())
    if live:
        starts = [(groups[0].name, slot) for slot in _fed_slots(model, run, threshold)]
        ends = [(groups[-1].name, slot) for slot in range(len(groups[-1].places))]
        graph = graph.subgraph(_reached(graph, starts) & _reached(graph.reverse(copy=False), ends))
    return graph


def _fed_slots(model, run, threshold):
    """Slots of the input row that carry a signal: with an embedding, those it writes to."""
    if model.embedding is None:
        return range(len(model.groups()[0].places))
    return (model.embedding[run].abs().amax(0) > threshold).nonzero().flatten().tolist()


def _reached(graph, starts):
    return set().union(*nx.bfs_layers(graph, starts))


def live_neurons(model, run=0, threshold=0.0):
    """Slots of the neurons on an input-to-output path of the pruned network: row name -> list. A
    neuron that only hands on its bias is not live."""
    live = sorted(wiring_graph(model, run, threshold))
    return {row: [slot for name, slot in live if name == row] for row in rows_of(model)}


def modules(model, run=0, threshold=0.0, rows=None):
    """Modules of the pruned network: the connected components of what lies on input-to-output
    paths, a list of sets of (row, slot), largest first. `rows` names the rows to look at, default
    all: modules that only meet in the output are found by leaving that row out."""
    graph = wiring_graph(model, run, threshold)
    if rows is not None:
        graph = graph.subgraph(node for node in graph if node[0] in rows)
    parts = nx.weakly_connected_components(graph)
    return sorted(parts, key=lambda part: (-len(part), sorted(part)))


def inputs_read(model, run=0, threshold=0.0):
    """For every output, in task order, the set of input features (with folds: of the places that
    the folds share) that reach it after pruning."""
    graph, groups = wiring_graph(model, run, threshold), model.groups()
    features, first = groups[0].label[run].tolist(), groups[0].name
    slots = groups[-1].label[run].argsort().tolist()
    outputs = [(groups[-1].name, slot) for slot in slots]
    return [
        {features[slot] for name, slot in nx.ancestors(graph, node) if name == first}
        if node in graph
        else set()
        for node in outputs
    ]


@torch.no_grad()
def wiring_length(model):
    """Total length of the wiring, sum of |w| * distance, (runs,)."""
    return sum((m.weight.abs() * m.distance).sum((1, 2)) for m in model.layers)


@torch.no_grad()
def mean_wire(model):
    """Length of the average wire, weighted by |w|, (runs,)."""
    return wiring_length(model) / sum(m.weight.abs().sum((1, 2)) for m in model.layers)


def newman_modularity(model, run=0, threshold=0.0, seed=0):
    """Newman's Q of the best communities that Louvain's method finds in all that pruning leaves,
    with |w| as weights: a float, 0 for a network without wires."""
    graph = wiring_graph(model, run, threshold, live=False).to_undirected()
    if graph.number_of_edges() == 0:
        return 0.0
    return nx.community.modularity(graph, nx.community.louvain_communities(graph, seed=seed))


@torch.no_grad()
def shuffled(model, generator=None):
    """A null model: a copy of `model` with the weights of each layer in random order, other for
    every run; biases, embedding and permutations stay. `generator` lives on the CPU."""
    twin = model.pick(list(range(model.runs)))
    for layer in twin.layers:
        weight = layer.weight.flatten(1)
        order = torch.rand(weight.shape, generator=generator).argsort(1).to(weight.device)
        layer.weight.copy_(weight.gather(1, order).view_as(layer.weight))
    return twin


# ---------------------------------------------------------------- pictures

POSITIVE, NEGATIVE = "#2040e0", "#e03020"
PNG_DPI = 80  # of pictures in widgets


def plot_network(
    model,
    run=0,
    ax=None,
    *,
    in_labels=None,
    out_labels=None,
    row_names=True,
    threshold=None,
    strongest=None,
    width=2.0,
    dot=12,
    fontsize=10,
):
    """Draw one network, inputs below: dots at the places, a line for every weight of size above
    `threshold` (default a hundredth of its layer's largest), blue if positive, red if negative,
    as wide as |w| / max |w| of its layer times `width` points, and at most the `strongest` of each
    layer. Folds (two tokens; query, key and value from below) make rows of dots of their own, each
    with its own weights. Stages of a stream are joined by thin grey lines. `in_labels` and
    `out_labels`, in task order, follow the neurons. Returns the axes."""
    ax = plt.subplots(figsize=(5, 4))[1] if ax is None else ax
    threshold = _of_run("threshold", threshold, model, run)
    groups, height = model.groups(), {name: y for y, name in enumerate(rows_of(model))}
    dots = []
    for layer, source, target in wires_between(model):
        lower = _fold_positions(source, height, range(layer.in_folds))
        upper = _fold_positions(target, height, range(layer.out_folds)[::-1])
        ax.add_collection(_wire_lines(layer.weight[run], lower, upper, threshold, width, strongest))
        dots += [lower, upper]
    for group in (group for group in groups if group.stages):
        ends = [height[group.stages[i]] for i in (0, -1)]
        ax.vlines(group.places[:, 0].tolist(), *ends, "0.85", lw=0.5, zorder=0)
    ax.scatter(*np.unique(np.concatenate(dots), axis=0).T, s=dot, c="black", lw=0, zorder=3)
    low = -0.25 * (groups[0].readers[0].in_folds - 1)
    _write_labels(ax, groups[0], run, in_labels, low - 0.12, "top", fontsize)
    _write_labels(ax, groups[-1], run, out_labels, len(height) - 1 + 0.12, "bottom", fontsize)
    for name, y in height.items() if row_names else ():
        ax.text(-0.03, y, name, ha="right", va="center", fontsize=fontsize)
    ax.set(xlim=(-0.02, 1.02), ylim=(low - 0.4, len(height) - 0.6))
    ax.axis("off")
    return ax


def plot_network_3d(
    model,
    run=0,
    ax=None,
    *,
    image=None,
    out_labels=None,
    threshold=None,
    strongest=800,
    width=1.5,
    dot=8,
    fontsize=10,
):
    """Draw one network whose rows lie in the plane, inputs below, like `plot_network`, but only
    the `strongest` lines of every layer. `image`, one value per input feature, colours the input
    dots (white to black). Returns the axes, which are 3-D ones."""
    ax = plt.figure(figsize=(6, 7)).add_subplot(projection="3d") if ax is None else ax
    threshold = _of_run("threshold", threshold, model, run)
    ax.computed_zorder = False  # lines over the input plane, dots over lines
    groups, rows = model.groups(), rows_of(model)
    points = {name: _space_positions(group, z) for z, (name, group) in enumerate(rows.items())}
    for layer, source, target in wires_between(model):
        ends = points[source.name], points[target.name]
        lines = _wire_lines(layer.weight[run], *ends, threshold, width, strongest)
        lines.set(alpha=0.6, zorder=2)
        if len(lines.get_linewidths()):  # matplotlib cannot draw none in space
            ax.add_collection3d(lines)
    for name, places in points.items():
        plane = {"s": dot, "lw": 0, "depthshade": False, "zorder": 3}
        if name == groups[0].name and image is not None:
            shade = 0.15 + torch.as_tensor(image).cpu()[groups[0].label[run].cpu()]
            plane |= {"c": shade, "cmap": "Greys", "marker": "s", "vmin": 0, "vmax": 1, "zorder": 1}
        else:
            plane |= {"c": "black"}
        ax.scatter(*places.T, **plane)
    if out_labels is not None:
        slots = zip(points[groups[-1].name], groups[-1].label[run].tolist(), strict=True)
        for (x, y, z), item in slots:
            ax.text(x, y, z + 0.12, out_labels[item], fontsize=fontsize, ha="center")
    ax.set(xlim=(0, 1), ylim=(1, 0), zlim=(0, len(rows) - 1))
    ax.set_box_aspect((1, 1, 1.25), zoom=1.15)
    ax.set_axis_off()
    return ax


def _fold_positions(group, height, levels):
    """Where a row's dots are in the picture, (folds * n, 2): each fold at its level below."""
    x, y = group.places[:, 0].cpu().numpy(), height[group.name]
    return np.concatenate([np.stack([x, np.full(len(x), y - 0.25 * f)], 1) for f in levels])


def _space_positions(group, z):
    """Where a row's dots are in space, (n, 3); a row in a line lies in the middle."""
    places = group.places.cpu().numpy()
    y = places[:, 1] if places.shape[1] > 1 else np.full(len(places), 0.5)
    return np.stack([places[:, 0], y, np.full(len(places), z)], 1)


def _wire_lines(weight, lower, upper, threshold, width, strongest=None):
    """One layer's weights (out, in) as a `LineCollection`, thick lines on top."""
    weight = weight.detach().cpu().numpy()
    size = np.abs(weight)
    largest = size.max(initial=0) or 1.0
    j, i = np.nonzero(size > (0.01 * largest if threshold is None else threshold))
    order = size[j, i].argsort()[-(strongest or size.size) :]
    j, i = j[order], i[order]
    collection = LineCollection if lower.shape[1] == 2 else Line3DCollection
    return collection(
        np.stack([lower[i], upper[j]], 1),
        linewidths=width * size[j, i] / largest,
        colors=np.where((weight[j, i] > 0)[:, None], to_rgba(POSITIVE), to_rgba(NEGATIVE)),
        capstyle="butt",
    )


def _write_labels(ax, group, run, labels, y, va, fontsize):
    if labels is not None:
        for x, item in zip(group.places[:, 0].tolist(), group.label[run].tolist(), strict=True):
            ax.text(x, y, labels[item], ha="center", va=va, fontsize=fontsize)


def plot_curves(history, values, ax=None, *, ylabel="", label=None, color=None, log=True):
    """Median over runs of `values` (logs, runs) with the range as a band, the phases of lamb as
    dotted lines; `label` and `color` of the line, `log` for a logarithmic axis. Returns the axes.
    """
    ax = plt.subplots(figsize=(5, 3))[1] if ax is None else ax
    values = torch.as_tensor(values)
    (drawn,) = ax.plot(history.steps, values.quantile(0.5, 1), label=label, color=color)
    ax.fill_between(
        history.steps, values.amin(1), values.amax(1), alpha=0.2, color=drawn.get_color(), lw=0
    )
    for step in history.phases:
        ax.axvline(step, color="grey", ls=":", lw=1)
    ax.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
    return ax


def animate(history, draw, path, *, figsize=(6, 4), fps=12, dpi=100):
    """Film the snapshots: draw(fig, model, step) draws one frame on an empty figure. Writes an
    H.264 video for .mp4, an animated picture for .gif; a plain name goes where `save_figure`
    writes. Returns the path."""
    path = figure_folder() / path
    _check_choice("the ending of path", path.suffix, (".mp4", ".gif"))
    with plt.rc_context({"animation.ffmpeg_path": imageio_ffmpeg.get_ffmpeg_exe()}):
        fig = plt.figure(figsize=figsize)
        if path.suffix == ".mp4":
            writer = FFMpegWriter(fps, codec="h264", extra_args=["-pix_fmt", "yuv420p"])
        else:
            writer = PillowWriter(fps)
        with writer.saving(fig, path, dpi):
            for step in sorted(history.snapshots):
                fig.clear()
                draw(fig, history.at(step), step)
                writer.grab_frame()
        plt.close(fig)
    return path


def as_png(draw, figsize=(6, 4)):
    """The bytes of a PNG of what draw(fig) draws, for widgets that show pictures."""
    fig, png = plt.figure(figsize=figsize), io.BytesIO()
    draw(fig)
    fig.savefig(png, dpi=PNG_DPI)
    plt.close(fig)
    return png.getvalue()


def explore(history, draw, *, figsize=(6, 4)):
    """A slider with a play button over the snapshots, each drawn by draw(fig, model, step).
    Returns a widget, whose first child holds the button and the slider."""
    import ipywidgets as widgets  # only notebooks need it

    steps = sorted(history.snapshots)
    play = widgets.Play(max=len(steps) - 1, interval=300, description="play")
    slider = widgets.SelectionSlider(options=steps, value=steps[-1], description="step")
    picture = widgets.Image(format="png", layout={"width": f"{PNG_DPI * figsize[0]:.0f}px"})

    def show(_=None):
        picture.value = as_png(
            lambda fig: draw(fig, history.at(slider.value), slider.value), figsize
        )

    play.observe(lambda change: setattr(slider, "index", change.new), "value")
    slider.observe(show, "value")
    show()
    return widgets.VBox([widgets.HBox([play, slider]), picture])


# ---------------------------------------------------------------- data (ours)


class Digits(NamedTuple):
    """What `load_mnist` returns: a name; the side of the images in pixels; `train` and `test`,
    each (images (n, side * side) in 0 to 1, labels (n,))."""

    name: str
    side: int
    train: tuple
    test: tuple


IDX_FILES = {
    "train": (60_000, "train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": (10_000, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def load_mnist(folder=None):
    """The MNIST digits as `Digits`: from the four canonical IDX files, plain or gzipped, in
    `folder` (default $BIMT_DATA/mnist, else data/mnist; from this module's folder, if relative);
    else from OpenML, which puts them there; else, without a network, and after saying so, the
    8x8 digits that come with scikit-learn.

    Raises ValueError for files that are truncated, foreign or mislabelled.
    """
    if folder is None:
        folder = Path(os.environ.get("BIMT_DATA") or "data") / "mnist"
    folder = Path(__file__).parent / folder
    missing = [n for _, *names in IDX_FILES.values() for n in names if not _idx_path(folder, n)]
    if missing:
        try:
            fetched = _fetch_mnist()
        except (OSError, HTTPException) as error:
            print(f"NOTICE: no {missing[0]} in {folder.name}/ and no download ({error});")
            print("instead of MNIST, these are the 8x8 digits that come with scikit-learn")
            return _small_digits()
        _keep_mnist(folder, *fetched)
    parts = {}
    for part, (count, images, labels) in IDX_FILES.items():
        pixels = _read_idx(_idx_path(folder, images), (count, 28, 28))
        classes = _read_idx(_idx_path(folder, labels), (count,))
        if classes.max() > 9:
            raise ValueError(f"{labels} has class {classes.max()}; allowed are 0 to 9")
        parts[part] = (
            torch.from_numpy(pixels.reshape(count, -1)).float() / 255,
            torch.from_numpy(classes).long(),
        )
    return Digits("MNIST", 28, **parts)


def _idx_path(folder, name):
    """The file `name` or `name`.gz, or None."""
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _read_idx(path, shape):
    """A file of unsigned bytes in IDX format, which has to have this shape."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}") from error
    header = _idx_header(shape)
    if raw[: len(header)] != header or len(raw) != len(header) + math.prod(shape):
        raise ValueError(
            f"{path} starts with {raw[: len(header)].hex()} and has {len(raw)} bytes; allowed is "
            f"{header.hex()} (IDX, unsigned bytes, {shape}) and {len(header) + math.prod(shape)}"
        )
    return np.frombuffer(raw, np.uint8, offset=len(header)).reshape(shape).copy()


def _idx_header(shape):
    return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)


def _fetch_mnist():
    """Pixels (70000, 784) and labels (70000,) from OpenML, as bytes, training digits first."""
    query = {"version": 1, "as_frame": False, "parser": "liac-arff", "n_retries": 1}
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds without an answer
    try:
        with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the retry
            found = fetch_openml("mnist_784", data_home=cache, **query)
    finally:
        socket.setdefaulttimeout(patience)
    data, labels = np.asarray(found.data, np.uint8), np.asarray(found.target, np.uint8)
    total = sum(count for count, *_ in IDX_FILES.values())
    if data.shape != (total, 784):
        raise ValueError(f"mnist_784 has shape {data.shape}; allowed is ({total}, 784)")
    return data, labels


def _keep_mnist(folder, data, labels):
    """Write the four IDX files. A file appears under its name only when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    n_train = IDX_FILES["train"][0]
    for part, rows in {"train": slice(n_train), "test": slice(n_train, None)}.items():
        count, images, classes = IDX_FILES[part]
        files = [(images, data[rows], (count, 28, 28)), (classes, labels[rows], (count,))]
        for name, values, shape in files:
            content = gzip.compress(_idx_header(shape) + values.tobytes())
            _write_whole(folder / f"{name}.gz", content)


def _write_whole(path, content):
    """Write a file under another name and rename it when it is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _small_digits():
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=0)
    images, test_images, labels, test_labels = (torch.from_numpy(part) for part in split)
    return Digits("8x8 digits", 8, (images.float(), labels), (test_images.float(), test_labels))


# ---------------------------------------------------------------- figures and claims


def figure_folder():
    """Where figures, videos and claims go: $BIMT_FIGURES (from this module's folder, if relative),
    else `figures/`. Raises PermissionError if nothing can be written there."""
    folder = Path(__file__).parent / (os.environ.get("BIMT_FIGURES") or "figures")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is read-only; set BIMT_FIGURES to a folder that is not")
    return folder


def save_figure(fig, name):
    """Write `fig` as name.png and name.pdf into `figure_folder()`; returns the path of the PNG."""
    path = figure_folder() / f"{name}.png"
    fig.savefig(path, dpi=160, bbox_inches="tight")
    fig.savefig(path.with_suffix(".pdf"), bbox_inches="tight", metadata={"CreationDate": None})
    return path


class Claims:
    """The paper's claims about one figure beside what our runs show.

    A claim holds if it holds in more than half of the runs.
    """

    def __init__(self, figure):
        self.figure, self.rows = figure, []

    def add(self, claim, values, held, authors="", unit=""):
        """One claim: our number in every run, whether it held in every run, the authors' number."""
        values = np.asarray(values, dtype=float)
        held = np.asarray(held, dtype=bool)
        if values.shape != held.shape or values.ndim != 1 or not len(values):
            raise ValueError(
                f"values and held have shapes {values.shape} and {held.shape}; allowed is one "
                "number and one verdict per run"
            )
        low, median, high = np.quantile(values, [0, 0.5, 1]).tolist()
        self.rows.append(
            {
                "claim": claim,
                "authors": str(authors),
                "median": median,
                "min": low,
                "max": high,
                "unit": unit,
                "runs": len(held),
                "held": int(held.sum()),
            }
        )

    def verdict(self):
        """How many of the claims hold, in one line."""
        held = sum(2 * row["held"] > row["runs"] for row in self.rows)
        return f"Figure {self.figure}: {held} of {len(self.rows)} claims hold in most runs"

    def save(self):
        """Write claims_figure_N.json beside the figures; returns its path."""
        path = figure_folder() / f"claims_figure_{self.figure}.json"
        path.write_text(json.dumps({"figure": self.figure, "claims": self.rows}, indent=1) + "\n")
        return path

    def _repr_markdown_(self):
        return claims_table(self.rows)


def claims_table(rows):
    """Claims as a Markdown table."""
    lines = [
        "| claim | authors | ours: median [min, max] | held in | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ours = "{median:.3g} [{min:.3g}, {max:.3g}] {unit}".format(**row).strip()
        verdict = "held" if 2 * row["held"] > row["runs"] else "**not held**"
        share = f"{row['held']} of {row['runs']}"
        lines.append(f"| {row['claim']} | {row['authors'] or '-'} | {ours} | {share} | {verdict} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- checks of arguments


def _check_count(name, value, least=1):
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; allowed are whole numbers from {least}")


def _check_run(model, run):
    if not isinstance(run, int | np.integer) or not -model.runs <= run < model.runs:
        raise ValueError(f"run is {run!r}; allowed are whole numbers below {model.runs}")


def _check_sequence(name, value, length=None):
    if not isinstance(value, tuple | list | set | range) or len(value) != (length or len(value)):
        raise ValueError(f"{name} is {value!r}; allowed is a tuple of {length or 'some'} numbers")


def _check_choice(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


def _check_places(name, places, count=None, dims=None):
    """Places are (n, d); `count` and `dims` fix n and d."""
    shape = tuple(getattr(places, "shape", ()))
    fits = len(shape) == 2 and min(shape) > 0 and bool(np.isfinite(np.asarray(places)).all())
    if not fits or (count or shape[0]) != shape[0] or (dims or shape[1]) != shape[1]:
        raise ValueError(
            f"{name} has shape {shape}; allowed is ({count or 'n'}, {dims or 'd'}), finite"
        )


def _check_mask(name, mask, model):
    """A boolean mask of runs on the model's device; None means all."""
    device = model.layers[0].weight.device
    if mask is None:
        return torch.ones(model.runs, dtype=torch.bool, device=device)
    mask = torch.as_tensor(mask, device=device)
    if mask.shape != (model.runs,) or mask.dtype != torch.bool:
        raise ValueError(
            f"{name} is {mask.dtype} of shape {tuple(mask.shape)}; allowed is bool ({model.runs},)"
        )
    return mask


def _check_finite(model):
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            run = (~p.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
            raise ValueError(f"{name} is not finite in run {run}; allowed are finite weights")
