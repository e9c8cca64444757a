"""What a batch computes before it needs the parameters that change, kept from pass to pass.

No family is known here. A first pass runs the stock code and keeps what modules gave before the
first call of one that holds such a parameter: what came earlier cannot depend on it. In later
passes the same code runs, and those modules answer with what they gave. So masks, positions and
residual sums are as always, and the numbers are those of a plain pass, to the bit.

The modules that are kept are the largest that hold none of the parameters: for an edit of the MLP
in language layer l these are the vision tower, the projector, the layers below l, and l's
attention. Where text is written they put the prompt's keys and values into the cache as they did;
from the second token on they compute.

What is kept is forgotten where it is out of date: another parameter below (an edit applied there,
`weights` that name one), other targets, other hooks. A module with a hook, by which a memory acts
or something is read, counts as one that changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from editing.prefix_calls import Call, NotKeptError
from editing.prefix_layouts import Layout, Layouts, layouts_of
from mmtune.backbones.attention import cache_of

if TYPE_CHECKING:
    from editing.batches import Batch, Part

Forward = Callable[..., Any]
Targets = Sequence[Tensor]
# A tensor that what is kept was computed with: where it is, itself (so that no other takes its
# memory), its address and how often it had been written to.
Stamp = tuple[Mapping[str, Tensor | None], str, Tensor, int, int]


class Prefix:
    """What parts of a batch compute below some parameters; empty until it is first computed.

    Args:
        layouts: of the model and the parameters.
        parts: whose prompts and pixels are read, together.
    """

    def __init__(self, layouts: Layouts, parts: Sequence[Part]) -> None:
        self._layouts = layouts
        self._read = [(part.prompts, part.pixels) for part in parts]
        self._kept: dict[tuple[str, frozenset[int]], _Pass] = {}

    @contextmanager
    def around(self, kind: str, parts: Sequence[Part], targets: Targets = ()) -> Iterator[None]:
        """A pass over `parts` inside, which computes only what is not kept of an earlier one.

        Args:
            kind: of pass: two of one kind call the same modules with tensors of the same shapes.
            parts: others than these are computed as if there were nothing here.
            targets: what is read behind the prompts; none where that is not known yet.
        """
        if not self._reads(parts):
            yield
            return
        hooked = self._layouts.hooked()
        kept = self._kept.get((kind, hooked))
        if kept is None or not kept.holds(targets):
            kept = self._kept[kind, hooked] = _Pass(self._layouts.layout(hooked), targets)
            try:
                with kept.recorded():
                    yield
            except BaseException:
                del self._kept[kind, hooked]
                raise
        else:
            with kept.replayed():
                yield

    def _reads(self, parts: Sequence[Part]) -> bool:
        return len(parts) == len(self._read) and all(
            part.prompts is prompts and part.pixels is pixels
            for part, (prompts, pixels) in zip(parts, self._read, strict=True)
        )


def prefixed(model: nn.Module, batch: Batch, names: Iterable[str]) -> Batch:
    """A batch that computes once what does not depend on these parameters.

    Where one of the parameters has no known place it is a plain batch.

    Raises:
        ValueError: a name that is no parameter's.
    """
    layouts = layouts_of(model, names)
    if layouts is None:
        parts = tuple(replace(part, prefix=None) for part in batch.parts)
        return replace(batch, parts=parts, prefix=None)
    parts = tuple(replace(part, prefix=Prefix(layouts, [part])) for part in batch.parts)
    return replace(batch, parts=parts, prefix=Prefix(layouts, parts))


def passing(
    prefix: Prefix | None, kind: str, parts: Sequence[Part], targets: Targets = ()
) -> AbstractContextManager[None]:
    """`Prefix.around`, where there is one."""
    return nullcontext() if prefix is None else prefix.around(kind, parts, targets)


class _Pass:
    """One kind of pass: recorded once, replayed as long as it holds."""

    def __init__(self, layout: Layout, targets: Targets) -> None:
        self.layout, self.targets = layout, targets
        self.versions = [tensor._version for tensor in targets]
        self.calls: list[list[Call | None]] = [[] for _ in layout.kept]
        self.stamps: list[Stamp] = []
        self.usable = True
        self.ended = False  # whether a watched module has been called
        self.weak: list[Call] = []
        self.deep = 0  # calls of kept modules that are being computed

    def holds(self, targets: Targets) -> bool:
        """Whether the same would be computed now with these targets."""
        if len(self.targets) != len(targets):
            return False
        for mine, other in zip(self.targets, targets, strict=True):
            # By identity first: to compare values the device must be waited for.
            if mine is not other and (mine.shape != other.shape or not torch.equal(mine, other)):
                return False
        if any(t._version != v for t, v in zip(self.targets, self.versions, strict=True)):
            return False
        return all(
            (now := tensors.get(name)) is not None
            and now.data_ptr() == at
            and now._version == version
            for tensors, name, _, at, version in self.stamps
        )

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A plain pass inside; what it gives is kept."""
        called: set[int] = set()

        def watch(module: nn.Module, _: Any) -> None:
            called.add(id(module))

        def end(module: nn.Module, _: Any) -> None:
            self._end()

        with ExitStack() as stack:
            pairs = {id(m): m for pair in self.layout.owners for m in pair}
            for module in pairs.values():
                stack.callback(module.register_forward_pre_hook(watch).remove)
            for module in self.layout.watched:
                hook = module.register_forward_pre_hook(end, prepend=True)
                stack.callback(hook.remove)
            instead = [partial(self._record, number) for number in range(len(self.calls))]
            stack.enter_context(_instead(self.layout.kept, instead))
            yield
        self._finish(called)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A pass inside, in which modules give again what they gave."""
        known = [(m, iter(c)) for m, c in zip(self.layout.kept, self.calls, strict=True) if c]
        with _instead([m for m, _ in known], [partial(self._replay, left) for _, left in known]):
            yield

    def _record(self, number: int, stock: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        calls = self.calls[number]
        # Of what is written, whose targets are not known, the pass over the prompt is kept.
        if self.ended or self.deep or (not self.targets and calls):
            return self._computed(stock, *args, **kwargs)
        call = Call()
        with _noted(cache_of(kwargs), call.updates) as plain:
            output = self._computed(stock, *args, **kwargs)
        if self.ended:  # a watched module that is called from elsewhere as well
            return output
        try:
            if not plain:
                raise NotKeptError
            call.keep(output)
        except NotKeptError:
            calls.append(None)
            return output
        calls.append(call)
        # What a layer gives goes into the next one, which gives what it gave whatever it is given.
        before = self.calls[self.layout.earlier[number]] if number in self.layout.earlier else []
        if len(calls) == len(before) == 1 and before[0] is not None:
            before[0].weaken()
            self.weak.append(before[0])
        return output

    def _replay(
        self,
        left: Iterator[Call | None],
        stock: Callable[..., Any],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call = None if self.deep else next(left, None)
        if call is None:
            return self._computed(stock, *args, **kwargs)
        for given, named in call.updates:
            cache_of(kwargs).update(*given, **named)
        return call.again()

    def _computed(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.deep += 1
        try:
            return stock(*args, **kwargs)
        finally:
            self.deep -= 1

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            for call in self.weak:
                call.settle()

    def _finish(self, called: Collection[int]) -> None:
        """Say what the outputs depend on, and whether they may be used."""
        # A parameter may be used without a call of the module that holds it (fused code): the
        # module around it is called then.
        bypassed = any(id(o) in called and id(h) not in called for h, o in self.layout.owners)
        found = [call for calls in self.calls for call in calls if call is not None]
        self.usable = not bypassed and (self.ended or not self.weak)
        self.usable = self.usable and all(call.untouched() for call in found)
        ran = [m for m, c in zip(self.layout.kept, self.calls, strict=True) if c]
        inner = [part for module in ran for part in module.modules()]
        for module in [*inner, *self.layout.opened]:
            for tensors in (module._parameters, module._buffers):
                self.stamps += [
                    (tensors, name, t.detach(), t.data_ptr(), t._version)
                    for name, t in tensors.items()
                    if t is not None
                ]
        if not self.usable:
            self.calls, self.weak = [[] for _ in self.calls], []


@contextmanager
def _instead(modules: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """While it lasts, these run in place of the modules' own, which they are given first."""
    # Past nn.Module.__setattr__, which takes longer than some passes.
    own = [module.__dict__.get("forward") for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        stock = module.forward
        module.__dict__["forward"] = instead = partial(forward, stock)
        # `generate` looks at the names of its arguments.
        instead.__dict__["__wrapped__"] = stock
    try:
        yield
    finally:
        for module, earlier in zip(modules, own, strict=True):
            if earlier is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = earlier


@contextmanager
def _noted(cache: Any, updates: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Iterator[bool]:
    """Note what is put into a cache; False where it is of a kind that may hold more than that."""
    if cache is None:
        yield True
        return
    if type(cache).__name__ != "DynamicCache":
        yield False
        return
    stock = cache.update

    def update(*args: Any, **kwargs: Any) -> Any:
        updates.append((args, kwargs))
        return stock(*args, **kwargs)

    cache.update = update
    try:
        yield True
    finally:
        del cache.update
