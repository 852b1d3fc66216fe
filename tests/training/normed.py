"""A family of the user's own with what ours have not: statistics of batches, a weight that stays as it is and one that nothing uses."""

from dataclasses import replace

import torch
from torch import nn

from training.networks import FAMILIES, Generator


class Normed(Generator):
    def __init__(self, latent, dim, **how):
        super().__init__(latent, dim, **how)
        self.norm, self.unused = nn.BatchNorm1d(dim), nn.Parameter(torch.ones(dim))
        self.frozen = nn.Parameter(torch.full((dim,), 0.5), requires_grad=False)

    def forward(self, z, y=None):
        return self.norm(super().forward(z, y) + 3) * self.frozen


FAMILY = replace(FAMILIES["perceptron"], generator=lambda latent, shape, **how: Normed(latent, shape[0], **how))
