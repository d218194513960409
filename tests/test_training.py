"""The training loop and its two steps: golden runs, phases, history, interrupts, faults."""

import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import reference as ref
import torch
from sklearn.linear_model import Lasso
from torch import nn

import bimt_utils as bimt
from bimt_utils import connection_cost, mse_loss, swap_neurons, train

X = torch.rand(30, 4, generator=ref.generator(9)).double() * 2 - 1
Y = torch.stack([X[:, 0] * X[:, 1], X[:, 2] + X[:, 3]], 1)
EXACT = pytest.mark.parametrize("exact", [False, True])


def new_model(runs=2, shape=(4, 6, 2), seed=0, **kwargs):
    return bimt.EmbeddedMLP(shape, runs, generator=ref.generator(seed), **kwargs).double()


def loss_fn(model):
    return mse_loss(model(X), Y)


def fit(model, **changes):
    settings = {"loss_fn": loss_fn, "steps": 40, "lr": 5e-3, "lamb": 1e-3, "swap_every": 10}
    return train(model, **{**settings, **changes})


MEASURES = {
    mse_loss: nn.functional.mse_loss,
    bimt.cross_entropy: nn.functional.cross_entropy,
    bimt.accuracy: lambda outputs, classes: (outputs.argmax(1) == classes).double().mean(),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_losses_equal_those_of_torch_and_do_not_broadcast(measure):  # defect 14
    outputs, wanted = torch.randn(3, 30, 5, generator=ref.generator(1)).double(), MEASURES[measure]
    targets = torch.randn(3, 30, 5, generator=ref.generator(3)).double()
    targets = targets if measure is mse_loss else targets.argmax(2)
    for run in range(3):
        one = wanted(outputs[run], targets[run])
        assert torch.allclose(measure(outputs, targets)[run], one)
        assert torch.allclose(measure(outputs, targets[run])[run], one)
    for wrong in (targets[:1], targets[:, :1], targets[0, :1], targets[..., None]):
        with pytest.raises(ValueError, match="expected"):
            measure(outputs, wrong)


@EXACT
def test_follows_a_plain_loop(exact):
    """Phases of lamb and greedy swaps; moments and prices stay with their slots."""
    model = new_model()
    singles = [model.pick(run) for run in range(2)]
    settings = {"steps": 240, "lr": 5e-3, "swap_every": 30, "exact": exact}
    phases, swap = [(0, 1e-3), (0.5, 5e-3)], partial(swap_neurons, top_k=3)
    history = train(model, loss_fn, lamb=phases, swap=swap, **settings)
    assert (history["loss"][-1] < 0.5 * history["loss"][0]).all()

    def prices(step):
        for layer in model.layers:
            length = (layer.out_places[:, None] - layer.in_places).abs().sum(-1)
            yield phases[step >= 120][1] * (length + 0.1)
            yield torch.full_like(layer.bias[:1], phases[step >= 120][1] * 0.1)

    def loss(single):
        return (ref.plain_forward(single, 0, X) - Y).square().mean()

    for run, single in enumerate(singles):
        ref.train_by_loop(single, loss, prices, top_k=3, **settings)
        for ours, plain in zip(model.pick(run).parameters(), single.parameters(), strict=True):
            assert torch.allclose(ours, plain, atol=1e-4)
        assert torch.equal(model.in_perm[run], single.in_perm[0])
        assert torch.equal(model.out_perm[run], single.out_perm[0])
    assert not torch.equal(model.in_perm, new_model().in_perm)  # so the swaps did something
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert (zeros > 0) == exact


# ---------------------------------------------------------------- the exact step


def test_every_run_takes_its_own_kind_of_step():
    together = new_model()
    alone = [together.pick(run) for run in range(2)]
    settings = {"steps": 100, "lr": 5e-3, "lamb": 0.05, "swap_every": 20}
    fit(together, exact=torch.tensor([False, True]), **settings)
    for run, single in enumerate(alone):
        fit(single, exact=run == 1, **settings)
        for ours, wanted in zip(together.pick(run).parameters(), single.parameters(), strict=True):
            assert torch.equal(ours, wanted)
    zeros = sum((p == 0).flatten(1).sum(1) for p in together.parameters())
    assert (zeros > 0).tolist() == [False, True]
    for wrong in ([0, 1], 0.5, [True] * 3):  # such as numbers of runs
        with pytest.raises(ValueError, match="expected exact"):
            fit(new_model(), exact=wrong)


def test_exact_step_reaches_the_solution_of_lasso():
    """Least squares with a price per weight is scikit-learn's Lasso on scaled features."""
    x = torch.randn(40, 8, generator=ref.generator(2)).double()
    y = x[:, :3] @ torch.tensor([[1.0], [-0.6], [0.2]]).double() + 0.4
    y += 0.3 * torch.randn(40, 1, generator=ref.generator(3)).double()
    lamb, A = torch.tensor([0.05, 0.3, 1.0, 0.3]), torch.tensor([0.0, 0.0, 0.0, 3.0])
    model, zeros = new_model(4, (8, 1)), 0
    cost = partial(connection_cost, A=A, y0=1.0, biases=False)
    for lr in (2e-2, 1e-3):
        settings = {"lr": lr, "steps": 500, "exact": True, "cost": cost, "lamb": lamb}
        train(model, lambda m: mse_loss(m(x), y), **settings, swap_every=0)
    for run, value in enumerate(lamb.tolist()):
        price = (A[run] * model.layers[0].distance[0] + 1).numpy()
        lasso = Lasso(alpha=value / 2, tol=1e-12, max_iter=100_000).fit(x.numpy() / price, y[:, 0])
        weight = model.layers[0].weight[run, 0].detach().numpy()
        assert np.allclose(weight, lasso.coef_ / price, atol=1e-4)
        assert ((weight == 0) == (lasso.coef_ == 0)).all()
        assert model.layers[0].bias[run].item() == pytest.approx(lasso.intercept_, abs=1e-4)
        zeros += (weight == 0).sum()
    assert 8 <= zeros <= 24


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_exact_step_without_prices_is_adamw_to_the_last_bit(kind):
    model = new_model().to(kind)
    plain = copy.deepcopy(model)
    settings = {"lr": 5e-3, "weight_decay": 0, "fused": False, "foreach": False}
    adam = torch.optim.AdamW(plain.parameters(), **settings)
    fit(model, steps=200, lamb=0.0, exact=True, swap_every=0)
    for _ in range(200):
        adam.zero_grad()
        loss_fn(plain).sum().backward()
        adam.step()
    assert ref.same_state(model, plain)


def test_exact_step_ends_at_a_stationary_point():
    """|g| <= c where a parameter is zero, g = -c sign p elsewhere."""
    model, lamb = new_model(2, (2, 4, 1), seed=1), torch.tensor([0.03, 0.1])

    def loss(m):
        return mse_loss(m(X[:, :2]), 2.25 * X[:, :1] ** 2)

    for steps, lr in ((1500, 2e-2), (500, 2e-3)):
        fit(model, loss_fn=loss, steps=steps, lr=lr, lamb=lamb, exact=True, swap_every=0)
    model.zero_grad()
    loss(model).sum().backward()
    for layer in model.layers:
        prices = lamb[:, None, None] * (layer.distance + 0.1), 0.1 * lamb[:, None]
        for tensor, c in zip((layer.weight, layer.bias), prices, strict=True):
            p, g, c = tensor.detach(), tensor.grad, c.expand_as(tensor)
            assert (g.abs() <= c)[p == 0].all()
            assert ((g + c * p.sign()).abs() < 1e-3 * c)[p != 0].all()
            assert (p == 0).any()
            assert (p != 0).any()


def slopes_of(cost, model):
    """What every parameter that trains pays per unit of size, by finite differences."""
    slopes, before = [], cost(model).detach()
    for p in [p.detach() for p in model.parameters() if p.requires_grad]:
        slopes.append(torch.zeros_like(p))
        for entry in itertools.product(*map(range, p.shape[1:])):
            old = p[:, *entry].clone()
            p[:, *entry] += torch.where(old < 0, -1, 1)
            slopes[-1][:, *entry] = cost(model).detach() - before
            p[:, *entry] = old
    return slopes


@EXACT
@pytest.mark.parametrize("name", ["tokens", "stream"])
def test_prices_equal_finite_differences_of_the_cost(name, exact):
    """In every phase of lamb and of the cost, with swaps, and with a parameter that is frozen."""
    tokens = new_model(2, (4, 3, 2), in_folds=2, embedding=(3, 2))
    model = tokens if name == "tokens" else ref.Stream(runs=2).double()
    model.layers[1].bias.requires_grad_(False)
    plain, first, x = copy.deepcopy(model), copy.deepcopy(model), ref.some_input(model)
    A, lamb = torch.tensor([0.5, 2.0]), torch.tensor([0.3, 0.01])
    costs = [
        partial(connection_cost, A=A, y0=torch.tensor([0.1, 0.2]), A_last=0.0),
        partial(connection_cost, A=2.0, y0=0.5, biases=False, reduce="mean"),
        partial(connection_cost, A_last=A, reduce="mean"),
    ]
    slopes = [slopes_of(cost, first) for cost in costs]

    def loss(m):
        return m(x).sub(0.5).square().mean((1, 2))

    def prices(step):
        now, price = slopes[(step >= 10) + (step >= 30)], 0.2 if step >= 20 else lamb
        return [(slope.movedim(0, -1) * price).movedim(-1, 0) for slope in now]

    settings = {"steps": 40, "lr": 5e-3, "exact": exact, "swap_every": 7}
    in_turn = list(zip((0, 0.25, 0.75), costs, strict=True))
    train(model, loss, lamb=[(0, lamb), (0.5, 0.2)], cost=in_turn, **settings)
    ref.train_by_loop(plain, lambda m: loss(m).sum(), prices, top_k=5, **settings)
    for ours, wanted in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-8)
    assert not torch.equal(model.layers[0].weight, first.layers[0].weight)
    assert torch.equal(*(m.layers[1].bias.sort().values for m in (model, first)))


