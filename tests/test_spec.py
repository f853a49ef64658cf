"""Spec: what it refuses and in which words, its defaults, and that it can't be changed."""

import dataclasses
import inspect
import json
import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from annealed_core.earlier import FAULTS
from annealed_core.fields import FIELDS, METHODS, check_parameter
from annealed_core.spec import DEFAULTS, Spec
from annealed_core.store import describe, key

TOY_METHODS = "elbo, alpha, iwae, avo, calibrated, mixture"
MNIST_METHODS = ", ".join(METHODS["mnist"])
ENERGIES = "A, B, C, D, E, F, ring8, gmm40, funnel, many_well"
every_method = pytest.mark.parametrize(("experiment", "method"), [(e, m) for e, ms in METHODS.items() for m in ms])
WHOLE = ["n_transitions", "hidden", "steps", "epochs", "batch", "samples", "latents", "width", "seed", "cycles"]
WHOLE += ["train_images", "nll_samples", "nll_images"]
REAL = ["lr", "beta1", "beta0", "gamma", "avo_weight", "ratio"]


class Bowl:
    """A user's own target."""

    dim = 2

    def log_prob(self, z):
        return -z.square().sum(-1)


def make(**fields):
    """An AVO spec, or a VAE's where AVO has no such field, of the experiment to which the fields apply."""
    toy = set(fields) & {"target", "steps", "samples"}
    own = {"experiment": "toy" if toy else "mnist", "method": "vae" if "anneals" in fields else "avo"}
    own |= {"schedule": "cyclical"} if set(fields) & {"cycles", "ratio", "shape"} else {}
    return Spec(**{**own, **fields})


SCHEDULED = "one of constant, linear, geometric, cyclical, or a function of the step"


BAD = [
    ({"experiment": "cifar"}, "unknown experiment 'cifar': experiment takes one of toy, mnist"),
    ({"experiment": None}, "impossible experiment None: experiment takes one of toy, mnist"),
    (
        {"experiment": "toy", "method": "vae"},
        f"unknown method 'vae': for 'toy' choose one of {TOY_METHODS}",
    ),
    ({"experiment": "mnist", "method": "elbo"}, f"unknown method 'elbo': for 'mnist' choose one of {MNIST_METHODS}"),
    ({"experiment": "mnist", "method": None}, f"unknown method None: for 'mnist' choose one of {MNIST_METHODS}"),
    ({"experiment": "mnist", "ema": 1.0}, "impossible ema 1.0: ema takes a number in [0, 1)"),
    ({"experiment": "mnist", "base": "x"}, "unknown base 'x': base takes one of encoder, prior"),
    ({"faults": [["grey"]]}, f"impossible faults [['grey']]: faults takes a list of some of {', '.join(FAULTS)}"),
    ({"bounds_images": 1}, "impossible bounds_images 1: bounds_images takes 0, or a whole number from 2 to 10,000"),
    ({"faults": ["gray"]}, f"impossible faults ['gray']: faults takes a list of some of {', '.join(FAULTS)}"),
    (
        {"faults": ["grey", "grey"]},
        f"impossible faults ['grey', 'grey']: faults takes a list of some of {', '.join(FAULTS)}",
    ),
    ({"target": "G"}, f"unknown target 'G': target takes one of {ENERGIES}, or an object with log_prob and dim"),
    ({"lr": -1e-3}, "impossible lr -0.001: lr takes a number above 0"),
    ({"lr": 0}, "impossible lr 0: lr takes a number above 0"),
    ({"lr": math.nan}, "impossible lr nan: lr takes a number above 0"),
    ({"lr": math.inf}, "impossible lr inf: lr takes a number above 0"),
    ({"lr": "1e-3"}, "impossible lr '1e-3': lr takes a number above 0"),
    ({"lr": True}, "impossible lr True: lr takes a number above 0"),
    ({"batch": 0}, "impossible batch 0: batch takes a whole number from 2"),
    ({"batch": 64.0}, "impossible batch 64.0: batch takes a whole number from 2"),
    ({"batch": True}, "impossible batch True: batch takes a whole number from 2"),
    ({"seed": -1}, "impossible seed -1: seed takes a whole number from 0 to 2,147,483,647"),
    ({"steps": 0}, "impossible steps 0: steps takes a whole number from 1"),
    ({"train_images": 60_000}, "impossible train_images 60000: train_images takes a whole number from 2 to 50,000"),
    ({"beta1": 1.0}, "impossible beta1 1.0: beta1 takes a number in [0, 1)"),
    ({"avo_weight": 1.5}, "impossible avo_weight 1.5: avo_weight takes a number in [0, 1]"),
    ({"beta0": -0.1}, "impossible beta0 -0.1: beta0 takes a number in [0, 1]"),
    (
        {"schedule": "cosine"},
        f"unknown schedule 'cosine': schedule takes {SCHEDULED}",
    ),
    ({"anneals": "gamma"}, "unknown anneals 'gamma': anneals takes one of beta, alpha, capacity"),
    ({"shape": "square"}, "unknown shape 'square': shape takes one of linear, sigmoid, cosine"),
    ({"decoder": "pixelcnn"}, "unknown decoder 'pixelcnn': decoder takes one of independent, autoregressive"),
    ({"ratio": 0}, "impossible ratio 0: ratio takes a number in (0, 1]"),
    (
        {"explored_images": 9},
        "impossible explored_images 9: explored_images takes 0, or a whole number from 10 to 2,000",
    ),
    ({"initialisation": "zero"}, "unknown initialisation 'zero': initialisation takes one of default, identity"),
    ({"n_transitions": 0}, "impossible n_transitions 0: method 'avo' takes at least 1"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message.split(":")[0] for _, message in BAD])
