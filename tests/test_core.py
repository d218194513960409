"""Places, layers, models, cost and swaps against plain references."""

import copy
import io
import math
from functools import partial

import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bimt_utils as bimt
from bimt_utils import connection_cost, connection_prices, line, swap_neurons

SEEDS, REDUCE = st.integers(0, 1000), st.sampled_from(["sum", "mean"])
MLPS = ("plain", "folds", "tokens", "ring")


def few(examples):
    return settings(deadline=None, max_examples=examples)


def new_model(shape=(4, 5, 2), runs=2, seed=0, kind=bimt.EmbeddedMLP, **kwargs):
    return kind(shape, runs, generator=ref.generator(seed), **kwargs)


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


@few(30)
@given(ref.models(), SEEDS)
def test_every_axis_has_one_group_and_no_arrangement_changes_the_outputs(model, seed):
    claimed, x = [], ref.some_input(model)
    for group in ref.groups_of(model):
        for tensor, axis, folds in group.axes:
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


def test_outputs_of_two_folds():
    model, x = ref.Gated(3, 4, 2, runs=2), torch.randn(5, 3, generator=ref.generator()).double()
    gate, up, down = ([*zip(m.weight, m.bias, strict=True)] for m in model.layers)
    for run in range(2):
        gates, values = (nn.functional.linear(x, *part[run]) for part in (gate, up))
        wanted = nn.functional.linear(gates.sigmoid() * values, *down[run])
        assert torch.allclose(model(x)[run], wanted)


def test_tokens_may_be_narrow_integers_or_numpy():
    model, tokens = new_tokens(), torch.tensor([[0, 6], [3, 3]])
    for same in (tokens.int(), tokens.numpy(), tokens.tolist()):
        assert torch.equal(model(same), model(tokens))


@pytest.mark.parametrize("new", [new_model, ref.Stream, ref.Gated, new_tokens])
def test_saved_and_loaded_after_swaps(new):
    model, twin, file = new(runs=2).double(), new(runs=2, seed=1).double(), io.BytesIO()
    swap_neurons(model, 6)
    assert not torch.equal(model.in_perm, twin.in_perm)
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file))
    assert ref.same_state(model, twin)
    outputs = model(ref.some_input(model))
    assert torch.equal(outputs, twin(ref.some_input(model)))
    assert outputs.dtype == connection_cost(model).dtype == torch.float64
    assert twin.in_perm.dtype == twin.out_perm.dtype == torch.int64
    assert "in_perm" not in dict(twin.named_parameters())


def test_pick_is_a_copy_that_keeps_what_is_frozen():
    model = new_model(runs=3)
    model.layers[0].bias.requires_grad_(False)
    picked = model.pick([2, 0, -1])
    assert [p.requires_grad for p in picked.parameters()] == [True, False, True, True]
    assert torch.equal(picked.layers[1].weight, model.layers[1].weight[[2, 0, 2]])
    assert model.pick(model.in_perm[0, 1].numpy()).runs == model.pick(torch.tensor(1)).runs == 1
    picked.layers[0].weight.data.zero_()
    assert model.layers[0].weight.abs().min() > 0


def test_pick_leaves_what_is_not_of_the_networks():
    model = new_model(runs=4)
    model.register_buffer("scale", torch.arange(4.0))  # of the four inputs
    model.gain = nn.Parameter(torch.arange(4.0))
    for picked in (model.pick(1), model.pick([3, 0])):
        assert torch.equal(picked.scale, model.scale)
        assert torch.equal(picked.gain, model.gain)


class Keeps(bimt.EmbeddedMLP):
    """A model that keeps what it saw."""

    def rows(self, x):
        rows = super().rows(x)
        self.seen = rows[0].detach()
        return rows


def test_a_model_that_keeps_a_detached_activation_is_copied():
    model, x = new_model(kind=Keeps), torch.rand(3, 4, generator=ref.generator())
    outputs = model(x)
    assert torch.equal(model.pick(1)(x)[0], outputs[1])
    assert not bimt.prune(model, 10.0)(x).any()
    assert bimt.modules(model)


