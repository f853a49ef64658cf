"""What several tests draw, and a target whose modes lie far from the origin."""

import torch

CORNERS = torch.tensor([[20.0, 20.0], [-20.0, 20.0], [20.0, -20.0], [-20.0, -20.0]])


class Four:
    """Four modes far from the origin, with what the arguments declare."""

    dim = 2

    def __init__(self, shift=0.0, **declared):
        self.shift = shift
        vars(self).update(declared)

    def log_prob(self, z):
        return torch.logsumexp(-0.5 * (z.unsqueeze(-2) - CORNERS.to(z)).square().sum(-1), -1) + self.shift


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=4, pixels=784):
    return (torch.rand(n, pixels) < 0.3).double()
