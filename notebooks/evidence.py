"""What the notebooks measure beyond the method: claims, null models and Newman's modularity.

"The paper" is Liu, Gan and Tegmark, arXiv 2305.08746; "journal version" is theirs in Entropy 26(1),
41 (2024); "ours" marks what neither contains. Wrong arguments raise ValueError.
"""

import copy
import math
from statistics import fmean

import networkx as nx
import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest

from bimt_utils import figure_folder, graph, live_neurons, whole_file

# ---------------------------------------------------------------- claims (ours)


class Claims:
    """Claims about one figure, tested in every run of a seed.

    `figure` is the number of a figure or a short name. `table` is a pandas frame with one row per
    claim and run and the columns figure, seed, run, claim, authors, at_least, at_most, value, held.
    """

    def __init__(self, figure, seed):
        self.figure, self.seed, self.parts = figure, seed, {}

    def add(self, claim, values, *, at_least=-math.inf, at_most=math.inf, authors="-"):
        """One claim: `values` (runs,) are our numbers, an array or tensor on the CPU or a list; it
        holds in a run where the number lies within the bounds, bounds included.

        The bounds are rounded to the precision of the values, so that an accuracy of nine in ten,
        computed in float32, is at least 0.9. `authors`, optional, says what the paper has.
        ValueError if a value is not finite, a bound is NaN or the claim is there already.
        """
        values = np.asarray(values)
        if not np.issubdtype(values.dtype, np.floating):
            values = values.astype(float)
        if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
            raise ValueError(f"expected finite numbers, one per run, for {claim!r}, got {values}")
        if not at_least <= at_most:
            raise ValueError(f"expected at_least up to at_most, got {at_least} and {at_most}")
        if claim in self.parts:
            raise ValueError(f"expected a claim that is not there yet, got {claim!r}")
        lowest, highest = np.array([at_least, at_most]).astype(values.dtype)
        columns = {
            "figure": self.figure,
            "seed": self.seed,
            "run": range(len(values)),
            "claim": claim,
            "authors": str(authors),
            "at_least": at_least,
            "at_most": at_most,
            "value": values.astype(float),
            "held": (lowest <= values) & (values <= highest),
        }
        self.parts[claim] = pd.DataFrame(columns)

    def record(self, quantity, values):
        """A number of every run that is compared with nothing here: a row of `table` whose "held"
        is missing. Arguments and errors as in `add`."""
        self.add(quantity, values)
        self.parts[quantity] = self.parts[quantity].astype({"held": object}).assign(held=None)

    @property
    def table(self):
        return pd.concat(self.parts.values(), ignore_index=True)

    def save(self):
        """Write `table` to claims_figure_N.json in `figure_folder()`. `pandas.read_json` reads it
        back, with NaN for a bound that is missing."""
        rows, style = self.table, {"indent": 1, "double_precision": 15, "force_ascii": False}
        text = rows.to_json(orient="records", **style)
        name = f"claims_figure_{self.figure}.json".replace(" ", "_")
        with whole_file(figure_folder(name)) as path:
            path.write_text(text, encoding="utf-8")


def summarise(table):
    """One row per claim of a table of `Claims`: the authors' number, ours as "median [lowest,
    highest]", and the number of runs in which the claim held."""
    parts = table[table.held.notna()].groupby(["figure", "claim"], sort=False)
    return parts.agg(
        authors=("authors", "first"),
        ours=("value", lambda v: f"{v.median():.3g} [{v.min():.3g}, {v.max():.3g}]"),
        held=("held", lambda held: f"{int(held.sum())} of {len(held)}"),
    )


def verdicts(table):
    """One row per claim of a table of `Claims`. "share" is the 90 % Wilson interval of the share of
    runs in which the claim held; "verdict" is "held" where it lies above one half, "not held" where
    it lies below, else "undecided". ValueError if a run of a seed is there twice."""
    if table.duplicated(["figure", "claim", "seed", "run"]).any():
        raise ValueError("expected every run once, got some run of a seed twice")
    rows, table = {}, table[table.held.notna()]
    for claim, held in table.groupby(["figure", "claim"], sort=False).held:
        share = binomtest(int(held.sum()), len(held)).proportion_ci(0.9, method="wilson")
        if share.low > 0.5:
            verdict = "held"
        elif share.high < 0.5:
            verdict = "not held"
        else:
            verdict = "undecided"
        rows[claim] = {"share": f"{share.low:.2f} to {share.high:.2f}", "verdict": verdict}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["figure", "claim"])


