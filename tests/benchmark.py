"""Speed as ratios, measured side by side: `python tests/benchmark.py` prints three tables.

Not collected by pytest: a ratio of times is a measurement, not a pass or a failure.
"""

import contextlib
import copy
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")  # the same bits on every x86 processor
os.environ.setdefault("MKL_CBWR", "AVX2")  # the same for Intel's matrix products
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "notebooks"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import torch
from matplotlib.figure import Figure
from notebook_cells import definitions
from reference import generator, greedy_by_search, plain_network, same_state, train_plainly

from bimt_utils import EmbeddedMLP, mse_loss, plot_network, swap_neurons, train

matplotlib.use("Agg")
torch.set_num_threads(1)


def seconds(call, repeats=5, before=lambda: None):
    """Shortest of some times: the one with the least disturbance. `before` is not counted."""
    times = []
    for _ in range(repeats):
        before()
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def networks():
    """Of the paper, name -> (one network, top_k)."""
    draw = {"generator": generator()}
    adding = EmbeddedMLP((64, 50, 50, 59), in_folds=2, embedding=(59, 32), **draw)
    images = EmbeddedMLP((784, 100, 100, 10), frozen=(0,), **draw)
    return {
        "Figure 3, 4-20-20-20-20-1": (EmbeddedMLP((4, 20, 20, 20, 20, 1), **draw), 5),
        "Figure 5, 2x32-50-50-59": (adding, 30),
        "Figure 7, transformer": (definitions("incontext_3.4")["transformer"](2, 2, **draw), 20),
        "Figure 8, 784-100-100-10": (images, 30),
    }


def time_swaps(model, top_k):
    start = copy.deepcopy(model.state_dict())
    return seconds(lambda: swap_neurons(model, top_k), before=lambda: model.load_state_dict(start))


def compare_swaps():
    """One pass over all rows: ours against trading, measuring the cost again, trading back."""
    print("| one pass of swaps | search | ours | speed-up | per network of 32 | same result |")
    print("|---|---|---|---|---|---|")
    for name, (model, top_k) in networks().items():
        model.double()  # so that both see the same ties
        fast, slow, many = copy.deepcopy(model), copy.deepcopy(model), model.pick([0] * 32)
        by_search = seconds(lambda m=slow, k=top_k: greedy_by_search(m, 0, k), repeats=1)
        one, each = time_swaps(fast, top_k), time_swaps(many, top_k) / 32
        same = "yes" if same_state(fast, slow) else "NO"
        speeds = f"{by_search / one:,.0f} | {by_search / each:,.0f}"
        print(f"| {name} | {by_search:.2f} s | {one * 1e3:.1f} ms | {speeds} | {same} |")


def time_steps(shape, runs=32, steps=2000):
    """One network in a plain loop and `runs` in ours, in turn: a step of each. Enough steps that
    the hundred lines of the log weigh as little as in the notebooks."""
    x, y = torch.rand(100, shape[0]), torch.rand(100, shape[-1])
    model, network = EmbeddedMLP(shape, runs), plain_network(*shape)
    settings = {"steps": steps, "lr": 2e-3, "swap_every": 0}

    def plain():
        train_plainly(network, x, y, phases={0: (1e-3, True)}, A=1.0, y0=0.1, **settings)

    def ours():
        with contextlib.redirect_stdout(None):
            train(model, lambda m: mse_loss(m(x), y), lamb=1e-3, **settings)

    rounds = [(seconds(plain, 1), seconds(ours, 1)) for _ in range(5)]
    return (min(times) / steps for times in zip(*rounds, strict=True))


def compare_training():
    print(
        "\n| one step of training | one network, plain loop | 32 together | speed-up per network |"
    )
    print("|---|---|---|---|")
    for shape in ((4, 20, 20, 2), (4, 20, 20, 20, 20, 1)):
        one, many = time_steps(shape)
        name, speed_up = "-".join(map(str, shape)), 32 * one / many
        print(f"| {name} | {one * 1e3:.2f} ms | {many * 1e3:.2f} ms | {speed_up:.1f} |")


@torch.no_grad()
def time_frames():
    """A frame before training, with all wires, and with the strongest 3 % that training leaves."""
    print("\n| one frame | lines | time |\n|---|---|---|")
    for name, (model, _) in networks().items():
        for share in (1.0, 0.03):
            for layer in model.layers:
                size = layer.weight.abs()
                layer.weight *= size >= size.quantile(1 - share)
            fig = Figure(figsize=(6, 5))

            def frame(fig=fig, model=model):
                fig.clear()
                plot_network(model, ax=fig.add_subplot())
                fig.canvas.draw()

            lines = sum((m.weight.abs() > 0.01 * m.weight.abs().max()).sum() for m in model.layers)
            print(f"| {name} | {lines:,} | {seconds(frame, 3):.3f} s |")


if __name__ == "__main__":
    print(f"one thread, torch {torch.__version__}\n", flush=True)
    compare_swaps()
    compare_training()
    time_frames()
