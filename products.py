"""
Products of fp32 matrices that the losses are made of: on a GPU large ones are computed by bf16 products.

    Matmul          a (n, k) @ b (k, m) -> (n, m)
    QuadraticForm   e^T G e of e (B, Q, E), G (E, E) -> (B, Q)
"""

import torch
from torch import Tensor

# multiply-adds. Below this, by estimate, a product in fp32 takes less time than the eight more launches of bf16x3.
BF16X3_MIN = 2 ** 31


def matmul_bf16x3(a: Tensor, b: Tensor) -> Tensor:
    """
    a (n, k) @ b (k, m), fp32, as three products of bf16 matrices whose sums are fp32: a = a1 + a2, b = b1 + b2, and
    a1 b1 + a2 b1 + a1 b2 is computed as one product of 3k terms an element. No gradient.

    |error| <= 3 / 2^16 (|a| @ |b|), beside the rounding of fp32 sums: a part keeps 8 bits, and a2 b2 is left out. TF32
    would need one product, but its error is 66 times as large (normal random matrices), and it is a switch of the whole
    process.
    """
    a1, b1 = a.bfloat16(), b.bfloat16()
    a2, b2 = (a - a1).bfloat16(), (b - b1).bfloat16()
    a, b = torch.cat([a1, a2, a1], 1), torch.cat([b1, b1, b2])
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (n, k) @ b (k, m) in fp32; a large product on a GPU is bf16x3. No gradient."""
    large = a.shape[0] * a.shape[1] * b.shape[1] >= BF16X3_MIN
    return matmul_bf16x3(a, b) if a.is_cuda and a.dtype == torch.float32 and large else a @ b


class Matmul(torch.autograd.Function):
    """`matmul` with its gradients, each of them by `matmul` too."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return matmul(a, b)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return matmul(grad, b.T), matmul(a.T, grad)


class QuadraticForm(torch.autograd.Function):
    """e^T G e of e (B, Q, E) and a symmetric G (E, E) -> (B, Q). Its gradient, 2 G e, reuses the product G e."""

    @staticmethod
    def forward(ctx, e: Tensor, G: Tensor) -> Tensor:
        y = matmul(e.flatten(0, 1), G).view_as(e)
        ctx.save_for_backward(y)
        return (y * e).sum(-1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        y, = ctx.saved_tensors
        return 2 * grad[..., None] * y, None