# ---------------------------------------------------------------- modularity (journal version)


def newman_modularity(model, run=0, seed=0):
    """Newman's modularity Q of the live part of one network, with |w| as weights: a float, 0 for a
    network without wires. The communities are the best that Louvain's method finds (ours: the
    journal version does not say which method it used); `seed` makes it repeatable."""
    network = graph(model, run).to_undirected()
    if network.size(weight="weight") == 0:
        return 0.0
    found = nx.community.louvain_communities(_without_ties(network, seed), seed=seed)
    return nx.community.modularity(network, found)


def _without_ties(network, seed):
    """A copy whose weights are larger by random shares of up to a millionth.

    Equal weights make ties: a neuron fits two communities equally well. Rounding errors then decide
    in favour of the move, and later of the move back, and Louvain's method of networkx 3.6.1 may go
    on for ever (networkx issue 8739). Differences of a millionth are far above rounding errors.
    """
    network, random = network.copy(), np.random.default_rng(seed)
    for _, _, edge in network.edges(data=True):
        edge["weight"] *= 1 + 1e-6 * random.random()
    return network


def record_modularity(claims, networks, runs_of, seed):
    """Record Q of every variant, label -> list of runs, and the null of the whole method, which is
    called BIMT or swaps. `networks` is a pruned model or a dict of such, one per task."""
    tasks = networks if isinstance(networks, dict) else {"": networks}
    for task, model in tasks.items():
        for variant, runs in runs_of.items():
            values = [newman_modularity(model, run, seed) for run in runs]
            claims.record(f"Q of {variant}: {task}", values)
        whole = runs_of.get("BIMT") or runs_of["swaps"]
        nulls = [null_modularity(model, run, seed=seed) for run in whole]
        claims.record(f"Q of shuffled: {task}", nulls)


# ---------------------------------------------------------------- null models (ours)


def null_modularity(model, run=0, draws=20, seed=0):
    """The null with which `newman_modularity` of one network is compared: its mean over `draws`
    shuffled copies, a float."""
    network, generator = model.pick(run), torch.Generator().manual_seed(seed)
    nulls = (shuffled(network, generator) for _ in range(draws))
    return fmean(newman_modularity(null, seed=seed) for null in nulls)


@torch.no_grad()
def shuffled(model, generator=None):
    """A null model: a copy in which, layer by layer, the wires between live neurons exchange ends
    and weights at random. Every neuron keeps its numbers of wires, so all live ones stay live.
    `generator` lives on the CPU."""
    null, live = copy.deepcopy(model), live_neurons(model)
    for layer, read, written in null.wires():
        if layer is None:  # a residual stream goes on by itself
            continue
        for run, weight in enumerate(layer.weight):
            from_live = live[read][run].repeat(layer.in_folds)
            to_live = live[written][run].repeat(layer.out_folds)
            wires = (weight != 0).cpu() & from_live & to_live[:, None]
            values = weight[wires]
            order = torch.randperm(len(values), generator=generator)
            ends = _exchange_ends(wires.nonzero().tolist(), generator)
            weight[wires] = 0
            to, from_ = torch.tensor(ends, dtype=torch.long).view(-1, 2).T
            weight[to, from_] = values[order]
    return null


def _exchange_ends(wires, generator):
    """Wires [to, from] after random exchanges of ends between two of them; an exchange that would
    make a wire double does not happen."""
    wires, taken = list(wires), {(to, from_) for to, from_ in wires}
    written, read = {to for to, _ in wires}, {from_ for _, from_ in wires}
    if len(wires) == len(written) * len(read):  # all are joined: there is nothing to exchange
        return wires
    pairs = torch.randint(len(wires), (10 * len(wires), 2), generator=generator)
    for a, b in pairs.tolist():
        (to_a, from_a), (to_b, from_b) = wires[a], wires[b]
        if (to_a, from_b) not in taken and (to_b, from_a) not in taken:
            taken -= {(to_a, from_a), (to_b, from_b)}
            taken |= {(to_a, from_b), (to_b, from_a)}
            wires[a], wires[b] = (to_a, from_b), (to_b, from_a)
    return wires
