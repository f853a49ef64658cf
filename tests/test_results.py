"""Committed results: what a run says of itself, kept with where it was made, and read back as it was."""

import json
import re
from pathlib import Path

import pytest

from annealed_core import Spec, results, run
from annealed_core.comparison import select

SPECS = [Spec(experiment="toy", target="D", method="elbo", seed=seed, steps=2, samples=50) for seed in (0, 1)]


@pytest.fixture
def folder(store, tmp_path, monkeypatch):
    monkeypatch.setenv("ANNEALED_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("ANNEALED_RECORD", "1")
    return tmp_path / "results"


def test_records_are_read_back_as_they_were_to_seven_digits(folder):
    runs = [run(spec) for spec in SPECS]
    results.record("full", "toy", runs)
    found = select(results.load("full", "toy"), target="D")
    assert [r.spec for r in found] == [r.spec for r in runs]
    for record, original in zip(found, runs, strict=True):
        assert record.metrics.keys() == original.metrics.keys()
        for name, value in record.metrics.items():
            whole = original.metrics[name]
            assert value == whole or value == pytest.approx(whole, rel=1e-6, abs=1e-12, nan_ok=True), name
    assert "2 runs, 2 seeds" in results.provenance(found)


def test_what_could_not_be_read_back_is_not_recorded(folder):
    class Bowl:
        dim = 2

        def log_prob(self, z):
            return -z.square().sum(-1)

    with pytest.raises(ValueError, match=r"^target must be one that has a name, to be recorded, got "):
        results.record("full", "toy", [run(SPECS[0].replace(target=Bowl()))])
    assert not folder.exists()


def test_recording_the_same_runs_again_changes_nothing(folder, monkeypatch):
    runs = [run(spec) for spec in SPECS]
    results.record("full", "toy", runs)
    before = (folder / "full" / "toy.json").read_bytes()
    monkeypatch.setattr(results, "machine", lambda: "another machine")
    results.record("full", "toy", runs[:1])
    assert (folder / "full" / "toy.json").read_bytes() == before


def test_who_just_looks_at_a_run_changes_no_committed_file(folder, monkeypatch):
    monkeypatch.delenv("ANNEALED_RECORD")
    results.record("full", "toy", [run(SPECS[0])])
    assert not folder.exists() and results.load("full", "toy") == []
    assert results.provenance([]) == "not yet run"


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*/*.json")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_committed_records_are_complete_and_name_no_computer(path):
    records = json.loads(Path(path).read_text())
    assert records
    for line in records:
        keys = {"spec", "metrics", "seconds", "machine", "versions", "date", "commit", "code"}
        assert set(line) - {"history"} == keys
        assert json.loads(json.dumps(results.spec_of(line["spec"]).fields())) == line["spec"]
        assert line["seconds"] > 0 and re.fullmatch(r"\d{4}-\d\d-\d\d", line["date"])


def test_a_record_keeps_as_much_of_the_history_as_is_asked_for(folder):
    spec = SPECS[0].replace(steps=1250)  # five lines
    whole = run(spec)
    results.record("full", "toy", [whole], every=2)
    (found,) = results.load("full", "toy")
    assert [line["step"] for line in found.history] == [250, 750, 1250]
    assert found.history[-1]["elbo"] == pytest.approx(whole.history[-1]["elbo"], rel=1e-6)
    results.record("full", "other", [whole])
    assert results.load("full", "other")[0].history == ()
    results.record("full", "other", [whole], every=1)
    assert len(results.load("full", "other")[0].history) == 5
