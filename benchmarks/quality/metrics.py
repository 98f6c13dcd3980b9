"""How far pictures are from those of an exact run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def psnr(pictures: Tensor, exact: Tensor) -> Tensor:
    """Peak signal to noise in dB, `(B,)`, of pixels `(B, H, W, 3)` in [0, 1], unrounded; at most 120."""
    error = (pictures.double() - exact.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-12))


def ssim(pictures: Tensor, exact: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004: Gaussian window of 11, deviation 1.5), `(B,)`, of pixels in [0, 1]."""
    x, y = (each.double().permute(0, 3, 1, 2) for each in (pictures, exact))
    line = torch.exp(-0.5 * ((torch.arange(11, dtype=torch.float64) - 5) / 1.5) ** 2)
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window, groups=3)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    one, two = 0.01**2, 0.03**2
    similar = (2 * mean_x * mean_y + one) * (2 * covariance + two)
    return (similar / ((mean_x**2 + mean_y**2 + one) * (var_x + var_y + two))).flatten(1).mean(1)


def relative_error(latents: Tensor, exact: Tensor) -> Tensor:
    """Relative error in the 2-norm, `(B,)`."""
    difference = (latents.double() - exact.double()).flatten(1).norm(dim=1)
    return difference / exact.double().flatten(1).norm(dim=1)
