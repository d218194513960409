"""The mathematics inside the notebooks of Figure 5 (rings, modules, committees) and Figure 6 (the
group S4, its representations and cosets), against references that share no code with them."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from notebook_cells import NOTEBOOKS, definitions
from reference import arrange

from bimt_utils import EmbeddedMLP, modules, plot_network, prune

elements, seeds = st.integers(0, 23), st.integers(0, 10_000)


@pytest.fixture(scope="module")
def s4():
    """Figure 6; its representations and subgroups come after the training."""
    names = definitions("permutation_S4_3.3")
    cells = json.loads((NOTEBOOKS / "permutation_S4_3.3.ipynb").read_text(encoding="utf-8"))[
        "cells"
    ]
    for text in ("".join(cell["source"]) for cell in cells):
        if "def best_cosets" in text or "def energies" in text:
            exec(text, names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def adding():
    """Figure 5 modulo 11, as the dictionary in which its functions look their names up."""
    return definitions("modular_addition_3.3", P=11, DIM=8, WIDTH=12, RUNS=1)


# ---------------------------------------------------------------- the group


def moves(perm):
    """The matrix that takes what is at i to perm[i]."""
    matrix = np.zeros((len(perm), len(perm)))
    matrix[list(perm), range(len(perm))] = 1
    return matrix


MATRICES = np.array([moves(perm) for perm in itertools.permutations(range(4))])


def test_table_multiplies_the_permutation_matrices(s4):
    assert sorted(set(s4.PERMS)) == s4.PERMS
    assert len(s4.PERMS) == 24
    assert (MATRICES[s4.TABLE] == MATRICES[:, None] @ MATRICES).all()


def test_b_is_applied_first(s4):
    """a exchanges 0 and 1; b turns 0 to 1, 1 to 2 and 2 to 0."""
    a, b = s4.PERMS.index((1, 0, 2, 3)), s4.PERMS.index((1, 2, 0, 3))
    assert s4.PERMS[s4.TABLE[a, b]] == (0, 2, 1, 3)
    assert s4.PERMS[s4.TABLE[b, a]] == (2, 1, 0, 3)


@settings(deadline=None)
@given(elements, elements, elements)
def test_group_axioms(s4, a, b, c):
    table, inverse = s4.TABLE, [row.index(0) for row in s4.TABLE.tolist()]
    assert 0 <= table[a, b] < 24
    assert table[table[a, b], c] == table[a, table[b, c]]
    assert table[a, 0] == table[0, a] == a
    assert table[a, inverse[a]] == table[inverse[a], a] == 0
    assert inverse[table[a, b]] == table[inverse[b], inverse[a]]
    assert (table[a, b] == table[a, c]) == (b == c) == (table[b, a] == table[c, a])


def test_sign_counts_the_pairs_that_change_their_order(s4):
    for perm, sign in zip(s4.PERMS, s4.SIGN, strict=True):
        assert sign == (-1) ** sum(a > b for a, b in itertools.combinations(perm, 2))


def test_what_the_network_learns_is_the_table(s4):
    for (a, b), product in zip(s4.pairs.tolist(), s4.products.tolist(), strict=True):
        assert (MATRICES[product] == MATRICES[a] @ MATRICES[b]).all()
    assert sorted(s4.train.tolist() + s4.test.tolist()) == list(range(24**2))


# ---------------------------------------------------------------- characters and energies


def partner_of_zero(perm):
    """How a permutation moves the three splits into two pairs, told apart by who is with 0."""
    moved = []
    for i in (1, 2, 3):
        pairs = [{perm[0], perm[i]}, {perm[j] for j in (1, 2, 3) if j != i}]
        moved += [j - 1 for pair in pairs if 0 in pair for j in pair - {0}]
    return moved


def without_the_mean(matrices):
    """Permutation matrices (24, n, n) on the plane of vectors that add up to zero."""
    n = matrices.shape[1]
    plane = np.linalg.svd(np.ones((1, n)))[2][1:]
    return plane @ matrices @ plane.T


def representations():
    """The five irreducible representations of S4, name -> matrices (24, d, d)."""
    sign = np.linalg.det(MATRICES).round()[:, None, None]
    points = without_the_mean(MATRICES)
    perms = itertools.permutations(range(4))
    return {
        "trivial": np.ones((24, 1, 1)),
        "sign": sign,
        "splits": without_the_mean(np.array([moves(partner_of_zero(p)) for p in perms])),
        "points": points,
        "points x sign": points * sign,
    }


REPRESENTATIONS = representations()


def test_characters_are_the_traces_of_the_representations(s4):
    assert list(s4.CHARACTERS) == list(REPRESENTATIONS)
    for name, matrices in REPRESENTATIONS.items():
        assert np.allclose(matrices[s4.TABLE], matrices[:, None] @ matrices)
        assert np.allclose(s4.CHARACTERS[name], matrices.trace(axis1=1, axis2=2))


def test_characters_are_orthonormal_and_fill_the_group(s4):
    table = np.array(list(s4.CHARACTERS.values()))
    assert (table @ table.T == 24 * np.eye(5)).all()
    assert table[:, 0].tolist() == [1, 1, 2, 3, 3]
    assert (table[:, 0] ** 2).sum() == 24


def test_characters_tell_the_five_classes_apart(s4):
    table = np.array(list(s4.CHARACTERS.values()))
    for g in range(24):
        conjugate = s4.TABLE[s4.TABLE[g], s4.TABLE[g].argmin()]  # g h g^-1 for all h
        assert (table[:, conjugate] == table).all()
    sizes = np.unique(table, axis=1, return_counts=True)[1]
    assert sorted(sizes.tolist()) == [1, 3, 6, 6, 8]


@pytest.mark.parametrize("number", range(5))
@settings(deadline=None, max_examples=20)
@given(seed=seeds)
def test_matrix_entries_lie_in_their_representation_alone(s4, number, seed):
    matrices = list(REPRESENTATIONS.values())[number]
    weights = np.random.default_rng(seed).normal(size=matrices.shape[1:])
    mixed = (matrices * weights).sum((1, 2))
    energy = s4.energies(np.stack([*matrices.reshape(24, -1).T, mixed]))
    assert np.allclose(energy, np.eye(5)[number], atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(seeds, elements, elements)
def test_energies_add_up_and_do_not_see_translations(s4, seed, left, right):
    values = np.random.default_rng(seed).normal(size=(3, 24))
    energy = s4.energies(values)
    assert energy.shape == (3, 5)
    assert np.allclose(energy.sum(1), 1)
    moved = values[:, s4.TABLE[s4.TABLE[left], right]]
    assert np.allclose(s4.energies(moved), energy)


@settings(deadline=None)
@given(st.permutations(range(5)), st.floats(0.01, 1))
def test_energies_of_a_mixture(s4, order, share):
    """Functions of length one, from two representations, in the shares that they were given."""
    a, b = (list(REPRESENTATIONS.values())[n][:, -1, 0] for n in order[:2])
    mixed = a * math.sqrt(share / (a @ a)) + b * math.sqrt((1 - share) / (b @ b))
    energy = s4.energies(mixed[None])[0]
    assert energy[order[0]] == pytest.approx(share)
    assert energy[order[1]] == pytest.approx(1 - share)


# ---------------------------------------------------------------- subgroups and cosets


def test_the_thirty_subgroups(s4):
    assert len(set(s4.SUBGROUPS)) == len(s4.SUBGROUPS) == 30
    orders = [len(group) for group in s4.SUBGROUPS]
    assert orders == [1] + 9 * [2] + 4 * [3] + 7 * [4] + 4 * [6] + 3 * [8] + [12, 24]
    for group in s4.SUBGROUPS:
        assert {s4.TABLE[a, b] for a in group for b in group} == group


def cosets(group, side):
    """The number of the coset that each permutation lies in, from products of matrices."""
    members, labels = MATRICES[sorted(group)], np.full(24, -1)
    for g in range(24):
        products = MATRICES[g] @ members if side == "left" else members @ MATRICES[g]
        same = (MATRICES[:, None] == products).all((2, 3)).any(1)
        labels[same & (labels < 0)] = g
    return np.unique(labels, return_inverse=True)[1]


def test_cosets_part_the_group(s4):
    for group, side in itertools.product(s4.SUBGROUPS, ("left", "right")):
        assert (np.bincount(cosets(group, side)) == len(group)).all()


def on_cosets(group, side, rng):
    """A function with another value on every coset, in random order."""
    labels = cosets(group, side)
    return rng.permutation(labels.max() + 1)[labels].astype(float)


@pytest.mark.parametrize("side", ["left", "right"])
def test_functions_on_cosets_are_recognised(s4, side):
    rng = np.random.default_rng(0)
    for group in s4.SUBGROUPS[:-1]:
        values = 3 - 0.1 * on_cosets(group, side, rng)
        order, share, found_side, found = s4.best_cosets(values)
        normal = (cosets(group, "left") == cosets(group, "right")).all()
        assert (order, found) == (len(group), group)
        assert found_side == side or normal
        assert share == pytest.approx(1)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 28), st.sampled_from(["left", "right"]), seeds)
def test_a_little_noise_within_the_cosets_is_forgiven(s4, number, side, seed):
    group, rng = s4.SUBGROUPS[number], np.random.default_rng(seed)
    values = on_cosets(group, side, rng)
    near = values + 0.03 * values.std() * rng.uniform(-1, 1, 24)
    far = values + 3 * values.std() * rng.normal(size=24)
    assert s4.best_cosets(near)[0] >= len(group)
    for noisy in (near, far):
        order, share, found_side, found = s4.best_cosets(noisy)
        labels = cosets(found, found_side.replace("-", "left"))  # "-": every one its own
        within = np.mean([noisy[labels == label].var() for label in set(labels)])
        assert order == len(found)
        assert share == pytest.approx(1 - within / noisy.var())
        assert share >= 0.95


def test_noise_is_constant_on_no_cosets(s4):
    for values in np.random.default_rng(0).normal(size=(10, 24)):
        assert s4.best_cosets(values)[0] == 1


def test_kinds_of_subgroups(s4):
    """The even permutations: the identity, three pairs of exchanges, eight turns of three."""
    orders = [len(s4.generated({0, element})) for element in range(24)]
    kinds = [sorted(orders[element] for element in group) for group in s4.SUBGROUPS]
    assert kinds[28] == [1] + 3 * [2] + 8 * [3]
    assert kinds.count([1, 2, 4, 4]) == 3  # cyclic
    assert kinds.count([1, 2, 2, 2]) == 4  # Klein's


def test_planted_neurons(s4):
    """The sign, a coset function, noise; no neuron at all."""
    rng = np.random.default_rng(0)
    model = EmbeddedMLP((8, 2, 24), 2, in_folds=2, embedding=(24, 4))
    coset = on_cosets(s4.SUBGROUPS[20], "left", rng)
    for slot, values in enumerate([s4.SIGN + 5, coset, rng.normal(size=24)]):
        model.embedding.data[1, :, slot] = torch.tensor(values)
    rows = s4.functions(model, 1, [0, 1, 2])
    assert (s4.energies(rows)[:, 1] >= s4.CONSTANT).tolist() == [True, False, False]
    assert [s4.best_cosets(row)[0] > 1 for row in rows] == [True, True, False]
    assert s4.energies(s4.functions(model, 0, [])).shape == (0, 5)


# ---------------------------------------------------------------- rings

MODULI = st.sampled_from([7, 12, 31, 59, 60, 97])


def ring(size, k, columns, rng, noise=0.0):
    """Tokens t at angles 2 pi k t / size, in a random plane of `columns` dimensions."""
    angle = 2 * np.pi * (k * np.arange(size) / size + rng.uniform())
    plane = np.linalg.qr(rng.normal(size=(columns, 2)))[0]
    circle = np.stack([np.cos(angle), np.sin(angle)], 1) @ plane.T
    circle += noise * rng.normal(size=circle.shape)
    return rng.uniform(0.1, 10) * (circle - circle.mean(0))


@settings(deadline=None)
@given(MODULI, st.data(), st.integers(2, 6), seeds)
def test_rings_are_recognised(adding, size, data, columns, seed):
    k = data.draw(st.integers(1, size - 1))
    assume(math.gcd(k, size) == 1)
    values = ring(size, k, columns, np.random.default_rng(seed), noise=0.004)
    found, plane, share = adding["find_ring"](values)
    assert found == min(k, size - k)  # a ring turns either way
    assert np.allclose(plane.T @ plane, np.eye(2))
    assert np.linalg.norm(values @ plane) > 0.99 * np.linalg.norm(values)
    assert share == 1


@pytest.mark.parametrize("k", [1, 7, 22])
def test_two_tokens_in_each_others_place_break_three_steps(adding, k):
    values = ring(59, k, 2, np.random.default_rng(k))
    here = 5
    there = (here + pow(k, -1, 59)) % 59  # the next on the ring
    values[[here, there]] = values[[there, here]]
    assert adding["find_ring"](values)[2] == pytest.approx(56 / 59)


def test_of_two_rings_in_one_module_the_larger_is_named(adding):
    tokens = np.arange(59)
    waves = [
        r * f(2 * np.pi * k * tokens / 59) for r, k in ((2, 9), (1, 4)) for f in (np.cos, np.sin)
    ]
    assert adding["find_ring"](np.stack(waves, 1))[0] == 9


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), seeds)
def test_noise_is_no_ring(adding, columns, seed):
    values = np.random.default_rng(seed).normal(size=(59, columns))
    assert adding["find_ring"](values - values.mean(0))[2] < 0.2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("k", [1, 7])
def test_one_column_or_none_makes_no_ring(adding, k):
    values = ring(59, k, 2, np.random.default_rng(0))[:, :1]
    wide = np.pad(values, ((0, 0), (0, 1)))
    found, _, share = adding["find_ring"](wide)
    assert (found, share) == (k, 0)
    assert adding["find_ring"](0 * wide)[2] == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("k", [2, 15, 30])
def test_several_numbers_in_one_place_are_in_no_order(adding, k):
    """For a composite modulus, k and k + P / 2 may sit in the same place of the ring."""
    values = ring(60, k, 3, np.random.default_rng(0))
    found, _, share = adding["find_ring"](values)
    assert (found, share) == (k, 0)


# ---------------------------------------------------------------- modules and committees


def plant(model, run, count, rng, faint=0.0):
    """Wire one run as `count` modules that only meet in the output, and put the neurons of every
    row in random order. Neurons of no module are dead ends: they read everyone, and nobody reads
    them. Wires that should not be are `faint`. Returns the modules as sets of (row, slot)."""
    groups, parts = model.groups(), [set() for _ in range(count)]
    *inner, last = [len(group.places) for group in groups.values()]
    rows = [np.r_[:count, rng.integers(-1, count, n - count)] for n in inner]
    rows.append(np.full(last, -1))
    for layer, (below, above) in zip(model.layers, itertools.pairwise(rows), strict=True):
        wired = (below >= 0) & ((above[:, None] == below) | (above[:, None] == -1))
        size = rng.uniform(0.5, 1, layer.weight[run].shape)
        size[~np.tile(wired, layer.in_folds)] *= faint
        signs = rng.choice([-1, 1], size.shape)
        layer.weight.data[run] = torch.tensor(size * signs)
    for (name, group), owner in zip(groups.items(), rows, strict=True):
        order = rng.permutation(len(owner))
        arrange(group, run, order)
        for slot, part in enumerate(owner[order]):
            if part >= 0:
                parts[part].add((name, slot))
    return parts


def planted(seed, faint=(0.0, 0.0)):
    """Two runs with one to four modules each, and these modules."""
    rng, first = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model = EmbeddedMLP((16, 12, 12, 11), 2, in_folds=2, embedding=(11, 8), generator=first)
    return model, [plant(model, run, rng.integers(1, 5), rng, faint[run]) for run in range(2)]


@pytest.mark.parametrize("seed", range(10))
def test_planted_modules_are_found(adding, seed):
    model, parts = planted(seed, faint=(0.05, 0.4))
    pruned = prune(model, torch.tensor([0.05, 0.4]))
    for run, expected in enumerate(parts):
        found = sorted(modules(pruned, run, adding["BELOW"]), key=adding["slots"])
        assert {frozenset(part) for part in found} == {frozenset(p) for p in expected}
        firsts = [adding["slots"](part)[0] for part in found]
        assert firsts == sorted(firsts)
        for part in found:
            assert adding["slots"](part) == sorted(s for row, s in part if row == "input")
        labels = adding["letters"](pruned, run, found)
        for slot, item in enumerate(pruned.in_perm[run].tolist()):
            owners = ["ABCD"[n] for n, part in enumerate(found) if ("input", slot) in part]
            assert [labels[item]] == (owners or [""])
        assert len(modules(model, run, rows=adding["BELOW"])) == 1
        assert len(modules(pruned, run)) == 1  # they meet in the output


@pytest.mark.parametrize("size", [8, 32])
def test_letters_of_interleaved_modules_do_not_lie_over_each_other(adding, size):
    model = EmbeddedMLP((2 * size, 3, 4), in_folds=2, embedding=(4, size))
    arrange(model.groups()["input"], 0, np.random.default_rng(0).permutation(size))
    found = [{("input", slot) for slot in slots} for slots in ([0, 3, 5], [1, 2, 7], [4, 6])]
    fig = Figure(figsize=(5, 4))
    labels = adding["letters"](model, 0, found)
    plot_network(model, 0, fig.subplots(), in_labels=labels, fontsize=9)
    fig.canvas.draw()
    texts = [text for text in fig.axes[0].texts if text.get_text() in ("A", "B", "C")]
    texts.sort(key=lambda text: text.get_position()[0])
    assert "".join(text.get_text() for text in texts) == "ABBACACB"
    boxes = [text.get_window_extent() for text in texts]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def everything(model):
    """The outputs of all runs for all pairs of tokens."""
    pairs = torch.cartesian_prod(torch.arange(11), torch.arange(11))
    with torch.no_grad():
        return model(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_committee_is_nobody_each_module_alone_and_everybody(adding, seed):
    model, parts = planted(seed)
    whole, before = everything(model), model.embedding.detach().clone()
    for run in range(2):
        voters = adding["committee"](model, run, parts[run])
        assert voters.runs == len(parts[run]) + 2
        nobody, *alone, everybody = everything(voters)
        assert torch.allclose(everybody, whole[run], atol=1e-5)
        assert torch.allclose(nobody, nobody[0], atol=1e-5)  # who reads nothing says the same
        for part, outputs in zip(parts[run], alone, strict=True):
            cut = model.pick(run)
            off = [slot for slot in range(8) if ("input", slot) not in part]
            cut.layers[0].weight.data[:, :, off + [8 + slot for slot in off]] = 0
            assert torch.allclose(outputs, everything(cut)[0], atol=1e-5)
    assert torch.equal(model.embedding, before)


@pytest.mark.parametrize("seed", range(5))
def test_separate_modules_add_their_logits(adding, seed):
    model, _ = planted(seed)
    parts = plant(model, 0, 3, np.random.default_rng(seed))
    additivity, committee = adding["additivity"], adding["committee"]
    assert additivity(committee(model, 0, parts)) == pytest.approx(1, abs=1e-9)
    into = [slot for row, slot in parts[0] if row == "A2"]
    out_of = [slot for row, slot in parts[1] if row == "A1"]
    for slot in into:  # now the first module reads the second
        model.layers[1].weight.data[0, slot, out_of] = 1.0
    assert additivity(committee(model, 0, parts)) < 0.999


def test_each_module_has_the_ring_that_was_planted(adding):
    model, _ = planted(0)
    rng = np.random.default_rng(0)
    parts = plant(model, 1, 3, rng)
    for k, part in zip((2, 3, 5), parts, strict=True):
        slots = adding["slots"](part)
        values = ring(11, k, max(2, len(slots)), rng)[:, : len(slots)]
        shift = rng.normal(size=len(slots))  # a bias absorbs it
        model.embedding.data[1, :, slots] = torch.tensor(values + shift).float()
        columns = adding["columns"](model, 1, slots)
        assert np.allclose(columns, np.pad(values, ((0, 0), (0, 1))), atol=1e-5)
        assert adding["find_ring"](columns)[0] == k


def test_film_of_a_ring_has_the_same_axes_in_every_frame(adding):
    """Neurons that only move leave the picture as it is, and larger values are drawn larger."""
    model, _ = planted(0)
    last, larger = model.pick([0, 1]), model.pick([0, 1])
    arrange(last.groups()["input"], 0, np.random.default_rng(1).permutation(8))
    larger.embedding.data *= 3
    slots = [2, 5, 6]
    values = adding["columns"](last, 0, slots)
    k, plane, _ = adding["find_ring"](values)
    adding |= {"model": last, "part": {("input", slot) for slot in slots}, "k": k, "plane": plane}
    dots, limits = [], set()
    for then in (last, model, larger):
        fig = Figure()
        adding["draw_forming_ring"](fig, then, 0)
        dots.append(fig.axes[0].collections[0].get_offsets().data)
        limits.add((*fig.axes[0].get_xlim(), *fig.axes[0].get_ylim()))
    assert np.allclose(dots[0], values @ plane)
    assert np.allclose(dots[1], dots[0])
    assert np.allclose(dots[2], 3 * dots[0])
    assert len(limits) == 1
