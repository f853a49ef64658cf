"""Densities of other systems: arrays in, values and gradients out; models of Pyro."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from annealed_core.description import Whole
from annealed_core.running.system import optional

#: An array (n, dim) of float64 -> log f in nats (n,), and its gradient (n, dim).
LogProbAndGradient = Callable[[np.ndarray], tuple[Any, Any]]


class External:
    """A target whose log-density and gradient come from JAX, NumPyro, Stan, PyMC or anything else.

        target = External(lambda z: tuple(map(np.asarray, jax.vmap(jax.value_and_grad(log_prob))(z))), dim=3)
        run(Density(target=target, name="my-posterior"))

    Args:
        log_prob_and_gradient: an array (n, dim) of float64 -> log f in nats (n,), and its gradient (n, dim).
        dim: dimensions of z.
        declared: what an `Energy` may declare beside: `support`, `base_scale`, `modes`, `log_normalizer` ...

    Its `log_prob` can be differentiated once: kernels that see the target, such as `Leapfrog`, take one that torch
    computes. Raises ValueError, with the shapes, where what comes back does not fit.
    """

    def __init__(self, log_prob_and_gradient: LogProbAndGradient, dim: int, **declared: Any) -> None:
        if not callable(log_prob_and_gradient):
            raise TypeError(f"log_prob_and_gradient must be a function of an array, got {log_prob_and_gradient!r}")
        checked = Whole(1)(dim)
        if checked is None:
            raise ValueError(f"impossible dim {dim!r} of External: dim takes a whole number from 1")
        self.log_prob_and_gradient, self.dim = log_prob_and_gradient, int(checked)
        vars(self).update(declared)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log f(z) in nats: (*batch, dim) -> (*batch,)."""
        values: Tensor = _Evaluate.apply(z.reshape(-1, self.dim), self.log_prob_and_gradient)
        return values.view(z.shape[:-1])


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, function: LogProbAndGradient) -> Tensor:
        given = z.detach().cpu().double().numpy()
        # A copy of what may be a read-only array of another library.
        values, gradient = (torch.from_numpy(np.array(each, dtype=np.float64)) for each in function(given))
        for name, found, shape in (("log f", values, given.shape[:1]), ("its gradient", gradient, given.shape)):
            if tuple(found.shape) != shape:
                raise ValueError(f"{name} of points {given.shape} must have shape {shape}, got {tuple(found.shape)}")
        ctx.save_for_backward(gradient.to(z))
        return values.to(z)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for, and would be silently wrong
            raise RuntimeError("the log_prob of an External can be differentiated once: this takes a target in torch")
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0].unsqueeze(-1) * gradient, None


class PyroModel:
    """The posterior of a Pyro model as a target, over all its latent sites in unconstrained space, one after another.

        run(Density(target=PyroModel(model, x, y), name="my-regression")).to_arviz()

    Args:
        model, given: the model and what it is called with; continuous sites only.

    Its sites and their transforms are those of Pyro's `initialize_model`. It is evaluated for many points at once by
    `torch.func.vmap`, which the model must allow: no branch that depends on a value. Raises ImportError without Pyro,
    ValueError for a model without continuous latent sites.
    """

    def __init__(self, model: Callable[..., Any], *given: Any, **named: Any) -> None:
        util = optional("pyro.infer.mcmc.util", "pyro")
        start, _, self._transforms, _ = util.initialize_model(model, given, named)
        self.name = str(getattr(model, "__name__", type(model).__name__))
        if not start:
            raise ValueError(f"Pyro's model {self.name} has no continuous latent sites")
        self._call = model, given, named
        self._sites = {name: value.shape for name, value in sorted(start.items())}
        self.dim = sum(shape.numel() for shape in self._sites.values())

    def _free(self, z: Tensor) -> dict[str, Tensor]:
        parts = z.split([shape.numel() for shape in self._sites.values()], -1)
        return {n: p.reshape((*z.shape[:-1], *s)) for (n, s), p in zip(self._sites.items(), parts, strict=True)}

    def constrained(self, z: Tensor) -> dict[str, Tensor]:
        """The sites as the model has them: (*batch, dim) -> {name: (*batch, *shape)}."""
        return {name: self._transforms[name].inv(value) for name, value in self._free(z).items()}

    def _log_joint(self, z: Tensor) -> Tensor:
        """Of one point (dim,), with the volume that the transforms take."""
        poutine, (model, given, named) = optional("pyro.poutine", "pyro"), self._call
        values, free = self.constrained(z), self._free(z)
        found: Tensor = poutine.trace(poutine.condition(model, values)).get_trace(*given, **named).log_prob_sum()
        for name, transform in self._transforms.items():
            found = found - transform.log_abs_det_jacobian(values[name], free[name]).sum()
        return found

    def log_prob(self, z: Tensor) -> Tensor:
        """Log joint density in unconstrained space, in nats: (*batch, dim) -> (*batch,)."""
        with optional("pyro", "pyro").validation_enabled(False):
            values: Tensor = torch.func.vmap(self._log_joint)(z.reshape(-1, self.dim))
        return values.view(z.shape[:-1])
