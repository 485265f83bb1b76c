"""The training loop: one compiled step, called until there is a reason to stop.

A step is forward, backward and update in one program, which is compiled before the first step and
reuses the memory of the parameters and of the optimiser's state. Its scalars stay on the devices
while the next step is made ready; the loop waits for them then, or where a record is due.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tpmlp.ahead import compile_lowered
from tpmlp.batch import Batch
from tpmlp.kernels.network import param_dtype
from tpmlp.objective import Evaluated, Objective
from tpmlp.randomness import random_words
from tpmlp.train import callbacks as hooks
from tpmlp.train.batches import Plan, Samples, Step
from tpmlp.train.inference import MAX_IN_FLIGHT, evaluate_samples, warm_up
from tpmlp.train.optimizer import ShardedOptimizer
from tpmlp.train.progress import Progress

Stopped = Literal["finished", "callback", "interrupted", "diverged"]
Params = Any

# What a record says of its own batch.
BATCH_NUMBERS = ("loss", "penalty", "accuracy")


WAY_OUT = (
    "Use a smaller learning rate, clip gradients (optax.clip_by_global_norm), or scale the inputs."
)


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a run leaves.

    Attributes:
        params: after the last step; of the best record with EarlyStopping(restore_best=True).
        opt_state: the optimiser's state after the last step.
        history: one dictionary a record: step, epoch, loss (of that step's batch, before its
            update, without R), penalty (R), accuracy (of the batch, where the loss has one),
            samples_per_s (since the record before), seconds (since the first step); after the
            last step of an epoch, and of the run, validation_loss and validation_accuracy.
        stopped: "finished", "callback" (one of them said so), "interrupted" (Ctrl-C) or
            "diverged" (the objective is no longer finite; then params seldom are).
        message: the same as a sentence, with what to do about it.
        steps: updates made.
        seconds: from the first step to the last; compilation is not in it.
    """

    params: Params = field(repr=False)
    opt_state: Any = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)
    stopped: Stopped
    message: str
    steps: int
    seconds: float


def _all_finite(params: Params) -> bool:
    finite = jax.jit(lambda leaves: [jnp.isfinite(leaf).all() for leaf in leaves])
    return all(map(bool, finite(jax.tree.leaves(params))))


def compile_step(
    objective: Objective,
    optimizer: ShardedOptimizer,
    params: Params,
    state: Any,
    batch: Batch,
    keys: tuple[jax.Array, ...] = (),
) -> jax.stages.Compiled:
    """Compile one training step for arrays like these; it consumes parameters and state.

    Compiled ahead of time, it cannot compile again: it refuses arrays of another shape. All may
    be ShapeDtypeStructs, placed on devices that are only described.

    Raises:
        MemoryError: it does not fit the device; shows what was predicted, the optimiser's state
            not counted.
    """

    def update(
        params: Params, state: Any, batch: Batch, *keys: jax.Array
    ) -> tuple[Params, Any, Evaluated]:
        words = random_words(keys[0]) if keys else None
        value, grads = objective.value_and_grad(params, batch, words)
        total = value.loss + value.penalty
        return *optimizer.apply(grads, state, params, total), value

    placed = objective.model.shardings(objective.placement)
    everywhere = NamedSharding(objective.placement.mesh, PartitionSpec())
    shardings = (placed, optimizer.state_shardings, everywhere)
    jitted = jax.jit(update, donate_argnums=(0, 1), out_shardings=shardings)
    rows, dtype = batch.weight.shape[0], param_dtype(params)
    return compile_lowered(jitted.lower(params, state, batch, *keys), objective, rows, dtype)


