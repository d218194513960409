"""The optimizer and the training loop: plain loops, phases, history, interrupts, faults."""

import contextlib
import copy
import itertools
import math
from functools import partial

import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bimt_utils as bimt
from bimt_utils import L1AdamW, connection_cost, connection_prices, mse_loss, swap_neurons, train

X = torch.rand(30, 4, generator=ref.generator(9)).double() * 2 - 1
Y = torch.stack([X[:, 0] * X[:, 1], X[:, 2] + X[:, 3]], 1)


def few(examples):
    return settings(deadline=None, max_examples=examples)


def new_model(runs=2, shape=(4, 6, 2), seed=0, kind=bimt.EmbeddedMLP, **kwargs):
    return kind(shape, runs, generator=ref.generator(seed), **kwargs).double()


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
def test_losses_equal_those_of_torch_and_do_not_broadcast(measure):
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


@pytest.mark.parametrize("measure", [bimt.cross_entropy, bimt.accuracy])
def test_classes_below_0_are_refused(measure):
    with pytest.raises(ValueError, match=r"expected (.|\n)* got"):
        measure(torch.zeros(2, 2, 3), torch.tensor([-100, 0]))


# ---------------------------------------------------------------- against plain loops


def test_a_thousand_steps_equal_a_plain_loop():
    """Three phases of lamb, biases free in the first, and swaps; in double precision."""
    shape, A, y0, first = (4, 8, 8, 2), 0.3, 0.1, new_model(3, (4, 8, 8, 2))
    model = copy.deepcopy(first)
    prices = partial(connection_prices, A=A, y0=y0)
    train(
        model,
        loss_fn,
        steps=1000,
        lr=2e-3,
        lamb=[(0, 1e-3), (0.25, 1e-2), (0.75, 3e-3)],
        prices=[(0, partial(prices, biases=False)), (0.25, prices)],
        swap=partial(swap_neurons, top_k=3),
        swap_every=50,
    )
    phases = {0: (1e-3, False), 250: (1e-2, True), 750: (3e-3, True)}
    for run in range(3):
        network = ref.plain_network(*shape).double()
        for p, start in zip(network.parameters(), first.parameters(), strict=True):
            p.data.copy_(start[run])
        settings = {"steps": 1000, "lr": 2e-3, "swap_every": 50, "top_k": 3}
        x, y = ref.train_plainly(network, X, Y, phases=phases, A=A, y0=y0, **settings)
        assert torch.equal(X[:, model.in_perm[run]], x)
        assert torch.equal(Y[:, model.out_perm[run]], y)
        for ours, plain in zip(model.parameters(), network.parameters(), strict=True):
            assert (ours[run] - plain).abs().max() < 1e-9
    assert not torch.equal(model.in_perm, first.in_perm)  # so the swaps did something


@few(15)
@given(ref.models(), st.booleans(), st.sampled_from(["sum", "mean"]))
def test_train_equals_a_loop_of_ones_own(model, biases, reduce):
    plain, x, lamb = copy.deepcopy(model), ref.some_input(model), torch.linspace(0.1, 0, model.runs)
    options = {"A": torch.linspace(0.5, 2, model.runs), "y0": 0.2, "A_last": 0.0}
    options |= {"biases": biases, "reduce": reduce}

    def loss(model):
        return (model(x) - 0.5).square().mean((1, 2))

    prices = partial(connection_prices, **options)
    train(model, loss, steps=24, lr=5e-3, lamb=lamb, prices=prices, swap_every=8)
    adam = torch.optim.AdamW(plain.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(24):
        adam.zero_grad()
        (loss(plain) + lamb * connection_cost(plain, **options)).sum().backward()
        adam.step()
        if (step + 1) % 8 == 0:
            swap_neurons(plain)
    for ours, wanted in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-9)


