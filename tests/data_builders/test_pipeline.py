"""Builds: what goes through, what is noticed, and what a stop or a death leaves behind."""

from __future__ import annotations

import json
import random
from multiprocessing import get_context

import pytest

from data_builders.config import load_build_config
from data_builders.manifests import read_manifest
from data_builders.pipeline import build
from data_builders.shards import kept_in
from mmtune.data.records import DataError, Problem
from mmtune.runs import RunError
from tests.data_builders import small_build
from tests.data_builders.small_build import OPENED, contents, die, run, write_config

STEPS = [
    "collect", "select", "rephrase", "imagine", "filter", "collect-text", "consistent-text",
    "collect-image", "consistent-image", "locality", "assemble",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_build.install(monkeypatch.setattr)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    OPENED.clear()


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a build that nothing happened to, the names of its events, and its config."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder)
    killed(config, folder / "runs", -1, names=folder / "names.txt")
    events = (folder / "names.txt").read_text().splitlines()
    return contents(folder / "runs/small"), events, config


def killed(config, runs, at, **options):
    """Run a build in a process that kills itself at event `at`; returns whether it did."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.data_builders.small_build", "data_builders.pipeline"])
    process = context.Process(target=die, args=(str(config), str(runs), at), kwargs=options)
    process.start()
    process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode == -9


def records(folder):
    return json.loads((folder / "data/train.json").read_text())


def ids(folder, step):
    return [
        sample.id
        for path in sorted(folder.glob(f"stages/*-{step}/shard-*.jsonl"))
        for sample in kept_in(path)
    ]


def test_every_sample_goes_through_the_steps_once_and_in_order(config, runs):
    built = run(config, runs)
    assert [report.name for report in built.reports] == STEPS
    counts = {r.name: (r.samples, r.kept, r.rejected) for r in built.reports}
    assert counts["collect"] == (13, 13, {})
    assert counts["select"] == (13, 10, {"of no use": 3})
    assert counts["rephrase"] == (10, 10, {})
    assert counts["filter"] == (10, 9, {"of no use": 1})
    assert counts["consistent-text"] == (5, 4, {"of no use": 1})
    assert counts["locality"] == (9, 8, {"no keeper": 1})
    found = records(built.folder)
    numbers = [n for n in range(13) if n % 5 != 1 and n not in (7, 10)]
    assert [record["id"] for record in found] == [f"n{n}" for n in numbers]
    for record in found:
        assert record["rephrase"] == record["question"].upper() + " \u2028é"
        assert record["image_rephrase"] == f"made:imagine/{record['id']}.png"
        assert record["text_locality"]["answer"] == "same"
    # Kept samples are cut anew: every shard is full but the last.
    sizes = [len(kept_in(p)) for p in sorted(built.folder.glob("stages/*-rephrase/shard-*"))]
    assert sizes == [3, 3, 3, 1]
    assert built.faults == built.defects == 0
    assert not (built.folder / "faults.jsonl").exists()


def test_a_finished_build_opens_nothing_and_changes_nothing(config, runs):
    built = run(config, runs)
    assert OPENED == ["keen", "shout", "draw", "pick", "steady", "steady"]
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files(built.folder)}
    OPENED.clear()
    again = run(config, runs)
    assert OPENED == []
    assert again.reports == built.reports
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files(built.folder)} == before


def files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_until_stops_after_a_step_and_the_next_run_goes_on(config, runs, whole):
    built = run(config, runs, until="rephrase")
    assert not built.complete
    assert [report.name for report in built.reports] == STEPS[:3]
    with pytest.raises(ValueError, match=r"--until refrase: .*Did you mean 'rephrase'"):
        run(config, runs, until="refrase")
    OPENED.clear()
    assert run(config, runs).complete
    assert OPENED == ["draw", "pick", "steady", "steady"]
    assert results(contents(runs / "small")) == results(whole[0])


def results(found):
    """Of a build's files those that do not hold the path of the folder that it was made in."""
    return {
        path: content
        for path, content in found.items()
        if "manifest" not in path and path != "config.yaml" and "shard" not in path
    }


@pytest.mark.parametrize("where", ["read", "select", "rephrase", "imagine", "filter", "consistent",
                                   "locality", "assemble"])  # fmt: skip
def test_killed_in_any_stage_it_goes_on_to_the_same_bytes(where, whole, tmp_path):
    expected, events, config = whole
    places = [number for number, name in enumerate(events) if name == where]
    for at in {places[0], places[len(places) // 2], places[-1]}:
        runs = tmp_path / str(at)
        assert killed(config, runs, at)
        assert not (runs / "small/stages/11-assemble/manifest.json").exists() or where == "assemble"
        run(config, runs)
        assert contents(runs / "small") == expected


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_it_comes_to_the_same_bytes(seed, whole, tmp_path):
    expected, events, config = whole
    draw, deaths = random.Random(seed), 0
    while killed(config, tmp_path, draw.randrange(10, len(events) // 3)):
        deaths += 1
        assert deaths < 60
    assert deaths
    assert contents(tmp_path / "small") == expected


@pytest.mark.slow
def test_killed_at_every_event_it_comes_to_the_same_bytes(whole, tmp_path):
    expected, events, config = whole
    for at in range(len(events)):
        assert killed(config, tmp_path / str(at), at)
        run(config, tmp_path / str(at))
        assert contents(tmp_path / str(at) / "small") == expected, at


def test_nothing_of_an_outcome_depends_on_the_size_of_shards(config, runs):
    small, large = run(config, runs), run(config, runs, ["name=large", "shard_size=50"])
    assert records(small.folder) == records(large.folder)


def test_a_limit_is_of_selected_samples_and_a_larger_one_goes_on(config, runs):
    built = run(config, runs, ["limit=4"])
    assert [(r.samples, r.kept) for r in built.reports[1:3]] == [(5, 4), (4, 4)]
    folder = built.folder / "stages/02-select"
    assert sorted(p.name for p in folder.glob("shard*")) == [
        "shard-00000.jsonl",
        "shard-00001.jsonl",
    ]
    kept = (folder / "shard-00000.jsonl").stat().st_mtime_ns
    more = run(config, runs, ["limit=7"])
    assert more.reports[1].kept == more.reports[2].samples == 7
    assert (folder / "shard-00000.jsonl").stat().st_mtime_ns == kept
    other = run(config, runs, ["limit=7", "name=other"])
    assert records(more.folder) == records(other.folder)
    less = run(config, runs, ["limit=4"])
    assert [(r.samples, r.kept) for r in less.reports[1:3]] == [(5, 4), (4, 4)]
    every = run(config, runs, ["limit=100"])
    assert every.reports[1].kept == 10


def test_a_limit_of_pools(config, runs):
    built = run(config, runs, ["pool_limit=2"])
    kept = {r.name: r.kept for r in built.reports}
    assert kept["consistent-text"] == kept["consistent-image"] == 2
    assert kept["select"] == 10


def test_changed_settings_are_refused_with_what_changed(config, runs):
    built = run(config, runs)
    before = contents(built.folder)
    with pytest.raises(RunError) as caught:
        run(config, runs, ["stages.imagine.word=b"])
    lines = str(caught.value).splitlines()
    assert lines[1:-1] == [
        '  imagine: settings.word changed from "a" to "b"',
        "  filter: comes after imagine",
        "  locality: comes after filter",
        "  assemble: comes after locality",
    ]
    assert "--remake" in lines[-1]
    assert contents(built.folder) == before
    OPENED.clear()
    again = run(config, runs, ["stages.imagine.word=b"], remake=True)
    assert OPENED == ["draw", "pick"]
    assert [report.kept for report in again.reports] == [report.kept for report in built.reports]
    with pytest.raises(RunError, match=r'settings.word changed from "b" to "a"'):
        run(config, runs)


@pytest.mark.parametrize(
    ("override", "first", "why"),
    [
        ("seed=4", "select", "seed changed from 3 to 4"),
        ("model.name=test:other", "select", 'model.name changed from "test:none" to "test:other"'),
        ("shard_size=4", "collect", "shard_size changed from 3 to 4"),
        ("source.count=12", "collect", "settings.count changed from 13 to 12"),
        ("pools.text.count=4", "collect-text", "settings.count changed from 5 to 4"),
        ("stages.locality.word=b", "locality", 'settings.word changed from "a" to "b"'),
        ("assemble.word=b", "assemble", 'settings.word changed from "a" to "b"'),
    ],
)
def test_whatever_decides_the_result_makes_stale(override, first, why, config, runs):
    run(config, runs)
    with pytest.raises(RunError) as caught:
        run(config, runs, [override])
    assert str(caught.value).splitlines()[1] == f"  {first}: {why}"


def test_other_content_of_a_file_or_another_version_of_a_stage_makes_stale(
    config, runs, tmp_path, monkeypatch
):
    run(config, runs)
    monkeypatch.setattr(small_build.Shout, "version", 2)
    with pytest.raises(RunError, match=r"rephrase: version changed from 1 to 2"):
        run(config, runs)
    monkeypatch.undo()
    small_build.install(monkeypatch.setattr)
    (tmp_path / "numbers.txt").write_text("others")
    with pytest.raises(RunError, match=r"collect: .*numbers.txt has other content"):
        run(config, runs)


def test_where_and_how_it_runs_makes_nothing_stale(config, runs):
    run(config, runs)
    OPENED.clear()
    run(config, runs, ["engine.threads=2", "model.device=auto", "on_fault=stop"])
    assert OPENED == []


def test_other_versions_of_libraries_are_a_note(config, runs):
    built = run(config, runs)
    assert built.notes == []
    folder = built.folder / "stages/03-rephrase"
    then = read_manifest(folder)
    assert {"torch", "transformers", "diffusers"} <= set(then.versions)
    then.versions["torch"] = "1.0"
    then.save(folder)
    (note,) = run(config, runs).notes
    assert note.startswith("rephrase was made with torch 1.0 (now ")


def test_faults_are_counted_and_named_and_the_others_go_on(config, runs):
    overrides = ["source.broken=[3]", "stages.imagine.broken=[n4, n5]"]
    built = run(config, runs, overrides)
    assert built.faults == 3
    assert {r.name: r.faults for r in built.reports if r.faults} == {
        "collect": {"broken record": 1},
        "imagine": {"unreadable": 2},
    }
    lines = [json.loads(t) for t in (built.folder / "faults.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["id"], line["reason"]) for line in lines] == [
        ("collect", "n3", "broken record"),
        ("imagine", "n4", "unreadable"),
        ("imagine", "n5", "unreadable"),
    ]
    assert not {"n3", "n4", "n5"} & {record["id"] for record in records(built.folder)}


def test_faults_end_the_build_by_policy_and_mended_ones_are_done_again(config, runs, monkeypatch):
    broken = ["stages.imagine.broken=[n4]"]
    with pytest.raises(RunError, match=r"imagine \(draw\): n4: unreadable \(n4 is\). .*skip"):
        run(config, runs, [*broken, "on_fault=stop"])
    assert ids(runs / "small", "imagine") == ["n0", "n2", "n3"]
    skipped = run(config, runs, broken)
    assert skipped.faults == 1
    # The setting stays as it is; what it names is mended.
    monkeypatch.setattr(small_build.Draw, "_one", lambda self, sample: self.grown(sample))
    OPENED.clear()
    mended = run(config, runs, [*broken, "on_fault=stop"])
    assert mended.faults == 0
    assert OPENED == ["draw", "pick"]
    assert "n4" in [record["id"] for record in records(mended.folder)]
    assert not (mended.folder / "faults.jsonl").exists()


def test_a_broken_record_of_a_source_ends_the_build_by_policy(config, runs):
    text = "collect: n3: broken record.* Mend it, or set on_fault: skip to set such samples aside"
    with pytest.raises(RunError, match=text):
        run(config, runs, ["source.broken=[3]", "on_fault=stop"])


def test_a_source_that_cannot_be_read_is_named(config, runs, monkeypatch):
    def read(self, pictures):
        raise DataError([Problem("x.json", "no sample", "it is empty")])

    monkeypatch.setattr(small_build.Numbers, "read", read)
    with pytest.raises(RunError, match=r"(?s)^collect \(numbers\): .*x.json: no sample"):
        run(config, runs)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["source.count=0"], r"collect \(numbers\): there is no sample\. Mend"),
        (
            ["source.count=2", "source.broken=[0,1]"],
            r"collect \(numbers\): none of 2 samples is kept: 2 broken record \(fault\)\.",
        ),
        (
            ["source.count=2", "stages.select.reject=[n0]"],
            r"select \(keen\): none of 2 samples is kept: 2 of no use\. .*stages.select",
        ),
        (
            ["pools.text.count=1", "stages.consistent.reject=[n0]"],
            r"consistent-text \(steady\): none of 1 samples is kept: .*another pool.*--remake",
        ),
    ],
)
def test_a_step_that_keeps_nothing_says_so_each_time(overrides, text, config, runs):
    for _ in range(2):
        with pytest.raises(RunError, match=text):
            run(config, runs, overrides)


def test_an_exception_names_stage_and_shard_and_keeps_what_is_done(config, runs, monkeypatch):
    with pytest.raises(
        RunError,
        match=r"imagine \(draw\) failed in shard 2 \(samples n8 to n10\): ZeroDivisionError: by "
        r"zero\. 2 of its 4 shards are finished",
    ) as caught:
        run(config, runs, ["stages.imagine.fail=n9"])
    assert "in _one" in str(caught.value.__cause__)
    assert ids(runs / "small", "imagine") == ["n0", "n2", "n3", "n4", "n5", "n7"]
    monkeypatch.setattr(small_build.Draw, "_one", lambda self, sample: self.grown(sample))
    run(config, runs, ["stages.imagine.fail=n9"])
    assert len(ids(runs / "small", "imagine")) == 10


def test_a_stage_that_cannot_start_says_why(config, runs):
    with pytest.raises(RunError, match=r"^rephrase \(shout\) cannot start: word is closed. Take"):
        run(config, runs, ["stages.rephrase.word=closed"])


def test_outcomes_of_other_samples_are_an_error(config, runs, monkeypatch):
    monkeypatch.setattr(small_build.Shout, "run", lambda self, samples: samples[1:])
    with pytest.raises(RunError, match="gave 2 outcomes for 3 samples"):
        run(config, runs)


def test_a_full_disk_in_a_stage_is_named_and_the_same_command_goes_on(
    config, runs, whole, monkeypatch
):
    with pytest.raises(RunError, match=r"filter \(pick\): the disk of .* is full \(.* MiB free\)"):
        run(config, runs, ["stages.filter.full=n5"])
    monkeypatch.setattr(small_build.Pick, "_one", small_build.Small._one)
    run(config, runs, ["stages.filter.full=n99"], remake=True)
    assert results(contents(runs / "small")) == results(whole[0])


@pytest.mark.parametrize("at", [0, 3, 9, 16, 24])
def test_a_disk_that_fills_while_files_are_written_leaves_no_half_of_one(
    at, config, runs, whole, monkeypatch
):
    import os

    count, write = [0], os.fsync

    def full(descriptor):
        count[0] += 1
        if count[0] > at:
            raise OSError(28, "No space left on device")
        write(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"is full \(.* MiB free\). .*the same command goes on"):
        run(config, runs)
    left = [p.name for p in files(runs) if p.suffix not in (".jsonl", ".json", ".yaml", ".png")]
    assert left == []
    monkeypatch.setattr(os, "fsync", write)
    run(config, runs)
    assert results(contents(runs / "small")) == results(whole[0])


def test_a_damaged_shard_is_noticed_and_made_again(config, runs, whole):
    folder = run(config, runs, until="rephrase").folder
    path = folder / "stages/03-rephrase/shard-00001.jsonl"
    text = path.read_text()
    path.write_text(text.replace("WHAT", "that"))
    with pytest.raises(RunError, match=r"shard-00001.jsonl is missing or damaged.*Remove it"):
        run(config, runs)
    path.unlink()
    run(config, runs)
    assert path.read_text() == text


def test_a_step_without_its_manifest_is_stale(config, runs):
    folder = run(config, runs).folder
    (folder / "stages/02-select/manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"select: its manifest.json is missing or damaged"):
        run(config, runs)
    run(config, runs, remake=True)


def test_a_folder_of_something_else_is_left_alone(config, runs):
    (runs / "small").mkdir(parents=True)
    (runs / "small/config.yaml").write_text("name: an evaluation\n")
    with pytest.raises(RunError, match="holds no build"):
        run(config, runs)
    assert [path.name for path in files(runs)] == ["config.yaml"]


def test_missing_files_are_named_before_anything_runs(config, runs, tmp_path):
    (tmp_path / "numbers.txt").unlink()
    with pytest.raises(RunError, match=r"numbers.txt \(collect: source numbers\)"):
        run(config, runs)
    assert not runs.exists()


def test_the_folder_says_what_made_it(config, runs):
    built = run(config, runs)
    assert load_build_config(built.folder / "config.yaml") == load_build_config(config)
    manifest = json.loads((built.folder / "manifest.json").read_text())
    assert manifest["seed"] == 3
    assert [path.rsplit("/", 1)[-1] for path in manifest["data"]] == ["numbers.txt"]
    stage = json.loads((built.folder / "stages/03-rephrase/manifest.json").read_text())
    assert stage["what"]["settings"]["word"] == "a"
    assert build(load_build_config(built.folder / "config.yaml"), runs).reports == built.reports
