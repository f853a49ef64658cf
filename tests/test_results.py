"""Committed results: what a run says of itself, kept with where it was made, and read back as it was."""

import json
import re
import subprocess
import sys

import pytest

from annealed_core import Density, run
from annealed_core.description import from_json, to_json
from annealed_core.objectives import AVO
from annealed_report import audit, results, study
from annealed_report.comparison import select
from annealed_report.studies import STUDIES

SPECS = [Density(target="D", seed=seed, n_transitions=1, steps=2, samples=50) for seed in (0, 1)]
COMMITTED = sorted(results.FOLDER.glob("*/*.json"))
committed = pytest.mark.parametrize("path", COMMITTED, ids=lambda p: f"{p.parent.name}-{p.stem}")


@pytest.fixture
def folder(store, tmp_path, monkeypatch):
    monkeypatch.setenv("ANNEALED_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("ANNEALED_RECORD", "1")
    return tmp_path / "results"


def test_records_are_read_back_as_they_were_to_seven_digits(folder):
    runs = [run(spec) for spec in SPECS]
    results.record("full", "some", runs)
    found = select(results.load("full", "some"), target="D")
    assert [r.spec for r in found] == [r.spec for r in runs]
    for record, original in zip(found, runs, strict=True):
        assert record.metrics.keys() == original.metrics.keys() - results.UNREAD
        for name, value in record.metrics.items():
            whole = original.metrics[name]
            assert value == whole or value == pytest.approx(whole, rel=1e-6, abs=1e-12, nan_ok=True), name
    assert re.fullmatch(r"2 runs, 2 seeds, .*, torch .*, \d{4}-\d\d-\d\d, code [0-9a-f]{12}", results.provenance(found))


def test_what_could_not_be_read_back_is_not_recorded(folder):
    class Bowl:
        dim = 2

        def log_prob(self, z):
            return -z.square().sum(-1)

    with pytest.raises(ValueError, match=r"^target must be a description of ours, to be recorded, got "):
        results.record("full", "some", [run(SPECS[0].replace(target=Bowl()))])
    assert not folder.exists()


def test_recording_the_same_runs_again_changes_nothing(folder, monkeypatch):
    runs = [run(spec) for spec in SPECS]
    results.record("full", "some", runs)
    before = (folder / "full" / "some.json").read_bytes()
    monkeypatch.setattr(results, "machine", lambda: "another machine")
    results.record("full", "some", runs[:1])
    assert (folder / "full" / "some.json").read_bytes() == before


def test_a_record_made_before_a_description_had_a_field_is_still_that_run(folder):
    found = run(SPECS[0])
    results.record("full", "some", [found])
    path = folder / "full" / "some.json"
    (line,) = json.loads(path.read_text())
    del line["spec"]["Density"]["beta1"], line["spec"]["Density"]["kernel"]["Gated"]["start"]
    path.write_text(json.dumps([line]))
    assert results.load("full", "some")[0].spec == SPECS[0]
    results.record("full", "some", [found])
    (again,) = json.loads(path.read_text())
    assert again["spec"] == to_json(SPECS[0])


def test_what_no_page_reads_is_not_recorded(folder, monkeypatch):
    monkeypatch.setattr(results, "UNREAD", {"ess"})
    results.record("full", "some", [found := run(SPECS[0])])
    assert set(results.load("full", "some")[0].metrics) == set(found.metrics) - {"ess"}
    monkeypatch.undo()
    kept = {metric for study in STUDIES for each in results.load("full", study) for metric in each.metrics}
    assert "ess" in kept and not kept & results.UNREAD


def test_who_just_looks_at_a_run_changes_no_committed_file(folder, monkeypatch):
    monkeypatch.delenv("ANNEALED_RECORD")
    results.record("full", "some", [run(SPECS[0])])
    assert not folder.exists() and results.load("full", "some") == []
    assert results.provenance([]) == "not yet run"


@pytest.mark.parametrize(
    ("study", "kept"), [("some", []), ("folded_line", [1250]), ("collapse", [250, 500, 750, 1000, 1250])]
)
def test_a_record_keeps_as_much_of_the_history_as_its_study_asks_for(study, kept, folder):
    results.record("full", study, [run(SPECS[0].replace(steps=1250))])
    assert [line["step"] for line in results.load("full", study)[0].history] == kept


def holds_all_of(found, recorded):
    """Whether a description's JSON says what a record's does; it may have fields that came later."""
    if isinstance(recorded, dict):
        return all(name in found and holds_all_of(found[name], each) for name, each in recorded.items())
    return found == recorded


@committed
def test_committed_records_are_complete_and_name_no_computer(path):
    records = json.loads(path.read_text())
    assert records and path.stem in STUDIES
    assert len({from_json(line["spec"]) for line in records}) == len(records)
    for line in records:
        keys = {"spec", "metrics", "seconds", "machine", "versions", "date", "commit", "code"}
        assert set(line) - {"history"} == keys
        assert holds_all_of(to_json(from_json(line["spec"])), line["spec"])
        assert line["seconds"] > 0 and re.fullmatch(r"\d{4}-\d\d-\d\d", line["date"])


def test_of_tuning_one_metric_is_kept_and_a_run_found_again_makes_no_new_record(folder):
    runs = [run(spec) for spec in SPECS]
    for _ in range(2):
        results.record("full", "tuning", runs)
        found = results.load("full", "tuning")
        assert [set(each.metrics) for each in found] == [{"total_variation"}] * 2


def test_records_of_any_description_are_read_where_nothing_else_was_imported():
    code = "from annealed_report import results; print(len(results.load('full', 'starts')))"
    assert int(subprocess.check_output([sys.executable, "-c", code], text=True)) == 640


def test_runs_of_one_commit_are_of_one_state_unless_like_parts_have_two_codes():
    elbo, avo = SPECS[0], SPECS[0].replace(objective=AVO())

    def made(spec, commit, code):
        return results.Record(spec, {}, 1.0, "", {"torch": ""}, "2026-01-01", commit, code)

    one = [made(elbo, "c", "1"), made(avo, "c", "2")]
    assert results.states(one) == ["commit c"]
    assert results.states([*one, made(elbo.replace(seed=1), "c", "3")]) == ["code 1", "code 2", "code 3"]
    assert results.states([*one, made(avo.replace(seed=1), "d", "2")]) == ["code 1", "code 2"]
    later = [made(avo.replace(seed=1), "d", "4"), made(elbo.replace(seed=1), "d", "3")]
    assert results.states([*one, *later]) == ["commit c", "commit d"]  # each with a code for each kind


@committed
def test_what_is_paired_comes_from_one_state_of_the_code_or_is_known_not_to(path):
    records = results.load(path.parent.name, path.stem)
    states = results.states(records)
    assert (len(states) > 1) == (path.stem in results.MIXED), states
    assert ("states of the code" in results.provenance(records)) == (len(states) > 1)


def test_a_study_is_recorded_as_it_goes_and_gone_on_with_at_the_same_commit(folder, capsys, monkeypatch):
    asked = []

    def broken_off(specs):
        asked.append([spec.seed for spec in specs])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [run(spec) for spec in specs]

    monkeypatch.setitem(STUDIES, "grid", lambda: SPECS)
    monkeypatch.setattr(study, "cores", lambda: 1)
    monkeypatch.setattr(study, "stacks", lambda specs, processes: [[spec] for spec in specs[::-1]])
    monkeypatch.setattr(study, "sweep", broken_off)
    with pytest.raises(KeyboardInterrupt):
        study.main(["grid"])
    assert [record.spec.seed for record in results.load("begun", "grid")] == [0] and not results.load("full", "grid")
    here = results.commit()
    monkeypatch.setattr(results, "commit", lambda: "abcdef0")
    assert study.main(["grid"]) == 2
    assert capsys.readouterr().err == f"grid was begun at commit {here}, and this is abcdef0: go on there\n"
    monkeypatch.setattr(results, "commit", lambda: here)
    assert study.main(["grid"]) == 0 and asked == [[0], [1], [1]]
    assert [record.spec for record in results.load("full", "grid")] == SPECS
    assert not (folder / "begun" / "grid.json").exists()


def test_an_audit_takes_short_runs_and_measures_in_spreads_over_seeds(folder, capsys, monkeypatch):
    specs = [SPECS[0].replace(seed=seed, objective=o) for seed in range(3) for o in (AVO(), SPECS[0].objective)]
    results.record("full", "grid", [run(spec) for spec in specs])
    records = results.load("full", "grid")
    assert len(audit.sample(records, 0.5, 60, 1)) == 3 and audit.sample(records, 1.0, 0, 1) == []
    moved = {**records[0].metrics, "elbo": records[0].metrics["elbo"] + 1}
    alike = [r.metrics["elbo"] for r in select(records, objective=records[0].spec.objective)]
    assert audit.differences(records[0], moved, records)["elbo"] == pytest.approx(1 / audit.statistics.stdev(alike))
    assert audit.main(["grid", "--share", "0.5"]) == 0
    assert re.search(r"^grid +elbo +3 runs +[+-]0\.00 +[+-]0\.00$", capsys.readouterr().out, re.MULTILINE)