@pytest.mark.parametrize("weight_decay", [0.0, 1.0])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_l1adamw_equals_adamw_on_the_whole_objective(weight_decay, kind):
    draw, sizes = ref.generator(), ((2, 3, 4), (2, 5), (2, 6, 3))
    start, target = ([torch.randn(s, generator=draw).to(kind) for s in sizes] for _ in range(2))
    start[0][:, 0] = target[0][:, 0] = 0  # stays at zero, where the price has no slope
    prices = [torch.rand(shape, generator=draw).to(kind) for shape in ((1, 3, 4), (2, 1), ())]
    ours, plain = ([nn.Parameter(p.clone()) for p in start] for _ in range(2))
    adam = torch.optim.AdamW(plain, lr=1e-2, weight_decay=weight_decay)
    optimizer = L1AdamW(ours, 1e-2, weight_decay=weight_decay)

    def step(parameters, charged):
        loss = sum((p - t).pow(2).sum() for p, t in zip(parameters, target, strict=True))
        cost = sum((c * p.abs()).sum() for p, c in zip(parameters, charged, strict=True))
        for p, slope in zip(parameters, torch.autograd.grad(loss + cost, parameters), strict=True):
            p.grad = slope

    for _ in range(100):
        step(ours, [torch.zeros(())] * 3)
        optimizer.step(dict(zip(ours, prices, strict=True)))
        step(plain, prices)
        adam.step()
    for p, wanted in zip(ours, plain, strict=True):
        assert torch.allclose(p, wanted, atol=1e-4 if kind == torch.float32 else 1e-9)
    assert not ours[0][:, 0].any()
    assert (ours[1] - start[1]).abs().min() > 1e-3


def test_an_optimizer_of_ones_own():
    """It gets the slopes of the loss alone, and prices that are multiplied by lamb."""
    model, seen = new_model(), []
    model.layers[1].bias.requires_grad_(False)
    free = [p for p in model.parameters() if p.requires_grad]

    class SignDescent:
        def __init__(self, parameters, lr):
            assert all(p is q for p, q in zip(parameters, free, strict=True))
            self.lr = lr

        @torch.no_grad()
        def step(self, prices):
            assert {*map(id, prices)} == {*map(id, free)}
            with torch.enable_grad():
                slopes = torch.autograd.grad(loss_fn(model).sum(), free)
            for p, slope in zip(free, slopes, strict=True):
                assert torch.equal(p.grad, slope)
                p -= self.lr * (slope + prices[p] * p.sign())
            seen.append(dict(prices))

    each = torch.tensor([0.3, 0.1], dtype=torch.float64)
    plain, start = copy.deepcopy(model), connection_prices(model, 2.0)
    phases = [(0, each), (0.5, 0.7)]
    prices = partial(connection_prices, A=2.0)
    fit(model, steps=4, lamb=phases, prices=prices, optimizer=SignDescent, swap_every=0)
    for step, lamb in enumerate((each, each, 0.7, 0.7)):
        for p in free:
            lambs = torch.as_tensor(lamb, dtype=torch.float64).view(-1, *[1] * (p.ndim - 1))
            assert (seen[step][p] == lambs * start[p]).all()  # numbers stay in double precision
        objective = loss_fn(plain) + lamb * connection_cost(plain, 2.0)
        own = [p for p in plain.parameters() if p.requires_grad]
        for p, slope in zip(own, torch.autograd.grad(objective.sum(), own), strict=True):
            p.data -= 5e-3 * slope
    for ours, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-12)


@pytest.mark.parametrize("kind", [ref.Stream, ref.Gated])
def test_frozen_parameters_stay(kind):
    model, x = kind(runs=2), ref.some_input(kind())
    for p in (model.layers[0].weight, model.layers[1].bias):
        p.requires_grad_(False)
    first = copy.deepcopy(model)
    train(model, lambda m: m(x).square().mean((1, 2)), steps=20, lr=0.01, lamb=0.1, swap_every=5)
    for layer, old in zip(model.layers[:2], first.layers, strict=False):
        assert (layer.weight.requires_grad, layer.bias.requires_grad).count(True) == 1
        moved = [not torch.equal(a.flatten(1).sort().values, b.flatten(1).sort().values)
                 for a, b in ((layer.weight, old.weight), (layer.bias, old.bias))]  # fmt: skip
        assert moved == [layer.weight.requires_grad, layer.bias.requires_grad]


