"""Figure 4's notebook exports one network as plain PyTorch layers."""

import pytest
import torch
from notebook_cells import definitions
from reference import arrange_at_random, generator
from torch import nn

from bimt_utils import EmbeddedMLP, prune

NOTEBOOK = definitions("two_moon_3.2", RUNS=1, SAMPLES=10)


@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(3, 2), (4, 7, 3), (2, 5, 6, 5, 4)])
def test_the_exported_network_gives_the_same_outputs(shape, threshold):
    model = EmbeddedMLP(shape, runs=3, generator=generator()).double()
    arrange_at_random(model)
    pruned = prune(model, threshold)
    x = torch.randn(9, shape[0], generator=generator(1), dtype=torch.float64)
    for run in range(3):
        plain = NOTEBOOK["to_sequential"](pruned, run)
        kinds = [type(part) for part in plain]
        assert kinds == [nn.Linear, nn.SiLU] * (len(shape) - 2) + [nn.Linear]
        assert torch.allclose(plain(x), pruned(x)[run], atol=1e-12)
        zeros = sum((p == 0).sum() for p in plain.parameters())
        assert zeros == sum((p[run] == 0).sum() for p in pruned.parameters())
