"""Places, layers, models, cost and swaps against plain references."""

import copy
from dataclasses import replace

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
    optimal_by_search,
    weight_axes,
)
from torch import nn

from bimt_utils import (
    EmbeddedLinear,
    EmbeddedMLP,
    NeuronGroup,
    connection_cost,
    grid,
    line,
    live_neurons,
    mse_loss,
    plot_network,
    ring,
    swap_neurons,
    train,
)


@st.composite
def models(draw, most=6, max_runs=3):
    """Small MLPs of every kind: plain, folded, with tokens, frozen rows, places in the plane."""
    kind = draw(st.sampled_from(["plain", "folded", "tokens", "plane"]))
    shape = draw(st.lists(st.integers(1, most), min_size=2, max_size=4))
    folds = 1 if kind in ("plain", "plane") else draw(st.integers(1, 3))
    embedding = (draw(st.integers(1, 5)), shape[0]) if kind == "tokens" else None
    places = [ring(n) for n in shape] if kind == "plane" else None
    return EmbeddedMLP(
        (shape[0] * folds, *shape[1:]),
        runs=draw(st.integers(1, max_runs)),
        in_folds=folds,
        embedding=embedding,
        places=places,
        frozen=draw(st.sets(st.integers(0, len(shape) - 1), max_size=1)),
        generator=generator(draw(st.integers(0, 1000))),
    )


def some_input(model, batch=7, seed=1):
    folds = model.layers[0].in_folds
    if model.embedding is not None:
        return torch.randint(model.embedding.shape[1], (batch, folds), generator=generator(seed))
    return torch.randn(batch, model.shape[0], generator=generator(seed))


