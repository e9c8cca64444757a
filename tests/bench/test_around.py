import json

from mmtune.bench import around


def test_everything_is_measured_and_written(tmp_path, capsys):
    options = {
        "device": "cpu", "workers": "0,1", "files": 5, "pixels": 48, "size": 16, "passes": 2,
        "queries": 40, "width": 8, "layers": 2, "hidden": 16, "rank": 2, "runs": 3,
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    around.main([*arguments, "--out", str(tmp_path)])
    text = (tmp_path / "around.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    found = json.loads((tmp_path / "around.json").read_text(encoding="utf-8"))
    assert set(found["images"]) == {"0", "1"}
    assert all(rate > 0 for rate in found["images"].values())
    assert found["ranking"]["count"] == 3
    assert found["ranking_bytes"] is None
    kinds = {f"{who}: {what}" for who in ("aurora", "PEFT LoRA") for what in ("load", "switch")}
    assert set(found["adapters"]) == kinds
    assert "| ranking 40 x 200, both directions |" in text
