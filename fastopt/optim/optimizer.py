"""The base class of every optimizer: torch's contract around one launch a device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastopt.optim import options
from fastopt.optim.additions import Additions
from fastopt.optim.state import averages, checkpoints, formats, saving
from fastopt.optim.state.store import StateStore
from fastopt.optim.step import fallback, interrupts, sharding
from fastopt.optim.step import plan as plans
from fastopt.optim.step.grad_norm import ClipResult, DeviceClipResult, ReportedClip
from fastopt.optim.step.grad_scale import NO_SCALE, Scale
from fastopt.optim.step.group_key import GroupKey, ParamRef
from fastopt.optim.step.hooks import hooked
from fastopt.optim.step.launch_group import LaunchGroup
from fastopt.optim.step.plan import Plan, build
from fastopt.optim.update import Update, number_dtype
from fastopt_kernels.chunks import NO_OPTIONS

_cuda_in_use = cast("Callable[[], bool]", torch.cuda.is_initialized)


class FusedOptimizer(Additions, torch.optim.Optimizer):
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
    nonnegative_names: states that are never below zero, such as means of squares.
    eight_bit_names: states that state_dtype="8bit" may keep in 8 bits.

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
    nonnegative_names: ClassVar[tuple[str, ...]] = ()
    eight_bit_names: ClassVar[tuple[str, ...]] = ()

    _update: ClassVar[Update]
    # Held for a step: threads that step one optimizer take turns.
    _lock: threading.RLock
    # Set where a ZeroRedundancyOptimizer has given this one its rank's part of the parameters.
    _in_zero: bool = False
    # Options by keyword, while constructors run: each group begins with them.
    _given: Mapping[str, Any] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        init = cls.__init__
        if init is not torch.optim.Optimizer.__init__ and not hasattr(init, "takes_options"):
            cls.__init__ = options.with_options(init)  # type: ignore[method-assign]
        if "rule" in cls.__dict__:
            cls._update = Update(
                cls.rule,
                cls.scalars,
                cls.state_names,
                cls.carried_names,
                nonnegative=cls.nonnegative_names,
                eight_bit=cls.eight_bit_names,
            )

    @property
    def state(self) -> Any:
        """The states by parameter, as torch has them."""
        self._store.was_accessed = True
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["state"] = value
        # The constructor of torch.optim.Optimizer makes the first one, and keeps no reference.
        self._forget(state_was_accessed="param_groups" in self.__dict__)

    def _forget(self, state_was_accessed: bool) -> None:
        self._plan, self._skipped_telemetry = None, None
        self._store = StateStore(self.__dict__["state"], self, state_was_accessed)
        self.__dict__.setdefault("_lock", threading.RLock())

    # A subclass may override these.

    def initial_state(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        """A state before the first step: zeros laid out like the parameter."""
        return torch.zeros_like(param, memory_format=torch.preserve_format)

    def initial_number(self, value: float, param: Tensor, group: dict[str, Any]) -> Tensor:
        """A number kept one a parameter: on its device where the step is counted there."""
        on_device = bool(group.get("capturable") or group.get("fused"))
        device = param.device if on_device else torch.device("cpu")
        return torch.full((), value, dtype=number_dtype(on_device), device=device)

    def step_sparse(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """One step of a parameter whose gradient is sparse, where the optimizer has one."""
        raise RuntimeError(self.sparse_error(group))

    def sparse_error(self, group: dict[str, Any]) -> str | None:
        """The reason why sparse gradients are refused; None where they are not."""
        return (
            f"{type(self).__name__} does not support sparse gradients. fastopt.optim.SGD and "
            "Adagrad do; or make the gradient dense (sparse=False in the embedding)."
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        own = isinstance(param_group, dict) and param_group.get("max_grad_norm") is not None
        if isinstance(param_group, dict):
            for name, value in options.chosen(self._given, self.defaults).items():
                param_group.setdefault(name, value)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            sharding.check(self)
            if self._released is not None:
                self._released.follow()
        except Exception:
            del self.param_groups[-1]
            raise
        if own:
            self.param_groups[-1][options.ALONE] = True
        self._plan = None

    def _check_group(self, group: dict[str, Any]) -> None:
        options.check(group)
        formats.check(self.update_of(group), group, type(self).__name__)
        if group.get("state_dtype") is not None:
            group["state_dtype"] = formats.named(group["state_dtype"])

    def __getstate__(self) -> dict[str, Any]:
        # Telemetry of the last step is in a plan, which is about addresses and stays behind.
        kept: dict[str, Any] = {"_copied_telemetry": self._telemetry_rows()}
        if self._clip is not None:
            kept["_clip"] = ReportedClip(self.last_step)
        return {**super().__getstate__(), **{k: v for k, v in kept.items() if v is not None}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's classes read the states while they are set.
        self._store = StateStore(state["state"], self, was_accessed=True)
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            if "state_dtype" in group:
                group["state_dtype"] = formats.named(group["state_dtype"])
        for key, held in self.__dict__["state"].items():
            if isinstance(held, dict) and (new := formats.renamed(held)).keys() != held.keys():
                self.__dict__["state"][key] = new
        self._forget(state_was_accessed=True)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; states as they are stored, and a version where that is not torch's way.

        States of 8 bits have names of their own, and a last group without parameters: torch's class
        refuses them. `torch_state_dict` is what it takes.
        """
        averages.end_backward(self)
        return saving.stamped(super().state_dict())

    def torch_state_dict(self) -> dict[str, Any]:
        """The state_dict that torch.optim's class of this name would save: its states in floating
        point, its options, and nothing else. Parameters are saved by the model, as they are."""
        return saving.plain(torch.optim.Optimizer.state_dict(self), self.carried_names)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim's class of that name, of any format.

        How this optimizer steps and stores stays as it was constructed, group by group: clipping,
        skipping, averages, rounding, state_dtype, telemetry. Hyper-parameters of torch's class are
        the state_dict's. States of another format are converted at the next step. torch casts every
        state but "step" to the parameter's dtype and device; averages, numbers that are one a
        parameter and, with state_dtype, all states keep the dtype they were saved in until then.

        Raises ValueError for a state_dict of a later version, for states that do not fit their
        parameter, and what the constructor would for the options and hyper-parameters of a group;
        RuntimeError inside averaged(). Nothing is loaded then.
        """
        averages.refuse_inside(self, "load_state_dict()")
        checkpoints.load(self, state_dict, super().load_state_dict)

    def _all_params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    @hooked
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's loss, if any."""
        if self._averaging is not None:
            averages.refuse_inside(self, "step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._released is not None:
            self._released.averages.end()
            self._released.check_step()
        if _cuda_in_use() and torch.cuda.is_current_stream_capturing():
            self._check_capturable()
        scale = NO_SCALE
        if "found_inf" in self.__dict__ or "grad_scale" in self.__dict__:
            scale = Scale(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        with self._lock:
            ahead, self._measured_ahead = self._measured_ahead, None
            if scale is not NO_SCALE and scale.on_host() and scale.skip():
                self.note_skip(scale, ahead and ahead[1])
            else:
                may_be_skipped = scale.found_inf is not None or self._finds_inf
                plan = self._current_plan(may_be_skipped) if ahead is None else ahead[0]
                self.run_plan(plan, scale, ahead and ahead[1])
        return loss

    def run_plan(
        self, plan: Plan, scale: Scale = NO_SCALE, measured: ClipResult | None = None
    ) -> None:
        """One step of what a plan holds, whole even where the user interrupts it.

        measured: norms of its gradients, where they have been measured already
        """
        handler = interrupts.hold()
        try:
            clip = self._clip = (
                self._measure_gradients(plan, measured, scale) if plan.measures_gradients else None
            )
            if self._skipped_telemetry is not None:
                self._forget_skipped_telemetry(plan.params)
            if clip is not None and clip.skip:
                self._note_skipped_telemetry(plan.params, scale.inverse())
                return
            for each in plan.fallback_params:
                fallback.check(self, self._store, each, plan.keys[each.group], scale)
            moves = self.average_moves(plan, scale, clip) if plan.averaged else None
            for launch_group in plan.count(
                self.param_groups, scale, clip, self._store.was_accessed
            ):
                self._run(launch_group, scale, clip)
            for each in plan.fallback_params:
                fallback.step(self, self._store, each, plan.keys[each.group], scale)
            if moves is not None:
                moves.run()
        finally:
            interrupts.release(handler)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        averages.end_backward(self)
        super().zero_grad(set_to_none)

    def update_of(self, group: dict[str, Any]) -> Update:
        """The update a parameter group is stepped by; the same object for the same settings."""
        return self._update

    def param_refs(self) -> Iterator[ParamRef]:
        """Every parameter with its group's number and its own among all, in order."""
        numbers = ((k, p) for k, group in enumerate(self.param_groups) for p in group["params"])
        for position, (number, param) in enumerate(numbers):
            yield ParamRef(param, number, position)

    def _current_plan(self, may_be_skipped: bool) -> Plan:
        """The plan for the gradients that are there now, checked against every address it holds.

        may_be_skipped: true where a GradScaler may skip the step on a device
        """
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        keys, plan = self._keys(may_be_skipped, params[:1]), self._plan
        # Whatever interrupts the check of a plan leaves it half updated: it is then built anew.
        self._plan = None
        if (
            plan is not None
            and plan.keys == keys
            and not (self._store.was_accessed and not plan.holds(self._store.states))
            and plan.fits(params, grads, self._store.was_accessed)
        ):
            self._plan = plan
            return plan
        plan = self._make_plan(list(self.param_refs()), grads, keys)
        plan.remember(self._store.states)
        if not plan.fallback_params:
            self._plan = plan
        return plan

    def plan_of(self, ref: ParamRef, plan: Plan | None) -> Plan:
        """A plan for one parameter alone; the one given, where it still holds."""
        param, held = ref.param, self._store.states
        keys, grads = self._keys(False, [param]), [param.grad]
        if (
            plan is None
            or plan.keys != keys
            or (self._store.was_accessed and not plan.holds({param: held.get(param)}))
            or not plan.fits([param], grads, self._store.was_accessed)
        ):
            plan = self._make_plan([ref], grads, keys)
            plan.remember({param: held.get(param)})
        return plan

    def plan_of_averages(self, param_refs: list[ParamRef]) -> Plan:
        """A plan in which nothing is stepped, and only averages move."""
        keys = self._keys(False, [ref.param for ref in param_refs])
        plan = self._make_plan(param_refs, [None] * len(param_refs), keys)
        plan.ends_backward = True
        return plan

    def _keys(self, may_be_skipped: bool, params: list[Tensor]) -> list[Any]:
        """The settings of each group that a plan depends on: a GroupKey, as a plain tuple."""
        for group in self.param_groups:
            if group.get("skip_nonfinite"):
                may_be_skipped = True
        may_be_skipped = may_be_skipped and any(
            plans.measures_on_device(param.device) for param in params
        )
        return [
            (
                update := self.update_of(group),
                group.get("capturable", False),
                group.get("fused", False),
                group.get("differentiable", False),
                # Calls are left out where the answer is the common one: this is most of a check.
                NO_OPTIONS
                if options.IN_KERNEL.isdisjoint(group)
                else options.step_options_of(group),
                group.get("max_grad_norm") is not None or bool(group.get("skip_nonfinite")),
                () if group.get("state_dtype") is None else formats.formats_of(update, group),
                may_be_skipped,
            )
            for group in self.param_groups
        ]

    def _make_plan(
        self, param_refs: list[ParamRef], grads: list[Tensor | None], keys: list[Any]
    ) -> Plan:
        for group, key in zip(self.param_groups, keys, strict=True):
            key[0].probe(group)
        with torch.no_grad():
            made = [GroupKey(*key) for key in keys]
            plan = build(self, self._store, param_refs, grads, made)
            for launch_group in plan.launch_groups:
                if not launch_group.refresh(grads, state_was_accessed=False):
                    raise AssertionError("a plan must fit the gradients it was just built for")
        self._copied_telemetry = None
        return plan

    def _check_capturable(self) -> None:
        if not all(group.get("capturable") for group in self.param_groups):
            name = type(self).__name__
            raise RuntimeError(
                f"Attempting CUDA graph capture of step() for an instance of {name} but "
                f"param_groups' capturable is False. Construct {name}(..., capturable=True): its "
                "steps are then counted on the device, which is where a replay happens."
            )

    def _run(
        self, launch_group: LaunchGroup, scale: Scale, clip: ClipResult | DeviceClipResult | None
    ) -> None:
        """One launch that was counted: stage, update, and tell autograd what was written."""
        on_device = (
            clip.on(launch_group.launch.device) if isinstance(clip, DeviceClipResult) else None
        )
        if launch_group.on_device:
            launch_group.run_on_device(scale, on_device)
        elif on_device is not None:
            launch_group.run((on_device, scale.grad_scale))
        else:
            launch_group.inverse_scale = 1.0 if scale is NO_SCALE else scale.inverse()
            launch_group.run()
        increment_version(launch_group.written_tensors(states=self._store.was_accessed))