@few(8)
@given(ref.models())
def test_runs_train_and_swap_as_they_would_alone(model):
    """Each with a lamb, an A and a top_k of its own."""
    x, n = ref.some_input(model), model.runs
    lamb, A, top_k = torch.linspace(1e-2, 0, n), torch.linspace(0, 1, n), torch.tensor([2, 0, 5])
    networks = {(run,): model.pick(run) for run in range(n)} | {tuple(range(n)): model}
    for runs, network in networks.items():
        own = list(runs)
        prices, swap = partial(connection_prices, A=A[own]), partial(swap_neurons, top_k=top_k[own])
        arguments = {"steps": 30, "lr": 2e-3, "swap_every": 10, "lamb": lamb[own]}
        loss_fn = lambda m: (m(x) - 1).square().mean((1, 2))  # noqa: E731
        bimt.train(network, loss_fn, prices=prices, swap=swap, **arguments)
    for run in range(n):
        assert networks[run,].runs == 1
        assert torch.allclose(model(x)[run], networks[run,](x)[0])
        assert torch.equal(model.in_perm[run], networks[run,].in_perm[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_same():
    model = ref.Stream(4, 8, 6, 3, runs=3)
    other, x, A = copy.deepcopy(model).to("cuda"), ref.some_input(model), torch.linspace(0, 1, 3)
    for network in (model, other):
        arguments = {"steps": 40, "lr": 1e-2, "lamb": A, "swap_every": 10}
        bimt.train(network, lambda m: m(x).square().mean((1, 2)), **arguments)
        swap_neurons(network, torch.tensor([0, 5, 3]))
    pruned = [bimt.prune(m, 0.1) for m in (model, other)]
    assert torch.allclose(pruned[0](x), pruned[1](x).cpu())
    assert bimt.modules(pruned[0]) == bimt.modules(pruned[1])


# ---------------------------------------------------------------- cost


@few(30)
@given(ref.models(), REDUCE, st.booleans(), st.sampled_from([None, 0.0, 3.0]), SEEDS)
def test_cost_and_prices_equal_a_double_loop(model, reduce, biases, A_last, seed):
    A, y0 = torch.linspace(0.5, 2, model.runs), torch.linspace(0.1, 0.4, model.runs)
    options = {"A_last": A_last, "biases": biases, "reduce": reduce}

    def by_loops():
        numbers = zip(A.tolist(), y0.tolist(), strict=True)
        return [ref.cost_by_loops(model, run, *two, **options) for run, two in enumerate(numbers)]

    before, cost = by_loops(), connection_cost(model, A, y0, **options)
    assert cost.shape == (model.runs,)
    assert cost.tolist() == pytest.approx(before)
    prices = connection_prices(model, A, y0, **options)
    paying = [p for m in model.layers for p in ([m.weight, m.bias] if biases else [m.weight])]
    paying += [model.embedding] if model.embedding is not None else []
    assert {*map(id, prices)} == {*map(id, paying)}
    for p, price in prices.items():
        entry = (slice(None), *(seed % n for n in p.shape[1:]))  # one in every run
        old = p[entry].detach().clone()
        p.data[entry] += old.sign()
        rise = [now - then for now, then in zip(by_loops(), before, strict=True)]
        assert price.expand_as(p)[entry].tolist() == pytest.approx(rise)
        p.data[entry] = old


@few(15)
@given(ref.models(), REDUCE, st.booleans(), SEEDS)
def test_slope_of_the_cost_is_price_times_sign(model, reduce, biases, seed):
    model = ref.thinned(model, seed, 0.3)
    options = {"A": 2.0, "y0": torch.linspace(0, 1, model.runs), "biases": biases, "reduce": reduce}
    prices = connection_prices(model, **options)
    slopes = torch.autograd.grad(connection_cost(model, **options).sum(), [*prices])
    for slope, (p, price) in zip(slopes, prices.items(), strict=True):
        assert torch.equal(slope, price * p.sign())


def test_numbers_keep_their_precision():
    model = new_model().double()
    each = torch.tensor([0.3, 0.7], dtype=torch.float64)
    for A, y0, column in ((0.3, 0.1, 0.1), (each, each, each[:, None])):
        prices = connection_prices(model, A, y0)
        slope, base = (each[:, None, None],) * 2 if A is each else (A, y0)
        for layer in model.layers:
            assert (prices[layer.weight] == slope * layer.distance + base).all()
            assert (prices[layer.bias] == column).all()
    with torch.no_grad():
        model.layers[0].bias[:, 0], model.layers[0].bias[:, 1] = 0.7, math.nextafter(0.7, 1)
    kept = bimt.prune(model, 0.7).layers[0].bias
    assert not kept[:, 0].any()
    assert kept[:, 1].all()


# ---------------------------------------------------------------- swaps


@few(40)
@given(ref.models(most=4), st.lists(st.integers(0, 5), min_size=3, max_size=3), st.booleans(),
    REDUCE, st.sampled_from([0, 0.6, 1]), st.sampled_from([torch.float64, torch.bfloat16]),
    SEEDS)  # fmt: skip
def test_swaps_equal_brute_force(model, each, differ, reduce, share, kind, seed):
    model = ref.thinned(model, seed, share).to(kind)
    slow, x = copy.deepcopy(model), ref.some_input(model)
    outputs, top_k = model(x), torch.tensor(each)[: model.runs]
    assert swap_neurons(model, top_k if differ else each[0], reduce=reduce) is None
    for run in range(model.runs):
        ref.greedy_by_search(slow, run, each[run] if differ else each[0], reduce)
    assert ref.same_state(model, slow)
    assert torch.allclose(outputs, model(x), **({} if kind == torch.float64 else {"atol": 0.1}))


def test_swaps_of_many_networks_equal_brute_force():
    model = ref.Stream(5, 6, 4, 3, runs=8)
    results = []
    for reduce in ("sum", "mean"):
        fast, slow = copy.deepcopy(model), copy.deepcopy(model)
        swap_neurons(fast, 4, reduce=reduce)
        for run in range(8):
            ref.greedy_by_search(slow, run, 4, reduce)
        assert ref.same_state(fast, slow)
        results.append(fast)
    assert not ref.same_state(*results)


def test_costs_that_differ_by_rounding_are_ties():
    """Inputs mirror each other, and neurons come in three kinds: the lowest slot wins."""
    model, draw = new_model((16, 16), runs=10, frozen=(0,)).double(), ref.generator()
    left, kinds = torch.rand(10, 1, 16, generator=draw).double(), torch.arange(16) % 3 + 1
    share = torch.rand(10, 1, 1, generator=draw).double()
    model.layers[0].weight.data[:] = share * kinds[:, None] * (left + left.flip(2))
    slow, first = copy.deepcopy(model), copy.deepcopy(model)
    swap_neurons(model, 8)
    for run in range(10):
        ref.greedy_by_search(slow, run, 8)
    assert ref.same_state(model, slow)
    assert not ref.same_state(model, first)


def test_frozen_rows_stay():
    model = new_model((6, 12, 5), runs=20, frozen=(0, 2))
    moved = copy.deepcopy(model)
    swap_neurons(moved, 12)
    assert not torch.equal(moved.layers[0].weight, model.layers[0].weight)
    assert torch.equal(moved.in_perm, model.in_perm)
    assert torch.equal(moved.out_perm, model.out_perm)


def test_interrupt_anywhere_in_a_swap_leaves_the_function():
    first, place, more = ref.Stream(), -1, True
    x = ref.some_input(first)
    while more:
        place, model = place + 2, copy.deepcopy(first)
        _, more = ref.interrupted(lambda model=model: swap_neurons(model, 2), place, "")
        assert torch.allclose(first(x), model(x))
    assert place > 100
    assert not ref.same_state(first, model)


def test_models_swap_where_tensors_are_made_somewhere_else_by_default():
    model, top_k = ref.Stream(runs=2), torch.tensor([3, 2])
    other = copy.deepcopy(model)
    swap_neurons(model, top_k)
    with torch.device("meta"):
        swap_neurons(other, top_k)
    assert ref.same_state(model, other)


# ---------------------------------------------------------------- wires and bad input

WIRES = {
    "two rows continue into one stage": lambda a, b, c: [
        (a, "input", "A"), (b, "input", "B"), (None, "A", "S"), (None, "B", "S"),
        (c, "S", "output")],
    "a stage before its source": lambda a, b, c: [
        (a, "input", "A1"), (None, "A2", "S"), (b, "A1", "A2"), (c, "S", "output")],
    "a stage after it was written": lambda a, b, c: [
        (a, "input", "A1"), (b, "A1", "A2"), (None, "input", "A2"), (c, "A2", "output")],
    "a stage after it was read": lambda a, b, c: [
        (a, "input", "A1"), (b, "A1", "A2"), (c, "A2", "output"), (None, "input", "output")],
    "a layer inside a group": lambda a, b, c: [
        (a, "input", "A1"), (None, "A1", "A2"), (b, "A1", "A2"), (c, "A2", "output")],
    "a layer from a row to itself": lambda a, b, c: [
        (a, "input", "A1"), (b, "A1", "A1"), (c, "A1", "output")],
    "one layer twice": lambda a, b, c: [
        (a, "input", "A1"), (b, "A1", "A2"), (b, "A2", "A3"), (c, "A3", "output")],
    "a layer left out": lambda a, b, c: [(a, "input", "A1"), (c, "A1", "output")],
    "a row read before it is written": lambda a, b, c: [
        (a, "input", "A1"), (c, "A2", "output"), (b, "A1", "A2")],
    "a row written after it is read": lambda a, b, c: [
        (a, "input", "A1"), (None, "A1", "S"), (b, "input", "A1"), (c, "S", "output")],
    "two rows that nothing writes": lambda a, b, c: [
        (a, "input", "A1"), (b, "more", "A1"), (c, "A1", "output")],
    "outputs that the last layer does not write": lambda a, b, c: [
        (a, "input", "A1"), (c, "A1", "A2"), (b, "A2", "output")],
    "a hidden row after the output": lambda a, b, c: [
        (a, "input", "A1"), (c, "A1", "output"), (b, "A1", "A2")],
}  # fmt: skip


@pytest.mark.parametrize("name", WIRES)
def test_wires_of_no_forward_pass_are_refused(name):
    class Model(bimt.EmbeddedMLP):
        def wires(self):
            return WIRES[name](*self.layers)

    model = new_model((3, 3, 3, 3), kind=Model)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"(?s)^expected .*, got "):
        swap_neurons(model)
    assert ref.same_state(model, before)


def test_layers_that_share_a_weight_are_refused():  # each of them would move it
    model = new_model((3, 3, 3, 3))
    model.layers[2].weight = model.layers[1].weight
    with pytest.raises(ValueError, match="weights of its own"):
        swap_neurons(model)


def with_nan(model):
    model.layers[1].weight.data[1, 0, 0] = float("nan")
    swap_neurons(model)


REFUSED = (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError)
SHAPES = [(4,), (), 5, {4, 20, 2}, (4, 0, 2), (4, -3, 2), (4, 2.5)]
SETTINGS = [{"runs": 1.5}, {"in_folds": 3}, {"in_folds": 0}, {"frozen": 0}]
SETTINGS += [{"embedding": size} for size in (7, (7.5, 4))]
SETTINGS += [{"places": [line(4), *rest]} for rest in ([], [line(3)], [ref.ring(2)])]
EMBEDDED = [{"embedding": (7, 3)}, {"embedding": (7, 4), "in_folds": 2}]
RUNS = [2, -3, 0.5, [], [0, 2]]
PRICES = [-1.0, float("nan"), float("inf"), torch.ones(3), torch.tensor([0.1, -0.1])]
TOKENS = [[[0, 7]], [[-1, 0]], [[1, 2, 3]], [0, 1], [[0.0, 1.0]]]
SWAPS = [{"top_k": -1}, {"top_k": [5]}, {"top_k": [1, 2, 3]}, {"top_k": [3, -1]}]


@pytest.mark.parametrize(
    "call",
    [
        *(lambda m, s=shape: m(torch.zeros(s)) for shape in [(3, 5), (1, 3, 5)]),
        lambda _: bimt.EmbeddedMLP((4, 2), places=[line(4), line(3)]),
        lambda _: bimt.EmbeddedMLP((4, 2), places=[line(4)]),
        *(lambda m, p=price: connection_cost(m, p) for price in PRICES),
        *(lambda m, p=price: connection_cost(m, y0=p) for price in PRICES),
        *(lambda m, p=price: connection_prices(m, A_last=p) for price in PRICES),
        *(lambda m, s=settings: swap_neurons(m, **s) for settings in SWAPS),
    ],
)
def test_bad_input_gets_a_clear_error(call):
    model, before = new_model(), new_model()
    with pytest.raises(ValueError, match=r"(?s)^expected .*, got "):
        call(model)
    assert ref.same_state(model, before)


@pytest.mark.parametrize(
    "call",
    [
        lambda _: bimt.EmbeddedLinear(line(2), ref.ring(2)),
        *(lambda _, s=shape: bimt.EmbeddedMLP(s) for shape in SHAPES),
        *(lambda _, s=settings: bimt.EmbeddedMLP((4, 2), **s) for settings in SETTINGS),
        *(lambda _, s=s: bimt.EmbeddedMLP((4, 2), **s)(torch.tensor([[0, 1]])) for s in EMBEDDED),
        *(lambda m, s=shape: m(torch.zeros(s)) for shape in [(4,), (3, 6, 4)]),
        *(lambda _, t=tokens: new_tokens()(torch.tensor(t)) for tokens in TOKENS),
        *(lambda m, r=run: m.pick(r) for run in RUNS),
        lambda m: connection_cost(m, reduce="max"),
        lambda m: swap_neurons(m, reduce="max"),
    ],
)
def test_other_bad_input_gives_no_result(call):
    with pytest.raises(REFUSED):
        call(new_model())
