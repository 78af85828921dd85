"""Token embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """A table of rows, weight [num_rows, hidden_size], uninitialised until the loader fills it."""

    def __init__(self, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] → rows [..., hidden_size]."""
        return F.embedding(ids, self.weight)
