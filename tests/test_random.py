"""Random descriptions, targets and files: each is taken, or refused in one line, and nothing is trained.

Few of them here; `make stress` tries two thousand, and kills at random moments.
"""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_experiment import CONTINUED, SCRIPT, assert_same

from annealed_core import Density, run
from annealed_core.description import _OURS, Description, from_json, to_json
from annealed_core.running.experiment import Experiment, folder_of
from annealed_core.running.store import Folder
from annealed_core.running.watch import check_target

STRESS = os.environ.get("HYPOTHESIS_PROFILE") == "stress"
tried = settings(
    max_examples=700 if STRESS else 40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=not STRESS,
    database=None,
)
#: Under `make stress` too, where only tests that are marked so are run.
both = pytest.mark.stress if STRESS else lambda test: test

numbers = st.one_of(
    st.integers(-3, 200), st.integers(), st.floats(), st.sampled_from([0.0, 0.5, 1.0, 1e-3, 10**20, float("nan")])
)
plain = st.one_of(numbers, st.none(), st.booleans(), st.text(max_size=8), st.sampled_from(["D", "cosine", "identity"]))
classes = st.sampled_from(sorted({*_OURS.values()} - {Experiment}, key=repr))  # it is trained by none


def names(cls):
    return list(cls.__dataclass_fields__)


def made(cls, fields):
    """A description, or None where it is refused: in one line of a ValueError or TypeError."""
    try:
        return cls(**fields)
    except (ValueError, TypeError) as refusal:
        assert str(refusal) and "\n" not in str(refusal)
        return None


parts = st.recursive(
    st.one_of(plain, st.sampled_from(sorted(_OURS.values(), key=repr))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.builds(
            lambda cls, values: made(cls, dict(zip(names(cls), values, strict=False))),
            classes,
            st.lists(inner, max_size=4),
        ),
    ),
    max_leaves=6,
)


@both
@tried
@given(classes, st.data())
@pytest.mark.filterwarnings("ignore:schedule")
def test_any_fields_make_a_description_that_comes_back_from_json_or_one_line(cls, data):
    chosen = data.draw(st.lists(st.sampled_from(names(cls)), unique=True, max_size=4)) if names(cls) else []
    found = made(cls, {name: data.draw(parts) for name in chosen})
    if found is None:
        return
    assert isinstance(found, Description) and hash(found) == hash(found.replace()) and found == found.replace()
    written = to_json(found, own=lambda each: None)
    json.dumps(written, allow_nan=False)  # no number that is none gets in
    try:
        assert from_json(json.loads(json.dumps(to_json(found)))) == found
    except ValueError as refusal:
        assert "an object of your own" in str(refusal)
    if isinstance(found, Experiment):
        assert found.label


values = st.one_of(numbers, st.none(), st.text(max_size=4), st.lists(numbers, max_size=3), st.just(torch.ones(2, 2)))
pieces = {
    "a bowl": lambda z: -z.square().sum(-1),
    "far": lambda z: -z.square().sum(-1) + 1e30,
    "nan": lambda z: z.sum(-1) * float("nan"),
    "inf": lambda z: z.sum(-1) / 0,
    "a number": lambda z: 3.0,
    "nothing": lambda z: None,
    "detached": lambda z: -z.detach().square().sum(-1),
    "too many": lambda z: z,
    "too few": lambda z: z.sum(),
    "a list": lambda z: z.sum(-1).tolist(),
    "whole numbers": lambda z: z.sum(-1).long(),
    "an error\nof two lines": lambda z: z.no_such_method(),
    "steps": lambda z: torch.floor(z).sum(-1),
    "in place": lambda z: z.mul_(2).sum(-1),
    "a root": lambda z: z.sum(-1).sqrt(),
}
declared = st.dictionaries(st.sampled_from(["support", "box", "base_scale", "log_normalizer", "modes", "name"]), values)


