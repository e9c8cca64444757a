"""The steps of an edit do nothing that a CUDA graph cannot hold: no shape depends on a value."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from editing.closed_form import values
from editing.methods import finetune
from editing.methods.base import editor
from mmtune.replayed import Steps
from tests.editing.closed_form_cases import options as closed_options
from tests.editing.closed_form_cases import outspoken
from tests.editing.test_finetune import options
from tests.editing.tiny import REQUEST, SECOND, tiny

# The device must be waited for, or numbers sent to it (`lift_fresh`: a tensor of Python numbers).
WAITING = ("nonzero", "bincount", "masked_select", "unique", "equal.", "lift_fresh", "repeat_inter")


class Waits(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        picked = args[1] if name.startswith(("index.", "index_put")) else ()
        masks = [i for i in picked if i is not None and i.dtype == torch.bool]
        if masks or name.startswith(WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """What waits for the device in passes from the second on, and how many passes there were."""
    found, passes = [], []

    class Watched(Steps):
        def gradients(self):
            passes.append(1)
            with Waits([] if len(passes) == 1 else found):
                return super().gradients()

        def update(self):
            with Waits([] if len(passes) == 1 else found):
                super().update()

    for module in (finetune, values):
        monkeypatch.setattr(module, "Steps", Watched)
    return found, passes


@pytest.mark.parametrize("kind", ["ft", "ft-l", "lora"])
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava", "qwen2"])
def test_gradient_steps(name, kind, waits):
    settings = options(kind, steps=3, lr=1e-4, batch_size=1)
    editor(kind, settings).edit(tiny(name), [REQUEST, SECOND])
    assert waits == ([], [1] * 4)


@pytest.mark.parametrize("kind", ["rome", "memit", "alphaedit"])
@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5", "llava", "qwen2"])
def test_the_search_for_values(name, kind, waits, tmp_path):
    editor(kind, closed_options(kind, tmp_path)).edit(outspoken(name), [REQUEST])
    assert waits[0] == []
    assert len(waits[1]) > 2
