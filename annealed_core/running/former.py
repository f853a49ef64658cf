"""The call of earlier versions, `Spec(...)`: its error names the new one."""

from __future__ import annotations

from typing import Any

_TOYS = {
    "elbo": "ELBO()",
    "alpha": "AlphaELBO(alpha=Linear(0.1, 6e-4))",
    "iwae": "IWAE(samples=8)",
    "avo": "AVO()",
    "calibrated": "AVO(weight=0.2)",
    "mixture": "Mixed(AVO(), ELBO(), chance=0.2)",
}
_KERNELS = {"gated": "Gated(hidden=32)", "iaf": "IAF(hidden=32)", "spline": "Spline(hidden=32)"}
_GATED = "kernel=Gated(hidden=40, start='identity'), objective="
_BETA = "beta=Linear(0.2, 2e-4)"
_MNIST = {
    "vae": f"objective=ELBO({_BETA})",
    "hvi": f"{_GATED}ELBO({_BETA})",
    "avo": f"{_GATED}AVO(weight=0.2, {_BETA})",
    "mixture": f"{_GATED}Mixed(LocalAVO({_BETA}), ELBO({_BETA}), chance=0.2)",
    "planar": f"kernel=Planar(), objective=ELBO({_BETA})",
    "householder": f"kernel=Householder(), objective=ELBO({_BETA})",
    "iaf": f"kernel=IAF(hidden=40), objective=ELBO({_BETA})",
    "iwae": f"objective=IWAE(samples=5, {_BETA})",
}


def Spec(experiment: str = "toy", method: str = "elbo", **fields: Any) -> Any:
    """Raise TypeError with the call that takes the place of this one."""
    rest = "".join(f", {name}={fields[name]!r}" for name in ("n_transitions", "seed") if name in fields)
    if experiment == "mnist":
        now = f"Mnist({_MNIST.get(method, _MNIST['vae'])}{rest})"
    else:
        target, kernel = fields.get("target", "D"), str(fields.get("kernel", "gated"))
        shown = repr(target) if isinstance(target, str) else type(target).__name__ + "()"
        kernel = _KERNELS.get(kernel, f"{kernel.capitalize()}()")
        now = f"Density(target={shown}, kernel={kernel}, objective={_TOYS.get(method, 'ELBO()')}{rest})"
    raise TypeError(f"Spec is no more: write {now}; the README has a table of old and new fields")
