"""How the bundled model is trained: going on from a checkpoint is going on."""

from __future__ import annotations

import torch
from mini_sd.optimizer import MuonWithAdamW
from torch import nn


def trained(steps, state=None, rate=1e-2):
    """A small net after some steps, and what it takes to go on."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    optimizer = MuonWithAdamW(net, 1e-3, lambda name: name.startswith("0"))
    if state is not None:
        net.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    inputs = torch.randn(5, 3, 6, 6)
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        net(inputs).square().mean().backward()
        optimizer.step()
    return net.state_dict(), optimizer.state_dict()


def test_a_resumed_training_takes_the_rates_that_it_is_given():
    once = trained(6)
    resumed = trained(3, trained(3))
    for name, tensor in once[0].items():
        torch.testing.assert_close(resumed[0][name], tensor)
    ended = trained(3, rate=0.0)  # as a call ends whose rate has come down to nothing
    start, moved = ended[0], trained(3, ended)[0]
    assert all((moved[name] - start[name]).abs().max() > 1e-3 for name in start)
