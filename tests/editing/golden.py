"""The golden numbers of editing: settings and arrays by case."""

import json
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent.parent / "golden" / "editing"
IGNORED = -100

SHARE = {"rtol": 0, "atol": 1e-6}
LOGS = {"rtol": 1e-5, "atol": 1e-5}
PROBABILITY = {"rtol": 1e-5, "atol": 1e-6}
SIMILARITY = {"rtol": 1e-5, "atol": 2e-6}
ROWS = {"rtol": 1e-5, "atol": 2e-5}
STATISTICS = {"rtol": 1e-5, "atol": 2e-6}


def settings(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


class Arrays:
    """The arrays of one file by case: arrays[case, name] is a tensor."""

    def __init__(self, name: str) -> None:
        self.stored = dict(np.load(FOLDER / f"{name}.npz"))

    def __getitem__(self, key: str | tuple[str, str]) -> torch.Tensor:
        return torch.from_numpy(self.stored[key if isinstance(key, str) else "__".join(key)])

    def __contains__(self, key: tuple[str, str]) -> bool:
        return "__".join(key) in self.stored


def close(found, want, tolerance) -> None:
    found = [float("nan") if x is None else x for x in np.atleast_1d(np.asarray(found, object))]
    want = [float("nan") if x is None else x for x in np.atleast_1d(np.asarray(want, object))]
    np.testing.assert_allclose(np.array(found, float), np.array(want, float), **tolerance)