def test_a_bad_spec_is_refused_with_one_line_of_field_value_and_what_it_takes(fields, message):
    with pytest.raises(ValueError) as refusal:
        make(**fields)
    assert str(refusal.value) == message


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [-1, 2.0, True, False, "3", math.nan, math.inf, [3], torch.tensor(3)])
def test_a_field_of_whole_numbers_takes_nothing_else(name, value):
    with pytest.raises(ValueError, match=rf"^impossible {name} .*: {name} takes a whole number from \d") as refusal:
        make(**{name: value})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("value", [-1e-9, True, False, "0.5", math.nan, math.inf, -math.inf, [0.5]])
def test_a_field_of_numbers_takes_nothing_else(name, value):
    with pytest.raises(ValueError, match=rf"^impossible {name} .*: {name} takes a number ") as refusal:
        make(**{name: value})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("bad", [["D"], 3, object(), type("NoDim", (), {"log_prob": print})()])
def test_a_target_without_log_prob_and_dim_is_refused(bad):
    with pytest.raises(ValueError, match=r"^impossible target .* or an object with log_prob and dim$"):
        make(target=bad)


@pytest.mark.parametrize("dim", [0, -1, 2.0, "2", None])
def test_a_target_of_no_dimension_is_refused(dim):
    with pytest.raises(ValueError, match=r"^impossible target"):
        make(target=type("Bad", (Bowl,), {"dim": dim})())


INAPPLICABLE = [
    *[("toy", "elbo", f) for f in ("epochs", "latents", "width", "beta0", "train_images", "nll_samples", "avo_weight")],
    ("toy", "avo", "avo_weight"),
    *[("mnist", "vae", f) for f in ("n_transitions", "hidden", "avo_weight", "steps", "samples")],
    ("mnist", "hvi", "avo_weight"),
]


@pytest.mark.parametrize(("experiment", "method", "field"), INAPPLICABLE)
def test_a_field_that_does_not_apply_is_refused(experiment, method, field):
    message = f"{field} does not apply to method '{method}' of experiment '{experiment}', got 1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Spec(experiment=experiment, method=method, **{field: 1})


@pytest.mark.parametrize("field", ["beta0", "gamma"])
def test_a_constant_schedule_takes_no_parameters(field):
    with pytest.raises(ValueError, match=f"^{field} does not apply"):
        Spec(experiment="mnist", method="vae", schedule="constant", **{field: 0.5})


