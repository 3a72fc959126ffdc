"""Steps in backward that free each gradient as they go."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastopt


def make_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 30), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(30, 1)).to(dtype)


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 20, generator=generator)
    # The middle layer is used twice: its gradient is there when both are added.
    hidden = model[1](model[0](x.to(model[0].weight.dtype)))
    loss: torch.Tensor = model[4](model[3](model[2](model[2](hidden)))).square().mean()
    return loss


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {}),
        ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
        ("AdamW", {"state_dtype": "8bit"}),
        ("NAdam", {"ema_decay": 0.9}),
    ],
)
def test_as_steps_after_backward(name: str, options: dict[str, Any]) -> None:
    models = [make_model(), make_model()]
    cls = getattr(fastopt.optim, name)
    released, plain = (cls(m.parameters(), lr=1e-2, **options) for m in models)
    released.release_gradients()
    for step in range(4):
        loss_of(models[0], step).backward()
        assert all(p.grad is None for p in models[0].parameters())
        released.step()
        loss_of(models[1], step).backward()
        plain.step()
        plain.zero_grad()
    for param, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(param, other)
        assert torch.equal(
            released.state[param].get("step", param), plain.state[other].get("step", other)
        )


def test_chance_is_that_of_a_whole_step() -> None:
    models = [make_model(torch.bfloat16), make_model(torch.bfloat16)]
    released, plain = (
        fastopt.optim.AdamW(m.parameters(), lr=1e-2, param_rounding="stochastic") for m in models
    )
    released.release_gradients()
    for step in range(3):
        loss_of(models[0], step).backward()
        loss_of(models[1], step).backward()
        plain.step()
        plain.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_states_may_be_looked_at_and_saved_between_steps() -> None:
    models = [make_model(), make_model()]
    released = fastopt.optim.AdamW(models[0].parameters(), lr=1e-2)
    released.release_gradients()
    for step in range(2):
        loss_of(models[0], step).backward()
        saved = copy.deepcopy(released.state_dict())
    models[1].load_state_dict(models[0].state_dict())
    plain = fastopt.optim.AdamW(models[1].parameters(), lr=1e-2)
    plain.load_state_dict(saved)
    for param in models[0].parameters():
        released.state[param]["exp_avg"] = released.state[param]["exp_avg"].clone()
    loss_of(models[0], 2).backward()
    loss_of(models[1], 2).backward()
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_the_norm_of_all_gradients_is_refused_and_that_of_a_tensor_offered() -> None:
    models = [make_model(), make_model()]
    optimizer = fastopt.optim.SGD(models[0].parameters(), lr=1e-2, max_grad_norm=0.01)
    with pytest.raises(RuntimeError, match="per_tensor=True"):
        optimizer.release_gradients()
    optimizer.release_gradients(per_tensor=True)
    loss_of(models[0], 0).backward()
    theirs = torch.optim.SGD(models[1].parameters(), lr=1e-2)
    loss_of(models[1], 0).backward()
    for param in models[1].parameters():
        assert torch.nn.utils.clip_grad_norm_([param], 0.01) > 0.01
    theirs.step()
    for param, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)


def test_gradients_stay_again_once_it_is_removed() -> None:
    models = [make_model(), make_model()]
    optimizer, plain = (fastopt.optim.AdamW(m.parameters(), lr=1e-2) for m in models)
    handle = optimizer.release_gradients()
    loss_of(models[0], 0).backward()
    handle.remove()
    loss_of(models[0], 1).backward()
    assert all(p.grad is not None for p in models[0].parameters())
    optimizer.step()
    for step in range(2):
        plain.zero_grad()
        loss_of(models[1], step).backward()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_a_scheduler_and_telemetry_go_with_it() -> None:
    model = make_model()
    optimizer = fastopt.optim.AdamW(list(model.named_parameters()), lr=1.0, telemetry=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    optimizer.release_gradients()
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 0).backward()
    after = [p.detach().clone() for p in model.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert list(optimizer.telemetry()) == [name for name, _ in model.named_parameters()]
    optimizer.step()
    scheduler.step()
    loss_of(model, 1).backward()
    assert all(torch.equal(a, b) for a, b in zip(after, model.parameters(), strict=True))
