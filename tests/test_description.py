"""Descriptions: what is refused and in which words, equality, what is printed and what is written down."""

import copy
import dataclasses
import importlib
import json
import math
import pickle
import pkgutil
from typing import Annotated

import numpy as np
import pytest

import annealed_core
from annealed_core import decoders, flows, kernels, objectives, schedules, targets, vae, variants
from annealed_core.description import (
    _OURS,
    Boolean,
    Calls,
    Description,
    Number,
    Size,
    Whole,
    from_json,
    own_objects,
    to_json,
)
from annealed_core.kernels import Gated
from annealed_core.objectives import AVO, ELBO, IWAE, AlphaELBO
from annealed_core.schedules import Constant, Cyclical, Geometric, Linear, Mixed, Then
from annealed_core.targets import GeometricAlphas, LearnedAlphas, LinearAlphas
from annealed_core.variants import CapacityELBO

for module in pkgutil.walk_packages(annealed_core.__path__, "annealed_core."):
    importlib.import_module(module.name)

#: Of the classes that say nothing without fields, and of the others another than their defaults.
EXAMPLES = [
    Mixed(AVO(0.2, Linear(0.1, 1e-3)), ELBO(), 0.3),
    Then(AVO(alphas=GeometricAlphas(0.1)), Mixed(IWAE(3), ELBO(Constant(0.5)), 1), 100),
    AVO(0.25, Cyclical(100, 2, 0.5, "cosine", 0.1), LearnedAlphas()),
    CapacityELBO(3, Geometric(0.5, 0.25)),
    Gated(8, "identity"),
]
NAMES = {
    name: each
    for part in (flows, kernels, objectives, schedules, targets, vae, decoders, variants)
    for name, each in vars(part).items()
}


def same(step):
    return 1.0


class Settings(Description):
    """One of each kind of field; a user's own."""

    size: Size = 3
    switch: Boolean = False
    limit: Annotated[int, Whole(1, 1000)] | None = None
    above: Annotated[float, Number(2)] = 2.0
    any_number: Annotated[float, Number()] = 0.0
    path: Annotated[object, Calls("what can write", "write", "close")] | None = None
    anything: object = None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AVO(weight=1.5), "impossible weight 1.5 of AVO: weight takes a number in [0, 1]"),
        (lambda: AVO(weight=math.nan), "impossible weight nan of AVO: weight takes a number in [0, 1]"),
        (lambda: AVO("0.2"), "impossible weight '0.2' of AVO: weight takes a number in [0, 1]"),
        (lambda: AVO(weight=True), "impossible weight True of AVO: weight takes a number in [0, 1]"),
        (lambda: AVO(weight=None), "impossible weight None of AVO: weight takes a number in [0, 1]"),
        (lambda: AVO().replace(weight=-1), "impossible weight -1 of AVO: weight takes a number in [0, 1]"),
        (lambda: Linear(rate=0), "impossible rate 0 of Linear: rate takes a number in (0, 1]"),
        (lambda: GeometricAlphas(1), "impossible first 1 of GeometricAlphas: first takes a number in (0, 1)"),
        (lambda: CapacityELBO(math.inf), "impossible capacity inf of CapacityELBO: capacity takes a number from 0"),
        (lambda: IWAE(0), "impossible samples 0 of IWAE: samples takes a whole number from 1"),
        (lambda: IWAE(2.0), "impossible samples 2.0 of IWAE: samples takes a whole number from 1"),
        (lambda: IWAE(True), "impossible samples True of IWAE: samples takes a whole number from 1"),
        (lambda: ELBO(2), "impossible beta 2 of ELBO: beta takes a number in [0, 1], or a function of the step"),
        (lambda: ELBO(Linear), f"impossible beta {Linear!r} of ELBO: beta takes a number in [0, 1], or a function"),
        (lambda: Gated(start="near"), "unknown start 'near' of Gated: start takes one of torch, identity"),
        (lambda: Gated(start=None), "impossible start None of Gated: start takes one of torch, identity"),
        (lambda: AVO(alphas=0.5), "impossible alphas 0.5 of AVO: alphas takes LinearAlphas(), GeometricAlphas(), "),
        (lambda: Mixed(AVO, ELBO()), f"impossible first {AVO!r} of Mixed: first takes an objective: what is called"),
        (lambda: Settings(limit=1001), "impossible limit 1001 of Settings: limit takes a whole number from 1 to 1,000"),
        (lambda: Settings(switch=1), "impossible switch 1 of Settings: switch takes True or False"),
        (lambda: Settings(above=1.9), "impossible above 1.9 of Settings: above takes a number from 2"),
        (lambda: Settings(any_number=math.inf), "impossible any_number inf of Settings: any_number takes a number"),
        (
            lambda: IWAE(np.eye(2)),
            "impossible samples array([[1., 0.], [0., 1.]]) of IWAE: samples takes a whole number",
        ),
        (lambda: Settings(path=print), f"impossible path {print!r} of Settings: path takes what can write"),
    ],
)
def test_what_is_impossible_is_refused_in_one_line_with_field_value_and_what_is_right(make, message):
    with pytest.raises(ValueError) as refusal:
        make()
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AVO(wieght=1.5), "unknown field 'wieght' of AVO, got 1.5: did you mean 'weight'?"),
        (lambda: IWAE(zzz=2), "unknown field 'zzz' of IWAE, got 2: choose from samples, beta"),
        (lambda: ELBO().replace(betta=1), "unknown field 'betta' of ELBO, got 1: did you mean 'beta'?"),
        (lambda: from_json({"IWAE": {"sample": 2}}), "unknown field 'sample' of IWAE, got 2: did you mean 'samples'?"),
    ],
)
def test_an_unknown_field_is_refused_with_what_may_have_been_meant(make, message):
    with pytest.raises(TypeError) as refusal:
        make()
    assert str(refusal.value) == message


