"""What the loop trains: the model itself, or its linear form. Either gives features with a graph, and the tensors that the optimiser moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn

from thetau.models.linear import LinearModel


@runtime_checkable
class View(Protocol):
    """`trained`: name → the tensor that the optimiser moves; its `grad` is set after `collect`."""

    trained: dict[str, Tensor]

    def features(self, columns: Mapping[str, Tensor]) -> Tensor:
        """What a head reads, `[example, feature]`."""
        ...

    def change(self, columns: Mapping[str, Tensor]) -> Tensor:
        r"""$J(x)\,\tau$; for the linear form only."""
        ...

    def collect(self) -> None:
        """Give `trained` the gradients of the last backward passes."""
        ...

    def decay(self, amount: float) -> None:
        """Pull the matrices of θ towards 0 by a share, where the optimiser does not do it by itself."""
        ...

    def finish(self) -> None:
        """Leave θ₀ + τ in the module."""
        ...


@final
class ModelView:
    """The module as it is."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        parameters = dict(module.named_parameters())
        self.trained: dict[str, Tensor] = {name: parameters[name] for name in names}
        self._module = module
        module.train()

    def features(self, columns: Mapping[str, Tensor]) -> Tensor:
        """The module's output."""
        out: Tensor = self._module(**columns)
        return out

    def change(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Not defined here: the config refuses it."""
        raise NotImplementedError

    def collect(self) -> None:
        """The parameters hold their gradients already."""

    def decay(self, amount: float) -> None:
        """The optimiser decays the parameters."""

    def finish(self) -> None:
        """The module holds them already."""


@final
class LinearView:
    r"""$f_0 + J\tau$: the module stays at θ₀ and τ is trained; `start` is where it begins, 0 by default."""

    def __init__(self, module: nn.Module, names: Sequence[str], start: Mapping[str, Tensor] | None = None) -> None:
        module.eval()
        self._parameters = {name: parameter for name, parameter in module.named_parameters() if name in set(names)}
        given = start or {}
        self.trained: dict[str, Tensor] = {
            name: given[name].detach().to(parameter, copy=True)
            if name in given
            else torch.zeros_like(parameter, requires_grad=False)
            for name, parameter in self._parameters.items()
        }
        self.model = LinearModel(module, self.trained)

    def features(self, columns: Mapping[str, Tensor]) -> Tensor:
        """The linear model's output; its gradient in the module's parameters is that of τ."""
        return self.model(columns)

    def change(self, columns: Mapping[str, Tensor]) -> Tensor:
        """What τ does to these inputs."""
        return self.model.change(columns)

    def collect(self) -> None:
        """Hand over the gradients that the backward pass left at θ₀."""
        for name, parameter in self._parameters.items():
            self.trained[name].grad, parameter.grad = parameter.grad, None

    def decay(self, amount: float) -> None:
        """τ ← τ − amount · (θ₀ + τ): the decay of θ, as in the authors' code."""
        if amount == 0:
            return
        with torch.no_grad():
            for name, tau in self.trained.items():
                if tau.ndim > 1 and tau.grad is not None:
                    tau.mul_(1 - amount).sub_(self._parameters[name].detach(), alpha=amount)

    def finish(self) -> None:
        """Write θ₀ + τ into the module."""
        with torch.no_grad():
            for name, tau in self.trained.items():
                self._parameters[name].add_(tau)
