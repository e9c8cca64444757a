import json

from mmtune.bench import building


def test_everything_is_measured_and_written(tmp_path, capsys):
    options = {
        "pipeline": "random:tiny-sd",
        "dtype": "float32",
        "device": "cpu",
        "pixels": "32",
        "steps": "2",
        "batches": "2,3",
        "images": "8",
        "scorer": "zoo:tiny-clip",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    building.main([*arguments, "--out", str(tmp_path)])
    text = (tmp_path / "building.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    found = json.loads((tmp_path / "building.json").read_text(encoding="utf-8"))
    assert set(found["bare"]) == {"2", "3"}
    assert found["rates"]["bare"] == max(found["bare"].values())
    assert set(found["rates"]) == {"bare", "bare, written", "stage", "filter"}
    assert all(rate > 0 for rate in found["rates"].values())
    assert "| stage |" in text
    assert found["bytes"] > 100


def test_the_table_compares_with_the_bare_pipeline():
    found = building.Measured(
        building.Setup(images=40),
        where="here",
        bare={4: 5.0, 8: 10.0},
        rates={"bare": 10.0, "stage": 12.0},
        loading=3.0,
        bytes=2e5,
    )
    text = building.table(found)
    assert found.best == 8
    assert "| stage | 12 | 1.20x |" in text
    assert "4: 5, 8: 10" in text
    assert "draws 2 s of a shard of 40" in text  # half of it, at 12 a second
