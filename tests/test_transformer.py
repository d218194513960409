"""The transformer that the notebook of Figure 7 defines, against PyTorch's own attention, and
everything that serves MLPs serving it, too."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from notebook_cells import definitions
from reference import (
    all_axes,
    arrange_at_random,
    cost_by_loops,
    generator,
    greedy_by_search,
    groups_of,
    same_state,
)
from torch import nn

from bimt_utils import connection_cost, live_neurons, mse_loss, swap_neurons, train

NOTEBOOK = SimpleNamespace(**definitions("incontext_3.4", SEQUENCES=200, RUNS=1))
ROWS = ["input", "Embed", "Atn1", "Res1", "MLP1", "Res2", "Atn2", "Res3", "MLP2", "Res4", "output"]


def transformer(width=4, blocks=2, runs=2, seed=0):
    return NOTEBOOK.transformer(2, 3, width, blocks, runs, generator(seed)).double()


def sequences(batch=5, tokens=4, seed=1):
    return torch.randn(batch, tokens, 2, generator=generator(seed), dtype=torch.float64)


TRANSFORMERS = st.builds(
    transformer, st.integers(1, 4), st.integers(1, 2), st.integers(1, 2), st.integers(0, 1000)
)


def plain_forward(model, run, x):
    """One run by nn.MultiheadAttention and nn.functional.linear."""

    def apply(layer, values):
        return nn.functional.linear(values, layer.weight[run], layer.bias[run])

    embed, *inner, output = model.layers
    stream = apply(embed, x[..., model.in_perm[run]])
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    for qkv, proj, up, down in zip(*(inner[i::4] for i in range(4)), strict=True):
        attention = nn.MultiheadAttention(stream.shape[-1], 1, batch_first=True).double()
        state = {"in_proj_weight": qkv.weight[run], "in_proj_bias": qkv.bias[run]}
        state |= {"out_proj.weight": proj.weight[run], "out_proj.bias": proj.bias[run]}
        attention.load_state_dict(state)
        stream = stream + attention(stream, stream, stream, attn_mask=later)[0]
        stream = stream + apply(down, nn.GELU("tanh")(apply(up, stream)))
    return apply(output, stream)[..., model.out_perm[run].argsort()]


@settings(deadline=None, max_examples=30)
@given(TRANSFORMERS, st.integers(0, 1000))
def test_equals_multihead_attention_in_any_arrangement(model, seed):
    x = sequences()
    before = model(x)
    arrange_at_random(model, seed)
    assert torch.allclose(model(x), before, atol=1e-9)
    assert before.shape == (model.runs, 5, 4, 3)
    for run in range(model.runs):
        assert torch.allclose(before[run], plain_forward(model, run, x), atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(TRANSFORMERS)
def test_every_axis_belongs_to_one_group(model):
    claimed = [(id(t), axis) for group in groups_of(model) for t, axis, _ in group.axes]
    assert sorted(claimed) == sorted(all_axes(model))


def test_rows_and_their_values():
    model = transformer()
    assert list(model.groups()) == ROWS
    rows = model.rows(sequences())
    sizes = [len(group.places) for group in model.groups().values()]
    assert [tuple(row.shape) for row in rows] == [(2, 5, 4, n) for n in sizes[1:]]
    stream = [group for name, group in model.groups().items() if name[:3] in ("Emb", "Res")]
    assert len(stream) == 5
    assert all(group is stream[0] for group in stream)


def test_tokens_see_only_earlier_tokens():
    x, model = sequences(), transformer()
    later = x.clone()
    later[:, 2:] += 1
    assert torch.equal(model(x)[:, :, :2], model(later)[:, :, :2])
    assert not torch.allclose(model(x)[:, :, 2:], model(later)[:, :, 2:])


@pytest.mark.parametrize("shape", [(0, 4, 2), (2, 0, 4, 2), (1, 1, 2)])
def test_empty_and_small_batches(shape):
    outputs = transformer()(torch.zeros(shape))
    assert outputs.shape == (2, *shape[-3:-1], 3)


def test_inputs_of_their_own_for_every_run():
    x, model = torch.stack([sequences(seed=1), sequences(seed=2)]), transformer()
    together = model(x)
    for run in range(2):
        assert torch.allclose(together[run], model(x[run])[run])


@pytest.mark.parametrize("shape", [(4, 2), (5, 4, 3), (3, 5, 4, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        transformer()(torch.zeros(shape))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000), st.sampled_from(["sum", "mean"]))
def test_swaps_equal_brute_force(seed, reduce):
    model = transformer(width=3, blocks=1, runs=1, seed=seed)
    other = model.pick(0)
    swap_neurons(model, 4, reduce=reduce)
    greedy_by_search(other, 0, 4, reduce)
    assert same_state(model, other)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_cost_equals_loops(reduce):
    model = transformer(width=2)
    costs = connection_cost(model, 2.0, 0.5, A_last=0.0, reduce=reduce)
    for run in range(2):
        assert costs[run].item() == pytest.approx(
            cost_by_loops(model, run, 2.0, 0.5, A_last=0.0, reduce=reduce)
        )


def test_it_learns_and_wires_fade():
    model, x = transformer(), sequences(32)
    target = x.cumsum(1).sum(2, keepdim=True).expand(-1, -1, 3)

    def loss(model):
        return mse_loss(model(x).flatten(1, 2), target.flatten(0, 1))

    def faint():
        return sum((layer.weight.abs() < 1e-2).sum((1, 2)) for layer in model.layers)

    before = faint()
    history = train(model, loss, steps=100, lr=1e-2, lamb=1e-2, swap_every=25)
    assert (history["objective"][-1] < 0.7 * history["objective"][0]).all()
    assert (faint() > 3 * before).all()


def test_live_neurons_follow_the_stream():
    """Without attention and MLP, signals pass straight from Embed to the last stage."""
    model = transformer(width=4, runs=1)
    with torch.no_grad():
        for layer in model.layers[1:-1]:
            layer.weight.zero_()
        model.layers[0].weight[:, 2:] = 0
    live = {name: mask.sum().item() for name, mask in live_neurons(model).items()}
    assert live == dict.fromkeys(ROWS, 0) | {"input": 2, "output": 3} | {
        name: 2 for name in ROWS if name.startswith(("Embed", "Res"))
    }


# ---------------------------------------------------------------- the task and what it measures


def test_sequences_are_lines_through_the_origin():
    for sequence, y, w in zip(NOTEBOOK.inputs, NOTEBOOK.targets, NOTEBOOK.w, strict=True):
        (zero, x1), (y1, nothing), (also_zero, x2) = sequence.tolist()
        assert zero == nothing == also_zero == 0
        assert y.tolist() == pytest.approx([w.item() * x1, w.item() * x2], abs=1e-6)
        assert y1 == y[0]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_explained_is_the_squared_correlation(seed):
    values = torch.randn(2, 30, 4, generator=generator(seed), dtype=torch.float64)
    values[..., 3] *= 1e-6  # hardly varies: carries nothing
    quantity = torch.randn(30, generator=generator(seed + 1), dtype=torch.float64)
    shares = NOTEBOOK.explained(values, quantity)
    for run in range(2):
        for neuron in range(3):
            r = np.corrcoef(values[run, :, neuron], quantity)[0, 1]
            assert shares[run, neuron].item() == pytest.approx(r**2)
    assert not shares[:, 3].any()


@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-3])
def test_readable_is_what_a_straight_line_gives(scale):
    w = NOTEBOOK.w[NOTEBOOK.test, None].double()
    noise = torch.randn(w.shape, generator=generator(), dtype=torch.float64)
    assert NOTEBOOK.readable(scale * torch.cat([w + noise, w - noise], 1) + 5) == pytest.approx(1)
    assert NOTEBOOK.readable(noise) < 0.5
