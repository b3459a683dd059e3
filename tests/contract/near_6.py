"""What kernels promise of relu6 near its limit, on any device."""

import torch

from evennorm.torch import batch_norm


def check_values_near_6(shape: tuple[int, int], device: str) -> None:
    """Where the gradient is let through, the value is below 6, which is recomputed to the last bit."""
    x, channels = torch.randn(shape, device=device), shape[1]
    gamma, beta = torch.full((channels,), 1e-6, device=device), torch.full((channels,), 6.0, device=device).requires_grad_()
    y, _ = batch_norm(x, gamma, beta, activation="relu6")
    (d_beta,) = torch.autograd.grad(y.sum(), beta)
    below = y < 6
    assert 0.3 < below.float().mean() < 0.6
    assert torch.equal(d_beta, below.sum(0).float())
    residual = torch.zeros_like(x).requires_grad_()
    y_residual, _ = batch_norm(x, gamma, beta, activation="relu6", residual=residual)
    (share,) = torch.autograd.grad(y_residual.sum(), residual)
    assert torch.equal(share == 1, y_residual < 6)
    assert torch.equal(y_residual < 6, below)
