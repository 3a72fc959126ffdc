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


def test_what_is_unfrozen_later_is_stepped_in_backward() -> None:
    models = [make_model(), make_model()]
    for model in models:
        model[0].requires_grad_(False)
    released, plain = (fastopt.optim.AdamW(m.parameters(), lr=1e-2) for m in models)
    released.release_gradients()
    for step in range(4):
        if step == 2:
            for model in models:
                model[0].requires_grad_(True)
                model[2].requires_grad_(False)
        loss_of(models[0], step).backward()
        assert all(p.grad is None for p in models[0].parameters())
        loss_of(models[1], step).backward()
        plain.step()
        plain.zero_grad()
    assert not torch.equal(models[0][0].weight, make_model()[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_a_backward_of_nothing_but_frozen_parameters_is_followed_once_they_are_not() -> None:
    param = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = fastopt.optim.SGD([param], lr=0.5)
    handle = optimizer.release_gradients()
    assert not param.requires_grad
    param.requires_grad_(True)
    param.sum().backward()
    assert param.grad is None
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.5))
    handle.remove()
    param.sum().backward()
    assert param.grad is not None


@pytest.mark.parametrize("frozen", [False, True])
def test_a_group_that_is_added_later_is_stepped_in_backward(frozen: bool) -> None:
    models = [make_model(), make_model()]
    optimizers = [fastopt.optim.AdamW(m[4].parameters(), lr=1e-2) for m in models]
    optimizers[0].release_gradients()
    for model, optimizer in zip(models, optimizers, strict=True):
        model[0].requires_grad_(not frozen)
        optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 1e-3})
        model[0].requires_grad_(True)
    for step in range(3):
        loss_of(models[0], step).backward()
        assert all(p.grad is None for layer in (0, 4) for p in models[0][layer].parameters())
        loss_of(models[1], step).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


def test_step_takes_the_gradients_that_came_without_a_backward() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = fastopt.optim.SGD(params, lr=0.5)
    optimizer.release_gradients()
    params[0].sum().backward()
    params[1].grad = torch.full((2,), 2.0)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), torch.full((2,), 0.5))
    torch.testing.assert_close(params[1].detach(), torch.zeros(2))


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.1}, {"skip_nonfinite": True}])
def test_the_norm_of_all_gradients_is_refused_once_it_is_asked_for(options: dict[str, Any]) -> None:
    """In a group that is there, and in one that is added."""
    model = make_model()
    optimizer = fastopt.optim.SGD(model[4].parameters(), lr=0.1)
    optimizer.release_gradients()
    with pytest.raises(RuntimeError, match="per_tensor=True"):
        optimizer.add_param_group({"params": list(model[0].parameters()), **options})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(options)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="per_tensor=True"):
        loss_of(model, 0).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class OwnScaler(torch.amp.GradScaler):
    """A scaler whose `scale` does not call torch's."""

    def scale(self, outputs: Any) -> Any:
        return outputs * self._init_scale


def make_scaler(kind: str, enabled: bool = True) -> torch.amp.GradScaler:
    classes = {"torch": torch.amp.GradScaler, "fastopt": fastopt.GradScaler, "own": OwnScaler}
    return classes[kind]("cpu", init_scale=1024.0, enabled=enabled)


@pytest.mark.parametrize("kind", ["torch", "fastopt", "own"])
@pytest.mark.parametrize("made_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"clip_value": 1.0}])
def test_a_scaler_is_refused_before_anything_is_stepped(
    kind: str, made_first: bool, options: dict[str, Any]
) -> None:
    model = make_model()
    optimizer = fastopt.optim.AdamW(model.parameters(), lr=1e-2, **options)
    scaler = make_scaler(kind)
    if made_first:
        scaler.scale(loss_of(model, 0)).backward()
        optimizer.zero_grad()
    optimizer.release_gradients()
    if not made_first:
        scaler = make_scaler(kind)
    before = [p.detach().clone() for p in model.parameters()]
    loss = loss_of(model, 0)
    for outputs in (loss, [loss.detach(), loss], (loss * 2, [loss])):
        with pytest.raises(RuntimeError, match="GradScaler does not go with release_gradients"):
            scaler.scale(outputs)
    if kind == "fastopt":
        with pytest.raises(RuntimeError, match="GradScaler does not go with release_gradients"):
            scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


def test_a_scaler_is_refused_behind_a_checkpoint() -> None:
    """One that computes its part of the graph anew, and shows none of its parameters."""
    layer = torch.nn.Linear(4, 1)
    optimizer = fastopt.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.release_gradients()
    x = torch.ones(2, 4, requires_grad=True)
    loss = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True).sum()
    with pytest.raises(RuntimeError, match="GradScaler does not go with release_gradients"):
        torch.amp.GradScaler("cpu").scale(loss)


@pytest.mark.parametrize("kind", ["torch", "fastopt"])
def test_a_scaler_of_other_losses_goes_on(kind: str) -> None:
    """Another model's, a loss without a graph, a scaler that is switched off, and any scaler once
    gradients stay again."""
    model, other = make_model(), make_model()
    handle = fastopt.optim.SGD(model.parameters(), lr=0.1).release_gradients()
    optimizer = fastopt.optim.SGD(other.parameters(), lr=0.1)
    scaler = make_scaler(kind)
    scaler.scale(loss_of(other, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(other[4].weight, make_model()[4].weight)
    loss = loss_of(model, 0)
    assert scaler.scale(loss.detach()) == 1024.0 * loss
    assert make_scaler(kind, enabled=False).scale(loss) is loss
    handle.remove()
    assert scaler.scale(loss) == 1024.0 * loss