@pytest.mark.parametrize("field", ["cycles", "ratio", "shape"])
def test_a_schedule_that_only_rises_takes_no_cycles(field):
    with pytest.raises(ValueError, match=f"^{field} does not apply"):
        Spec("mnist", "vae", **{field: DEFAULTS["mnist"][field]})


def test_a_cyclical_schedule_has_its_cycles_over_all_of_training():
    spec = Spec("mnist", "vae", schedule="cyclical", epochs=4, train_images=6400, batch=64, cycles=2, ratio=0.25)
    assert spec.n_steps == 400
    values = [spec.annealing(step) for step in range(400)]
    assert values[:200] == values[200:] == [min(1, step / 50) for step in range(200)]
    assert spec.annealing(400) == 1
    assert spec.replace(shape="cosine").annealing(25) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"^impossible cycles 401: there are 400 steps in all"):
        spec.replace(cycles=401)


def half_way(step):
    return min(1.0, 0.5 + step / 100)


def test_any_function_of_the_step_is_a_schedule():
    spec = Spec("mnist", "vae", schedule=half_way, train_images=640, epochs=10)
    assert [spec.annealing(step) for step in (0, 10, 50, 99, 1000)] == [0.5, 0.6, 1, 1, 1]
    assert spec.beta0 is None and spec.replace(seed=1).schedule is half_way


def test_a_function_that_leaves_0_1_or_does_not_end_at_1_is_refused_or_warned_of_at_construction():
    few = {"train_images": 640, "epochs": 10}
    with pytest.raises(ValueError, match=r"^schedule <lambda> must stay in \[0, 1\], got 1.01 at step 51$"):
        Spec("mnist", "vae", schedule=lambda step: 0.5 + step / 100, **few)
    with pytest.warns(UserWarning, match=r"^schedule half_way should end at 1, got 0.59 at step 9, its last$"):
        Spec("mnist", "vae", schedule=half_way, train_images=640, epochs=1)
    for anneals in ("alpha", "capacity"):
        with pytest.raises(ValueError, match=r"^schedule half_way must end at 1, got 0.59 at step 9, its last$"):
            Spec("mnist", "vae", schedule=half_way, anneals=anneals, train_images=640, epochs=1)
        with pytest.raises(ValueError, match=r"^impossible schedule 'linear': it ends at 0.21\d* at step 9, and "):
            Spec("mnist", "vae", anneals=anneals, gamma=2e-3, train_images=640, epochs=1)


