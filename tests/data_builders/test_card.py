"""The data card says what was done, and `datasets` reads the folder by it."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from data_builders.card import render_card
from data_builders.stages.assemble import AssembleOptions, write_set
from tests.data_builders.finished_samples import MANIFEST, build_of, finished, pictures_in

CONFIG = "name: my-set\nseed: 3\n"


def card_of(samples, pictures, folder, options=None, recipe="evqa"):
    options = options or AssembleOptions()
    found = write_set(samples, options, pictures, folder)
    build = build_of(pictures, folder, options, recipe)
    return render_card(build, found, CONFIG, MANIFEST)


@pytest.fixture
def pictures(tmp_path):
    return pictures_in(tmp_path)


def rows(card, heading):
    """The cells of the first table below a heading."""
    part = card.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_counts_and_reasons_are_those_of_the_reports(pictures, tmp_path):
    samples = finished(pictures)
    samples[1] = samples[1].with_(rephrase=samples[1].question)
    card = card_of(samples, pictures, tmp_path)
    assert rows(card, "Files") == [
        ["data/train.json", "3", "3", "3"],
        ["data/eval.json", "2", "2", "2"],
    ]
    assert rows(card, "How it was made") == [
        ["select", "questions", "40", "12", "1"],
        ["rephrase", "chat", "12", "6", "0"],
        ["assemble", "files", "6", "5", "0"],
    ]
    assert rows(card, "What was left out") == [
        ["select", "answered rightly", "25"],
        ["select", "no agreed answer", "2"],
        ["select", "missing image (broken)", "1"],
        ["rephrase", "a refusal", "6"],
        ["assemble", "rephrase equals src", "1"],
    ]


def test_front_matter_lets_datasets_load_the_folder(pictures, tmp_path):
    from datasets import load_dataset

    card = card_of(finished(pictures), pictures, tmp_path, AssembleOptions(licence="cc-by-4.0"))
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["size_categories"]) == ("cc-by-4.0", ["n<1K"])
    assert front["task_categories"] == ["visual-question-answering"]
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    loaded = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert {split: rows.num_rows for split, rows in loaded.items()} == {"train": 4, "eval": 2}
    assert loaded["train"][0]["image"].size == (12, 8)


def test_without_parquet_the_records_themselves_load(pictures, tmp_path):
    from datasets import load_dataset

    card = card_of(finished(pictures), pictures, tmp_path, AssembleOptions(parquet="none"))
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    loaded = load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert loaded["eval"][0]["alt"] == "cup 4"


def test_the_same_build_has_the_same_card_and_no_date(pictures, tmp_path):
    samples = finished(pictures)
    first = card_of(samples, pictures, tmp_path / "a")
    assert first == card_of(samples, pictures, tmp_path / "b")
    for said in ("CC BY 4.0 (6)", "`pairs` (6)", "sha256 f00", "torch 2.14.1", "seed: 3", CONFIG):
        assert said in first
    assert "hf:some/model" in first


def test_leaks_are_told(pictures, tmp_path):
    samples = finished(pictures)
    assert "none is in two splits" in card_of(samples, pictures, tmp_path)
    keeper = dataclasses.replace(samples[5].image_locality, image=samples[0].image)
    samples[5] = samples[5].with_(image_locality=keeper)
    card = card_of(samples, pictures, tmp_path)
    assert "should not be used" in card
    assert ["eval", "image in two splits", "1"] in rows(card, "Splits and leaks")


def test_a_bar_in_a_reason_does_not_break_the_table(pictures, tmp_path):
    options = AssembleOptions()
    found = write_set(finished(pictures), options, pictures, tmp_path)
    build = build_of(pictures, tmp_path, options)
    odd = dataclasses.replace(build.reports[1], rejected={"a|b": 1})
    card = render_card(dataclasses.replace(build, reports=[odd]), found, CONFIG, {})
    assert "| rephrase | a\\|b | 1 |" in card


def test_an_empty_set_has_a_card(pictures, tmp_path):
    card = card_of([], pictures, tmp_path)
    assert "0 E-VQA records" in card
    assert "configs" not in yaml.safe_load(card.split("---\n")[1])