COSTS = {
    "squared": lambda m: connection_cost(m) ** 2,
    "with a constant": lambda m: connection_cost(m) + 1,
    "negative": lambda m: -connection_cost(m),
    "L2": lambda m: sum(p.square().flatten(1).sum(1) for p in m.parameters()),
    "norms": lambda m: sum(p.flatten(1).norm(dim=1) for p in m.parameters()),
    "signed": lambda m: sum(p.flatten(1).sum(1) for p in m.parameters()),
}


@pytest.mark.parametrize("name", COSTS)
def test_exact_step_refuses_a_cost_that_is_not_a_weighted_sum_of_sizes(name):
    model = new_model()
    with pytest.raises(ValueError, match="expected"):
        fit(model, exact=True, cost=COSTS[name])
    assert ref.same_state(model, new_model())


# ---------------------------------------------------------------- phases and history


@pytest.mark.parametrize(
    ("steps", "fraction", "first"), [(40, 0.25, 10), (40, 0.75, 30), (11, 0.5, 5), (50, 0.58, 29)]
)
def test_phases_start_at_their_step(steps, fraction, first):
    lamb, free = torch.tensor([0.1, 0.3]), partial(connection_cost, biases=False)
    settings = {"steps": steps, "snapshots": steps, "lamb": [(0, 0.0), (fraction, lamb)]}
    history = fit(new_model(), cost=[(0, free), (fraction, connection_cost)], **settings)
    assert history.phases == [first]
    assert history.steps == list(range(steps + 1))
    for step in history.steps:
        cost = (connection_cost if step >= first else free)(history.at(step))
        loss = loss_fn(history.at(step))
        assert torch.allclose(history["cost"][step], cost)
        assert torch.allclose(history["objective"][step], loss + (step >= first) * lamb * cost)