@pytest.mark.parametrize("kind", ["linear", "geometric"])
@pytest.mark.parametrize("make", [lambda **fields: Spec("mnist", "vae", **fields), Spec("mnist", "vae").replace])
def test_a_warm_up_that_is_too_slow_for_the_training_is_warned_of_where_it_is_asked_for(kind, make):
    few = {"schedule": kind, "train_images": 6400, "epochs": 2}  # 200 steps
    with pytest.warns(
        UserWarning, match=r"end near 1.* at step 199, its last: gamma 0.0002 is too small, \S+ would do"
    ) as seen:
        make(**few)
    assert seen[0].filename == __file__
    enough = float(re.search(r"too small, (\S+) would do", str(seen[0].message))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0.95 <= make(**few, gamma=enough).annealing(199) < 1
        Spec("mnist", "vae", schedule=kind)  # the report's configuration
        Spec("mnist", "vae", schedule="constant", train_images=64, epochs=1)
    with pytest.warns(UserWarning, match=r"got 0.2 at step 0, its last$"):
        Spec("mnist", "vae", schedule=kind, train_images=64, epochs=1)


@pytest.mark.parametrize("method", ["avo", "mixture", "iwae"])
def test_avo_and_iwae_are_annealed_by_beta_alone(method):
    with pytest.raises(ValueError, match=r"^anneals does not apply"):
        Spec("mnist", method, anneals="beta")


@every_method
def test_what_a_method_has_no_use_for_is_dropped_when_it_takes_the_place_of_another(experiment, method):
    if experiment == "toy":
        return
    for fields in ({"anneals": "capacity", "gamma": 0.01}, {"schedule": "cyclical"}, {"schedule": half_way}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec = Spec("mnist", "vae", train_images=2000, **fields)
            assert spec.replace(method=method).fields().keys() <= {*DEFAULTS["mnist"], "experiment", "method", "seed"}


def test_a_given_function_is_asked_once_whatever_is_done_with_the_spec():
    asked = []

    def counted(step):
        asked.append(step)
        return 1.0

    spec = Spec("mnist", "vae", schedule=counted, train_images=640, epochs=3)
    assert asked == list(range(30))
    assert describe(spec) == describe(spec) and spec.annealing(29) == 1 and key(spec) == key(spec)
    assert asked == list(range(30))


def test_what_only_a_path_or_a_measure_needs_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match=r"^impossible avo_weight 0: a learned path takes AVO to be trained$"):
        Spec("mnist", "avo", path="learned", avo_weight=0.0)
    with pytest.raises(
        ValueError, match=r"^impossible latents 1001: with explored_images, latents takes at most 1,000"
    ):
        Spec("mnist", "vae", latents=1001, explored_images=100)


def test_a_capacity_is_for_what_anneals_it():
    assert Spec("mnist", "vae", anneals="capacity").capacity == 25
    with pytest.raises(ValueError, match=r"^capacity does not apply"):
        Spec("mnist", "vae", capacity=20)


CYCLES = {"cycles", "ratio", "shape", "capacity"}  # only with another schedule
CHAIN, ANNEALED = {"initialisation", "base"}, {"avo_weight", "path", "faults"}  # what only some use on MNIST
#: What only some methods or kernels use.
FLOWS, PATH, MIXED, ALPHA, IWAE = (
    {"bins"},
    {"path", "elbo_steps"},
    {"avo_weight"},
    {"warmup", "beta0"},
    {"iwae_samples"},
)


@pytest.mark.parametrize(
    ("kernel", "unused"),
    [
        ("residual", {"bins"}),
        ("planar", {"bins", "hidden", "initialisation"}),
        ("householder", {"bins", "hidden", "initialisation"}),
        ("iaf", {"bins", "initialisation"}),
        ("spline", {"initialisation"}),
    ],
)
def test_a_kernel_takes_its_own_fields_alone(kernel, unused):
    given_ = Spec(experiment="toy", method="calibrated", kernel=kernel).fields()
    assert DEFAULTS["toy"].keys() - given_.keys() == unused | ALPHA | IWAE
    for field in unused:
        with pytest.raises(ValueError, match=f"^{field} does not apply to method 'avo' with kernel '{kernel}' of"):
            Spec(experiment="toy", method="avo", kernel=kernel, **{field: 1})


def test_what_contradicts_other_fields_is_refused():
    with pytest.raises(ValueError, match=r"^impossible elbo_steps 11: there are 10 steps in all"):
        Spec(experiment="toy", method="avo", steps=10, elbo_steps=11)
    with pytest.raises(ValueError, match=r"^impossible iwae_samples 8: batch 12 is not made of whole groups"):
        Spec(experiment="toy", method="iwae", batch=12)
    with pytest.raises(ValueError, match=r"^impossible n_transitions 0: method 'mixture' takes at least 1"):
        Spec(experiment="toy", method="mixture", n_transitions=0)


def test_get_gives_what_applies_and_says_what_does_not():
    spec = Spec(experiment="toy", method="elbo", hidden=7)
    assert spec.get("hidden") == 7
    with pytest.raises(AttributeError, match="bins does not apply to toy-D-elbo-s0"):
        spec.get("bins")


@every_method
def test_fields_that_are_not_given_have_the_defaults_of_the_experiment(experiment, method):
    spec = Spec(experiment=experiment, method=method)
    given_ = spec.fields()
    assert given_.pop("experiment") == experiment and given_.pop("method") == method and given_.pop("seed") == 0
    assert given_.items() <= DEFAULTS[experiment].items()
    unused = DEFAULTS[experiment].keys() - given_.keys()
    assert (
        unused
        == {
            ("toy", "elbo"): FLOWS | PATH | MIXED | ALPHA | IWAE,
            ("toy", "alpha"): FLOWS | PATH | MIXED | IWAE,
            ("toy", "iwae"): FLOWS | PATH | MIXED | ALPHA,
            ("toy", "avo"): FLOWS | MIXED | ALPHA | IWAE,
            ("toy", "calibrated"): FLOWS | ALPHA | IWAE,
            ("toy", "mixture"): FLOWS | ALPHA | IWAE,
            ("mnist", "vae"): {"n_transitions", "hidden"} | CHAIN | ANNEALED | IWAE | CYCLES,
            ("mnist", "iwae"): {"n_transitions", "hidden"} | CHAIN | ANNEALED | CYCLES | {"anneals"},
            ("mnist", "planar"): {"hidden"} | CHAIN | ANNEALED | IWAE | CYCLES,
            ("mnist", "householder"): {"hidden"} | CHAIN | ANNEALED | IWAE | CYCLES,
            ("mnist", "iaf"): CHAIN | ANNEALED | IWAE | CYCLES,
            ("mnist", "hvi"): ANNEALED | IWAE | CYCLES,
            ("mnist", "avo"): IWAE | CYCLES | {"anneals"},
            ("mnist", "mixture"): IWAE | CYCLES | {"anneals"},
        }[experiment, method]
    )


def test_mnists_defaults_are_the_reports_configuration():
    spec = Spec(experiment="mnist", method="avo")
    assert (spec.width, spec.latents, spec.n_transitions, spec.hidden) == (300, 40, 5, 40)
    assert (spec.epochs, spec.batch, spec.lr, spec.schedule, spec.beta0, spec.gamma) == (
        25,
        64,
        1e-3,
        "linear",
        0.2,
        2e-4,
    )
    assert (spec.avo_weight, spec.initialisation, spec.train_images) == (0.2, "identity", 50_000)


def test_faults_come_in_one_order_and_are_part_of_what_a_spec_is():
    spec = Spec("mnist", "avo", faults=["grey", "summed"])
    assert spec.faults == ("summed", "grey") and spec == Spec("mnist", "avo", faults=("summed", "grey"))
    assert spec != Spec("mnist", "avo") and hash(spec) != hash(Spec("mnist", "avo"))
    assert Spec(**json.loads(json.dumps(spec.fields()))) == spec


@every_method
def test_a_spec_made_of_its_own_fields_is_the_same(experiment, method):
    spec = Spec(experiment=experiment, method=method, seed=3, lr=0.01)
    assert Spec(**spec.fields()) == spec and hash(Spec(**spec.fields())) == hash(spec)


def test_a_spec_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Spec(experiment="toy", method="avo").seed = 1


def test_specs_are_keys():
    specs = {Spec(experiment="toy", method="avo", seed=seed % 2): seed for seed in range(4)}
    assert list(specs.values()) == [2, 3]


def test_replace_changes_fields_and_drops_those_that_no_longer_apply():
    spec = Spec(experiment="mnist", method="avo", seed=3, n_transitions=2, avo_weight=0.5, beta0=0.1)
    assert spec.replace(seed=4) == Spec(
        experiment="mnist", method="avo", seed=4, n_transitions=2, avo_weight=0.5, beta0=0.1
    )
    assert spec.replace(method="hvi") == Spec(experiment="mnist", method="hvi", seed=3, n_transitions=2, beta0=0.1)
    assert spec.replace(method="vae") == Spec(experiment="mnist", method="vae", seed=3, beta0=0.1)
    assert spec.replace(schedule="constant").beta0 is None
    assert spec.replace() == spec and spec.seed == 3


def test_replace_refuses_what_a_spec_refuses():
    spec = Spec(experiment="mnist", method="vae")
    for changes in ({"lr": -1.0}, {"hidden": 3}, {"method": "elbo"}, {"experiment": "cifar"}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            spec.replace(**changes)
    with pytest.raises(TypeError, match="learning_rate"):
        spec.replace(learning_rate=1.0)


def test_a_spec_shows_its_fields_to_whoever_asks_for_its_signature():
    names = [field.name for field in dataclasses.fields(Spec)]
    assert list(inspect.signature(Spec).parameters) == names


def test_an_unknown_field_is_refused():
    with pytest.raises(
        TypeError, match=r"^unknown field 'learning_rate' of Spec, got 0.001: choose from experiment, .*"
    ):
        Spec(experiment="toy", method="avo", learning_rate=1e-3)
    with pytest.raises(TypeError, match=r"^unknown field 'epoch' of Spec, got 1: did you mean 'epochs'\?$"):
        Spec(experiment="mnist", method="vae", epoch=1)


def test_a_kernel_is_named_once_where_it_does_not_apply():
    message = "kernel does not apply to method 'vae' of experiment 'mnist', got 'iaf'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        Spec(experiment="mnist", method="vae", kernel="iaf")


def test_a_users_own_target_is_taken():
    target = Bowl()
    spec = Spec(experiment="toy", method="elbo", target=target)
    assert spec.target_object is target
    assert spec.label == "toy-Bowl-elbo-s0"


def test_labels_and_target_objects():
    assert Spec(experiment="toy", method="avo", target="A", seed=2).label == "toy-A-avo-s2"
    assert Spec(experiment="mnist", method="vae").label == "mnist-vae-s0"
    assert Spec(experiment="toy", method="avo", target="A").target_object.name == "A"


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    lr=st.floats(1e-12, 1e6, exclude_min=True),
    batch=st.integers(2, 10**6),
    beta1=st.floats(0, 1, exclude_max=True),
    n_transitions=st.integers(1, 1000),
    target=st.sampled_from(ENERGIES.split(", ")),
)
def test_possible_values_are_taken_as_they_are(**fields):
    assert {**Spec(experiment="toy", method="avo", **fields).fields(), **fields} == Spec(
        experiment="toy", method="avo", **fields
    ).fields()


@given(value=st.one_of(st.text(), st.floats(), st.integers(), st.booleans(), st.binary(), st.lists(st.integers())))
@pytest.mark.parametrize("name", FIELDS)
def test_whatever_a_field_is_given_it_is_taken_or_refused_with_one_line(name, value):
    try:
        check_parameter(name, value)
    except ValueError as refusal:
        message = str(refusal)
        assert "\n" not in message and repr(value) in message and f": {name} takes {FIELDS[name].takes}" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "avo"),
        ("methods", ["elbo", "avo"]),
        ("seeds", [0, 1, 2]),
        ("seeds", (0, 1)),
        ("targets", ["A", "ring8"]),
        ("schedules", ["linear", "constant"]),
        ("lr", 1e-3),
        ("something_else", -1),
    ],
)
def test_check_parameter_takes_what_is_possible(name, value):
    check_parameter(name, value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", -1, "impossible lr -1: lr takes a number above 0"),
        ("seeds", [0, -1], "impossible seed -1: seed takes a whole number from 0 to 2,147,483,647"),
        ("seeds", [], "seeds must be a list of at least one value, got []"),
        ("seeds", 3, "seeds must be a list of at least one value, got 3"),
        ("methods", "avo", "methods must be a list of at least one value, got 'avo'"),
        (
            "methods",
            ["avo", "flow"],
            f"unknown method 'flow': method takes one of {TOY_METHODS}, vae, hvi, planar, householder, iaf",
        ),
        (
            "schedules",
            ["cosine"],
            f"unknown schedule 'cosine': schedule takes {SCHEDULED}",
        ),
    ],
)
def test_check_parameter_refuses_the_impossible_with_one_line(name, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_parameter(name, value)


@pytest.mark.parametrize(("name", "values"), [("seeds", [0, 1, 0]), ("methods", ["avo", "avo"])])
def test_values_of_a_plural_must_differ(name, values):
    with pytest.raises(ValueError, match=f"^{name} must differ from each other"):
        check_parameter(name, values)