def same_state(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# ---------------------------------------------------------------- places and layers


def test_places():
    assert line(4).tolist() == [[0.125], [0.375], [0.625], [0.875]]
    assert grid(2, 3).shape == (6, 2)
    assert torch.allclose(grid(2, 3)[1], torch.tensor([0.5, 0.25]))  # x runs first
    assert torch.allclose(grid(5), grid(5, 5))
    places = ring(4, radius=0.25)
    assert torch.allclose((places - 0.5).norm(dim=1), torch.tensor(0.25))
    assert torch.allclose(places[0], 0.5 + 0.25 * torch.tensor([0.5, 0.5]).sqrt())


def test_distance_is_manhattan_and_repeats_over_folds():
    layer = EmbeddedLinear(grid(2), ring(3), in_folds=2, out_folds=3)
    assert layer.distance.shape == (9, 8)
    assert torch.allclose(layer.distance[0, 1], (ring(3)[0] - grid(2)[1]).abs().sum())
    assert torch.equal(layer.distance[:3, :4], layer.distance[6:, 4:])


def test_initialised_like_nn_linear():
    layer = EmbeddedLinear(line(25), line(400), runs=10, generator=generator())
    usual = nn.Linear(25, 400)
    for ours, theirs in ((layer.weight, usual.weight), (layer.bias, usual.bias)):
        assert ours.abs().max() <= 0.2
        assert abs(ours.std() / theirs.std() - 1) < 0.1


def test_building_a_model_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    EmbeddedMLP((4, 5, 2), runs=2, generator=generator())
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


# ---------------------------------------------------------------- models


def plain_forward(model, run, x):
    """One run by nn.functional.linear, with the permutations applied to the activations."""
    if model.embedding is not None:
        x = model.embedding[run][x].flatten(1)
    else:
        folds = model.layers[0].in_folds
        x = x.unflatten(1, (folds, -1))[:, :, model.in_perm[run]].flatten(1)
    for i, layer in enumerate(model.layers):
        x = nn.functional.linear(x, layer.weight[run], layer.bias[run])
        x = model.activation(x) if i < len(model.layers) - 1 else x
    return x[:, model.out_perm[run].argsort()]


@settings(deadline=None, max_examples=60)
@given(models(), st.integers(0, 1000))
def test_forward_equals_a_plain_network(model, seed):
    shuffle_everything(model, seed)
    x = some_input(model)
    outputs = model(x)
    assert outputs.shape == (model.runs, len(x), model.shape[-1])
    for run in range(model.runs):
        assert torch.allclose(outputs[run], plain_forward(model, run, x), atol=1e-5)


def shuffle_everything(model, seed=0):
    with torch.no_grad():
        for group in model.groups():
            for run in range(model.runs):
                order = torch.randperm(len(group.places), generator=generator(seed + run))
                arrange(group, run, order)


@settings(deadline=None, max_examples=60)
@given(models(), st.integers(0, 1000))
def test_no_permutation_of_any_row_changes_the_outputs(model, seed):
    x = some_input(model)
    before = model(x)
    shuffle_everything(model, seed)
    assert torch.allclose(before, model(x), atol=1e-5)


@settings(deadline=None)
@given(models())
def test_every_axis_belongs_to_exactly_one_group(model):
    claimed = [(id(t), axis) for group in model.groups() for t, axis, _ in group.axes()]
    assert sorted(claimed) == sorted(weight_axes(model))
    for group in model.groups():
        for tensor, axis, folds in group.axes():
            assert tensor.shape[axis] == folds * len(group.places)


def test_inputs_of_one_run_each():
    model = EmbeddedMLP((3, 4, 2), runs=2, generator=generator())
    x = torch.randn(2, 5, 3, generator=generator())
    both = model(x)
    for run in range(2):
        assert torch.allclose(both[run], model(x[run])[run], atol=1e-6)


def test_state_dict_keeps_permutations():
    model = EmbeddedMLP((4, 6, 3), runs=2, generator=generator())
    swap_neurons(model, 6)
    assert not torch.equal(model.in_perm[0], torch.arange(4)) or not torch.equal(
        model.out_perm[0], torch.arange(3)
    )
    twin = EmbeddedMLP((4, 6, 3), runs=2, generator=generator(1))
    twin.load_state_dict(model.state_dict())
    x = some_input(model)
    assert torch.equal(model(x), twin(x))
    assert not twin.in_perm.is_floating_point()
    assert "in_perm" not in dict(model.named_parameters())


def test_double_precision_follows_the_model():
    model = EmbeddedMLP((4, 6, 2), runs=2, in_folds=2, generator=generator()).double()
    outputs = model(torch.randn(3, 4))
    assert outputs.dtype == connection_cost(model).dtype == torch.float64
    assert swap_neurons(model).dtype == torch.float64
    assert model.in_perm.dtype == torch.int64


# ---------------------------------------------------------------- cost


@settings(deadline=None, max_examples=40)
@given(models(), st.sampled_from(["sum", "mean"]), st.booleans(), st.sampled_from([None, 0.0, 3.0]))
def test_cost_equals_a_double_loop(model, reduce, biases, A_last):
    A, y0 = torch.linspace(0.5, 2, model.runs), torch.linspace(0.1, 0.4, model.runs)
    cost = connection_cost(model, A, y0, A_last=A_last, biases=biases, reduce=reduce)
    assert cost.shape == (model.runs,)
    for run in range(model.runs):
        wanted = cost_by_loops(model, run, A[run].item(), y0[run].item(), A_last, biases, reduce)
        assert cost[run].item() == pytest.approx(wanted, rel=1e-4)


# ---------------------------------------------------------------- swaps


@settings(deadline=None, max_examples=60)
@given(models(), st.integers(0, 8), st.sampled_from(["sum", "mean"]))
def test_greedy_swap_equals_brute_force(model, top_k, reduce):
    model = model.double()
    slow, x = copy.deepcopy(model), some_input(model)
    before = [distance_cost(model, run, reduce) for run in range(model.runs)]
    outputs = model(x)
    saved = swap_neurons(model, top_k, reduce=reduce)
    for run in range(model.runs):
        with torch.no_grad():
            greedy_by_search(slow, run, top_k, reduce)
        fall = before[run] - distance_cost(model, run, reduce)
        assert saved[run].item() == pytest.approx(fall, abs=1e-9)
        assert saved[run] >= 0
    assert same_state(model, slow)
    assert torch.allclose(outputs, model(x), atol=1e-9)
    for group, number in zip(model.groups(), range(9), strict=False):
        if number in model.frozen and group.label is not None:
            assert torch.equal(group.label, torch.arange(len(group.places)).expand_as(group.label))


@settings(deadline=None, max_examples=20)
@given(models(most=4, max_runs=2), st.sampled_from(["sum", "mean"]))
def test_optimal_swap_is_the_best_of_all_arrangements(model, reduce):
    model = model.double()
    model.frozen = ()
    slow, x = copy.deepcopy(model), some_input(model)
    before = [distance_cost(model, run, reduce) for run in range(model.runs)]
    outputs = model(x)
    saved = swap_neurons(model, method="optimal", reduce=reduce)
    for run in range(model.runs):
        with torch.no_grad():
            optimal_by_search(slow, run, reduce)
        fast = distance_cost(model, run, reduce)
        assert fast == pytest.approx(distance_cost(slow, run, reduce), abs=1e-9)
        assert saved[run].item() == pytest.approx(before[run] - fast, abs=1e-9)
    assert torch.allclose(outputs, model(x), atol=1e-9)


def test_symmetric_network_stays_where_it_is():
    """Neurons without wires gain nothing anywhere, so nothing moves."""
    model = EmbeddedMLP((3, 5, 2), runs=2, generator=generator())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    before = copy.deepcopy(model)
    for method in ("greedy", "optimal"):
        assert torch.equal(swap_neurons(model, 5, method=method), torch.zeros(2))
        assert same_state(before, model)


def test_mask_leaves_other_runs_alone():
    model = EmbeddedMLP((5, 9, 4), runs=3, generator=generator())
    before = copy.deepcopy(model)
    saved = swap_neurons(model, 9, runs=torch.tensor([True, False, True]))
    assert saved[1] == 0
    assert (saved[[0, 2]] > 0).all()
    assert same_state(before.pick(1), model.pick(1))
    assert not same_state(before.pick(0), model.pick(0))


@pytest.mark.parametrize("carry", [True, False])
def test_moments_move_with_their_neurons(carry):
    """A swap with the optimiser told changes nothing about what training computes."""
    model = EmbeddedMLP((6, 8, 4), in_folds=2, runs=2, generator=generator()).double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(9, 6, generator=generator(1)), torch.randn(9, 4, generator=generator(2))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, twin)]
    for step in range(6):
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            mse_loss(m(x), y).sum().backward()
            optimizer.step()
        if step == 2:
            swap_neurons(model, 8, optimizer=optimizers[0] if carry else None)
    assert torch.allclose(model(x), twin(x), atol=1e-9) == carry


