"""Places, layers, models, cost and swaps against plain references."""

import copy
import io
from functools import partial

import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bimt_utils as bimt
from bimt_utils import connection_cost, line, swap_neurons

SEEDS, REDUCE = st.integers(0, 1000), st.sampled_from(["sum", "mean"])
MLPS = ("plain", "folds", "tokens", "ring")


def few(examples):
    return settings(deadline=None, max_examples=examples)


def new_model(shape=(4, 5, 2), runs=2, seed=0, **kwargs):
    return bimt.EmbeddedMLP(shape, runs, generator=ref.generator(seed), **kwargs)


def new_tokens(runs=2, seed=0):
    return new_model((6, 4), runs, seed, in_folds=2, embedding=(7, 3))


def test_places():
    assert line(4).tolist() == [[0.125], [0.375], [0.625], [0.875]]


def test_distance_is_manhattan_and_repeats_over_folds():
    four, three = ref.ring(4), ref.ring(3)
    layer = bimt.EmbeddedLinear(four, three, in_folds=2, out_folds=3)
    assert layer.distance.shape == (9, 8)
    assert torch.allclose(layer.distance[0, 1], (three[0] - four[1]).abs().sum())
    assert torch.equal(layer.distance[:3, :4], layer.distance[6:, 4:])


def test_initialised_like_nn_linear_and_without_the_global_generator():
    before = torch.get_rng_state()
    layer = bimt.EmbeddedLinear(line(25), line(400), runs=10, generator=ref.generator())
    new_tokens()
    assert torch.equal(before, torch.get_rng_state())
    usual = nn.Linear(25, 400)
    for ours, theirs in ((layer.weight, usual.weight), (layer.bias, usual.bias)):
        assert ours.abs().max() <= 0.2
        assert abs(ours.std() / theirs.std() - 1) < 0.1
    assert not torch.equal(layer.weight[0], layer.weight[1])


# ---------------------------------------------------------------- models


@few(25)
@given(ref.models(kinds=MLPS), SEEDS)
def test_forward_equals_a_plain_network(model, seed):
    ref.arrange_at_random(model, seed)
    x = ref.some_input(model)
    each = [x if model.embedding is not None else x + run for run in range(model.runs)]
    outputs = model(x), model(x if model.embedding is not None else torch.stack(each))
    assert outputs[0].shape == (model.runs, len(x), model.shape[-1])
    for run in range(model.runs):
        assert torch.allclose(outputs[0][run], ref.plain_forward(model, run, x))
        assert torch.allclose(outputs[1][run], ref.plain_forward(model, run, each[run]))
    assert torch.equal(outputs[0], model(x.numpy()))


@few(25)
@given(ref.models(), SEEDS)
def test_every_axis_has_one_group_and_no_arrangement_changes_the_outputs(model, seed):
    claimed, x = [], ref.some_input(model)
    for group in ref.groups_of(model):
        for tensor, axis, folds in group.axes():
            assert tensor.shape[axis] == folds * len(group.places)
            claimed.append((id(tensor), axis))
    assert sorted(claimed) == sorted(ref.all_axes(model))
    before = model(x)
    ref.arrange_at_random(model, seed)
    assert torch.allclose(before, model(x))
    (_, *groups), values = model.groups().values(), model.rows(x)
    for group, value in zip(groups, values, strict=True):
        assert value.shape[2] % len(group.places) == 0
    assert torch.equal(values[-1], model(x))


def test_tokens_of_every_integer_type():  # defect 7
    model, tokens = new_tokens(), torch.tensor([[0, 6], [3, 3]])
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(model(tokens.to(kind)), model(tokens))


@pytest.mark.parametrize("new", [new_model, ref.Stream, new_tokens])
def test_saved_and_loaded_after_swaps(new):
    model, twin, file = new(runs=2).double(), new(runs=2, seed=1).double(), io.BytesIO()
    assert (swap_neurons(model, 6) > 0).all()
    assert not torch.equal(model.in_perm, twin.in_perm)
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file))
    assert ref.same_state(model, twin)
    outputs = model(ref.some_input(model))
    assert torch.equal(outputs, twin(ref.some_input(model)))
    assert outputs.dtype == connection_cost(model).dtype == swap_neurons(model).dtype
    assert twin.in_perm.dtype == twin.out_perm.dtype == torch.int64
    assert "in_perm" not in dict(twin.named_parameters())


