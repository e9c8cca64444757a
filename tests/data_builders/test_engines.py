"""Engines: the same files from one process, several, several launches, and Ray Data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from data_builders.config import EngineOptions
from data_builders.engines import engine_of
from data_builders.engines.base import Failure, Job, devices
from data_builders.pictures import Pictures
from data_builders.samples import Sample
from data_builders.shards import Part, Shard, cut, read_outcomes, shard_file, write_shard
from data_builders.stages.base import Context
from editing.config import EditModelOptions
from mmtune.runs import RunError
from tests.data_builders import small_build
from tests.data_builders.small_build import Keen, SmallOptions, contents, run, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_build.install(monkeypatch.setattr)
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


def job_of(folder, settings=None, **options):
    (folder / "made").mkdir()
    (folder / "out").mkdir()
    pictures = Pictures({"made": folder / "made"})
    context = Context(0, EditModelOptions("test:none"), pictures, folder)
    job = Job("select", "key", Keen, settings or SmallOptions(), context, folder / "out", **options)
    samples = [Sample(f"n{n}", "?", answers=("a",)) for n in range(20)]
    write_shard(folder, 0, "collect", "key", "", samples)
    return job, cut([Part(str(shard_file(folder, 0)), 0, 20)], 2)


def same(one, other):
    """The differences of two builds, but for the name and the engine in their configs."""
    return [
        path
        for path in sorted({*one, *other})
        if one.get(path) != other.get(path) and path != "config.yaml"
    ]


def started(config, runs, *overrides, ranks=1, seconds=0.0):
    """The processes of a build, launched as torchrun does."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.data_builders.small_build", config, runs, *overrides],
            cwd=ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "SECONDS_A_SAMPLE": str(seconds),
            },
            stderr=subprocess.PIPE,
            text=True,
            # Tests that run in the background of a shell were told to ignore Ctrl-C.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        for rank in range(ranks)
    ]


def test_several_processes_make_the_same_files(config, runs):
    one = run(config, runs, ["name=one"])
    two = run(config, runs, ["name=two", "engine.workers=2"])
    assert [r.kept for r in one.reports] == [r.kept for r in two.reports]
    assert same(contents(one.folder), contents(two.folder)) == []


def test_a_limit_means_the_same_for_several_processes(config, runs):
    one = run(config, runs, ["name=one", "limit=4"], until="imagine")
    two = run(config, runs, ["name=two", "limit=4", "engine.workers=3"], until="imagine")
    assert [(r.samples, r.kept, r.rejected) for r in one.reports] == [
        (r.samples, r.kept, r.rejected) for r in two.reports
    ]
    later = [p for p in contents(one.folder) if "rephrase" in p or "imagine" in p]
    assert not set(later) & set(same(contents(one.folder), contents(two.folder)))


def test_processes_of_a_launch_share_the_shards(config, runs):
    one = run(config, runs, ["name=one"])
    processes = started(config, runs, "name=two", ranks=3)
    assert [(p.wait(), p.stderr.read()) for p in processes] == [(0, "")] * 3
    two = contents(runs / "two")
    assert two["manifest.json"]["processes"] == 3
    assert same(contents(one.folder), two) == ["manifest.json"]


