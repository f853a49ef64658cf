"""Densities that another system computes: arrays in, values and gradients out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from annealed_core.description import Whole

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