def test_pick_is_a_copy_that_keeps_what_is_frozen():  # defect 28
    model = new_model(runs=3)
    model.layers[0].bias.requires_grad_(False)
    picked = model.pick([2, 0, -1])
    assert [p.requires_grad for p in picked.parameters()] == [True, False, True, True]
    assert torch.equal(picked.layers[1].weight, model.layers[1].weight[[2, 0, 2]])
    assert model.pick(model.in_perm[0, 1].numpy()).runs == model.pick(torch.tensor(1)).runs == 1
    picked.layers[0].weight.data.zero_()
    assert model.layers[0].weight.abs().min() > 0


@few(8)
@given(ref.models(), st.booleans())
def test_runs_train_and_swap_as_they_would_alone(model, exact):
    """Each with a lamb, an A and swaps of its own."""
    x, targets, n = ref.some_input(model), torch.ones(7, model.out_perm.shape[1]), model.runs
    lamb, A, mask = torch.linspace(1e-2, 0, n), torch.linspace(0, 1, n), torch.arange(n) != 1
    networks = {(run,): model.pick(run) for run in range(n)} | {tuple(range(n)): model}
    for runs, network in networks.items():
        own = list(runs)
        cost, swap = partial(connection_cost, A=A[own]), partial(swap_neurons, mask=mask[own])
        arguments = {"steps": 30, "lr": 2e-3, "swap_every": 10, "exact": exact, "lamb": lamb[own]}
        loss_fn = lambda m: bimt.mse_loss(m(x), targets)  # noqa: E731
        bimt.train(network, loss_fn, cost=cost, swap=swap, **arguments)
    for run in range(n):
        assert networks[run,].runs == 1
        assert torch.allclose(model(x)[run], networks[run,](x)[0])
        assert torch.equal(model.in_perm[run], networks[run,].in_perm[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("exact", [True, False])
def test_cuda_gives_the_same(exact):
    model = ref.Stream(4, 8, 6, 3, runs=3).double()
    other, x, A = copy.deepcopy(model).to("cuda"), ref.some_input(model), torch.linspace(0, 1, 3)
    for network in (model, other):
        arguments = {"steps": 40, "lr": 1e-2, "lamb": A, "swap_every": 10, "exact": exact}
        bimt.train(network, lambda m: m(x).square().mean((1, 2)), **arguments)
        swap_neurons(network, mask=A > 0)
    nulls = [bimt.shuffled(bimt.prune(m, 0.1), ref.generator()) for m in (model, other)]
    assert torch.allclose(nulls[0](x), nulls[1](x).cpu())


# ---------------------------------------------------------------- cost and swaps


@few(25)
@given(ref.models(), REDUCE, st.booleans(), st.sampled_from([None, 0.0, 3.0]))
def test_cost_equals_a_double_loop(model, reduce, biases, A_last):
    A, y0 = torch.linspace(0.5, 2, model.runs), torch.linspace(0.1, 0.4, model.runs)
    cost = connection_cost(model, A, y0, A_last=A_last, biases=biases, reduce=reduce)
    assert cost.shape == (model.runs,)
    for run in range(model.runs):
        prices = A[run].item(), y0[run].item(), A_last
        wanted = ref.cost_by_loops(model, run, *prices, biases, reduce)
        assert cost[run].item() == pytest.approx(wanted, rel=1e-6)
    assert torch.equal(connection_cost(model), connection_cost(model, A=1.0, y0=0.1))


@few(25)
@given(ref.models(most=4), st.integers(0, 5), REDUCE, st.sampled_from([0, 0.6, 1]), SEEDS)
def test_swaps_equal_brute_force(model, top_k, reduce, share, masked):
    model = ref.thinned(model, masked, share)
    mask = torch.tensor([masked >> run & 1 for run in range(model.runs)]) == 1
    slow, first, outputs = copy.deepcopy(model), copy.deepcopy(model), model(ref.some_input(model))
    saved = swap_neurons(model, top_k, reduce=reduce, mask=mask)
    for run in range(model.runs):
        if mask[run]:
            ref.greedy_by_search(slow, run, top_k, reduce)
        before, now = (ref.distance_cost(m, run, reduce) for m in (first, model))
        assert saved[run].item() == pytest.approx(before - now, abs=1e-9)
        assert saved[run] >= 0
        assert saved[run] > 0 or ref.same_state(model.pick(run), first.pick(run))
    assert ref.same_state(model, slow)
    assert torch.allclose(outputs, model(ref.some_input(model)))


def test_frozen_rows_stay():
    model = new_model((6, 12, 5), runs=20, frozen=(0, 2))
    moved = copy.deepcopy(model)
    assert (swap_neurons(moved, 12) > 0).all()
    assert torch.equal(moved.in_perm, model.in_perm)
    assert torch.equal(moved.out_perm, model.out_perm)


def test_interrupt_anywhere_in_a_swap_leaves_the_function():
    first, place, more = ref.Stream().double(), -1, True
    x = ref.some_input(first)
    while more:
        place, model = place + 2, copy.deepcopy(first)
        saved, more = ref.interrupted(lambda model=model: swap_neurons(model, 2), place, "")
        assert torch.allclose(first(x), model(x))
    assert place > 100
    assert (saved > 0).all()


# ---------------------------------------------------------------- bad input


class SelfLoop(bimt.EmbeddedMLP):
    def wires(self):
        return [*super().wires(), (None, "A1", "A2")]


class OneStream(bimt.EmbeddedMLP):
    def wires(self):
        return [*super().wires(), (None, "input", "output")]


def with_nan(model):
    model.layers[1].weight.data[1, 0, 0] = float("nan")
    swap_neurons(model)


SHAPES = [(4,), (), 5, {4, 20, 2}, (4, 0, 2), (4, -3, 2), (4, 2.5), (4, True)]  # a set: defect 9
SETTINGS = [{"runs": 0}, {"runs": 1.5}, {"in_folds": 3}, {"in_folds": 0}, {"frozen": (2,)}]
SETTINGS += [{"frozen": 0}, {"frozen": (-1,)}, {"embedding": (7, 4), "in_folds": 2}]
SETTINGS += [{"embedding": size} for size in (7, (7, 3), (7.5, 4), (0, 4))]
SETTINGS += [{"places": [line(4), *rest]} for rest in ([], [line(3)], [ref.ring(2)])]
RUNS = [2, -3, 0.5, [], [0, 2], True, [True, False], [[0, 1]]]  # defect 29
PRICES = [-1.0, float("nan"), float("inf"), 1j, torch.ones(3), torch.tensor([0.1, -0.1])]
TOKENS = [[[0, 7]], [[-1, 0]], [[1, 2, 3]], [0, 1], [[0.0, 1.0]], [[True, False]], [[1j, 0]]]
SWAPS = [{"top_k": -1}, {"top_k": 1.5}, {"reduce": "max"}, {"mask": [0, 1]}]


@pytest.mark.parametrize(
    "call",
    [
        lambda _: line(0),
        lambda _: bimt.EmbeddedLinear(line(2), ref.ring(2)),
        lambda _: bimt.EmbeddedLinear(line(2), line(2) / 0),
        lambda _: bimt.EmbeddedLinear(line(2), line(2), out_folds=0),
        *(lambda _, s=shape: bimt.EmbeddedMLP(s) for shape in SHAPES),
        *(lambda _, s=settings: bimt.EmbeddedMLP((4, 2), **s) for settings in SETTINGS),
        *(lambda m, s=shape: m(torch.zeros(s)) for shape in [(3, 5), (4,), (3, 6, 4)]),
        *(lambda _, t=tokens: new_tokens()(torch.tensor(t)) for tokens in TOKENS),  # defect 7
        *(lambda m, r=run: m.pick(r) for run in RUNS),
        lambda m: connection_cost(m, reduce="max"),
        *(lambda m, p=price: connection_cost(m, p) for price in PRICES),  # defect 10
        *(lambda m, p=price: connection_cost(m, y0=p) for price in PRICES),
        *(lambda m, p=price: connection_cost(m, A_last=p) for price in PRICES),
        *(lambda m, s=settings: swap_neurons(m, **s) for settings in SWAPS),
        lambda m: swap_neurons(m, mask=[True]),
        lambda _: swap_neurons(SelfLoop((2, 3, 3, 2))),
        lambda _: swap_neurons(OneStream((3, 4, 3))),
        with_nan,
    ],
)
def test_bad_input_gets_a_clear_error(call):
    with pytest.raises(ValueError, match=r"(?s)^expected .*, got "):
        call(new_model())