def test_interrupt_inside_a_swap_leaves_the_function(monkeypatch):
    import bimt_utils

    model = EmbeddedMLP((4, 9, 3), generator=generator())
    x = some_input(model)
    before, copy_all, calls = model(x), bimt_utils._copy_all, []

    def interrupted_once(pairs):
        calls.append(len(pairs))
        if len(calls) == 1:
            copy_all(pairs[:1])
            raise KeyboardInterrupt
        copy_all(pairs)

    monkeypatch.setattr(bimt_utils, "_copy_all", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        swap_neurons(model, 9)
    assert torch.allclose(before, model(x), atol=1e-6)
    assert len(calls) == 2


# ---------------------------------------------------------------- many runs in one


@settings(deadline=None, max_examples=15)
@given(models())
def test_many_runs_equal_their_single_runs(model):
    x, y = some_input(model), torch.randn(7, model.shape[-1], generator=generator(5))
    singles = [model.pick(run) for run in range(model.runs)]
    for run, single in enumerate(singles):
        assert single.runs == 1
        assert torch.allclose(model(x)[run], single(x)[0], atol=1e-6)
        assert torch.allclose(connection_cost(model)[run], connection_cost(single)[0])
    settings_ = {"steps": 50, "lr": 2e-3, "lamb": 1e-2, "swap_every": 10, "top_k": 3}
    train(model, lambda m: mse_loss(m(x), y), **settings_)
    for run, single in enumerate(singles):
        train(single, lambda m: mse_loss(m(x), y), **settings_)
        assert torch.allclose(model(x)[run], single(x)[0], atol=1e-4)


def test_pick_is_a_copy():
    model = EmbeddedMLP((2, 3, 1), runs=3, generator=generator())
    assert model.pick(torch.tensor(1)).runs == model.pick(model.in_perm[0, 1].numpy()).runs == 1
    picked = model.pick([2, 0])
    assert picked.runs == 2
    assert torch.equal(picked.layers[0].weight[0], model.layers[0].weight[2])
    with torch.no_grad():
        picked.layers[0].weight.zero_()
    assert model.layers[0].weight.abs().sum() > 0


@pytest.mark.parametrize("method", ["greedy", "optimal"])
def test_neurons_stay_within_their_head(method):
    class TwoHeads(EmbeddedMLP):
        def groups(self):
            groups = super().groups()
            return [groups[0], replace(groups[1], heads=2), groups[2]]

    model = TwoHeads((4, 10, 4), runs=3, generator=generator())
    x, first = some_input(model), model.layers[0].weight.detach().clone()
    before = model(x)
    assert (swap_neurons(model, 10, method=method) > 0).all()
    assert torch.allclose(before, model(x), atol=1e-6)
    for run in range(3):
        rows = first[run][:, model.in_perm[run]]
        now = [(rows == w).all(1).nonzero().item() for w in model.layers[0].weight[run].detach()]
        assert sorted(now) == list(range(10))
        assert all(a // 5 == slot // 5 for slot, a in enumerate(now))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same():
    model = EmbeddedMLP((4, 8, 3), runs=3, generator=generator())
    other, x = copy.deepcopy(model).to("cuda"), some_input(model)
    A = torch.linspace(0, 1, 3)
    for method in ("greedy", "optimal"):
        swap_neurons(model, 8, method=method)
        swap_neurons(other, 8, method=method)
        assert torch.allclose(model(x), other(x).cpu(), atol=1e-5)
        assert torch.allclose(connection_cost(model, A), connection_cost(other, A).cpu())
    history = train(other, lambda m: mse_loss(m(x), x[:, :3]), steps=20, lr=1e-3, lamb=1e-3)
    assert history.losses.device.type == "cpu"


# ---------------------------------------------------------------- bad input


class SelfLoop(EmbeddedMLP):
    def groups(self):
        return [NeuronGroup("loop", writers=(self.layers[0],), readers=(self.layers[0],))]


def build(*args, **kwargs):
    return lambda: EmbeddedMLP(*args, **kwargs)


def with_model(use, shape=(4, 5, 2), **kwargs):
    return lambda: use(EmbeddedMLP(shape, runs=2, generator=generator(), **kwargs))


def with_nan(model):
    with torch.no_grad():
        model.layers[1].weight[1, 0, 0] = float("nan")
    swap_neurons(model)


TOKENS = {"shape": (4, 5, 2), "in_folds": 2, "embedding": (7, 2)}


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (build((4,)), ["shape", "(4,)"]),
        (build(()), ["shape"]),
        (build(5), ["shape", "5"]),
        (build((4, 2), frozen=1), ["frozen", "1"]),
        (build((4, 2), embedding=7), ["embedding", "7"]),
        (build((4, 2), embedding=(7.5, 4)), ["embedding", "7.5"]),
        (build((4, 2), places=[line(4) * float("nan"), line(2)]), ["places[0]", "finite"]),
        (build((4, 0, 2)), ["shape", "0"]),
        (build((4, -3, 2)), ["shape", "-3"]),
        (build((4, 2.5)), ["shape", "2.5"]),
        (build((4, 2), runs=0), ["runs", "0"]),
        (build((4, 2), in_folds=3), ["in_folds", "3"]),
        (build((4, 2), in_folds=0), ["in_folds", "0"]),
        (build((4, 2), embedding=(7, 3)), ["embedding", "(7, 3)"]),
        (build((4, 2), in_folds=2, embedding=(7, 4)), ["embedding", "(7, 4)"]),
        (build((4, 2), embedding=(0, 4)), ["embedding", "(0, 4)"]),
        (build((4, 2), places=[line(4)]), ["places", "1"]),
        (build((4, 2), places=[line(4), line(3)]), ["places[1]", "(3, 1)"]),
        (build((4, 2), places=[line(4), ring(2)]), ["places", "(2, 2)"]),
        (build((4, 2), frozen=(2,)), ["frozen", "2"]),
        (build((4, 2), frozen=(-1,)), ["frozen", "-1"]),
        (lambda: line(0), ["n", "0"]),
        (lambda: EmbeddedLinear(line(2), grid(2)), ["out_places", "(4, 2)"]),
        (lambda: EmbeddedLinear(line(2), line(2), out_folds=0), ["out_folds", "0"]),
        (with_model(lambda m: m(torch.zeros(3, 5))), ["x", "(3, 5)"]),
        (with_model(lambda m: m(torch.zeros(4))), ["x", "(4,)"]),
        (with_model(lambda m: m(torch.zeros(3, 6, 4))), ["x", "(3, 6, 4)"]),
        (with_model(lambda m: m(torch.tensor([[0, 7]])), **TOKENS), ["x", "7"]),
        (with_model(lambda m: m(torch.tensor([[-1, 0]])), **TOKENS), ["x", "-1"]),
        (with_model(lambda m: m(torch.tensor([[1, 2, 3]])), **TOKENS), ["x", "(1, 3)"]),
        (with_model(lambda m: m(torch.zeros(3, 2)), **TOKENS), ["x", "float"]),
        (with_model(lambda m: m.pick(2)), ["run", "2"]),
        (with_model(lambda m: connection_cost(m, reduce="max")), ["reduce", "max"]),
        (with_model(lambda m: connection_cost(m, torch.ones(3))), ["A", "(3,)"]),
        (with_model(lambda m: connection_cost(m, y0=torch.ones(3))), ["y0", "(3,)"]),
        (with_model(lambda m: connection_cost(m, A_last=torch.ones(3))), ["A_last", "(3,)"]),
        (with_model(lambda m: swap_neurons(m, -1)), ["top_k", "-1"]),
        (with_model(lambda m: swap_neurons(m, 1.5)), ["top_k", "1.5"]),
        (with_model(lambda m: swap_neurons(m, reduce="max")), ["reduce", "max"]),
        (with_model(lambda m: swap_neurons(m, method="best")), ["method", "best"]),
        (with_model(lambda m: swap_neurons(m, runs=[True])), ["runs", "(1,)"]),
        (with_model(lambda m: swap_neurons(m, runs=[0, 1])), ["runs", "int64"]),
        (with_model(with_nan), ["layers.1.weight", "finite"]),
        (lambda: swap_neurons(SelfLoop((3, 3))), ["loop", "both ends"]),
    ],
)
def test_bad_input_gets_a_clear_error(call, names):
    with pytest.raises(ValueError, match=r"allowed|rows|needed|must|shape") as error:
        call()
    for name in names:
        assert name in str(error.value)


