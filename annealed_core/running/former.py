"""The call of earlier versions, `Spec(...)`: its error names the new ones."""

from __future__ import annotations

from typing import Any


def Spec(experiment: str = "toy", **fields: Any) -> Any:
    """Raise TypeError with what takes the place of this call."""
    now = "Mnist(kernel=Gated(hidden=40, start='identity'), objective=AVO(weight=0.2, beta=Linear(0.2, 2e-4)))"
    if experiment != "mnist":
        now = f"Density(target={fields.get('target', 'D')!r}, kernel=Gated(hidden=32), objective=AVO())"
    raise TypeError(f"Spec is no more: write {now}; the README has a table of old and new fields")
