"""Speed as ratios, measured side by side in one run: `python tests/benchmark.py`.

`python tests/benchmark.py scaling`: how times grow with the size of the network; `threads`: all
threads against one, on this machine as it is and beside a busy process.

Not collected by pytest: a ratio of times is a measurement, not a pass or a failure.
"""

import argparse
import contextlib
import copy
import itertools
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib
import numpy as np
import torch
from matplotlib.ticker import EngFormatter, NullLocator
from notebook_cells import definitions
from reference import generator, greedy_by_search
from torch import nn

from bimt_utils import (
    NEGATIVE,
    POSITIVE,
    EmbeddedMLP,
    PricedAdam,
    mse_loss,
    plot_network,
    save_figure,
    swap_neurons,
    train,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def seconds(call, repeats=5, before=lambda: None):
    """Shortest of some times: the one with the least disturbance. `before` is not counted."""
    times = []
    for _ in range(repeats):
        before()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


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


def compare_training(shape, runs=32, steps=2000):
    """Long enough that the hundred lines of the log weigh as little as in the notebooks."""
    x, y = torch.rand(100, shape[0]), torch.rand(100, shape[-1])
    model = EmbeddedMLP(shape, runs=runs)

    def ours(exact):
        loss_fn = lambda m: mse_loss(m(x), y)  # noqa: E731
        with contextlib.redirect_stdout(None):
            train(model, loss_fn, steps=steps, lr=2e-3, lamb=1e-3, exact=exact)

    def plain():
        plain_training(shape, x, y, steps)

    calls = plain, lambda: ours(False), lambda: ours(True)
    rounds = [[seconds(call, 1) for call in calls] for _ in range(5)]  # in turn, then the best
    one, paper, exact = (min(times) / steps for times in zip(*rounds, strict=True))
    name = "-".join(map(str, shape))
    print(
        f"| {name} | {one * 1e3:.2f} ms | {paper * 1e3:.2f} ms | {one * runs / paper:.1f} "
        f"| {exact * 1e3:.2f} ms | {one * runs / exact:.1f} |"
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


def ratios():
    head = "| one pass of swaps | search | ours | speed-up | speed-up per network, 32 together "
    print(f"{head}| same result |")
    print("|---|---|---|---|---|---|")
    for name, (model, top_k) in NETWORKS.items():
        compare_swaps(name, model, top_k)
    print("\n| one step of training | one network, plain | 32 together | speed-up per network "
          "| 32 together, exact | speed-up per network |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    for shape in ((4, 20, 20, 2), (4, 20, 20, 20, 20, 1)):
        compare_training(shape)
    print("\n| one frame | lines | time |\n|---|---|---|")
    time_frames()


# ---------------------------------------------------------------- how times grow

SIZES = {  # one of them grows, the others stay at their first value
    "neurons": [64, 128, 256, 512, 1024, 2048, 4096],
    "layers": [2, 3, 4, 6, 8, 12, 16],
    "runs": [1, 2, 4, 8, 16, 32, 64, 128, 256],
}
NAMES = {"neurons": "neurons per row", "layers": "layers", "runs": "runs"}
TOP_K, BATCH, MOST_DRAWN = 30, 100, 512


def network(neurons=64, layers=2, runs=1, **kwargs):
    return EmbeddedMLP((neurons,) * (layers + 1), runs, generator=generator(), **kwargs)


def patient_seconds(call, before=lambda: None):
    """`seconds` with many repeats of what is quick, a few of what is slow."""
    first = seconds(call, 1, before)
    if first > 5:
        return first
    return min(first, seconds(call, min(30, max(2, int(0.5 / first))), before))


def time_sweep(model):
    """One swap sweep over all rows, every time from the same weights."""
    start = copy.deepcopy(model.state_dict())
    return patient_seconds(
        lambda: swap_neurons(model, TOP_K), before=lambda: model.load_state_dict(start)
    )


def time_step(model):
    x = torch.rand(BATCH, model.shape[0], generator=generator())
    optimizer = PricedAdam(model, 1e-3)

    def step():
        loss = mse_loss(model(x), x).sum()
        optimizer.step(torch.autograd.grad(loss, optimizer.parameters))

    return patient_seconds(step)


def time_frame(model):
    """One network with all its wires; not a number where they are too many to be seen."""
    if model.shape[0] > MOST_DRAWN:
        return math.nan
    fig = plt.figure(figsize=(6, 5))

    def frame():
        fig.clear()
        plot_network(model, ax=fig.add_subplot())
        fig.canvas.draw()

    try:
        return patient_seconds(frame)
    finally:
        plt.close(fig)


COLORS = {"swap sweep": POSITIVE, "training step": NEGATIVE, "drawn frame": "#303030"}
TIMED = {"swap sweep": time_sweep, "training step": time_step, "drawn frame": time_frame}


def slope(sizes, times):
    """Exponent of a power law through the upper half of what was measured."""
    known = np.isfinite(times)
    x, y = np.log(np.array(sizes)[known]), np.log(np.array(times)[known])
    half = len(x) // 2
    return np.polyfit(x[half:], y[half:], 1)[0]


def readable(time):
    if math.isnan(time):
        return "-"
    return f"{time:.3g} s" if time >= 1 else f"{time * 1e3:.3g} ms"


def measure(what):
    """Print a table as it grows; returns times by name of what is timed."""
    print(f"\n| {NAMES[what]} | {' | '.join(TIMED)} |\n|---|{'---|' * len(TIMED)}")
    rows = []
    for size in SIZES[what]:
        rows.append([call(network(**{what: size})) for call in TIMED.values()])
        print(f"| {size:,} | {' | '.join(map(readable, rows[-1]))} |", flush=True)
    times = dict(zip(TIMED, zip(*rows, strict=True), strict=True))
    slopes = [f"{slope(SIZES[what], values):.2f}" for values in times.values()]
    print(f"| **exponent, last rows** | {' | '.join(slopes)} |")
    return times


def draw_growth(ax, what, times):
    """One panel: times against size, and a line that grows as the number of weights does."""
    sizes = np.array(SIZES[what])
    for (name, values), style in zip(times.items(), ("o-", "s-", "^-"), strict=True):
        label = f"{name}: slope {slope(sizes, values):.1f}"
        ax.plot(sizes, values, style, color=COLORS[name], ms=5, lw=1.5, label=label)
    weights = (sizes / sizes[0]) ** (2.0 if what == "neurons" else 1.0)
    ax.plot(sizes, 5e-5 * weights, "--", color="grey", lw=1, label="number of weights")
    ax.set_xscale("log", base=2)
    ax.set(yscale="log", xlabel=NAMES[what])
    shown = sizes[:: 1 if what == "layers" else 2]
    ax.set_xticks(shown, [f"{size:,}" for size in shown])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(EngFormatter("s"))
    ax.grid(color="#e5e5e5", lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="upper left")


def scaling():
    # first of all: a process starts with the peak of the one that starts it
    subprocess.run([sys.executable, __file__, "memory"], check=True)
    print(f"\none network of 64-64-64 unless stated otherwise; top_k {TOP_K}")
    fig, axes = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for ax, what in zip(axes, SIZES, strict=True):
        draw_growth(ax, what, measure(what))
    axes[0].set_ylabel("time, one thread")
    axes[0].set_ylim(top=30 * axes[0].get_ylim()[1])  # room for the legends
    save_figure(fig, "benchmark_scaling")


def memory():
    """How much one swap raises the peak of this process, for 4,096 neurons between 4,096."""
    model = network(4096, frozen=(0, 2))
    weights = sum(layer.weight.nbytes for layer in model.layers)
    _ballast = torch.ones(weights, dtype=torch.uint8)  # lifts us above the peak of building
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = seconds(lambda: swap_neurons(model, TOP_K), repeats=1)
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    rise *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    print(
        f"one swap of 4,096 neurons between rows of 4,096: {took:.2f} s, peak memory"
        f" {rise / weights:.1f} times that of the weights ({weights / 2**20:.0f} MiB)"
    )


def training_steps():
    """Name -> a call that makes 20 training steps of the kind and size of a notebook's."""

    def steps(model, *shape, high=None):
        x = torch.rand(*shape) if high is None else torch.randint(high, shape)
        loss_fn = lambda m: m(x).square().flatten(1).mean(1)  # noqa: E731

        def call():
            with contextlib.redirect_stdout(None):
                train(model, loss_fn, steps=20, lr=1e-3, lamb=1e-3)

        return call

    tokens = {"in_folds": 2, "embedding": (59, 32)}, {"in_folds": 2, "embedding": (24, 32)}
    transformer = definitions("incontext_3.4")["EmbeddedTransformer"](2, 2, runs=4)
    return {
        "Figure 3: 24 of 4-20-20-2": steps(EmbeddedMLP((4, 20, 20, 2), 24), 100, 4),
        "Figure 4: 64 of 2-20-20-2": steps(EmbeddedMLP((2, 20, 20, 2), 64), 200, 2),
        "Figure 5: 3 of 2x32-50-50-59": steps(
            EmbeddedMLP((64, 50, 50, 59), 3, **tokens[0]), 2784, 2, high=59
        ),
        "Figure 6: 15 of 2x32-50-50-24": steps(
            EmbeddedMLP((64, 50, 50, 24), 15, **tokens[1]), 460, 2, high=24
        ),
        "Figure 7: 4 transformers": steps(transformer, 64, 3, 2),
        "Figure 8: 4 of 784-100-100-10": steps(EmbeddedMLP((784, 100, 100, 10), 4), 100, 784),
    }


def threads():
    calls, default = training_steps(), os.cpu_count()
    busy = "import torch; torch.set_num_threads(1); a = torch.rand(500, 500)\nwhile True: a @ a"
    print(f"| a step of | {default} threads against one | beside a busy process |")
    print("|---|---|---|")
    ratios = []
    for beside in (0, 1):
        others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(beside)]
        time.sleep(5 * beside)
        for call in calls.values():
            rounds = []
            for number in (default, 1) * 5:
                torch.set_num_threads(number)
                rounds.append(seconds(call, 1))
            ratios.append(np.median(rounds[::2]) / np.median(rounds[1::2]))
        for other in others:
            other.kill()
    for name, *pair in zip(calls, ratios, ratios[len(calls) :], strict=False):
        print(f"| {name} | {' | '.join(f'{ratio:.2f} times the time' for ratio in pair)} |")


def main():
    parts = {"ratios": ratios, "scaling": scaling, "threads": threads, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", default="ratios", choices=parts)
    part = parser.parse_args().part
    torch.set_num_threads(1)
    if part != "memory":
        print(f"one thread, torch {torch.__version__}\n", flush=True)
    parts[part]()


if __name__ == "__main__":
    main()
