"""What runs around a step: hooks, the profiler, torch.compile, grad modes, autograd's graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fastopt
from tests.optim.pairs import (
    ONE_EACH,
    Pair,
    assert_params_close,
    assert_states_close,
    construct,
    give_grads,
    make_params,
)


class Deaf(fastopt.optim.AdamW):
    """Wrong: says that its step runs the hooks, and does not."""

    def step(self, closure: Any = None) -> Any:
        return closure() if closure is not None else None

    step.hooked = True  # type: ignore[attr-defined]


def check_hooks(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    params = make_params()
    give_grads(params, 0)
    optimizer = make(params)
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *a: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *a: seen.append("global post")),
        optimizer.register_step_pre_hook(lambda *a: seen.append("pre")),
        optimizer.register_step_post_hook(lambda *a: seen.append("post")),
    ]
    try:
        optimizer.step(lambda: seen.append("closure"))
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert seen == ["global pre", "pre", "closure", "post", "global post"]


@pytest.mark.parametrize("case", ONE_EACH)
def test_hooks_of_the_instance_and_of_all_optimizers_run_in_torchs_order(case: str) -> None:
    check_hooks(lambda params: construct(torch, case, params))
    check_hooks(lambda params: construct(fastopt, case, params))


def test_these_checks_see_a_wrong_optimizer() -> None:
    with pytest.raises(AssertionError):
        check_hooks(Deaf)


def test_a_pre_hook_may_change_gradients_and_arguments() -> None:
    pair = Pair("AdamW")
    losses = []

    def hook(optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for param in optimizer.param_groups[0]["params"]:
            param.grad = param.grad * 3  # new tensors, after zero_grad and backward
        return (optimizer, lambda: losses.append(1.0) or 1.0), {}

    for optimizer, _ in pair.sides:
        optimizer.register_step_pre_hook(hook)
    pair.run(3).check()
    assert losses == [1.0] * 6


def test_a_post_hook_may_read_and_change_parameters_and_states() -> None:
    pair = Pair("Adam")

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        for param in optimizer.param_groups[0]["params"]:
            param.data.clamp_(-0.5, 0.5)
            optimizer.state[param]["exp_avg"].mul_(0.5)

    for optimizer, _ in pair.sides:
        optimizer.register_step_post_hook(hook)
    pair.run(4).check()
    assert all(param.abs().max() <= 0.5 for param in pair.our_params)


def test_hooks_run_once_a_step_where_a_subclass_calls_super() -> None:
    """torch runs them twice, but only if a plain instance has been made before."""

    class Sub(fastopt.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    for cls in (Sub, fastopt.optim.AdamW, Sub):
        params = make_params()
        give_grads(params, 0)
        optimizer = cls(params)
        seen: list[str] = []
        optimizer.register_step_pre_hook(lambda *a, seen=seen: seen.append("pre"))
        optimizer.register_step_post_hook(lambda *a, seen=seen: seen.append("post"))
        optimizer.step()
        optimizer.step()
        assert seen == ["pre", "post"] * 2


def test_a_pre_hook_that_returns_something_else_is_refused() -> None:
    params = make_params()
    give_grads(params, 0)
    before = [param.clone() for param in params]
    optimizer = fastopt.optim.SGD(params)
    optimizer.register_step_pre_hook(lambda *a: "arguments")
    with pytest.raises(RuntimeError, match=r"tuple of \(new_args, new_kwargs\), but got"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
def test_the_profiler_shows_a_step_by_the_name_torch_gives_it(case: str) -> None:
    pair = Pair(case).run(1)
    with torch.autograd.profiler.profile() as profile:
        pair.step()
        pair.ours.zero_grad()
    name = case.partition("-")[0]
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts[f"Optimizer.step#{name}.step"] == 2
    assert counts[f"Optimizer.zero_grad#{name}.zero_grad"] == 1


def test_a_compiled_function_may_step() -> None:
    """Our step runs outside the graph, as one break: what surrounds it is compiled, nothing of it
    is, and later calls compile no more."""
    pair = Pair("AdamW", shapes=((7, 5), (11,)))
    graphs: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str([node.meta.get("stack_trace") for node in module.graph.nodes]))
        return module

    def train(optimizer: Any, params: Any) -> Any:
        loss = sum((param.detach() * 2).sin().sum() for param in params)
        for param in params:
            param.grad = (param * 2).cos().detach()
        optimizer.step()
        return loss + sum(param.detach().sum() for param in params)

    compiled, counts = torch.compile(train, backend=backend), []
    for _ in range(4):
        expected = train(pair.theirs, pair.their_params)
        loss = compiled(pair.ours, pair.our_params)
        torch.testing.assert_close(loss, expected)
        counts.append(len(graphs))
    pair.check()
    assert counts[0] >= 2
    assert counts[3] == counts[2]
    assert not [graph for graph in graphs if "fastopt" in graph.replace(__file__, "")]
    torch._dynamo.reset()


def test_a_compiled_step_is_the_step() -> None:
    """torch.compile(optimizer.step), as is done with torch's, finds nothing to compile."""
    pair = Pair("SGD-momentum")
    graphs: list[Any] = []
    step = torch.compile(pair.ours.step, backend=lambda module, _: graphs.append(module) or module)
    for seed in range(3):
        for _, params in pair.sides:
            give_grads(params, seed)
        pair.theirs.step()
        step()
    pair.check()
    assert not graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("case", ["SGD-momentum", "AdamW"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_step_in_any_grad_mode(mode: Callable[[], AbstractContextManager], case: str) -> None:
    """States made in inference mode are inference tensors, which count no versions."""
    pair = Pair(case)
    with mode():
        pair.run(2).check()
        pair.run(1).check()


def test_parameters_made_in_inference_mode_are_stepped_there() -> None:
    def train(package: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
        with torch.inference_mode():
            params = [torch.nn.Parameter(torch.arange(5.0), requires_grad=False)]
            optimizer = construct(package, "Adam", params)
            for seed in range(3):
                give_grads(params, seed)
                optimizer.step()
            return params, optimizer.state_dict()

    (ours, our_state), (theirs, their_state) = train(fastopt), train(torch)
    assert_params_close(ours, theirs)
    assert_states_close(our_state, their_state)


def test_states_made_in_inference_mode_serve_outside_of_it() -> None:
    """torch refuses to write those, after having written some; ours refuses first or goes on."""
    pair = Pair("Adam")
    give_grads(pair.our_params, 1)
    with torch.inference_mode():
        pair.ours.step()
    give_grads(pair.their_params, 1)
    pair.theirs.step()
    assert pair.ours.state[pair.our_params[0]]["exp_avg"].is_inference()
    pair.run(2)
    assert_params_close(pair.our_params, pair.their_params)


@pytest.mark.parametrize("case", ["SGD-nesterov", "AdamW"])
def test_gradients_that_carry_a_graph(case: str) -> None:
    """create_graph=True gives gradients that require gradients themselves."""
    pair = Pair(case, shapes=((3, 2), (4,)))
    for _ in range(3):
        for optimizer, params in pair.sides:
            optimizer.zero_grad()
            loss = sum((param**3).sum() for param in params)
            grads = torch.autograd.grad(loss, params, create_graph=True)
            penalty = sum((grad**2).sum() for grad in grads)
            (loss + penalty).backward(create_graph=False)
            for param, grad in zip(params, grads, strict=True):
                param.grad = param.grad.detach() + grad
                assert param.grad.requires_grad
            optimizer.step()
            assert all(param.is_leaf and param.requires_grad for param in params)
    pair.check()


def test_an_optimizer_for_each_parameter_inside_backward() -> None:
    """Gradient release: each gradient is stepped and freed as soon as it is there."""
    pair = Pair("AdamW")
    for package, params in ((torch, pair.their_params), (fastopt, pair.our_params)):
        for param in params:
            single = construct(package, "AdamW", [param])

            def release(param: Any, optimizer: Any = single) -> None:
                optimizer.step()
                optimizer.zero_grad()

            param.register_post_accumulate_grad_hook(release)
    for _ in range(3):
        for _, params in pair.sides:
            sum((param**2).sum() for param in params).backward()
            assert all(param.grad is None for param in params)
    pair.check()
    assert float(pair.our_params[0].detach().sum()) != float(make_params()[0].detach().sum())
