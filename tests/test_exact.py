"""The proximal step of notebooks/further/exact_zeros.ipynb: against a plain loop, AdamW and Lasso;
and the formulas that the notebook writes out, against the network."""

import copy
from functools import partial

import numpy as np
import pytest
import reference as ref
import sympy
import torch
from notebook_cells import definitions
from sklearn.linear_model import Lasso
from torch import nn

import bimt_utils as bimt

NOTEBOOK = definitions("exact_zeros", before="## Two tasks")
ProximalAdam, written_out = NOTEBOOK["ProximalAdam"], NOTEBOOK["written_out"]
SYMBOLS, SIGMA = sympy.symbols("x_1:5"), sympy.Function("sigma")
NOTEBOOK |= {"X": SYMBOLS, "sigma": SIGMA}  # as the notebook defines them beside written_out
X = torch.rand(30, 4, generator=ref.generator(9)).double() * 2 - 1
Y = torch.stack([X[:, 0] * X[:, 1], X[:, 2] + X[:, 3]], 1)


def new_model(runs=2, shape=(4, 6, 2), seed=0):
    return bimt.EmbeddedMLP(shape, runs, generator=ref.generator(seed)).double()


def loss_fn(model):
    return bimt.mse_loss(model(X), Y)


def fit(model, loss=loss_fn, **changes):
    settings = {"steps": 100, "lr": 5e-3, "lamb": 1e-3, "swap_every": 0}
    return bimt.train(model, loss, optimizer=ProximalAdam, **{**settings, **changes})


def zeros(model):
    return sum((p == 0).flatten(1).sum(1) for p in model.parameters())


def train_by_loop(model, prices, *, steps, lr, swap_every, top_k):
    """The step as its formulas are written, one entry of one parameter at a time; prices(step) has
    a list like the parameters. Moments and prices belong to slots."""
    parameters = list(model.parameters())
    moments = [(np.zeros(p.numel()), np.zeros(p.numel())) for p in parameters]
    for step in range(1, steps + 1):
        model.zero_grad()
        (ref.plain_forward(model, 0, X) - Y).square().mean().backward()
        for p, c, (m, v) in zip(parameters, prices(step - 1), moments, strict=True):
            entries, slopes = p.detach().view(-1).numpy(), p.grad.view(-1).tolist()
            costs = c.expand_as(p).reshape(-1).tolist()
            for i, (g, price) in enumerate(zip(slopes, costs, strict=True)):
                h = g + price * np.sign(entries[i])
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * h**2
                d = max(np.sqrt(v[i] / (1 - 0.999**step)) + 1e-8, price)
                q = entries[i] - lr * m[i] / (1 - 0.9**step) / d
                entries[i] = np.sign(q) * max(abs(q) - lr * price / d, 0)
        if step % swap_every == 0:
            ref.greedy_by_search(model, 0, top_k)


def test_follows_a_plain_loop():
    """Phases of lamb, per-run prices, biases that are free at first, and greedy swaps."""
    model, A = new_model(), torch.tensor([0.5, 2.0])
    singles = [model.pick(run) for run in range(2)]
    settings = {"steps": 160, "lr": 1e-2, "swap_every": 30}
    prices = partial(bimt.connection_prices, A=A)
    free = partial(prices, biases=False)
    swap = partial(bimt.swap_neurons, top_k=3)
    fit(
        model,
        lamb=[(0, 1e-3), (0.5, 2e-2)],
        prices=[(0, free), (0.75, prices)],
        swap=swap,
        **settings,
    )
    for run, single in enumerate(singles):

        def now(step, single=single, run=run):
            lamb, bias = (1e-3, 2e-2)[step >= 80], (0.0, 0.1)[step >= 120]
            for layer in single.layers:
                length = (layer.out_places[:, None] - layer.in_places).abs().sum(-1)
                yield lamb * (A[run] * length[None] + 0.1)
                yield torch.full_like(layer.bias, lamb * bias)

        train_by_loop(single, now, top_k=3, **settings)
        for ours, plain in zip(model.pick(run).parameters(), single.parameters(), strict=True):
            assert torch.allclose(ours, plain, atol=1e-7)
            assert ((ours == 0) == (plain == 0)).all()
        assert torch.equal(model.in_perm[run], single.in_perm[0])
        assert torch.equal(model.out_perm[run], single.out_perm[0])
    assert (zeros(model) > 0).all()
    assert not torch.equal(model.in_perm, new_model().in_perm)  # so the swaps did something