def test_what_the_loss_does_not_use_pays():
    model = new_model()
    fit(model, loss_fn=lambda m: m.rows(X)[0].square().mean((1, 2)), lamb=0.1, swap_every=0)
    before, now = (m.layers[1].weight.abs() for m in (new_model(), model))
    assert torch.allclose(now, (before - 40 * 5e-3).clamp_min(0), atol=0.03)


def test_a_parameter_of_ones_own_trains_and_pays_nothing():
    class Louder(bimt.EmbeddedMLP):
        def rows(self, x):
            rows = super().rows(x)
            return [*rows[:-1], rows[-1] * self.gain]

    model = new_model(kind=Louder)
    model.gain, model.idle = (nn.Parameter(torch.ones(2, 1, 1).double()) for _ in range(2))
    history = fit(model, steps=100)
    assert ((model.gain - 1).abs() > 0.01).all()
    assert (model.idle == 1).all()
    assert torch.allclose(history["cost"][-1], connection_cost(model))


# ---------------------------------------------------------------- phases and history


@pytest.mark.parametrize(
    ("steps", "fraction", "first"), [(40, 0.25, 10), (40, 0.75, 30), (11, 0.5, 5), (50, 0.58, 29)]
)
def test_phases_start_at_their_step(steps, fraction, first):
    lamb, free = torch.tensor([0.1, 0.3]), partial(connection_prices, biases=False)
    settings = {"steps": steps, "snapshots": steps, "lamb": [(0, 0.0), (fraction, lamb)]}
    history = fit(new_model(), prices=[(0, free), (fraction, connection_prices)], **settings)
    assert history.phases == [first]
    assert history.steps == list(range(steps + 1))
    for step in history.steps:
        cost = connection_cost(history.at(step), biases=step >= first)
        loss = loss_fn(history.at(step))
        assert torch.allclose(history["cost"][step], cost)
        assert torch.allclose(history["objective"][step], loss + (step >= first) * lamb * cost)


def test_history():
    model, metrics = new_model(3), {"half": lambda m: loss_fn(m) / 2}
    history = fit(model, steps=400, metrics=metrics, snapshots=4)
    assert history.steps == list(range(0, 401, 4))
    assert history["loss"].shape == history["cost"].shape == (101, 3)
    assert not history["half"].requires_grad
    assert torch.allclose(history["half"], history["loss"] / 2)
    assert list(history.snapshots) == [0, 100, 200, 300, 400]
    assert torch.allclose(history.at(400)(X), model(X))
    assert torch.allclose(history.at(0)(X), new_model(3)(X))
    assert torch.allclose(loss_fn(history.at(190)), history["loss"][50])  # the nearest


def test_a_metric_may_be_a_view_of_a_weight():
    def weight(model):
        return model.layers[0].weight[:, 0, 0]

    metrics = {"view": weight, "copy": lambda model: weight(model) * 1}
    history = fit(new_model(), metrics=metrics)
    assert torch.equal(history["view"], history["copy"])
    assert len(history["view"].unique()) > 10


def test_training_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    fit(new_model())
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------- unusual models


def test_parameters_whose_data_is_replaced_are_still_those_that_train():
    """A mask that assigns does what one does that works in place."""
    ours, plain = new_model(), new_model()

    def assign(model):
        for layer in model.layers:
            layer.weight.data = layer.weight.data * (layer.distance < 0.5)

    def multiply(model):
        for layer in model.layers:
            layer.weight.data *= layer.distance < 0.5

    fit(ours, swap=assign)
    history = fit(plain, swap=multiply)
    assert ref.same_state(ours, plain)
    assert ref.same_state(ours, history.at(40))


@pytest.mark.parametrize("place", ["loss_fn", "metrics", "swap"])
def test_a_model_that_changes_its_precision_does_not_train_beside_itself(place):
    calls, model = itertools.count(), new_model().float()

    def doubling(model):
        if next(calls) == 2:
            model.double()
        return loss_fn(model)

    with contextlib.suppress(RuntimeError):  # torch refuses to mix the two
        history = fit(model, **{place: {"a": doubling} if place == "metrics" else doubling})
        assert torch.allclose(history["loss"][-1].double(), loss_fn(model).double())
        assert (history["loss"][-1] < history["loss"][30]).all()
        assert model.layers[0].weight.dtype == torch.float64


