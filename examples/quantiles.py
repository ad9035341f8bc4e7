"""The loss that teaches a model quantiles, which the pages of series share."""

import torch
from torch import Tensor


def quantile_loss(forecast: Tensor, target: Tensor, quantiles: Tensor) -> Tensor:
    """The mean pinball loss (Koenker and Bassett, 1978): what is above quantile q costs q times the distance, below it 1 - q.

    Args:
        forecast: [..., Q], one number for each quantile.
        target: [...], what happened.
        quantiles: [Q], between 0 and 1.
    """
    error = target.unsqueeze(-1) - forecast
    return torch.maximum(quantiles * error, (quantiles - 1) * error).mean()