def test_every_run_is_on_its_own():
    together = new_model()
    alone = [together.pick(run) for run in range(2)]
    lamb = torch.tensor([0.01, 0.1])
    fit(together, lamb=lamb, swap_every=20)
    for run, single in enumerate(alone):
        fit(single, lamb=lamb[run].item(), swap_every=20)
        for ours, wanted in zip(together.pick(run).parameters(), single.parameters(), strict=True):
            assert torch.allclose(ours, wanted, atol=1e-9)
    few, many = zeros(together)
    assert 0 < few < many


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_without_prices_it_is_adam_to_the_last_bit(kind):
    model = new_model().to(kind)
    plain = copy.deepcopy(model)
    settings = {"lr": 5e-3, "weight_decay": 0, "fused": False, "foreach": False}
    adam = torch.optim.AdamW(plain.parameters(), **settings)
    fit(model, steps=200, lamb=0.0)
    for _ in range(200):
        adam.zero_grad()
        loss_fn(plain).sum().backward()
        adam.step()
    assert ref.same_state(model, plain)


def test_reaches_the_solution_of_lasso():
    """Least squares with a price per weight is scikit-learn's Lasso on scaled features."""
    x = torch.randn(40, 8, generator=ref.generator(2)).double()
    y = x[:, :3] @ torch.tensor([[1.0], [-0.6], [0.2]]).double() + 0.4
    y += 0.3 * torch.randn(40, 1, generator=ref.generator(3)).double()
    lamb, A = torch.tensor([0.05, 0.3, 1.0, 0.3]), torch.tensor([0.0, 0.0, 0.0, 3.0])
    model, found = new_model(4, (8, 1)), 0
    prices = partial(bimt.connection_prices, A=A, y0=1.0, biases=False)
    for lr in (2e-2, 1e-3):
        fit(model, lambda m: bimt.mse_loss(m(x), y), steps=500, lr=lr, lamb=lamb, prices=prices)
    for run, value in enumerate(lamb.tolist()):
        price = (A[run] * model.layers[0].distance[0] + 1).numpy()
        lasso = Lasso(alpha=value / 2, tol=1e-12, max_iter=100_000).fit(x.numpy() / price, y[:, 0])
        weight = model.layers[0].weight[run, 0].detach().numpy()
        assert np.allclose(weight, lasso.coef_ / price, atol=1e-4)
        assert ((weight == 0) == (lasso.coef_ == 0)).all()
        assert model.layers[0].bias[run].item() == pytest.approx(lasso.intercept_, abs=1e-4)
        found += (weight == 0).sum()
    assert 8 <= found <= 24


def test_ends_at_a_stationary_point():
    """|g| <= c where a parameter is zero, g = -c sign p elsewhere."""
    model, lamb = new_model(2, (2, 4, 1), seed=1), torch.tensor([0.03, 0.1])

    def loss(m):
        return bimt.mse_loss(m(X[:, :2]), 2.25 * X[:, :1] ** 2)

    for steps, lr in ((1500, 2e-2), (500, 2e-3)):
        fit(model, loss, steps=steps, lr=lr, lamb=lamb)
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


def test_a_parameter_that_is_frozen_stays_as_it_is():
    model = new_model()
    model.layers[1].weight.requires_grad_(False)
    before = model.layers[1].weight.clone()
    fit(model, lamb=0.1)
    assert torch.equal(model.layers[1].weight, before)
    assert (model.layers[0].weight == 0).any()


@pytest.mark.parametrize("seed", range(4))
def test_formulas_equal_the_network(seed):
    """With constants (neurons that read nothing) and with inputs and outputs that have moved."""
    model = ref.thinned(new_model(1, (3, 4, 3, 2), seed), seed)
    ref.arrange_at_random(model, seed)
    outputs, x = written_out(model, 17), X[:, :3]
    for number, formula in enumerate(outputs):
        function = sympy.lambdify(SYMBOLS[:3], formula, [{"sigma": nn.SiLU()}])
        values = function(*x.T) + 0 * x[:, 0]
        assert torch.allclose(values, model(x)[0, :, number], atol=1e-12)
