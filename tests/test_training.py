"""The training loop: phases, history, interrupts, faults, determinism."""

import math

import pytest
import torch
from torch import nn

from bimt_utils import (
    EmbeddedMLP,
    _phases,
    accuracy,
    connection_cost,
    cross_entropy,
    mse_loss,
    phase_value,
    swap_neurons,
    train,
    wiring_length,
)

X = torch.rand(30, 4, generator=torch.Generator().manual_seed(9)) * 2 - 1
Y = torch.stack([X[:, 0] * X[:, 1], X[:, 2] + X[:, 3]], 1)


def new_model(runs=2, seed=0):
    return EmbeddedMLP((4, 8, 2), runs=runs, generator=torch.Generator().manual_seed(seed))


def loss_fn(model):
    return mse_loss(model(X), Y)


def fit(model, **changes):
    settings = {"steps": 40, "lr": 5e-3, "lamb": 1e-3, "swap_every": 10, "top_k": 3}
    return train(model, **{"loss_fn": loss_fn, **settings, **changes})


@pytest.mark.parametrize(
    ("steps", "fraction", "first"),
    [(20_000, 1 / 4, 5000), (20_000, 3 / 4, 15_000), (10_001, 1 / 2, 5000), (100, 0.29, 29)],
)
def test_phases_start_at_their_step(steps, fraction, first):
    phases = _phases("lamb", [(0, "low"), (fraction, "high")], steps)
    assert phase_value(phases, 0) == phase_value(phases, first - 1) == "low"
    assert phase_value(phases, first) == phase_value(phases, steps) == "high"


def test_one_value_is_one_phase():
    assert phase_value(_phases("lamb", 0.5, 10), 9) == 0.5


@pytest.mark.parametrize(
    "phases",
    [[], [(0.1, 1.0)], [(0, 1.0), (0.5, 2.0), (0.5, 3.0)], [(0, 1.0), (0.6, 2.0), (0.3, 3.0)]],
)
def test_phases_out_of_order(phases):
    with pytest.raises(ValueError, match="lamb has phases at"):
        fit(new_model(), lamb=phases)
    with pytest.raises(ValueError, match="cost has phases at"):
        fit(new_model(), cost=phases)


def test_follows_a_plain_loop_with_adamw():
    """Phases of lamb and of the cost, swaps at their steps, moments left behind."""
    model, plain = new_model(runs=1), new_model(runs=1)

    def free_biases(m):
        return connection_cost(m, biases=False)

    fit(model, lamb=[(0, 1e-3), (0.5, 1e-2)], cost=[(0, free_biases), (0.75, connection_cost)])
    optimizer = torch.optim.AdamW(plain.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(40):
        cost = free_biases if step < 30 else connection_cost
        optimizer.zero_grad()
        (loss_fn(plain) + (1e-3 if step < 20 else 1e-2) * cost(plain)).sum().backward()
        optimizer.step()
        if (step + 1) % 10 == 0:
            swap_neurons(plain, 3)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(model.out_perm, plain.out_perm)


def test_training_learns_and_shortens_the_wiring():
    model = new_model()
    before = loss_fn(model).detach(), wiring_length(model)
    history = fit(model, steps=300, lamb=1e-2)
    assert (loss_fn(model) < before[0] / 2).all()
    assert (wiring_length(model) < before[1]).all()
    assert history.losses[0].tolist() == pytest.approx(before[0].tolist())


def test_settings_per_run():
    """Runs with other lamb, A and swap mask train as they would alone."""
    lamb, A, swaps = torch.tensor([0.0, 1e-2]), torch.tensor([1.0, 0.0]), torch.tensor([0, 1]) == 1
    both = new_model()
    singles = [both.pick(run) for run in range(2)]
    fit(both, lamb=lamb, cost=lambda m: connection_cost(m, A), swap_runs=swaps)
    for run, single in enumerate(singles):
        fit(
            single,
            lamb=lamb[run].item(),
            cost=lambda m, run=run: connection_cost(m, A[run].item()),
            swap_every=10 if swaps[run] else 0,
        )
        assert torch.allclose(both(X)[run], single(X)[0], atol=1e-5)
        assert torch.equal(both.in_perm[run], single.in_perm[0])


def test_history():
    model = new_model(runs=3)
    history = fit(
        model,
        log_every=10,
        metrics={"half": lambda m: loss_fn(m) / 2},
        snapshot_every=20,
        snapshot_runs=[2, 0],
    )
    assert history.steps == [0, 10, 20, 30, 40]
    assert history.losses.shape == history.costs.shape == (5, 3)
    assert torch.allclose(history.metrics["half"], history.losses / 2)
    assert sorted(history.snapshots) == [0, 20, 40]
    assert torch.allclose(history.at(40)(X), model(X)[[2, 0]], atol=1e-6)
    assert not torch.allclose(history.at(0)(X), model(X)[[2, 0]], atol=1e-3)
    assert history.finished
    assert 0 < history.swap_seconds < history.seconds
    with pytest.raises(ValueError, match="step is 7"):
        history.at(7)


def test_own_swap_is_called_in_place_of_the_usual_one():
    calls = []
    model = new_model()
    fit(model, swap=lambda m, optimizer: calls.append((m is model, len(optimizer.state))))
    assert calls == [(True, 4)] * 4
    assert torch.equal(model.in_perm[0], torch.arange(4))


@pytest.mark.parametrize("when", [1, 14])
def test_interrupt_returns_what_there_is(when, capsys):
    model, calls = new_model(), []

    def interrupted(m):
        calls.append(1)
        if len(calls) >= when:
            raise KeyboardInterrupt
        return loss_fn(m)

    history = fit(model, loss_fn=interrupted, log_every=5)
    assert not history.finished
    assert history.steps == list(range(0, when - 1, 5))
    assert len(history.losses) == len(history.costs) == len(history.steps)
    assert torch.equal(history.at(when - 1)(X), model(X))
    assert torch.equal(history.at(0)(X), new_model()(X))
    assert history.nearest(10_000) == when - 1
    assert "interrupted after" in capsys.readouterr().out


def test_interrupt_in_a_metric_leaves_no_half_line():
    calls = []

    def metric(m):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss_fn(m)

    history = fit(new_model(), log_every=5, metrics={"a": loss_fn, "b": metric})
    lines = [len(v) for v in (history.steps, history.losses, history.costs)]
    assert lines + [len(v) for v in history.metrics.values()] == [2] * 5


def test_non_finite_loss_names_run_and_step():
    model = new_model()

    def broken(m):
        with torch.no_grad():
            m.layers[0].bias[1] *= 1e30
        return loss_fn(m)

    with pytest.raises(FloatingPointError, match=r"run \[1\] at step \d"):
        fit(model, loss_fn=broken)


def test_the_last_loss_is_checked_too():
    with pytest.raises(FloatingPointError, match="at step 1"):
        fit(new_model(), steps=1, lr=1e38)


def test_targets_of_another_shape():
    with pytest.raises(ValueError, match=r"targets has shape \(30,\)"):
        mse_loss(torch.zeros(2, 30, 1), torch.zeros(30))


def test_same_seed_gives_the_same_bits():
    models = [new_model(seed=3) for _ in range(2)]
    for model in models:
        fit(model, steps=100)
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(a, b)


def test_training_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    fit(new_model())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"lamb": torch.ones(3)}, "lamb has shape"),
        ({"swap_runs": [True]}, "swap_runs"),
        ({"steps": 0}, "steps is 0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"swap_every": -1}, "swap_every is -1"),
        ({"steps": 5, "reduce": "max"}, "reduce is 'max'"),
        ({"loss_fn": lambda m: loss_fn(m).mean()}, "loss_fn"),
        ({"cost": lambda m: connection_cost(m)[:1]}, "cost"),
    ],
)
def test_bad_input(changes, names):
    with pytest.raises(ValueError, match=names):
        fit(new_model(runs=2), **changes)


