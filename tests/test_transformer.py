"""The transformer against PyTorch's attention, and everything that serves MLPs serving it too."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    arrange,
    cost_by_loops,
    distance_cost,
    generator,
    greedy_by_search,
    keeps_heads,
    optimal_by_search,
    weight_axes,
)
from torch import nn

from bimt_utils import (
    EmbeddedTransformer,
    connection_cost,
    live_neurons,
    modules,
    mse_loss,
    plot_network,
    rows_of,
    swap_neurons,
    train,
    wires_between,
    wiring_graph,
)


def transformer(width=8, heads=1, blocks=2, runs=2, seed=0):
    return EmbeddedTransformer(
        2, 3, width=width, heads=heads, blocks=blocks, runs=runs, generator=generator(seed)
    ).double()


def sequences(batch=5, tokens=4, seed=1):
    return torch.randn(batch, tokens, 2, generator=generator(seed), dtype=torch.float64)


@st.composite
def transformers(draw):
    heads = draw(st.sampled_from([1, 2, 4]))
    return transformer(
        width=heads * draw(st.integers(1, 2)),
        heads=heads,
        blocks=draw(st.integers(1, 2)),
        runs=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 1000)),
    )


def shuffle(model, seed=0):
    """Any arrangement of every row that keeps the neurons of a head together."""
    for group, run in itertools.product(model.groups(), range(model.runs)):
        n, random = len(group.places), generator(seed + run)
        size = n // group.heads
        order = torch.cat(
            [
                head * size + torch.randperm(size, generator=random)
                for head in torch.randperm(group.heads, generator=random).tolist()
            ]
        )
        assert keeps_heads(order.tolist(), group.heads)
        with torch.no_grad():
            arrange(group, run, order)


def plain_forward(model, run, x):
    """One run by nn.MultiheadAttention and nn.functional.linear."""

    def apply(layer, values):
        return nn.functional.linear(values, layer.weight[run], layer.bias[run])

    embed, *inner, output = model.layers
    stream = apply(embed, x[..., model.in_perm[run]])
    width, tokens = stream.shape[-1], x.shape[1]
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    for qkv, proj, up, down in zip(*(inner[i::4] for i in range(4)), strict=True):
        attention = nn.MultiheadAttention(width, model.heads, batch_first=True).double()
        attention.load_state_dict(
            {
                "in_proj_weight": qkv.weight[run],
                "in_proj_bias": qkv.bias[run],
                "out_proj.weight": proj.weight[run],
                "out_proj.bias": proj.bias[run],
            }
        )
        stream = stream + attention(stream, stream, stream, attn_mask=later)[0]
        stream = stream + apply(down, nn.GELU("tanh")(apply(up, stream)))
    return apply(output, stream)[..., model.out_perm[run].argsort()]


@settings(deadline=None, max_examples=30)
@given(transformers(), st.integers(0, 1000))
def test_forward_equals_multihead_attention(model, seed):
    shuffle(model, seed)
    x = sequences()
    outputs = model(x)
    assert outputs.shape == (model.runs, 5, 4, 3)
    for run in range(model.runs):
        assert torch.allclose(outputs[run], plain_forward(model, run, x), atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(transformers(), st.integers(0, 1000))
def test_no_arrangement_changes_the_outputs(model, seed):
    x = sequences()
    before = model(x)
    shuffle(model, seed)
    assert torch.allclose(before, model(x), atol=1e-9)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_no_token_sees_a_later_one(heads):
    model, x = transformer(heads=heads), sequences()
    for token in range(4):
        changed = x.clone()
        changed[:, token] += 1
        differs = (model(x) - model(changed)).abs().amax((0, 1, 3)) > 1e-6
        assert differs.tolist() == [later >= token for later in range(4)]


def test_inputs_of_one_run_each():
    model = transformer()
    x = torch.stack([sequences(seed=1), sequences(seed=2)])
    both = model(x)
    for run in range(2):
        assert torch.allclose(both[run], model(x[run])[run])
        assert torch.allclose(both[run], model.pick(run)(x[run])[0])


def test_rows_are_the_named_ones():
    model, x = transformer(), sequences()
    names, values = list(rows_of(model)), model.rows(x)
    assert " ".join(names) == "input Embed Atn1 Res1 MLP1 Res2 Atn2 Res3 MLP2 Res4 output"
    rows = dict(zip(names[1:], values, strict=True))
    assert rows["MLP1"].shape == (2, 5, 4, 32)
    assert torch.equal(rows["output"], model(x))
    proj = model.layers[2]
    added = rows["Atn1"] @ proj.weight.transpose(1, 2)[:, None] + proj.bias[:, None, None]
    assert torch.allclose(rows["Res1"] - rows["Embed"], added)


@settings(deadline=None)
@given(transformers())
def test_every_axis_belongs_to_exactly_one_group(model):
    claimed = [(id(t), axis) for group in model.groups() for t, axis, _ in group.axes()]
    assert sorted(claimed) == sorted(weight_axes(model))
    for group in model.groups():
        for tensor, axis, folds in group.axes():
            assert tensor.shape[axis] == folds * len(group.places)


@settings(deadline=None, max_examples=10)
@given(transformers(), st.sampled_from(["sum", "mean"]), st.sampled_from([None, 0.0]))
def test_cost_equals_a_double_loop(model, reduce, A_last):
    cost = connection_cost(model, 2.0, 0.5, A_last=A_last, reduce=reduce)
    for run in range(model.runs):
        wanted = cost_by_loops(model, run, 2.0, 0.5, A_last, True, reduce)
        assert cost[run].item() == pytest.approx(wanted, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(transformers(), st.integers(0, 8), st.sampled_from(["sum", "mean"]))
def test_greedy_swap_equals_brute_force(model, top_k, reduce):
    slow, x = copy.deepcopy(model), sequences()
    outputs = model(x)
    before = [distance_cost(model, run, reduce) for run in range(model.runs)]
    saved = swap_neurons(model, top_k, reduce=reduce)
    for run in range(model.runs):
        with torch.no_grad():
            greedy_by_search(slow, run, top_k, reduce)
        fall = before[run] - distance_cost(model, run, reduce)
        assert saved[run].item() == pytest.approx(fall, abs=1e-9)
    for ours, theirs in zip(model.state_dict().values(), slow.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.allclose(outputs, model(x), atol=1e-9)


@pytest.mark.parametrize(("width", "heads"), [(2, 1), (4, 2), (4, 4), (6, 3)])
def test_optimal_swap_is_the_best_that_keeps_heads_together(width, heads):
    model = transformer(width, heads, blocks=1, runs=1, seed=width)
    for layer in model.layers[3:5]:  # the MLP row is too wide to try every arrangement
        layer.distance.zero_()
    slow, x = copy.deepcopy(model), sequences()
    outputs, before = model(x), distance_cost(model, 0)
    saved = swap_neurons(model, method="optimal")
    with torch.no_grad():
        optimal_by_search(slow, 0, skipped=["MLP1"])
    assert distance_cost(model, 0) == pytest.approx(distance_cost(slow, 0), abs=1e-9)
    assert saved[0].item() == pytest.approx(before - distance_cost(model, 0), abs=1e-9)
    assert torch.allclose(outputs, model(x), atol=1e-9)


def test_whole_heads_trade_places():
    """Two heads that sit on each other's side: only a trade of heads can shorten the wiring."""
    model = transformer(width=4, heads=2, blocks=1, runs=1)
    qkv, proj = model.layers[1:3]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for slot, other in enumerate([2, 3, 0, 1]):
            qkv.weight[0, [slot, slot + 4, slot + 8], other] = 1.0
            proj.weight[0, other, slot] = 1.0
    model.groups = lambda: [g for g in type(model).groups(model) if g.name == "Atn1"]
    assert swap_neurons(model, 4)[0] > 0
    assert distance_cost(model, 0) == 0