@both
@tried
@given(st.sampled_from(sorted(pieces)), declared, st.one_of(st.integers(-1, 3), values))
def test_any_target_is_taken_or_refused_in_one_line(piece, attributes, dim):
    target = type("Odd", (), {"log_prob": lambda self, z: pieces[piece](z)})()
    vars(target).update({**attributes, "dim": dim})
    spec = made(Density, {"target": target})
    if spec is None:
        return
    try:
        check_target(spec.target_object)
    except ValueError as refusal:
        assert str(refusal).startswith("target ") and "\n" not in str(refusal).removeprefix(f"target {target}")
        return
    assert piece in ("a bowl", "far", "steps", "a root"), "wrong, and taken without a word"
    z = torch.randn(4, target.dim)
    assert target.log_prob(z).shape == (4,)


contents = st.one_of(
    st.binary(max_size=40),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=5)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from(["metrics", "history", "seconds", "weights", "error", "step"]), inner),
        ),
    ).map(lambda value: json.dumps(value).encode()),
    st.integers(0, 10_000),
)
FILES = ["result.json", "weights.pt", "checkpoint.pt", "failed.json"]


@both
@tried
@given(name=st.sampled_from(FILES), content=contents)
def test_any_file_in_the_store_is_what_was_written_or_counts_as_absent(tmp_path_factory, name, content):
    """A whole number stands for the byte of the file that is turned around."""
    logging.getLogger("annealed_core.running.store").disabled = True
    folder = Folder(tmp_path_factory.mktemp("run"))
    weights, result = {"w": torch.arange(4.0)}, {"metrics": {"elbo": -1.0}, "history": [], "seconds": 1.0}
    folder.save("weights.pt", weights)
    folder.save("checkpoint.pt", {"step": 3, "model": weights})
    folder.write_result(result)
    path = folder.path / name
    if isinstance(content, int):
        before = path.read_bytes() if path.exists() else b"x"
        place = content % len(before)
        content = before[:place] + bytes([before[place] ^ 0x55]) + before[place + 1 :]
    path.write_bytes(content)
    found, failure = folder.result(), folder.failure()
    loaded, saved = folder.load("weights.pt", weights), folder.load("checkpoint.pt", {"step": 3, "model": weights})
    assert failure is None or isinstance(failure, str)
    assert loaded is None or torch.equal(loaded["w"], weights["w"])
    assert saved is None or saved["step"] == 3
    if name != "result.json":
        assert found in (result, None) and (found is None) == (name == "weights.pt")
    folder.save("weights.pt", weights)
    folder.write_result(result)
    assert folder.result() == result and folder.load("weights.pt", weights) is not None
    logging.getLogger("annealed_core.running.store").disabled = False


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.stress)])
def test_a_run_killed_at_random_moments_ends_bit_by_bit_as_if_nothing_had_happened(store, monkeypatch, kills):
    spec = CONTINUED["density"].replace(steps=1500 if kills < 9 else 100_000)
    script = SCRIPT.replace("kill_after_the_first_checkpoint(self", "unused(self").replace(
        "store.Folder.save = kill_after_the_first_checkpoint", ""
    )
    generator, killed, steps = random.Random(kills), 0, [0]
    while killed < kills:
        process = subprocess.Popen(
            [sys.executable, "-c", script, json.dumps(to_json(spec)), "live"], stdout=subprocess.PIPE
        )
        while process.poll() is None and not (folder_of(spec).path / "checkpoint.pt").exists():
            time.sleep(0.01)
        until = time.monotonic() + generator.uniform(0, 0.5 if kills < 9 else 8.0)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
        saved = folder_of(spec).load("checkpoint.pt")
        steps.append(0 if saved is None else saved["step"])
        assert steps[-1] >= steps[-2], "a checkpoint was lost"
    assert killed
    continued = run(spec)
    monkeypatch.setenv("ANNEALED_STORE", str(store / "undisturbed"))
    assert_same(continued, run(spec))