def test_losses_equal_those_of_torch():
    outputs = torch.randn(3, 30, 5, generator=torch.Generator().manual_seed(1))
    classes = torch.randint(5, (30,), generator=torch.Generator().manual_seed(2))
    targets = torch.randn(30, 5, generator=torch.Generator().manual_seed(3))
    for run in range(3):
        wanted = nn.functional.mse_loss(outputs[run], targets)
        assert math.isclose(mse_loss(outputs, targets)[run], wanted, rel_tol=1e-5)
        wanted = nn.functional.cross_entropy(outputs[run], classes)
        assert math.isclose(cross_entropy(outputs, classes)[run], wanted, rel_tol=1e-5)
        wanted = (outputs[run].argmax(1) == classes).float().mean()
        assert math.isclose(accuracy(outputs, classes)[run], wanted, rel_tol=1e-6)


def test_twice_the_same_to_the_last_bit():
    def once():
        model = EmbeddedMLP((4, 9, 2), runs=3, generator=torch.Generator().manual_seed(0))
        random = torch.Generator().manual_seed(1)
        x = torch.rand(50, 4, generator=random)

        def loss(model):
            rows = torch.randint(50, (10,), generator=random)
            return mse_loss(model(x[rows]), x[rows, :2] ** 2)

        train(model, loss, steps=60, lr=1e-2, lamb=1e-2, swap_every=20)
        return model.state_dict()

    for one, other in zip(once().values(), once().values(), strict=True):
        assert torch.equal(one, other)


def test_objectives_are_what_is_minimised():
    model = EmbeddedMLP((4, 9, 2), runs=2, generator=torch.Generator().manual_seed(0))
    x = torch.rand(20, 4, generator=torch.Generator().manual_seed(1))
    lamb = torch.tensor([0.1, 0.3])
    history = train(
        model, lambda m: mse_loss(m(x), x[:, :2]), steps=40, lr=1e-2, lamb=[(0, 0.0), (0.5, lamb)]
    )
    late = (torch.tensor(history.steps) >= 20)[:, None]
    expected = history.losses + torch.where(late, lamb, 0) * history.costs
    assert torch.allclose(history.objectives, expected)


@pytest.mark.parametrize("lamb", [[1e-3, 1e-2], [(0, 1e-3, 5)], [0.1]])
def test_phases_that_are_no_pairs(lamb):
    model = EmbeddedMLP((4, 9, 2), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="lamb is"):
        train(model, lambda m: m(torch.rand(3, 4)).mean((1, 2)), steps=2, lr=1e-2, lamb=lamb)
