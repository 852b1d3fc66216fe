"""A family of the user's own, as `--network tests.training.blows_up:FAMILY` names it: its generator breaks after a while."""

from dataclasses import replace

import torch

from training.networks import FAMILIES, Generator


class BlowsUp(Generator):
    """Gives NaN from the 121st batch on."""

    batches = 0

    def forward(self, z, y=None):
        self.batches += self.training and torch.is_grad_enabled()
        return super().forward(z, y) * (torch.nan if self.batches > 120 else 1.0)


FAMILY = replace(FAMILIES["perceptron"], generator=lambda latent, shape, **how: BlowsUp(latent, shape[0], **how))
