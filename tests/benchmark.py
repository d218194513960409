"""Speed as ratios, measured side by side in one run: `python tests/benchmark.py`.

Not collected by pytest: a ratio of times is a measurement, not a pass or a failure.
"""

import copy
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib
import torch
from reference import greedy_by_search
from torch import nn

from bimt_utils import EmbeddedMLP, mse_loss, plot_network, swap_neurons, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def seconds(call, repeats=5):
    """Shortest of some times: the one with the least disturbance."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def generator():
    return torch.Generator().manual_seed(0)


NETWORKS = {
    "4-20-20-20-20-1": (EmbeddedMLP((4, 20, 20, 20, 20, 1), generator=generator()), 5),
    "2x32-50-50-59": (
        EmbeddedMLP((64, 50, 50, 59), in_folds=2, embedding=(59, 32), generator=generator()),
        30,
    ),
    "784-100-100-10": (EmbeddedMLP((784, 100, 100, 10), frozen=(0,), generator=generator()), 30),
}


def compare_swaps(name, model, top_k):
    """One sweep over all rows: ours against swap, re-measure, swap back, from the same start."""
    model.double()  # so that both searches see the same ties
    fast, slow = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        by_search = seconds(lambda: greedy_by_search(slow, 0, top_k), repeats=1)
    by_table = seconds(lambda: swap_neurons(copy.deepcopy(model), top_k))
    by_table -= seconds(lambda: copy.deepcopy(model))
    swap_neurons(fast, top_k)
    pairs = zip(fast.state_dict().values(), slow.state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    many = copy.deepcopy(model).pick([0] * 32)
    batched = seconds(lambda: swap_neurons(many.pick(list(range(32))), top_k))
    batched = (batched - seconds(lambda: many.pick(list(range(32))))) / 32
    print(
        f"| {name} | {by_search:.2f} s | {by_table * 1e3:.1f} ms | {by_search / by_table:,.0f} "
        f"| {by_search / batched:,.0f} | {'yes' if same else 'NO'} |"
    )


def plain_training(shape, x, y, steps):
    """The same training of one network as one would write it with nn.Linear."""
    distances = [layer.distance for layer in EmbeddedMLP(shape).layers]
    sizes = list(itertools.pairwise(shape))
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b), nn.SiLU())][:-1]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(network(x), y)
        for layer, distance in zip(linear, distances, strict=True):
            loss = loss + 1e-3 * (layer.weight.abs() * (distance + 0.1)).sum()
            loss = loss + 1e-3 * 0.1 * layer.bias.abs().sum()
        loss.backward()
        optimizer.step()


def compare_training(shape, runs=32, steps=500):
    x, y = torch.rand(100, shape[0]), torch.rand(100, shape[-1])
    model = EmbeddedMLP(shape, runs=runs)

    def ours():
        loss_fn = lambda m: mse_loss(m(x), y)  # noqa: E731
        train(model, loss_fn, steps=steps, lr=2e-3, lamb=1e-3, log_every=100)

    def plain():
        plain_training(shape, x, y, steps)

    rounds = [(seconds(plain, 1), seconds(ours, 1)) for _ in range(8)]  # in turn, then the best
    one, together = (min(times) / steps for times in zip(*rounds, strict=True))
    name = "-".join(map(str, shape))
    print(
        f"| {name} | {one * 1e3:.2f} ms | {together * 1e3:.2f} ms | {one * runs / together:.1f} |"
    )


def time_frames():
    """A frame before training, with all wires, and with the strongest 3 % that training leaves."""
    for name, (model, _) in NETWORKS.items():
        for share in (1.0, 0.03):
            with torch.no_grad():
                for layer in model.layers:
                    size = layer.weight.abs()
                    rank = size.flatten().argsort(descending=True).argsort().view_as(size)
                    layer.weight *= rank < share * rank.numel()
            fig = plt.figure(figsize=(6, 5))

            def frame(fig=fig, model=model):
                fig.clear()
                plot_network(model, ax=fig.add_subplot())
                fig.canvas.draw()

            lines = sum((m.weight.abs() > 0.01 * m.weight.abs().max()).sum() for m in model.layers)
            print(f"| {name} | {lines:,} | {seconds(frame, 3):.3f} s |")
            plt.close(fig)


def main():
    torch.set_num_threads(1)
    print(f"one thread, torch {torch.__version__}\n")
    print("| one sweep of swaps | search | ours | times less | 32 together | same result |")
    print("|---|---|---|---|---|---|")
    for name, (model, top_k) in NETWORKS.items():
        compare_swaps(name, model, top_k)
    print("\n| one step of training | one network, plain | 32 networks | times less per network |")
    print("|---|---|---|---|")
    for shape in ((4, 20, 20, 2), (4, 20, 20, 20, 20, 1)):
        compare_training(shape)
    print("\n| one frame | lines | time |\n|---|---|---|")
    time_frames()


if __name__ == "__main__":
    main()
