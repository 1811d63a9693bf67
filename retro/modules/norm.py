"""Normalization by the root of the mean square."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * w over the last axis (Zhang & Sennrich 2019).

    Torch has no single kernel for it on CPUs and walks over x seven times, and oftener backward; training in float32
    walks over it in few steps here.
    """

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s d"]:
        if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        if not x.dtype == self.weight.dtype == torch.float32:
            return super().forward(x)
        return _FewPasses.apply(x, self.weight, self.eps)


class _FewPasses(torch.autograd.Function):
    """With s = 1 / sqrt(mean(x^2) + eps) of each row and g the gradient of the result:

    dx = s g w - x s^3 / d sum(g w x),  dw = sum over rows of s g x
    """

    @staticmethod
    def forward(ctx, x, weight, eps: float):
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        product = grad * x
        dots = (product @ weight)[..., None]
        grad_weight = product.flatten(0, -2).T @ scale.flatten()
        torch.mul(grad, weight, out=product)
        grad_x = product.mul_(scale).addcmul_(x, dots * scale.pow(3), value=-1 / x.shape[-1])
        return grad_x, grad_weight, None