# ---------------------------------------------------------------- users' slips


@pytest.mark.parametrize("price", [{"A": -1.0}, {"y0": torch.tensor([0.1, -0.1])}, {"A_last": -2}])
def test_negative_prices(price):
    with pytest.raises(ValueError, match=f"{next(iter(price))} is"):
        connection_cost(EmbeddedMLP((3, 4, 2), runs=2, generator=generator()), **price)


def test_numpy_arrays_are_welcome():
    model = EmbeddedMLP((3, 4, 2), runs=2, generator=generator())
    x = torch.randn(5, 3, generator=generator())
    assert torch.equal(model(x), model(x.numpy()))
    tokens = EmbeddedMLP((6, 4), in_folds=2, embedding=(7, 3), generator=generator())
    pairs = torch.tensor([[0, 6], [3, 3]])
    assert torch.equal(tokens(pairs), tokens(pairs.numpy()))


@pytest.mark.parametrize("run", [2, -3, 0.5, None])
def test_runs_that_are_not_there(run):
    model = EmbeddedMLP((3, 4, 2), runs=2, generator=generator())
    for call in (plot_network, live_neurons):
        with pytest.raises(ValueError, match="run is"):
            call(model, run)


def test_pictures_and_graphs_take_thresholds_per_run():
    model = EmbeddedMLP((3, 4, 2), runs=2, generator=generator())
    thresholds = torch.tensor([0.1, 0.3])
    for run in range(2):
        one = plot_network(model, run, threshold=thresholds.tolist()[run])
        all_of_them = plot_network(model, run, threshold=thresholds)
        lines = [len(ax.collections[0].get_segments()) for ax in (one, all_of_them)]
        assert lines[0] == lines[1]
