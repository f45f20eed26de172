"""Progress of long runs on a terminal: rich bars fed by the Trainer's callbacks, by evaluations and by a grid."""

from __future__ import annotations

from typing import Any

import transformers
from rich.progress import Progress

from xfast.stilts.estimate import Estimate


class TrainingBar(transformers.TrainerCallback):
    """Shows steps, loss and the last dev score."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step, note="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        shown = [f"{name} {float(logs[key]):.4g}" for key, name in _SHOWN.items() if key in (logs or {})]
        if shown and self.task is not None:
            self.progress.update(self.task, note=" ".join(shown))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.remove_task(self.task)
        self.task = None


_SHOWN = {"loss": "loss", "eval_score": "dev score"}


class EvaluationBar:
    """One bar a language."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, Any] = {}

    def __call__(self, language: str, done: int, total: int) -> None:
        """As :func:`xfast.stilts.evaluation.evaluate` calls it."""
        if language not in self.tasks:
            self.tasks[language] = self.progress.add_task(language, total=total, note="")
        self.progress.update(self.tasks[language], completed=done, total=total)
        if done >= total:
            self.progress.remove_task(self.tasks.pop(language))


def cost(estimate: Estimate) -> str:
    """One line about what a run will cost."""
    hours, memory = estimate.seconds / 3600, estimate.memory_bytes / 2**30
    duration = f"{hours:.1f} h" if hours >= 1 else f"{estimate.seconds / 60:.0f} min"
    return (
        f"{estimate.steps} steps, {estimate.examples} examples, {estimate.tokens / 1e6:.2f} M tokens, "
        f"{estimate.parameters / 1e6:.0f} M parameters; about {memory:.1f} GiB and, to a factor of 2, {duration} "
        f"on {estimate.device}"
    )