def test_a_limit_means_the_same_for_the_processes_of_a_launch(config, runs):
    one = run(config, runs, ["name=one", "limit=4"])
    processes = started(config, runs, "name=two", "limit=4", ranks=2)
    assert [(p.wait(), p.stderr.read()) for p in processes] == [(0, "")] * 2
    again = run(config, runs, ["name=two", "limit=4"])
    assert [r.kept for r in again.reports] == [r.kept for r in one.reports]
    records = [(runs / name / "data/train.json").read_bytes() for name in ("one", "two")]
    assert records[0] == records[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_taken_as_they_are_needed(workers, tmp_path):
    job, tasks = job_of(tmp_path)
    taken = []

    def lazily():
        for task in tasks:
            taken.append(task.index)
            yield task

    engine = engine_of(EngineOptions(workers=workers), "cpu")
    results = engine.run(job, lazily())
    assert isinstance(next(results), Shard)
    assert len(taken) <= workers + 1
    results.close()
    engine.close()
    assert len(list(job.folder.glob("shard*.jsonl"))) <= workers + 1


def test_a_process_that_dies_is_named_with_its_shard_and_the_rest_is_kept(config, runs):
    text = (
        r"imagine \(draw\) failed in shard 2 \(samples n8 to n10\): its process was killed by "
        r"SIGKILL, as the kernel does where memory runs out"
    )
    with pytest.raises(RunError, match=text):
        run(config, runs, ["engine.workers=2", "stages.imagine.kill=n9"])
    assert (runs / "small/stages/04-imagine/shard-00000.jsonl").exists()
    assert not (runs / "small/stages/04-imagine/shard-00002.jsonl").exists()
    assert not list(runs.rglob("*.partial"))


@pytest.mark.parametrize("setting", ["fail", "full"])
def test_what_goes_wrong_in_a_process_is_told_as_in_place(setting, config, runs):
    told = []
    for workers in (1, 2):
        with pytest.raises(RunError) as caught:
            run(config, runs, [f"engine.workers={workers}", f"stages.select.{setting}=n0"])
        told.append(str(caught.value).partition(". ")[0])
    assert told[0].replace("(", "").split(" MiB")[0][:60] == told[1].replace("(", "")[:60]
    assert told[0].startswith("select (keen)")


def test_faults_end_a_build_in_several_processes_too(config, runs):
    with pytest.raises(RunError, match=r"select \(keen\): n4: unreadable"):
        run(config, runs, ["engine.workers=2", "on_fault=stop", "stages.select.broken=[n4]"])


def test_a_main_process_that_is_killed_takes_its_workers_along(config, runs):
    whole = run(config, runs, ["name=whole"])
    (process,) = started(config, runs, "name=two", "engine.workers=2", seconds=0.2)
    folder = runs / "two/stages/02-select"
    _until(lambda: folder.is_dir() and any(folder.glob("shard*")))
    process.kill()
    process.wait()
    assert process.stderr.read() == ""  # ends when the last worker has ended
    run(config, runs, ["name=two", "engine.workers=2"])
    assert same(contents(whole.folder), contents(runs / "two")) == []


def test_ctrl_c_stops_the_workers_and_keeps_what_is_done(config, runs):
    whole = run(config, runs, ["name=whole"])
    (process,) = started(config, runs, "name=two", "engine.workers=2", seconds=0.2)
    folder = runs / "two/stages/02-select"
    _until(lambda: folder.is_dir() and any(folder.glob("shard*")))
    process.send_signal(signal.SIGINT)
    process.wait()
    assert process.stderr.read().rstrip().endswith("KeyboardInterrupt")
    assert not list((runs / "two").rglob("*.partial"))
    run(config, runs, ["name=two"])
    assert same(contents(whole.folder), contents(runs / "two")) == []


def _until(happened):
    for _ in range(600):
        if happened():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def test_ray_makes_the_same_files_and_tells_what_went_wrong(config, runs, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    monkeypatch.chdir(ROOT)
    engine = engine_of(EngineOptions("ray", workers=2), "cpu")
    try:
        _ray_stops_early(engine, tmp_path)  # and Ray stays for the builds below
        one = run(config, runs, ["name=one"], until="select")
        two = run(config, runs, ["name=two", "engine={kind: ray, workers: 2}"], until="select")
        assert one.reports[1].kept == two.reports[1].kept == 10
        assert same(contents(one.folder), contents(two.folder)) == []
        _ray_failures(engine, tmp_path)
        assert ray.is_initialized()
    finally:
        engine.close()
    assert not ray.is_initialized()


def _ray_stops_early(engine, tmp_path):
    (tmp_path / "early").mkdir()
    job, tasks = job_of(tmp_path / "early")
    results = engine.run(job, iter(tasks))
    first = next(results)
    results.close()
    assert isinstance(first, Shard)
    samples = read_outcomes(shard_file(job.folder, first.index))
    assert [one.id for one in samples] == [s.id for s in tasks[first.index].load()]


def _ray_failures(engine, tmp_path):
    (tmp_path / "failing").mkdir()
    job, tasks = job_of(tmp_path / "failing", SmallOptions(fail="n3", kill="n9"))
    results = list(engine.run(job, iter(tasks)))
    failures = {one.kind: one for one in results if isinstance(one, Failure)}
    assert set(failures) <= {"error", "killed"}
    assert failures["killed"].index is None
    if "error" in failures:  # unless the actor died first
        assert failures["error"].index == 1
        assert failures["error"].text == "ZeroDivisionError: by zero"
    assert not shard_file(job.folder, 1).exists()
    assert not shard_file(job.folder, 4).exists()


def test_threads_are_those_of_the_config_while_a_stage_runs(config, runs, monkeypatch):
    torch = pytest.importorskip("torch")
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(1)

    def grown(self, sample):
        seen.append(torch.get_num_threads())
        return sample

    monkeypatch.setattr(Keen, "grown", grown)
    run(config, runs, ["engine.threads=2"], until="select")
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_each_process_has_a_device_of_its_own(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices("cpu") == devices("auto") == ["cpu"]
    with pytest.raises(ValueError, match=r"model\.device is cuda, but torch sees no CUDA device"):
        devices("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices("cpu") == ["cpu"]
    assert devices("auto") == devices("cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices("auto") == ["cuda:1"]


def test_ray_is_asked_for_and_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match=r"needs Ray Data .*mmtune\[ray\].*engine.kind: local"):
        engine_of(EngineOptions("ray"), "cpu")
