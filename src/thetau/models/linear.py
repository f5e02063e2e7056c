r"""The linear model: $f(x; \theta_0) + J(x)\,\tau$, the first-order expansion of any module in its parameters.

Ortiz-Jimenez et al., NeurIPS 2023, <https://arxiv.org/abs/2305.12827>; Yoshida et al., Eq. 5. Here the function that is expanded is
the whole module, its normalisation included, so that the outputs, and the logits of a linear head, are exactly linear in τ.

The gradient of a loss of $f_0 + J\tau$ with respect to τ is $J^\top g$ at θ₀: an ordinary backward pass through the primal. One
pass of dual numbers (`thetau.models.dual`) gives all of it; where a module does what they cannot follow, torch's forward mode and a
second forward pass do, at more cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from thetau.errors import DataError
from thetau.models.dual import Dual, NoRuleError, math_attention, primal_of, tangent_of

_TOLERANCE = 1e-3


@final
class LinearModel:
    """`module` expanded at the parameters that it holds.

    - `tau`: name of a parameter → its τ, of the same shape; may change between calls. Parameters without one stay at θ₀.
    """

    def __init__(self, module: nn.Module, tau: Mapping[str, Tensor]) -> None:
        self.module = module
        self.tau = dict(tau)
        self.way: Literal["dual", "torch"] | None = None
        self._parameters = dict(module.named_parameters())
        _check(self._parameters, self.tau)

    def parts(self, columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        r"""$f(x; \theta_0)$ and $J(x)\,\tau$, both `[example, …]`.

        The first carries the graph of an ordinary forward pass where parameters ask for gradients; the second carries none.
        Raises `DataError` naming the module that forward mode cannot differentiate.
        """
        if self.module.training:
            raise DataError("a linear model is made of a module in evaluation mode: dropout would make it another one each time.")
        if self.way is None:
            self.way = self._check_way(columns)
        if self.way == "dual":
            return self._dual(self.tau, columns)
        with math_attention():
            out: Tensor = self.module(**columns)
        return out, self._torch(self.tau, columns)

    def __call__(self, columns: Mapping[str, Tensor]) -> Tensor:
        r"""$f_0 + J\tau$. Its gradient with respect to the *parameters of the module* is $J^\top g$, that of τ."""
        first, change = self.parts(columns)
        return first + change

    def change(self, columns: Mapping[str, Tensor]) -> Tensor:
        r"""$J\tau$ as a function of τ: the value, and a graph whose gradient with respect to the module's parameters is $J^\top g$."""
        first, change = self.parts(columns)
        return first - first.detach() + change

    def _dual(self, tau: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        pairs: dict[str, Tensor] = {name: Dual.of(self._parameters[name], value) for name, value in tau.items()}
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            out = functional_call(self.module, pairs, (), dict(columns))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        change = tangent_of(out)
        return primal_of(out), torch.zeros_like(primal_of(out)) if change is None else change

    def _torch(self, tau: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> Tensor:
        start = {name: self._parameters[name].detach() for name in tau}
        with torch.no_grad(), math_attention():
            both: tuple[Tensor, Tensor] = jvp(  # type: ignore[assignment]
                lambda given: functional_call(self.module, given, (), dict(columns)), (start,), (dict(tau),)
            )
        return both[1]

    def _check_way(self, columns: Mapping[str, Tensor]) -> Literal["dual", "torch"]:
        """Compare both ways on two examples along a direction of our own; the faster one where they agree."""
        few = {name: column[:2] for name, column in columns.items()}
        generator = torch.Generator().manual_seed(0)
        probe = {
            name: torch.randn(value.shape, generator=generator).to(value)
            * self._parameters[name].detach().abs().mean().clamp(min=1e-3)
            for name, value in self.tau.items()
        }
        with _named_failures(self.module):
            expected = self._torch(probe, few)
        try:
            with torch.no_grad():
                got = self._dual(probe, few)[1]
        except (NoRuleError, RuntimeError, TypeError, AttributeError, NotImplementedError):
            return "torch"
        close = (got - expected).norm() <= _TOLERANCE * expected.norm()
        return "dual" if bool(close) else "torch"


def _check(parameters: Mapping[str, Tensor], tau: Mapping[str, Tensor]) -> None:
    unknown = [name for name in tau if name not in parameters]
    if unknown:
        raise DataError(f"τ names {unknown[0]!r}, which is no parameter of the model (and {len(unknown) - 1} more).")
    wrong = [name for name, value in tau.items() if value.shape != parameters[name].shape]
    if wrong:
        shapes = f"{list(tau[wrong[0]].shape)} for a parameter of shape {list(parameters[wrong[0]].shape)}"
        raise DataError(f"τ of {wrong[0]!r} has shape {shapes}.")
    if not tau:
        raise DataError("a linear model needs the τ of at least one parameter. Got none.")


@contextmanager
def _named_failures(module: nn.Module) -> Iterator[None]:
    """Name the innermost module in which something went wrong."""
    inside: list[str] = []
    handles = []

    def leave(*_: object) -> None:
        inside.pop()

    for name, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        handles.append(part.register_forward_hook(leave))
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        where = inside[-1] if inside else ""
        kind = type(dict(module.named_modules()).get(where, module)).__name__
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"module {where or '(the model)'!r} ({kind}) cannot be differentiated in forward mode ({reason}), so the model has no linear form. "
            "Fine-tune with paradigm standard or attention, or give the operation a forward derivative (`jvp` of its autograd function)."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