@pytest.mark.parametrize("detached", [False, True])
def test_a_model_that_keeps_an_activation_trains_through_phases(detached):
    class Keeps(bimt.EmbeddedMLP):
        def rows(self, x):
            rows = super().rows(x)
            self.seen = rows[0].detach() if detached else rows[0]
            return rows

    ours, plain = new_model(kind=Keeps), new_model()
    if detached:
        ours(X)
    settings = {"lamb": [(0, 0.01), (0.5, 0.1)], "snapshots": 4, "metrics": {"again": loss_fn}}
    free = partial(connection_prices, biases=False)
    for model in (ours, plain):
        history = fit(model, prices=[(0, free), (0.7, connection_prices)], **settings)
    assert ref.same_state(ours, plain)
    assert torch.equal(history["loss"], history["again"])


@few(20)
@given(ref.models(), st.sampled_from(["sum", "mean"]))
def test_bfloat16_trains_in_every_architecture(model, reduce):
    model, x = model.bfloat16(), ref.some_input(model)
    prices, swap = partial(connection_prices, reduce=reduce), partial(swap_neurons, reduce=reduce)
    arguments = {"steps": 12, "lr": 0.02, "swap_every": 5, "prices": prices, "swap": swap}
    first = copy.deepcopy(model)
    lamb = [(0, 1e-3), (0.5, torch.linspace(0.1, 0.3, model.runs))]
    history = train(model, lambda m: m(x).square().mean((1, 2)), lamb=lamb, **arguments)
    assert history["objective"].isfinite().all()
    for p, old in zip(model.parameters(), first.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        assert not torch.equal(p, old)


def test_bfloat16_follows_float32():
    narrow, wide = (fit(new_model().to(kind)) for kind in (torch.bfloat16, torch.float32))
    assert torch.allclose(narrow["loss"], wide["loss"], atol=0.02)
    assert (wide["loss"][-1] < wide["loss"][0] - 0.1).all()


# ---------------------------------------------------------------- interrupts and faults


@pytest.mark.parametrize("place", ["loss_fn", "metrics", "swap", "prices"])
def test_interrupt_returns_what_there_is(place, capsys):
    stop, model = partial(ref.raising, KeyboardInterrupt), new_model()
    lines, changed = {
        "loss_fn": (0, stop(1, loss_fn)),
        "metrics": (3, {"a": loss_fn, "b": stop(4, loss_fn)}),
        "swap": (4, stop(2, swap_neurons)),
        "prices": (20, [(0, connection_prices), (0.5, stop(1, connection_prices))]),
    }[place]
    history = fit(model, swap_every=2, **{place: changed})
    assert len(history.steps) == lines
    assert set(history.snapshots) == {0, lines}
    assert ref.same_state(history.at(40), model)
    assert torch.equal(history.at(0)(X), new_model()(X))
    notice = f"NOTICE: interrupted after {lines} of 40 steps"
    assert any(line.startswith(notice) for line in capsys.readouterr().out.splitlines())


def test_interrupt_anywhere_keeps_the_history():
    """Ctrl-C at every other line, from the first step to the return."""
    settings = {"steps": 3, "swap_every": 2, "lr": 0.05, "snapshots": 3}
    settings["metrics"] = {"again": loss_fn}
    whole, place, more, lost = fit(new_model(), **settings), 0, True, []
    seen = {step: whole.at(step)(X).detach() for step in whole.snapshots}
    assert not torch.allclose(seen[2], seen[3], atol=1e-3)
    while more:
        place, model, started = place + 2, new_model(), []
        settings["loss_fn"] = lambda m, started=started: started.append(1) or loss_fn(m)
        history, more = ref.interrupted(lambda model=model: fit(model, **settings), place, "")
        if history is None:  # before the first step, or at the return
            lost += started[:1]
            continue
        *earlier, last = sorted(history.snapshots)
        assert ref.same_state(history.at(last), model)
        for step in earlier:
            assert torch.allclose(history.at(step)(X), seen[step])
        now = [step for step in seen if torch.allclose(model(X), seen[step])]
        assert now[0] - last in (0, 1)  # a step may be made and not yet counted
        for name in ("loss", "cost", "objective", "again") if history.log else ():
            assert torch.equal(history[name], whole[name][: len(history.steps)])
    assert ref.same_state(history.at(3), whole.at(3))  # the same to the last bit
    assert place > 100
    assert len(lost) <= 1


def test_a_loss_that_is_not_finite_names_run_and_step():
    calls, model = itertools.count(), new_model(3)

    def broken(m):
        bad = (torch.arange(3) == 1) & (next(calls) == 25)
        return torch.where(bad, math.inf, loss_fn(m))

    with pytest.raises(FloatingPointError, match=r"run \[1\] at step 25") as error:
        fit(model, loss_fn=broken, snapshots=2)
    history = error.value.history
    assert history["loss"].isfinite().tolist() == [[True] * 3] * 25
    assert sorted(history.snapshots) == [0, 20, 25]
    assert ref.same_state(history.at(25), model)


def test_the_last_loss_is_checked_too():
    with pytest.raises(FloatingPointError, match="at step 1"):
        fit(new_model().float(), steps=1, lr=1e30)


def test_losses_whose_sum_is_not_finite():
    model = new_model()
    history = fit(model, loss_fn=lambda m: loss_fn(m) + 1.7e308, steps=5)
    assert history["objective"].isfinite().tolist() == [[True, True]] * 6
    assert not ref.same_state(model, new_model())


def test_any_error_carries_the_history():
    shapes = iter([2, 2, 2, 1])
    for error, lines, changes in (
        (ZeroDivisionError, 4, {"metrics": {"odd": ref.raising(ZeroDivisionError, 5, loss_fn)}}),
        (ValueError, 3, {"metrics": {"odd": lambda m: torch.ones(next(shapes))}}),
        (ValueError, 10, {"swap": partial(swap_neurons, top_k=-2)}),
    ):
        with pytest.raises(error) as raised:
            fit(new_model(), **changes)
        assert len(raised.value.history["loss"]) == lines


REFUSED = (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, AttributeError)
NAN = float("nan")
NO_NUMBERS = [-1.0, NAN, float("inf"), torch.ones(3), torch.tensor([0.1, -0.1])]
NO_PHASES = [[], [(0.1, 1.0)], [(0, 1.0), (1.5, 2.0)], [(0, -1.0)], [(0, 1.0), (0.5, -1.0)]]
NO_PHASES += [[(0, 1.0), (0.5, 2.0), (later, 3.0)] for later in (0.5, 0.3)]
NO_LOSSES = [lambda m: loss_fn(m)[:1], lambda m: loss_fn(m).mean(), lambda m: torch.ones(2, 1)]


def lower(model):
    prices = connection_prices(model)
    return prices | {model.layers[1].bias: torch.tensor([[0.1, -0.1]])}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lamb", NO_NUMBERS + NO_PHASES),
        ("prices", [[], [(0.1, connection_prices)], [(0, connection_prices)] * 2, lower]),
        ("prices", [partial(connection_prices, A=bad) for bad in NO_NUMBERS]),
        ("steps", [0, -1]),
        ("snapshots", [0, -1]),
        ("swap_every", [-1]),
        ("loss_fn", NO_LOSSES),
        ("metrics", [{"right": loss_fn, "wrong": wrong} for wrong in NO_LOSSES]),
    ],
)
def test_bad_settings_are_refused_before_the_first_step(name, values):
    for value in values:
        model = new_model()
        with pytest.raises(ValueError, match=r"(?s)^expected .*, got "):
            fit(model, **{name: value})
        assert ref.same_state(model, new_model())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lamb", [1j, [0.1], [1e-3, 1e-2], [(0, 1e-3, 5)]]),
        ("lr", [-1.0, NAN, "0.1"]),
        ("steps", [2.5, NAN]),
        ("snapshots", [2.5, NAN]),
        ("loss_fn", [torch.no_grad()(loss_fn), lambda m: 1.0]),
        ("metrics", [{"odd": lambda m: 1.0}, {"loss": loss_fn}, {"objective": loss_fn}]),
    ],
)
def test_other_bad_settings_stop_before_the_first_step_too(name, values):
    for value in values:
        model = new_model()
        with pytest.raises(REFUSED):
            fit(model, **{name: value})
        assert ref.same_state(model, new_model())
