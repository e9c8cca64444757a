"""Virtual tokens put into a trunk by hooks, without any tuner."""

from contextlib import contextmanager


@contextmanager
def inside(trunk, tokens, at):
    """`tokens` [p, d] enter `trunk` before the positions `at`, in every call."""
    entered = []

    def enter(module, args, kwargs):
        entered.clear()
        if not trunk.entering(args, kwargs):
            return trunk.carry(args, kwargs, at)
        entered.append(True)
        rows = tokens.expand(trunk.batch_size(args, kwargs), -1, -1)
        return trunk.enter(args, kwargs, rows, at)

    def leave(module, args, output):
        return trunk.leave(output, at) if entered else output

    handles = [trunk.module.register_forward_pre_hook(enter, with_kwargs=True)]
    if trunk.exit is None:
        handles.append(trunk.module.register_forward_hook(leave))
    else:
        handles.append(trunk.exit.register_forward_pre_hook(lambda m, a: leave(m, (), a[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
