"""The linear model: parity with torch's forward mode, the theorems of the τJp paper, what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jvp

from thetau.errors import DataError
from thetau.models import load_encoder
from thetau.models.dual import Dual, NoRuleError, math_attention
from thetau.models.linear import LinearModel
from tiny import make_model
from tiny import one_thread as one_thread

F = nn.functional


def random_tau(module: nn.Module, seed: int = 0, size: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(p.shape, generator=generator) for name, p in module.named_parameters()}


def reference(
    module: nn.Module, tau: dict[str, Tensor], columns: dict[str, Tensor], loss: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reverse over forward: torch's own way, τ asking for gradients."""
    start = {name: p.detach() for name, p in module.named_parameters() if name in tau}
    asking = {name: value.clone().requires_grad_() for name, value in tau.items()}
    with math_attention():
        first, change = jvp(lambda given: functional_call(module, given, (), columns), (start,), (asking,))
    out = first + change
    grads = torch.autograd.grad(loss(out), list(asking.values()), allow_unused=True)
    return out.detach(), {name: grad for name, grad in zip(asking, grads, strict=True) if grad is not None}


class Zoo(nn.Module):
    """One block of a kind, between two linear maps."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm, self.batch = nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        match self.kind:
            case "norm":
                h = self.norm(h) * self.scale
            case "batch norm":
                h = self.batch(h)
            case "conv":
                h = self.conv(h.view(-1, 1, 4, 2)).mean(1).flatten(1)
            case "multihead":
                h = h.view(-1, 2, 8)
                h = self.attention(h, h, h)[0].reshape(-1, 8)
            case "encoder layer":
                h = self.layer(h.view(-1, 2, 8)).reshape(-1, 8)
            case "in place":
                h = h * 2
                h += self.scale
            case "causal":
                q = h.view(1, 1, -1, 8)
                h = F.scaled_dot_product_attention(q, q * 2, q + self.scale, is_causal=True).view(-1, 8)
            case "masked":
                q = h.view(1, 1, -1, 8)
                mask = torch.eye(q.shape[2], dtype=torch.bool) | (torch.arange(q.shape[2]) < 2)
                h = F.scaled_dot_product_attention(q, q, q, attn_mask=mask, scale=0.3).view(-1, 8)
            case "activations":
                h = F.gelu(h) + F.gelu(h, approximate="tanh") + torch.tanh(h) + F.relu(h) + F.silu(h) - torch.sigmoid(h)
            case "shapes":
                a, b = h.chunk(2, dim=1)
                h = torch.cat([b, a * b, torch.ones_like(a)], 1)[:, :8].masked_fill(torch.arange(8) == 3, 0.0)
                h = torch.where(h > 0, h, 0.1 * h) / 3
            case "softmax":
                h = torch.softmax(h, dim=-1) @ h.T @ h / len(h)
            case "normalise":
                h = F.normalize(h, dim=-1)
            case "frozen start":
                h = h.detach() * 0 + x[:, :1].expand(-1, 8)
        return self.last(h)


KINDS = (
    *("norm", "batch norm", "conv", "multihead", "encoder layer", "in place", "causal", "masked", "activations", "shapes"),
    *("softmax", "normalise", "frozen start"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_reverse_over_forward(kind: str) -> None:
    torch.manual_seed(0)
    module = Zoo(kind).double().eval() if kind == "norm" else Zoo(kind).eval()
    dtype = next(module.parameters()).dtype
    x = torch.randn(6, 6, dtype=dtype)
    tau = {name: value.to(dtype) for name, value in random_tau(module).items()}
    target = torch.tensor([0, 1, 2, 0, 1, 2])

    def loss(out: Tensor) -> Tensor:
        return F.cross_entropy(out, target)

    expected, gradients = reference(module, tau, {"x": x}, loss)
    model = LinearModel(module, tau)
    out = model({"x": x})
    assert model.way == ("torch" if kind == "in place" else "dual")
    torch.testing.assert_close(out.detach(), expected, rtol=1e-5, atol=1e-5)
    names = list(gradients)
    found = torch.autograd.grad(loss(out), [dict(module.named_parameters())[name] for name in names])
    for name, gradient in zip(names, found, strict=True):
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_real_encoder_agrees_in_value_and_gradient(tmp_path: Path) -> None:
    encoder = load_encoder(make_model(tmp_path / "base"))
    module = encoder.module.eval()
    columns = {
        "input_ids": torch.randint(4, 20, (5, 7), generator=torch.Generator().manual_seed(1)),
        "attention_mask": torch.tensor([[1] * (7 - i) + [0] * i for i in range(5)]),
        "token_type_ids": torch.zeros(5, 7, dtype=torch.int64),
    }
    tau = random_tau(module, size=0.01)

    def loss(out: Tensor) -> Tensor:
        return out.square().sum() + out[:, 0].sum()

    expected, gradients = reference(module, tau, columns, loss)
    model = LinearModel(module, tau)
    out = model(columns)
    assert model.way == "dual"
    torch.testing.assert_close(out.detach(), expected, rtol=1e-5, atol=1e-5)
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(loss(out), [parameters[name] for name in gradients])
    for name, gradient in zip(gradients, found, strict=True):
        scale = gradients[name].abs().max().clamp(min=1e-3)
        torch.testing.assert_close(gradient / scale, gradients[name] / scale, rtol=1e-5, atol=1e-5)


@given(alpha=st.floats(-3, 3), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_theorem_1_interpolation_in_weights_is_interpolation_of_outputs(alpha: float, seed: int) -> None:
    torch.manual_seed(seed)
    module, x = Zoo("activations").double().eval(), torch.randn(4, 6, dtype=torch.float64)
    tau = {name: value.double() for name, value in random_tau(module, seed, 1.0).items()}
    with torch.no_grad():
        first, change = LinearModel(module, tau).parts({"x": x})
        whole = LinearModel(module, {name: alpha * value for name, value in tau.items()})({"x": x})
    torch.testing.assert_close(whole, (1 - alpha) * first + alpha * (first + change), rtol=1e-9, atol=1e-9)


@given(a=st.floats(-3, 3), b=st.floats(-3, 3), share=st.floats(0, 1), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_theorem_2_the_loss_is_convex_in_alpha(a: float, b: float, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    module, x = Zoo("norm").double().eval(), torch.randn(5, 6, dtype=torch.float64)
    target = torch.randint(0, 3, (5,))
    tau = {name: value.double() for name, value in random_tau(module, seed, 1.0).items()}

    def loss(alpha: float) -> float:
        with torch.no_grad():
            out = LinearModel(module, {name: alpha * value for name, value in tau.items()})({"x": x})
        return float(F.cross_entropy(out, target))

    assert loss(share * a + (1 - share) * b) <= share * loss(a) + (1 - share) * loss(b) + 1e-9


def test_a_vector_with_no_penalty_on_a_task_changes_nothing_there() -> None:
    """J(x_B) τ_A = 0: adding τ_A at α = 1 leaves the outputs on B's inputs as τ_B alone makes them (Eq. 8)."""
    torch.manual_seed(0)
    module = nn.Linear(6, 3, bias=False).eval()
    basis = torch.linalg.qr(torch.randn(6, 6)).Q
    inputs_b = torch.randn(8, 3) @ basis[:3]  # B lives in three directions, τ_A acts on the others
    tau_a, tau_b = {"weight": torch.randn(3, 3) @ basis[3:]}, {"weight": torch.randn(3, 6)}

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = module.weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    named = Named().eval()
    with torch.no_grad():
        assert LinearModel(named, tau_a).change({"x": inputs_b}).square().sum() < 1e-10
        together = LinearModel(named, {"weight": tau_a["weight"] + tau_b["weight"]})({"x": inputs_b})
        torch.testing.assert_close(together, LinearModel(named, tau_b)({"x": inputs_b}))


