"""Problems: what an experiment consists of.

Each builds models from specs, gives one objective a step, and judges the results. Toys are trained many at a time
(`toys.Toys`), auto-encoders one by one (`mnist.Mnist`).
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from annealed_core.spec import Spec


class Problem(Protocol):
    """M models trained side by side, each by its own spec."""

    specs: list[Spec]

    @property
    def model(self) -> nn.Module:
        """What is trained: the weights of all models."""
        ...

    @property
    def failures(self) -> dict[int, str]:
        """Models whose training failed, and one line on why."""
        ...

    steps: int
    steps_per_record: int

    def objective(self, step: int) -> Tensor:
        """The objective of each model at that step, to be maximised: (M,), in nats."""
        ...

    def record(self) -> list[dict[str, float]]:
        """A line of each model's history."""
        ...

    def metrics(self) -> list[dict[str, Any]]:
        """Each model's final figures."""
        ...

    def weights(self) -> list[dict[str, Tensor]]:
        """Each model's own weights."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside weights, optimiser and random state."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take a state that `state` gave."""
        ...