def test_numbers_of_numpy_become_plain_ones():
    found = Settings(np.int64(4), np.bool_(True), np.int8(5), np.float32(2.1), np.float64(0.1))
    assert found == Settings(4, True, 5, 2.1, 0.1)
    assert [type(value) for value in list(found.fields().values())[:5]] == [int, bool, int, float, float]
    assert AVO(np.float32(0.2), np.float16(0.5)) == AVO(0.2, 0.5) and AVO(1) == AVO(1.0)
    assert IWAE(np.int32(3)) == IWAE(3)


def test_a_field_that_may_be_left_out_takes_none():
    assert Settings().limit is None and Settings(limit=7).replace(limit=None) == Settings()


@pytest.mark.parametrize("name", _OURS)
def test_every_description_comes_back_from_json_with_all_of_its_fields(name):
    needed = {field.name: ELBO() for field in dataclasses.fields(_OURS[name]) if field.default is dataclasses.MISSING}
    made = _OURS[name](**needed)
    written = to_json(made)
    assert list(written) == [name] and list(written[name]) == list(made.fields())
    assert from_json(json.loads(json.dumps(written))) == made


@pytest.mark.parametrize("made", EXAMPLES, ids=repr)
def test_nested_descriptions_come_back_from_json_from_a_pickle_and_from_what_is_printed(made):
    assert from_json(json.loads(json.dumps(to_json(made)))) == made
    assert pickle.loads(pickle.dumps(made)) == made == copy.deepcopy(made)
    assert eval(repr(made), NAMES) == made


def test_json_and_what_is_printed_are_what_one_would_type():
    assert to_json(CapacityELBO(20, Linear())) == {
        "CapacityELBO": {"capacity": 20.0, "rise": {"Linear": {"start": 0.2, "rate": 0.0002}}}
    }
    assert repr(AVO(0.2, 1.0, LinearAlphas())) == "AVO(weight=0.2)" and repr(ELBO()) == "ELBO()"
    assert repr(Mixed(AVO(), ELBO(0.5))) == "Mixed(first=AVO(), second=ELBO(beta=0.5))"


def test_fields_that_json_lacks_take_their_defaults():
    assert from_json({"AVO": {"beta": {"Linear": {"rate": 0.5}}}}) == AVO(beta=Linear(rate=0.5))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"EBLO": {}}, "unknown description 'EBLO': did you mean 'ELBO'? choose from "),
        ({"ELBO": {"beta": 3}}, "impossible beta 3 of ELBO: "),
    ],
)
def test_json_of_nothing_known_or_possible_is_refused(written, message):
    with pytest.raises(ValueError) as refusal:
        from_json(written)
    assert str(refusal.value).startswith(message)


def test_descriptions_are_equal_and_hash_alike_where_their_fields_are():
    alike = [AVO(0.2), AVO(weight=0.2, alphas=LinearAlphas()), AVO().replace(weight=0.2)]
    assert len(set(alike)) == 1 and alike[0] == alike[1] == alike[2]
    others = [AVO(0.3), AVO(0.2, 0.5), AVO(0.2, alphas=LearnedAlphas()), ELBO(), AlphaELBO(), ELBO(Linear()), "AVO()"]
    assert len({*others, alike[0]}) == len(others) + 1 and all(other != alike[0] for other in others)


def test_a_description_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AVO().weight = 0.5


class Mine(AVO):
    """A user's own kind of AVO."""


def test_objects_of_the_users_own_are_compared_by_identity_named_by_their_place_and_not_written_down():
    first, second = lambda step: 1.0, lambda step: 1.0
    assert ELBO(first) == ELBO(first) != ELBO(second) and hash(ELBO(first)) == hash(ELBO(first))
    mine = Mine()
    whole = Then(AVO(alphas=first), Mixed(mine, ELBO(Linear())), 5)
    assert own_objects(whole) == {"first.alphas": first, "second.first": mine}
    assert own_objects(EXAMPLES[0]) == {} and own_objects(second) == {"": second}
    with pytest.raises(ValueError, match=r"^<function .* is an object of your own, which can't be written down$"):
        to_json(whole)
    written = to_json(whole, own=lambda each: "the user's" if each is first else "Mine")
    assert written["Then"]["first"]["AVO"]["alphas"] == "the user's"
    assert written["Then"]["second"]["Mixed"]["first"] == "Mine"


def test_a_class_of_the_users_own_is_none_of_ours_even_under_one_of_our_names():
    theirs = type("ELBO", (Description,), {"__module__": "theirs"})()
    assert theirs != ELBO() and own_objects(theirs) == {"": theirs} and "Settings" not in _OURS


def test_tuples_are_walked_and_compared_by_what_is_in_them():
    pair = Settings(anything=(ELBO(same), 2))
    assert pair == Settings(anything=(ELBO(same), 2)) and hash(pair) == hash(Settings(anything=(ELBO(same), 2)))
    assert own_objects((ELBO(same), 2)) == {"[0].beta": same}
    assert from_json(json.loads(json.dumps(to_json((ELBO(), 2))))) == (ELBO(), 2)