def test_part_of_the_parameters_may_move() -> None:
    torch.manual_seed(0)
    module, x = Zoo("encoder layer").eval(), torch.randn(4, 6)
    tau = {name: value for name, value in random_tau(module).items() if name.startswith("layer.self_attn")}
    expected, _ = reference(module, tau, {"x": x}, torch.sum)
    torch.testing.assert_close(LinearModel(module, tau)({"x": x}).detach(), expected, rtol=1e-5, atol=1e-5)


class Sharp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0] * ctx.saved_tensors[0]


class Sharpened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Sharp.apply(x)
        return out


def test_a_module_without_a_forward_derivative_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 3), Sharpened())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out

    module = Model().eval()
    with pytest.raises(DataError, match=r"module 'body\.1' \(Sharpened\) cannot be differentiated in forward mode"):
        LinearModel(module, random_tau(module)).parts({"x": torch.ones(2, 3)})


def test_what_a_linear_model_refuses() -> None:
    module = Zoo("norm")
    with pytest.raises(DataError, match="evaluation mode"):
        LinearModel(module.train(), random_tau(module)).parts({"x": torch.ones(2, 6)})
    with pytest.raises(DataError, match="names 'nothing', which is no parameter"):
        LinearModel(module, {"nothing": torch.ones(1)})
    with pytest.raises(DataError, match=r"'scale' has shape \[3\] for a parameter of shape \[8\]"):
        LinearModel(module, {"scale": torch.ones(3)})
    with pytest.raises(DataError, match="at least one parameter"):
        LinearModel(module, {})


def test_duals_refuse_what_they_cannot_follow() -> None:
    one = Dual.of(torch.ones(3), torch.ones(3))
    with pytest.raises(NoRuleError, match="writes into a tensor"):
        one.add_(1)
    with pytest.raises(NoRuleError, match="draws at random"):
        F.dropout(one, 0.5, training=True)
    assert "Dual((3,))" in repr(one)
    assert math.isclose(float((one * 3 + one).tangent.sum()), 12.0)
