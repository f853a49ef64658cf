"""Spec: everything that a run depends on, checked when it is made."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, TypeVar

from annealed_core import targets
from annealed_core.earlier import FAULTS
from annealed_core.fields import METHODS, refuse_unless_valid, suggest
from annealed_core.schedules import SCHEDULES, Schedule, checked, warn_if_far_from_one

_T = TypeVar("_T")

_AVO = ("avo", "calibrated", "mixture")  # what follows a path
SCHEDULED = ("beta0", "gamma", "cycles", "ratio", "shape")  # what only some schedules have
_HIERARCHICAL = ("hvi", "avo", "mixture")  # chains of stochastic kernels on MNIST

#: What each experiment's fields are unless a spec says otherwise; a field that is not listed does not apply to it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "toy": {
        "target": "D",
        "kernel": "gated",
        "n_transitions": 4,
        "hidden": 32,
        "bins": 8,
        "steps": 3000,
        "batch": 128,
        "lr": 1e-3,
        "lr_schedule": "constant",
        "beta1": 0.9,
        "initialisation": "default",
        "path": "linear",
        "elbo_steps": 0,
        "avo_weight": 0.2,
        "warmup": 0.5,
        "beta0": 0.1,
        "iwae_samples": 8,
        "samples": 20_000,
    },
    "mnist": {
        "n_transitions": 5,
        "hidden": 40,
        "epochs": 25,
        "batch": 64,
        "lr": 1e-3,
        "lr_schedule": "constant",
        "beta1": 0.9,
        "initialisation": "identity",
        "latents": 40,
        "width": 300,
        "layers": "plain",
        "base": "encoder",
        "path": "linear",
        "faults": (),
        "ema": 0.0,
        "iwae_samples": 5,
        "decoder": "independent",
        "anneals": "beta",
        "schedule": "linear",
        "beta0": 0.2,
        "gamma": 2e-4,
        "cycles": 4,
        "ratio": 0.5,
        "shape": "linear",
        "capacity": 25.0,
        "avo_weight": 0.2,
        "precision": "highest",
        "train_images": 50_000,
        "nll_samples": 100,
        "nll_images": 10_000,
        "bounds_images": 0,
        "explored_images": 0,
    },
}


def _refusing_unknown_fields(cls: type[_T]) -> type[_T]:
    """Have a dataclass say which field is unknown, and which may have been meant."""
    initialise, names = cls.__init__, [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(initialise)
    def __init__(self: _T, *values: Any, **fields: Any) -> None:
        for name, value in fields.items():
            if name not in names:
                meant = suggest(name, names) or f"choose from {', '.join(names)}"
                raise TypeError(f"unknown field {name!r} of {cls.__name__}, got {value!r}: {meant.strip()}")
        initialise(self, *values, **fields)

    cls.__init__ = __init__  # type: ignore[method-assign,assignment]
    return cls


@_refusing_unknown_fields
@dataclass(frozen=True)
class Spec:
    """Everything that a run depends on.

    Fields left at None take the experiment's default from `DEFAULTS`; a field that the experiment or method does not
    use must stay None. Raises ValueError with one line that names the field, the value and what it takes; TypeError
    for a field that there is not.

    Attributes:
        experiment: "toy" (an energy, or any target) or "mnist".
        method: for toys "elbo", "alpha" (alpha-annealing), "iwae", "avo", "calibrated" (a weighted sum of AVO and ELBO)
            or "mixture" (AVO or ELBO by chance at each step); for MNIST "vae", "hvi", "avo" (calibrated), "mixture",
            "planar", "householder" or "iaf" (the encoder's Gaussian followed by a flow), or "iwae".
        seed: of weights, data order and noise.
        target: toys: a name in `targets.ENERGIES`, or an object with `log_prob` and `dim`.
        kernel: toys: "gated" or "residual" (pairs of Gaussians), "planar", "householder", "iaf" or "spline" (flows).
        n_transitions: T, the number of kernels.
        hidden: width of the kernels' networks; flows have two layers of it.
        bins: of a spline.
        steps, epochs: length of training (toy, MNIST).
        batch: samples or images in a step.
        lr, lr_schedule, beta1: Adam's learning rate, whether it stays or falls to 0 as a cosine, its first decay rate.
        initialisation: of pairs of Gaussians: "default" (torch's) or "identity" (near the identity).
        path: of AVO's exponents: "linear", "geometric", or "learned" as in NVI; on MNIST one path for all images.
        elbo_steps: how many of the steps, the last ones, train on the ELBO instead.
        avo_weight: the weight of AVO against the ELBO ("calibrated", MNIST's "avo"), or its chance ("mixture"). On
            MNIST AVO trains the kernels; at weight 1 it alone does, and the ELBO trains encoder and decoder.
        warmup, beta0: alpha-annealing: the share of the steps in which alpha rises, and where it starts.
        iwae_samples: in a group; a toy's batch is made of such groups, each image has one.
        samples: toys: samples drawn for the metrics.
        latents, width: of the auto-encoder.
        layers: "plain" (LeakyReLU and batch normalisation) or "gated" as in Tomczak & Welling 2016.
        base: where the chain of "hvi", "avo" and "mixture" starts: from the "encoder"'s q_0(z | x) or the "prior".
        faults: which of the earlier report's faults to train with, see `earlier.FAULTS`.
        ema: decay of the moving average of the weights that is judged and kept; 0 for the weights themselves.
        decoder: of the pixels: "independent" given z, or "autoregressive": each given z and those before it.
        anneals: what the schedule multiplies: "beta" all but the likelihood (deterministic warm-up), "alpha" the whole
            energy log p(x, z), "capacity" the KL term's target (Burgess et al. 2018). AVO and IWAE take beta alone.
        schedule: "constant" (1), "linear", "geometric", "cyclical", or any function of the step, see `schedules`.
        beta0, gamma: where it starts, and what it rises by; of "linear" and "geometric". A warning names a
            gamma where training ends below 0.95.
        cycles, ratio, shape: of "cyclical".
        capacity: nats of KL that are aimed at in the end.
        precision: in which encoder and decoder with plain layers multiply matrices in training: "highest" (float32) or
            "medium" (bfloat16 where the processor has it, which is faster). All that judges is in float32.
        train_images: how many of the 50,000 training images are used.
        nll_samples, nll_images: importance samples for each image, and how many test images, for the likelihood.
        bounds_images: test images whose likelihood is also taken by annealing, and bounded from both sides.
        explored_images: test images over which it is measured how much the posterior explores, see `exploration`.
    """

    experiment: str
    method: str
    seed: int = 0
    target: Any = None
    kernel: str | None = None
    n_transitions: int | None = None
    hidden: int | None = None
    bins: int | None = None
    steps: int | None = None
    epochs: int | None = None
    batch: int | None = None
    lr: float | None = None
    lr_schedule: str | None = None
    beta1: float | None = None
    initialisation: str | None = None
    path: str | None = None
    elbo_steps: int | None = None
    warmup: float | None = None
    iwae_samples: int | None = None
    samples: int | None = None
    latents: int | None = None
    width: int | None = None
    decoder: str | None = None
    anneals: str | None = None
    schedule: Any = None
    beta0: float | None = None
    gamma: float | None = None
    cycles: int | None = None
    ratio: float | None = None
    shape: str | None = None
    capacity: float | None = None
    avo_weight: float | None = None
    precision: str | None = None
    train_images: int | None = None
    nll_samples: int | None = None
    nll_images: int | None = None
    layers: str | None = None
    base: str | None = None
    faults: Any = None
    ema: float | None = None
    bounds_images: int | None = None
    explored_images: int | None = None

    def __post_init__(self) -> None:
        refuse_unless_valid("experiment", self.experiment)
        methods = METHODS[self.experiment]
        if self.method not in methods:
            raise ValueError(
                f"unknown method {self.method!r}: for {self.experiment!r} choose one of {', '.join(methods)}"
            )
        defaults = self._defaults()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in defaults:
                object.__setattr__(self, field.name, defaults[field.name])
            elif value is not None:
                if field.name not in ("experiment", "method", "seed", *defaults):
                    other = field.name != "kernel" and self.kernel not in (None, "gated")
                    kernel = f" with kernel {self.kernel!r}" if other else ""
                    where = f"method {self.method!r}{kernel} of experiment {self.experiment!r}"
                    if field.name in SCHEDULED and self.experiment == "mnist":
                        where += f" with schedule {self.schedule or defaults['schedule']!r}"
                    raise ValueError(f"{field.name} does not apply to {where}, got {value!r}")
                refuse_unless_valid(field.name, value)
                if field.type.startswith("float"):
                    object.__setattr__(self, field.name, float(value))
                elif field.name == "faults":  # in one order, whatever the order they came in
                    object.__setattr__(self, "faults", tuple(fault for fault in FAULTS if fault in value))
        self._refuse_unless_consistent()

    def _refuse_unless_consistent(self) -> None:
        if self.n_transitions == 0 and self.method in _AVO:
            raise ValueError(f"impossible n_transitions 0: method {self.method!r} takes at least 1")
        if self.elbo_steps and self.elbo_steps > self.get("steps"):
            raise ValueError(f"impossible elbo_steps {self.elbo_steps}: there are {self.steps} steps in all")
        if self.experiment == "toy" and self.iwae_samples and self.get("batch") % self.iwae_samples:
            whole = f"batch {self.batch} is not made of whole groups of as many"
            raise ValueError(f"impossible iwae_samples {self.iwae_samples}: {whole}")
        lone = self.train_images is not None and self.train_images % self.get("batch") == 1
        if lone and self.layers == "plain":
            alone = f"the last of {self.train_images} images would be alone in its batch"
            raise ValueError(f"impossible batch {self.batch}: {alone}, which batch normalisation can't take")
        if self.path == "learned" and self.experiment == "mnist" and self.avo_weight == 0:
            raise ValueError("impossible avo_weight 0: a learned path takes AVO to be trained")
        if self.explored_images and 10 * self.get("latents") > 10_000:
            raise ValueError(f"impossible latents {self.latents}: with explored_images, latents takes at most 1,000")
        if self.experiment == "mnist":
            self._refuse_unless_annealed()

    def _refuse_unless_annealed(self) -> None:
        """Look at the whole schedule, once: a function given is not asked again."""
        if self.schedule == "cyclical" and self.get("cycles") > self.n_steps:
            raise ValueError(f"impossible cycles {self.cycles}: there are {self.n_steps:,} steps in all")
        must_end = self.anneals in ("alpha", "capacity")
        if self.schedule == "constant":
            made = SCHEDULES["constant"]()
        elif self.schedule == "cyclical":
            made = SCHEDULES["cyclical"](self.n_steps, self.cycles, self.ratio, self.shape)
        elif isinstance(self.get("schedule"), str):
            made = SCHEDULES[self.get("schedule")](self.beta0, self.gamma)
        else:
            made = checked(self.get("schedule"), self.n_steps, may_end_below_one=not must_end)
        last = self.n_steps - 1
        if must_end and made(last) < 1:
            ends = f"it ends at {made(last)!r} at step {last:,}"
            raise ValueError(f"impossible schedule {self.schedule!r}: {ends}, and {self.anneals!r} must end at 1")
        if self.schedule in ("linear", "geometric"):
            warn_if_far_from_one(self.schedule, self.get("beta0"), self.get("gamma"), self.n_steps)
        object.__setattr__(self, "_annealing", made)

    def _defaults(self) -> dict[str, Any]:
        defaults = dict(DEFAULTS[self.experiment])
        unused: set[str] = set()
        if self.method not in (("calibrated", "mixture") if self.experiment == "toy" else ("avo", "mixture")):
            unused.add("avo_weight")
        if self.experiment == "mnist":
            unused |= {"n_transitions"} if self.method in ("vae", "iwae") else set()
            unused |= set() if self.method in (*_HIERARCHICAL, "iaf") else {"hidden"}
            unused |= set() if self.method in _HIERARCHICAL else {"initialisation", "base"}
            unused |= set() if self.method in _AVO else {"path", "faults"}
            unused |= set() if self.method == "iwae" else {"iwae_samples"}
            unused |= {"anneals"} if self.method in (*_AVO, "iwae") else set()
            unused |= set() if self.anneals == "capacity" and "anneals" not in unused else {"capacity"}
            schedule = self.schedule or defaults["schedule"]
            unused |= set() if schedule in ("linear", "geometric") else {"beta0", "gamma"}
            unused |= set() if schedule == "cyclical" else {"cycles", "ratio", "shape"}
        if self.experiment == "toy":
            kernel = self.kernel or defaults["kernel"]
            unused |= set() if kernel in ("gated", "residual") else {"initialisation"}
            unused |= {"hidden"} if kernel in ("planar", "householder") else set()
            unused |= set() if kernel == "spline" else {"bins"}
            unused |= set() if self.method in _AVO else {"path", "elbo_steps"}
            unused |= set() if self.method == "alpha" else {"warmup", "beta0"}
            unused |= set() if self.method == "iwae" else {"iwae_samples"}
        return {name: value for name, value in defaults.items() if name not in unused}

    def get(self, name: str) -> Any:
        """The value of a field that applies; AttributeError where it does not."""
        value = getattr(self, name)
        if value is None:
            raise AttributeError(f"{name} does not apply to {self.label}")
        return value

    def replace(self, **changes: Any) -> Spec:
        """The same spec with other values; fields that no longer apply are dropped."""
        fields = {**self.fields(), **changes}
        probe = object.__new__(Spec)
        for field in dataclasses.fields(Spec):
            object.__setattr__(probe, field.name, fields.get(field.name))
        refuse_unless_valid("experiment", probe.experiment)
        applies = {"experiment", "method", "seed", *probe._defaults()}
        return Spec(**{name: value for name, value in fields.items() if name in applies or name in changes})

    def fields(self) -> dict[str, Any]:
        """The fields that apply, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is not None}

    @property
    def n_steps(self) -> int:
        """How many steps training takes."""
        if self.experiment == "toy":
            return int(self.get("steps"))
        return int(self.get("epochs") * -(-self.get("train_images") // self.get("batch")))

    @property
    def annealing(self) -> Schedule:
        """MNIST: the schedule that the fields describe, looked at when the spec was made."""
        made: Schedule = self._annealing  # type: ignore[attr-defined]
        return made

    @property
    def target_object(self) -> Any:
        """The target itself, where the experiment has one."""
        return targets.find(self.target) if isinstance(self.target, str) else self.target

    @property
    def label(self) -> str:
        """A short readable name, such as toy-D-avo-s0."""
        target = self.target if isinstance(self.target, str) or self.target is None else type(self.target).__name__
        return "-".join(
            str(part) for part in (self.experiment, target, self.method, f"s{self.seed}") if part is not None
        )