def test_history():
    model, metrics = new_model(3), {"half": lambda m: loss_fn(m) / 2}
    history = fit(model, steps=400, metrics=metrics, snapshots=4)
    assert history.steps == list(range(0, 401, 4))
    assert history["loss"].shape == history["cost"].shape == (101, 3)
    assert torch.allclose(history["half"], history["loss"] / 2)
    assert list(history.snapshots) == [0, 100, 200, 300, 400]
    assert torch.allclose(history.at(400)(X), model(X))
    assert torch.allclose(history.at(0)(X), new_model(3)(X))
    assert torch.allclose(loss_fn(history.at(190)), history["loss"][50])  # the nearest
    with pytest.raises(ValueError, match=r"expected .*'accuracy'"):
        history["accuracy"]


# ---------------------------------------------------------------- interrupts and faults


@pytest.mark.parametrize("measure", [bimt.cross_entropy, bimt.accuracy])
@pytest.mark.parametrize("classes", [[0, 3], [-100, 0], [0.0, 1.0], [True, False]])
def test_classes_that_do_not_exist_are_refused(measure, classes):
    with pytest.raises(ValueError, match="expected classes"):
        measure(torch.zeros(2, 2, 3), torch.tensor(classes))


@EXACT
@pytest.mark.parametrize("place", ["loss_fn", "metrics", "swap"])
def test_interrupt_returns_what_there_is(place, exact, capsys):  # defects 20 and 21
    stop, model = partial(ref.raising, KeyboardInterrupt), new_model()
    lines, changed = {
        "loss_fn": (0, stop(1, loss_fn)),
        "metrics": (3, {"a": loss_fn, "b": stop(4, loss_fn)}),
        "swap": (4, stop(2, swap_neurons)),
    }[place]
    history = fit(model, exact=exact, swap_every=2, **{place: changed})
    assert len(history.steps) == lines
    assert set(history.snapshots) == {0, lines}
    assert ref.same_state(history.at(40), model)
    assert torch.equal(history.at(0)(X), new_model()(X))
    assert "interrupted after" in capsys.readouterr().out
    if not lines:
        with pytest.raises(ValueError, match="expected the name of a logged curve"):
            bimt.plot_curves(history, "loss", ax="none was drawn on")