class Run:
    """One run: what fit checked, and what changes from step to step."""

    def __init__(
        self,
        *,
        objective: Objective,
        optimizer: ShardedOptimizer,
        samples: Samples,
        plan: Plan,
        validation: Samples | None,
        callbacks: tuple[hooks.Callback, ...],
        log_every: int,
    ) -> None:
        self.objective, self.optimizer = objective, optimizer
        self.samples, self.plan, self.validation = samples, plan, validation
        self.callbacks, self.log_every = callbacks, log_every
        self.history: list[hooks.Record] = []
        self.begun: deque[tuple[Step, Evaluated]] = deque()
        self.numbers: dict[str, float] = {}
        self.num_steps = self.num_samples = 0

    def __call__(
        self, params: Params, interrupted: Callable[[], bool], progress: Progress
    ) -> FitResult:
        """Compile, train and return the result; consumes params."""
        self.params, self.state = params, self.optimizer.init(params)
        self.interrupted, self.progress = interrupted, progress
        self._compile()
        hooks.start(self.callbacks)
        self.began = time.perf_counter()
        self.recorded = (self.began, 0)
        stopped, message = self._train()
        jax.block_until_ready(self.params)
        seconds = time.perf_counter() - self.began
        progress.say(message)
        return FitResult(
            params=hooks.best_params(self.callbacks, self.params),
            opt_state=self.state,
            history=self.history,
            stopped=stopped,
            message=message,
            steps=self.num_steps,
            seconds=seconds,
        )

    def _compile(self) -> None:
        batch = self.samples.take(next(self.plan.steps()).rows, self.plan.batch_size)
        self.update = compile_step(
            self.objective, self.optimizer, self.params, self.state, batch, self._keys(1)
        )
        if self.validation is not None:
            warm_up(self.objective, self.params, self.validation, self._validation_size)

    def _train(self) -> tuple[Stopped, str]:
        for step in self.plan.steps():
            if self.interrupted():
                return self._interrupt()
            self._advance(step)
            due = self._is_due(step)
            broken = self._wait(0 if due else MAX_IN_FLIGHT - 1)
            if broken is not None:
                return self._diverge(broken)
            if due and (stopping := self._record(step, validate=self._is_validated(step))):
                return "callback", f"stopped by {stopping!r} after step {step.number}."
        if not _all_finite(self.params):
            return "diverged", (
                f"diverged: the parameters are not finite after the last step, {self.num_steps}. "
                f"{WAY_OUT}"
            )
        return "finished", f"finished after step {self.num_steps}."

    def _advance(self, step: Step) -> None:
        batch = self.samples.take(step.rows, self.plan.batch_size)
        self.params, self.state, value = self.update(
            self.params, self.state, batch, *self._keys(step.number)
        )
        self.begun.append((step, value))
        self.num_steps = step.number
        self.num_samples += len(step.rows)

    def _keys(self, number: int) -> tuple[jax.Array, ...]:
        """Return the key of a step, alone in a tuple, if the model drops at random."""
        if not getattr(self.objective.model, "dropouts", ()):
            return ()
        return (jax.random.fold_in(jax.random.key(self.plan.seed), number),)

    def _wait(self, leave: int) -> Step | None:
        """Wait until at most `leave` steps are not done; return the first that is not finite."""
        while len(self.begun) > leave:
            step, value = self.begun.popleft()
            loss, penalty, correct = map(float, jax.device_get(value))
            self.numbers |= {"loss": loss, "penalty": penalty}
            self.numbers |= {} if math.isnan(correct) else {"accuracy": correct}
            if not math.isfinite(loss + penalty):
                return step
            elapsed_s = time.perf_counter() - self.began
            self.progress.update(step.number, self.num_samples, elapsed_s, self._shown())
        return None

    def _is_due(self, step: Step) -> bool:
        logged = step.number % self.log_every == 0 or step.number == self.plan.num_steps
        return logged or self._is_validated(step)

    def _is_validated(self, step: Step) -> bool:
        at_end = step.ends_epoch or step.number == self.plan.num_steps
        return self.validation is not None and at_end

    def _record(self, step: Step, *, validate: bool) -> hooks.Callback | None:
        """Record a step whose numbers are here; return a callback that says to stop."""
        now = time.perf_counter()
        then, samples_then = self.recorded
        record: hooks.Record = {"step": step.number, "epoch": step.epoch}
        record |= {k: self.numbers[k] for k in BATCH_NUMBERS if k in self.numbers}
        record["samples_per_s"] = (self.num_samples - samples_then) / (now - then)
        record["seconds"] = now - self.began
        record |= self._validate() if validate else {}
        self.history.append(record)
        answers = [callback(dict(record), self.params) for callback in self.callbacks]
        self.recorded = (time.perf_counter(), self.num_samples)
        pairs = zip(self.callbacks, answers, strict=True)
        return next((callback for callback, answer in pairs if answer), None)

    @property
    def _validation_size(self) -> int:
        assert self.validation is not None
        return min(self.plan.batch_size, self.validation.num_samples)

    def _validate(self) -> dict[str, float]:
        assert self.validation is not None
        result = evaluate_samples(
            self.objective, self.params, self.validation, self._validation_size
        )
        found = {"validation_loss": result.loss}
        found |= {} if result.accuracy is None else {"validation_accuracy": result.accuracy}
        self.numbers |= found
        return found

    def _shown(self) -> dict[str, float]:
        return {name: value for name, value in self.numbers.items() if name != "penalty"}

    def _diverge(self, step: Step) -> tuple[Stopped, str]:
        self._record(step, validate=False)
        total = self.numbers["loss"] + self.numbers["penalty"]
        return "diverged", (f"diverged: the objective is {total} at step {step.number}. {WAY_OUT}")

    def _interrupt(self) -> tuple[Stopped, str]:
        last = self.begun[-1][0] if self.begun else None
        broken = self._wait(0)
        if broken is not None:
            return self._diverge(broken)
        if last is not None:
            self._record(last, validate=False)
        return "interrupted", (
            f"interrupted after step {self.num_steps} of {self.plan.num_steps}; the result holds "
            "what was learned so far."
        )
