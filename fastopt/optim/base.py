"""The base class of every optimizer: torch's contract around one launch a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastopt.optim import eager, passes
from fastopt.optim import plan as plans
from fastopt.optim.bucket import Bucket
from fastopt.optim.hooks import hooked
from fastopt.optim.look import DeviceVerdict, Looking
from fastopt.optim.passes import AVERAGED, Verdict
from fastopt.optim.plan import GroupKey, Odd, Plan, build
from fastopt.optim.scale import NO_SCALE, Scale
from fastopt.optim.update import Update, sign

_cuda_in_use = cast("Callable[[], bool]", torch.cuda.is_initialized)


class FusedOptimizer(Looking, torch.optim.Optimizer):
    """A torch.optim.Optimizer whose whole step is one kernel launch for each device.

    A subclass names a rule, its host half and its states; kernels for CPU and GPU, every dtype and
    the whole contract of torch.optim follow:

        class Lion(FusedOptimizer):
            rule, scalars, state_names = lion, lion_scalars, ("exp_avg",)

            def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **options):
                defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, **options)
                super().__init__(params, defaults)

    rule(p, g, *states, *scalars) -> (p, *states): one element, in floats; no number literals, no
        functions but those of `fastopt.optim.xp`. Numba and Triton compile it.
    scalars(step, *carried, *hyper-parameters) -> (*scalars, *carried): in double on the host,
        step counted from 1; hyper-parameters by the names they have in a group, `beta1` for
        `betas[0]`.
    state_names: states of an element, zero at first unless `initial_state` says otherwise.
    carried_names: numbers kept one a parameter, such as NAdam's mu_product.

    Options of every subclass, in the defaults or in a group: maximize, capturable, differentiable,
    foreach (a hint), fused (torch.amp.GradScaler's grad_scale and found_inf inside the step).

    Raises, before anything is written: RuntimeError for sparse gradients where torch has none,
    gradients of another shape or device, devices without kernels; TypeError for dtypes other than
    float32, bfloat16, float16, float64, complex64 and complex128.
    """

    rule: ClassVar[Callable[..., Any]]
    scalars: ClassVar[Callable[..., Any]]
    state_names: ClassVar[tuple[str, ...]] = ()
    carried_names: ClassVar[tuple[str, ...]] = ()

    _update: ClassVar[Update]
    _plan: Plan | None = None
    # Steps of parameters whose state has none (SGD): {param: {"step": tensor}}.
    _hidden: dict[Tensor, dict[str, Any]]
    # Whether anybody else could have reached the states. Until somebody reads `state`, nobody can
    # have replaced or saved one of them, and a step need not look.
    _exposed: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        init = cls.__init__
        if init is not torch.optim.Optimizer.__init__ and not hasattr(init, "takes_options"):
            cls.__init__ = passes.with_options(init)  # type: ignore[method-assign]
        if "rule" in cls.__dict__:
            cls._update = Update(cls.rule, cls.scalars, cls.state_names, cls.carried_names)

    @property
    def state(self) -> Any:
        """The states by parameter, as torch has them."""
        self._exposed = True
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["state"] = value
        # The constructor of torch.optim.Optimizer makes the first one, and keeps no reference.
        self._forget(exposed="param_groups" in self.__dict__)

    def _forget(self, exposed: bool) -> None:
        self._plan, self._hidden, self._exposed = None, {}, exposed

    # What a subclass may say of itself.

    def update_of(self, group: dict[str, Any]) -> Update:
        """The update a parameter group is stepped by; the same object for the same settings."""
        return self._update

    def initial_state(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        """A state before the first step: zeros laid out like the parameter."""
        return torch.zeros_like(param, memory_format=torch.preserve_format)

    def initial_number(self, value: float, param: Tensor, group: dict[str, Any]) -> Tensor:
        """A number kept one a parameter: on its device where the step is counted there."""
        on_device = bool(group.get("capturable") or group.get("fused"))
        device = param.device if on_device else torch.device("cpu")
        return torch.full((), value, dtype=_number_dtype(on_device), device=device)

    def step_sparse(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """One step of a parameter whose gradient is sparse, where the optimizer has one."""
        raise RuntimeError(self.sparse_error(group))

    def sparse_error(self, group: dict[str, Any]) -> str | None:
        """Why sparse gradients are refused; None where they are not."""
        return (
            f"{type(self).__name__} does not support sparse gradients. fastopt.optim.SGD and "
            "Adagrad do; or make the gradient dense (sparse=False in the embedding)."
        )

    # torch's contract.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        own = isinstance(param_group, dict) and param_group.get("max_grad_norm") is not None
        if own:
            passes.check(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if own:
            group[passes.ALONE] = True
        if group.get("fused"):
            if group.get("differentiable"):
                raise RuntimeError("`fused` does not support `differentiable`")
            if group.get("foreach"):
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        self._note_amp()
        self._plan = None

    def _add_option(self, name: str, value: Any) -> None:
        """An option torch's class does not have; groups show it only where it is set."""
        if value:
            self.defaults[name] = value
            for group in self.param_groups:
                group.setdefault(name, value)

    def _set_options(self, options: dict[str, Any]) -> None:
        """What stands around the update; groups show only what is set."""
        passes.check({**self.defaults, **options})
        for name, value in options.items():
            if value != passes.DEFAULTS[name]:
                self._add_option(name, value)
        self._note_amp()

    def _note_amp(self) -> None:
        clips = ("fused", "max_grad_norm", "clip_value")
        if any(group.get(name) for group in self.param_groups for name in clips):
            self._step_supports_amp_scaling = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._forget(exposed=True)
        self._note_amp()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim's class of that name.

        torch casts every state but "step" to the parameter's dtype and device; averages and numbers
        that are one a parameter keep their dtype here.
        """
        handle = self.register_load_state_dict_pre_hook(lambda _, final: loaded.append(final))
        loaded: list[dict[str, Any]] = []
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._forget(exposed=True)
        state_dict = loaded[0]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, param in zip(saved, self._all_params(), strict=True):
            saved_state = state_dict["state"].get(index, {})
            for name in self.carried_names:
                if name in saved_state:
                    value = torch.as_tensor(saved_state[name], dtype=_number_dtype()).clone()
                    self.state[param][name] = value
            for name in passes.OWN_DTYPE:
                if isinstance(kept := saved_state.get(name), Tensor):
                    self.state[param][name] = kept.detach().to(param.device, copy=True)

    def _all_params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    @hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if _cuda_in_use() and torch.cuda.is_current_stream_capturing():
            self._check_capturable()
        scale = NO_SCALE
        if "found_inf" in self.__dict__ or "grad_scale" in self.__dict__:
            scale = Scale(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        seen, self._seen = self._seen, None
        if scale.on_host() and scale.skip():
            if seen is None or seen[1] is None:
                self._verdict = None
            else:
                self._verdict = seen[1].given(scale.inverse(), skip=True)
            return loss
        told = scale.found_inf is not None or self._finds
        plan = self._current_plan(told) if seen is None else seen[0]
        verdict = None
        if plan.looks:
            verdict = self._judge(plan, seen and seen[1], scale)
            if verdict.skip:
                return loss
        for bucket in plan.buckets:
            self._run(bucket, scale, verdict)
        for odd in plan.odd:
            self._step_odd(odd, plan.keys[odd.group].update, scale)
        return loss

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Parameters hold their running averages inside (ema_decay), and their own values again
        after; one that has not been stepped yet keeps its own."""
        if not any(group.get("ema_decay") is not None for group in self.param_groups):
            raise RuntimeError(f"construct {type(self).__name__} with ema_decay to keep averages")
        states = self.state
        pairs = [(p, states[p][AVERAGED]) for p in self._all_params() if AVERAGED in states[p]]
        with torch.no_grad():
            kept = [param.clone() for param, _ in pairs]
            for param, average in pairs:
                param.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for (param, _), own in zip(pairs, kept, strict=True):
                    param.copy_(own)

    def _check_capturable(self) -> None:
        if not all(group.get("capturable") for group in self.param_groups):
            name = type(self).__name__
            raise RuntimeError(
                f"Attempting CUDA graph capture of step() for an instance of {name} but "
                f"param_groups' capturable is False. Construct {name}(..., capturable=True): its "
                "steps are then counted on the device, which is where a replay happens."
            )

    def _current_plan(self, told: bool) -> Plan:
        """The plan for the gradients that are there now, checked against every address it holds.

        told: whether somebody else may skip the step
        """
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        told = told or any(group.get("skip_nonfinite") for group in self.param_groups)
        unknown = told and any(plans.looks_on_device(param.device) for param in params[:1])
        keys = [
            (
                self.update_of(group),
                group.get("capturable", False),
                group.get("fused", False),
                group.get("differentiable", False),
                passes.extras_of(group),
                passes.measures((group,)),
                unknown,
            )
            for group in self.param_groups
        ]
        plan = self._plan
        if (
            plan is not None
            and plan.keys == keys
            and not (self._exposed and not plan.holds(self.__dict__["state"]))
            and plan.fits(params, grads, self._exposed)
        ):
            return plan
        self._plan = None
        for group, key in zip(self.param_groups, keys, strict=True):
            key[0].probe(group)
        with torch.no_grad():
            plan = build(self, params, grads, [GroupKey(*key) for key in keys])
            for bucket in plan.buckets:
                if not bucket.refresh(grads, exposed=False):
                    raise AssertionError("a plan must fit the gradients it was just built for")
        if not plan.odd:
            self._plan = plan
        return plan

    def _run(self, bucket: Bucket, scale: Scale, verdict: Verdict | DeviceVerdict | None) -> None:
        """One launch: stage, count, update, and tell autograd what was written."""
        if bucket.empty:
            return
        factors = [1.0] * len(self.param_groups)
        seen = verdict.on(bucket.launch.device) if isinstance(verdict, DeviceVerdict) else None
        if bucket.on_device:
            bucket.run_on_device(self.param_groups, scale, seen)
        elif seen is not None:
            bucket.run(self.param_groups, factors, self._exposed, seen)
        elif not scale.skip():
            inverse = scale.inverse()
            if isinstance(verdict, Verdict):
                factors = verdict.coefficients
            bucket.run(self.param_groups, [inverse * c for c in factors], self._exposed)
        else:
            return
        increment_version(bucket.touched(states=self._exposed))

    def _step_odd(self, odd: Odd, update: Update, scale: Scale) -> None:
        group, param = self.param_groups[odd.group], odd.param
        grad = param.grad
        if grad is None or scale.skip():
            return
        if odd.sparse:
            if scale.grad_scale is not None:
                raise RuntimeError(
                    f"{type(self).__name__} with fused=True cannot unscale sparse gradients: got "
                    "one with a grad_scale. Leave fused unset, and GradScaler unscales before."
                )
            with torch.no_grad():
                self.step_sparse(param, grad, group)
            return
        state, numbers = self._state_of(param, update), self._numbers_of(param, update)
        factor = sign(group) * scale.inverse()
        with torch.set_grad_enabled(bool(group.get("differentiable"))):
            eager.step_param(update, param, grad, state, numbers, group, factor)

    def _state_of(self, param: Tensor, update: Update, averaged: bool = False) -> dict[str, Any]:
        """The state of a parameter; an update without any leaves no entry, as with torch."""
        if not update.counted and not update.state_names and not averaged:
            return {}
        state: dict[str, Any] = self.__dict__["state"][param]
        return state

    def _numbers_of(self, param: Tensor, update: Update) -> dict[str, Any]:
        """Where a parameter's step is counted."""
        if update.counted:
            return self._state_of(param, update)
        return self._hidden.setdefault(param, {})

    def _first(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        if name == AVERAGED:
            # In 16 bits an average stands still: a step of 1e-3 of it is rounded away.
            low = param.dtype in (torch.bfloat16, torch.float16)
            return param.detach().to(torch.float32) if low else param.detach().clone()
        if name in passes.OWN_DTYPE:
            return torch.zeros_like(param, dtype=passes.OWN_DTYPE[name])
        return self.initial_state(name, param, group)

    def _init_missing_state(
        self, param: Tensor, group: dict[str, Any], key: GroupKey
    ) -> list[tuple[dict[str, Any], str]]:
        """Make the states a parameter lacks; returns what was made, to be undone on an error."""
        made = []
        update = key.update
        numbers = self._numbers_of(param, update)
        state = self._state_of(param, update, bool(key.state_names(param)))
        # Without a count in its state (SGD), a parameter begins where its buffer does.
        started = all(state.get(name) is not None for name in update.state_names)
        if "step" not in numbers or not (update.counted or started):
            first = 0.0 if update.counted or not started else 1.0
            numbers["step"] = self.initial_number(first, param, group)
            made.append((numbers, "step"))
        for name in (*update.carried, *key.state_names(param)):
            if state.get(name) is None:
                state[name] = self._first(name, param, group)
                made.append((state, name))
        return made


def _number_dtype(on_device: bool = False) -> torch.dtype:
    """What torch keeps its step counts in."""
    double = torch.get_default_dtype() == torch.float64 and not on_device
    return torch.float64 if double else torch.float32