# ---------------------------------------------------------------- structure and pictures


def planted():
    """One wire from input 0 to stream neuron 1, on through MLP neuron 5 of the second block to
    stream neuron 6 and output 2; MLP neuron 3 of the first block reads neuron 6, too early."""
    model = transformer(runs=1)
    embed, *inner, output = model.layers
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        embed.weight[0, 1, 0] = 1
        inner[6].weight[0, 5, 1] = 1
        inner[7].weight[0, 6, 5] = 1
        output.weight[0, 2, 6] = 1
        inner[2].weight[0, 3, 6] = 1
        inner[3].weight[0, 2, 3] = 1
    return model


def test_live_neurons_follow_the_stream_in_time():
    live = live_neurons(planted())
    assert live["input"] == [0]
    assert live["Embed"] == live["Res1"] == live["Res2"] == live["Res3"] == [1]
    assert live["MLP2"] == [5]
    assert live["Res4"] == [6]
    assert live["output"] == [2]
    assert live["MLP1"] == live["Atn1"] == live["Atn2"] == []
    assert len(modules(planted())) == 1


def test_graph_has_a_wire_for_every_weight_and_the_stream():
    model = transformer(runs=1)
    graph = wiring_graph(model, live=False)
    weights = sum(layer.weight.numel() / layer.out_folds for layer in model.layers)
    assert graph.number_of_edges() == weights + 4 * 8
    assert graph["Embed", 3]["Res1", 3]["weight"] == 0


def test_picture_draws_every_row_and_fold():
    model = transformer(runs=1)
    ax = plot_network(model, threshold=0.05)
    wires = wires_between(model)
    assert [text.get_text() for text in ax.texts] == list(rows_of(model))
    for (layer, _, _), lines in zip(wires, ax.collections, strict=False):
        assert len(lines.get_segments()) == (layer.weight[0].abs() > 0.05).sum()
    heights = {round(y, 2) for line in ax.collections[1].get_segments() for y in line[:, 1]}
    assert heights == {1.0, 1.5, 1.75, 2.0}  # Embed, then query, key and value from below


def test_training_lowers_the_loss():
    model, x = transformer(), sequences()
    y = torch.randn(2, 20, 3, generator=generator(3), dtype=torch.float64)
    losses = train(
        model,
        lambda model: mse_loss(model(x).flatten(1, 2), y),
        steps=60,
        lr=1e-2,
        lamb=1e-3,
        swap_every=20,
    ).losses
    assert (losses[-1] < 0.8 * losses[0]).all()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "sizes", [{"width": 6, "heads": 4}, {"blocks": 0}, {"heads": 0}, {"runs": 1.5}, {"width": "8"}]
)
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match=next(iter(sizes))):
        EmbeddedTransformer(2, 2, **sizes)


@pytest.mark.parametrize("shape", [(5, 2), (5, 4, 3), (3, 5, 4, 2), (2, 2, 5, 4, 2)])
def test_inputs_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"allowed are \(batch, tokens, 2\)"):
        transformer()(torch.zeros(shape))
