"""The ways into the method that notebooks/further/own_network.ipynb offers for copying: a loop and
an architecture of one's own, the adapter for networks that exist already, and `nn.Sequential`."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from notebook_cells import cells, definitions
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

import bimt_utils as bimt

NOTEBOOK = SimpleNamespace(**definitions("own_network", before="## (d)", STEPS=4, RUNS=2, WIDTH=5))
x = torch.randn(7, 4, generator=generator(1)).double()


def branches(runs=2, seed=0):
    return NOTEBOOK.Branches(runs=runs, generator=generator(seed)).double()


def plain_branches():
    plain = NOTEBOOK.Plain(nn.Linear(*ends) for ends in NOTEBOOK.ENDS).double()
    return plain, NOTEBOOK.PlacedNetwork(plain, NOTEBOOK.branch_wires(*plain)).double()


def plain_sequential():
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)]
    plain, rows = nn.Sequential(*layers).double(), ["input", "A1", "A2", "output"]
    wires = list(zip(plain[::2], rows, rows[1:], strict=False))
    return plain, NOTEBOOK.PlacedNetwork(plain, wires).double()


@pytest.fixture(params=[plain_branches, plain_sequential])
def network(request):
    torch.manual_seed(0)
    return request.param()


def linears(plain):
    return [part for part in plain.modules() if isinstance(part, nn.Linear)]


# ---------------------------------------------------------------- (b) and (c)


def test_the_loop_lowers_the_objective():
    model = bimt.EmbeddedMLP((4, 6, 2), 2, generator=generator())

    def objective():
        return NOTEBOOK.loss(model) + 1e-2 * bimt.connection_cost(model, NOTEBOOK.A, NOTEBOOK.Y0)

    before = objective()
    NOTEBOOK.train_in_a_loop(model, 400, 1e-2)
    assert (objective() < 0.7 * before).all()


def test_every_axis_of_the_architecture_belongs_to_one_group():
    model = branches()
    claimed = [(id(t), axis) for group in groups_of(model) for t, axis, _ in group.axes]
    assert sorted(claimed) == sorted(all_axes(model))
    groups = model.groups()
    assert list(groups) == ["input", "stream", "A", "B", "sum", "output"]
    assert groups["stream"] is groups["sum"]


def test_the_architecture_in_any_arrangement_equals_plain_pytorch():
    model, (plain, _) = branches(), plain_branches()
    arrange_at_random(model)
    before = model(x)
    bimt.swap_neurons(model)
    assert torch.allclose(model(x), before, atol=1e-9)
    straight = branches()
    for run in range(2):
        for linear, layer in zip(plain, straight.layers, strict=True):
            linear.load_state_dict({"weight": layer.weight[run], "bias": layer.bias[run]})
        assert torch.allclose(straight(x)[run], plain(x), atol=1e-12)
        assert torch.allclose(before[run], plain(x), atol=1e-9)
    sizes = [len(group.places) for group in model.groups().values()]
    assert [tuple(row.shape) for row in model.rows(x)] == [(2, 7, n) for n in sizes[1:]]


def test_swaps_of_the_architecture_equal_brute_force():
    model = branches(runs=1)
    other = model.pick(0)
    bimt.swap_neurons(model, 4)
    greedy_by_search(other, 0, 4)
    assert same_state(model, other)


# ---------------------------------------------------------------- (d) a network that exists


def test_the_adapter_shares_memory_and_owns_nothing(network):
    plain, placed = network
    assert {*map(id, placed.parameters())} == {*map(id, plain.parameters())}
    assert len(placed.layers) == len(linears(plain))
    for layer, linear in zip(placed.layers, linears(plain), strict=True):
        assert layer.weight.data_ptr() == linear.weight.data_ptr()
        assert torch.equal(layer.weight, linear.weight[None])
        if linear.bias is None:
            assert not layer.bias.any()
        else:
            assert layer.bias.data_ptr() == linear.bias.data_ptr()
    assert torch.equal(placed(x), plain(x)[None])


def test_cost_and_its_gradient_equal_loops(network):
    plain, placed = network
    settings = {"A": 2.0, "y0": 0.5, "A_last": 0.3}
    for reduce in ("sum", "mean"):
        cost = bimt.connection_cost(placed, **settings, reduce=reduce)
        wanted = cost_by_loops(placed, 0, **settings, reduce=reduce)
        assert cost.item() == pytest.approx(wanted)
    bimt.connection_cost(placed).sum().backward()
    for layer, linear in zip(placed.layers, linears(plain), strict=True):
        assert torch.allclose(linear.weight.grad, (layer.distance + 0.1) * linear.weight.sign())


def test_swaps_work_in_place_and_leave_the_outputs_unchanged(network):
    plain, placed = network
    before, ends = plain(x), [p.clone() for p in (plain[0].weight, plain[-1].weight)]
    other, length = copy.deepcopy(placed), bimt.wiring_length(placed)
    bimt.swap_neurons(placed, 4)
    greedy_by_search(other, 0, 4)
    assert same_state(placed, other)
    assert bimt.wiring_length(placed) < length
    assert torch.allclose(plain(x), before, atol=1e-12)
    assert not torch.equal(plain[0].weight, ends[0])
    # inputs and outputs stay in the order of the task
    assert torch.allclose(plain[0].weight.sum(0), ends[0].sum(0))
    assert torch.allclose(plain[-1].weight.sum(1), ends[1].sum(1))
    assert torch.equal(placed.in_perm, torch.arange(4)[None])


def test_pruning_and_structure_work_on_a_copy(network):
    plain, placed = network
    with torch.no_grad():
        plain[0].weight[:, 3] *= 1e-3
    before = copy.deepcopy(plain.state_dict())
    pruned = bimt.prune(placed, 2e-3)
    assert all({0, 1, 2} == read for read in bimt.inputs_read(pruned))
    assert len(bimt.modules(pruned)) == 1
    assert not pruned.network[0].weight[:, 3].any()
    assert all(torch.equal(p, before[name]) for name, p in plain.state_dict().items())
    assert torch.allclose(placed.pick(0)(x), placed(x))
    bimt.plot_network(pruned)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_it_trains_in_a_loop_but_not_by_train():
    plain, placed = plain_branches()
    plain.float()
    placed.float()

    def loss(model):
        return bimt.mse_loss(model(NOTEBOOK.x), NOTEBOOK.y)

    before = loss(placed)
    NOTEBOOK.train_in_a_loop(placed, 100, 1e-3)
    assert loss(placed) < 0.7 * before
    state = copy.deepcopy(plain.state_dict())
    with pytest.raises(TypeError):
        bimt.train(placed, loss, steps=2, lr=1e-3, lamb=1e-3)
    assert all(torch.equal(p, state[name]) for name, p in plain.state_dict().items())


@pytest.mark.parametrize(("frozen", "unchanged"), [((0, -1), False), ((0, 1, -1), True)])
def test_rows_in_which_neurons_are_told_apart_are_to_be_frozen(frozen, unchanged):
    norm = nn.LayerNorm(6)
    nn.init.normal_(norm.weight, generator=generator())
    first, second, last = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
    plain = nn.Sequential(first, norm, nn.Tanh(), second, nn.ReLU(), last)
    wires = [(first, "input", "A1"), (second, "A1", "A2"), (last, "A2", "output")]
    placed, before = NOTEBOOK.PlacedNetwork(plain, wires, frozen), last.weight.clone()
    assert NOTEBOOK.unchanged_by_swaps(placed) == unchanged
    assert not torch.equal(last.weight, before)


# ---------------------------------------------------------------- (e) to and from nn.Sequential


def blocks():
    """The blocks of code in the text of the notebook: the way back, and saving and loading."""
    text = "".join("".join(cell["source"]) for cell in cells("own_network"))
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(3, 2), (4, 7, 3), (2, 5, 6, 5, 4)])
def test_to_sequential_and_back(shape, threshold):
    model = bimt.EmbeddedMLP(shape, runs=3, generator=generator())
    arrange_at_random(model)
    pruned = bimt.prune(model, threshold)
    state = copy.deepcopy(pruned.state_dict())
    inputs = torch.randn(9, shape[0], generator=generator(1))
    for run in range(3):
        plain = NOTEBOOK.to_sequential(pruned, run)
        kinds = [type(part) for part in plain]
        assert kinds == [nn.Linear, nn.SiLU] * (len(shape) - 2) + [nn.Linear]
        assert torch.allclose(plain(inputs), pruned(inputs)[run], atol=1e-5)
        zeros = sum((p == 0).sum() for p in plain.parameters())
        assert zeros == sum((p[run] == 0).sum() for p in pruned.parameters())
        names = {"sequential": plain, "bimt": bimt}
        exec(blocks()[0], names)
        assert torch.allclose(names["again"](inputs)[0], plain(inputs), atol=1e-5)
        with torch.no_grad():
            plain[0].weight.zero_()  # it is a copy
    assert all(torch.equal(p, state[name]) for name, p in pruned.state_dict().items())


def test_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save, load = blocks()[1].splitlines()
    model = bimt.EmbeddedMLP((4, 5, 2), 2, generator=generator())
    arrange_at_random(model)
    exec(save, {"torch": torch, "model": model})
    again = bimt.EmbeddedMLP((4, 5, 2), 2)
    exec(load, {"torch": torch, "model": again})
    assert same_state(model, again)
    assert torch.equal(model(x.float()), again(x.float()))
