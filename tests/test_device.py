"""Nothing turns a tensor on the model's device into float64, which Apple's MPS does not have."""

from functools import partial

import matplotlib
import matplotlib.pyplot as plt
import pytest
import reference as ref
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import bimt_utils as bimt

matplotlib.use("Agg")


class Elsewhere(torch.Tensor):
    """A tensor that behaves as if on a device without float64. What is computed from it is there,
    too; only .cpu() leads back."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if function in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("no NumPy without .cpu()")
        result = super().__torch_function__(function, types, args, kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, cls)]
        if any(tensor.is_floating_point() and tensor.element_size() == 8 for tensor in made):
            raise TypeError(f"no float64 on this device: {function}")
        return result

    def __deepcopy__(self, memo):
        twin = self.detach().clone()
        return nn.Parameter(twin, self.requires_grad) if isinstance(self, nn.Parameter) else twin


def moved(model):
    """The same model, on that device."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(p.detach().as_subclass(Elsewhere)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.as_subclass(Elsewhere))
    return model


def new_model(kind):
    draw = {"runs": 2, "generator": ref.generator()}
    if kind == "stream":
        return ref.Stream(runs=2).float()
    if kind == "tokens":
        return bimt.EmbeddedMLP((6, 5, 2), in_folds=2, embedding=(7, 3), **draw)
    return bimt.EmbeddedMLP((3, 5, 2), **draw)


def outputs_of(model):
    x = ref.some_input(model).as_subclass(torch.Tensor)
    return model(x), torch.arange(len(x)) % model.out_perm.shape[1]


def loss_of(model):
    outputs, classes = outputs_of(model)
    return bimt.cross_entropy(outputs, classes) + bimt.mse_loss(
        outputs, torch.zeros(outputs[0].shape)
    )


def trained(model):
    lamb = [(0, 1e-3), (0.5, torch.tensor([1e-2, 1e-3]))]
    metrics = {"length": bimt.wiring_length, "right": lambda m: bimt.accuracy(*outputs_of(m))}
    settings = {"steps": 4, "lr": 1e-2, "swap_every": 2, "metrics": metrics, "snapshots": 2}
    return bimt.train(model, loss_of, lamb=lamb, **settings)


def drawn(model):
    history = trained(model)
    bimt.plot_curves(history, "length", log=True)
    bimt.plot_network(history.at(2), 1)
    bimt.explore(history, lambda fig, model, step: bimt.plot_network(model, ax=fig.add_subplot()))


USES = {
    "swap_neurons": partial(bimt.swap_neurons, reduce="mean"),
    "swap_neurons, per run": partial(bimt.swap_neurons, top_k=torch.tensor([0, 3])),
    "connection_cost": partial(bimt.connection_cost, A=torch.tensor([1.0, 2.0]), A_last=0.0),
    "prune": partial(bimt.prune, threshold=0.1),
    "prune_threshold": partial(bimt.prune_threshold, loss_fn=loss_of, tolerance=1.0),
    "pick": lambda model: model.pick([1]),
    "live_neurons": bimt.live_neurons,
    "graph": bimt.graph,
    "modules": bimt.modules,
    "inputs_read": bimt.inputs_read,
    "wiring_length": bimt.wiring_length,
    "plot_network": bimt.plot_network,
    "train": trained,
    "plot_curves and explore": drawn,
}


def values(result):
    """All numbers of a result, as plain tensors."""
    if isinstance(result, bimt.History):
        return [*result.log[-1][1].values(), *result.snapshots[4].values()]
    if isinstance(result, nn.Module):
        result = list(result.state_dict().values())
    leaves = tree_leaves(result)
    return [leaf.cpu() for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("kind", ["plain", "tokens", "stream"])
@pytest.mark.parametrize("use", USES)
def test_works_without_float64(use, kind):
    here, there = new_model(kind), moved(new_model(kind))
    assert isinstance(next(there.parameters()), Elsewhere)
    results = [values(USES[use](model)) + values(model) for model in (here, there)]
    plt.close("all")
    for ours, wanted in zip(*results, strict=True):
        assert type(ours) is torch.Tensor
        assert torch.equal(ours, wanted)


CARELESS = {
    "double": lambda weight: weight.double(),
    "to": lambda weight: weight.abs().to(torch.float64),
    "sum": lambda weight: weight.sum(dtype=torch.float64),
    "promoted": lambda weight: weight * torch.ones(1, dtype=torch.float64),
    "numpy": lambda weight: weight.detach().numpy(),
    "double before cpu": lambda weight: weight.detach().double().cpu(),
    "bool to numpy": lambda weight: (weight > 0).numpy(),
}


@pytest.mark.parametrize("use", CARELESS)
def test_carelessness_is_noticed(use):
    weight = moved(new_model("plain")).layers[0].weight
    with pytest.raises(TypeError):
        CARELESS[use](weight)
    assert weight.detach().cpu().double().numpy().shape == weight.shape