@EXACT
def test_interrupt_anywhere_keeps_the_history(exact):  # defect 20
    """Ctrl-C at every line of train, from the first step to its return."""
    settings = {"steps": 3, "swap_every": 2, "lr": 0.05, "exact": exact, "snapshots": 3}
    settings["metrics"] = {"again": loss_fn}
    whole, place, more, lost = fit(new_model(), **settings), 0, True, []
    random = torch.get_rng_state()
    seen = {step: whole.at(step)(X).detach() for step in whole.snapshots}
    assert not torch.allclose(seen[2], seen[3], atol=1e-3)
    while more:
        place, model, started = place + 1, new_model(), []
        settings["loss_fn"] = lambda m, started=started: started.append(1) or loss_fn(m)
        history, more = ref.interrupted(lambda model=model: fit(model, **settings), place, "train")
        if history is None:  # before the first step, or at the return
            lost += started[:1]
            continue
        for step in history.snapshots:
            assert torch.allclose(history.at(step)(X), seen[step])
        now = [step for step in seen if torch.allclose(model(X), seen[step])]
        assert now[0] - max(history.snapshots) in (0, 1)  # a step may be made and not yet counted
        for name in ("loss", "cost", "objective", "again") if history.log else ():
            assert torch.equal(history[name], whole[name][: len(history.steps)])
    assert ref.same_state(history.at(3), whole.at(3))  # the same to the last bit
    assert torch.equal(random, torch.get_rng_state())
    assert place > 50
    assert len(lost) <= 1


