"""Hooks of the method and of the task act as one."""

import torch

from mmtune.tuners.hooks import JoinedHooks, TrainingHooks


class Counting(TrainingHooks):
    def __init__(self, weight=None):
        self.weight, self.seen, self.loaded = weight, [], None

    def before_step(self, step):
        self.seen.append(("before", step))

    def after_step(self, step):
        self.seen.append(("after", step))

    def penalty(self):
        return None if self.weight is None else torch.tensor(self.weight)

    def state_dict(self):
        return {"seen": torch.tensor(len(self.seen))}

    def load_state_dict(self, state):
        self.loaded = state

    def finish(self):
        self.seen.append("finish")


def test_every_part_is_called_and_penalties_add():
    parts = {"method": Counting(0.5), "task": Counting(0.25), "silent": TrainingHooks()}
    joined = JoinedHooks(parts)
    joined.before_step(3)
    joined.after_step(3)
    joined.finish()
    wanted = [("before", 3), ("after", 3), "finish"]
    assert parts["method"].seen == parts["task"].seen == wanted
    assert joined.penalty() == 0.75
    assert JoinedHooks({"a": TrainingHooks()}).penalty() is None


def test_each_part_gets_its_own_state_back():
    parts = {"method": Counting(), "task": Counting(), "silent": TrainingHooks()}
    parts["task"].before_step(1)
    state = JoinedHooks(parts).state_dict()
    assert sorted(state) == ["method.seen", "task.seen"]
    fresh = {name: Counting() for name in parts}
    JoinedHooks(fresh).load_state_dict(state)
    assert fresh["method"].loaded == {"seen": torch.tensor(0)}
    assert fresh["task"].loaded == {"seen": torch.tensor(1)}
    assert fresh["silent"].loaded is None
