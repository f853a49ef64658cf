"""Adam without its bookkeeping is torch's, to the last digit."""

import copy

import pytest
import torch
from torch import nn

from annealed_core.optimiser import Adam


def trained(make, steps=12, skipped=(), reload_at=None):
    """Parameters after some steps, in some of which a part has no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimiser = make(model.parameters())
    for step in range(steps):
        if step == reload_at:
            saved = copy.deepcopy(optimiser.state_dict())
            optimiser = make(model.parameters())
            optimiser.load_state_dict(saved)
        optimiser.param_groups[0]["lr"] = 0.01 / (1 + step)
        optimiser.zero_grad()
        hidden = model[1](model[0](torch.randn(5, 3)))
        loss = (model[2](hidden.detach()) if step in skipped else model[2](hidden)).square().sum()
        loss.backward()
        optimiser.step()
    return [p.detach() for p in model.parameters()], optimiser.state_dict()


def torchs(parameters):
    return torch.optim.Adam(list(parameters), lr=0.01, betas=(0.9, 0.99), fused=True)


def ours(parameters):
    return Adam(parameters, 0.01, (0.9, 0.99))


@pytest.mark.parametrize("skipped", [(), (4,), (0, 1, 5)])
@pytest.mark.parametrize("reload_at", [None, 0, 1, 6])
def test_adam_is_torchs_to_the_last_digit(skipped, reload_at):
    (found, state), (expected, expected_state) = (trained(make, 12, skipped, reload_at) for make in (ours, torchs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for number, each in expected_state["state"].items():
        assert all(torch.equal(state["state"][number][name], value) for name, value in each.items())


def test_a_step_takes_torchs_own_way_only_where_a_parameter_is_new(monkeypatch):
    calls, own = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, closure=None: calls.append(1) or own(self, closure))
    trained(ours, 12)
    assert len(calls) == 1