@EXACT
def test_one_run_that_diverges_does_not_take_the_others_along(exact):  # defect 3
    calls, model = itertools.count(), new_model(3)

    def broken(m):
        bad = (torch.arange(3) == 1) & (next(calls) == 25)
        return torch.where(bad, math.inf, loss_fn(m))

    with pytest.raises(FloatingPointError, match=r"run \[1\] at step 25") as error:
        fit(model, loss_fn=broken, exact=exact, snapshots=2)
    history = error.value.history
    assert history["loss"].isfinite().tolist() == [[True] * 3] * 25
    assert sorted(history.snapshots) == [0, 20, 25]
    assert ref.same_state(history.at(25), model)


def test_the_last_loss_is_checked_too():
    with pytest.raises(FloatingPointError, match="at step 1"):
        fit(new_model().float(), steps=1, lr=1e30)


def test_losses_near_the_largest_float():  # defect 22: their sum is not finite
    model = new_model()
    history = fit(model, loss_fn=lambda m: loss_fn(m) + 1.7e308, steps=5)
    assert history["objective"].isfinite().tolist() == [[True, True]] * 6
    assert not ref.same_state(model, new_model())


def test_any_error_carries_the_history():
    shapes = iter([2, 2, 2, 1])
    for error, lines, changes in (
        (ZeroDivisionError, 4, {"metrics": {"odd": ref.raising(ZeroDivisionError, 5, loss_fn)}}),
        (ValueError, 3, {"metrics": {"odd": lambda m: torch.ones(next(shapes))}}),  # defect 2
        (ValueError, 10, {"swap": partial(swap_neurons, top_k=-2)}),
    ):
        with pytest.raises(error) as raised:
            fit(new_model(), **changes)
        assert len(raised.value.history["loss"]) == lines


NO_NUMBERS = [-1.0, float("nan"), float("inf"), 1j, torch.ones(3), torch.tensor([0.1, -0.1])]
NO_PHASES = [[], [0.1], [1e-3, 1e-2], [(0, 1e-3, 5)], [(0.1, 1.0)], [(0, 1.0), (1.5, 2.0)]]
NO_PHASES += [[(0, 1.0), (0.5, 2.0), (later, 3.0)] for later in (0.5, 0.3)] + [[(0, -1.0)]]
NO_COUNTS = [0, -1, 2.5, float("nan"), True]
NO_LOSSES = [lambda m: loss_fn(m)[:1], lambda m: loss_fn(m).mean(), lambda m: 1.0]
NO_LOSSES += [lambda m: torch.ones(3, requires_grad=True)]


@EXACT
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lamb", NO_NUMBERS + NO_PHASES),  # defect 10
        ("lr", [0, -1.0, float("inf"), float("nan"), "0.1"]),  # defect 10
        ("cost", [[], [(0.1, connection_cost)], *NO_LOSSES]),
        ("cost", [partial(connection_cost, A=bad) for bad in NO_NUMBERS]),  # defect 10
        ("steps", NO_COUNTS),
        ("snapshots", NO_COUNTS),  # defect 23
        ("swap_every", [-1, 2.5, float("nan")]),
        ("loss_fn", [torch.no_grad()(loss_fn), *NO_LOSSES]),  # defect 11
        ("metrics", [{"right": loss_fn, "wrong": wrong} for wrong in NO_LOSSES]),  # defect 2
        ("metrics", [{"loss": loss_fn}, {"objective": loss_fn}]),
    ],
)
def test_bad_settings_are_refused_before_the_first_step(name, values, exact):
    for value in values:
        model = new_model()
        with pytest.raises(ValueError, match=r"(?s)^expected .*, got "):
            fit(model, exact=exact, **{name: value})
        assert ref.same_state(model, new_model())
