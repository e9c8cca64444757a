"""Pages of methods and editors in a terminal, and the names that have one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mmtune.reference.pages import Page, editor_page, method_page
from mmtune.suggestions import did_you_mean
from mmtune.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table


def pages(name: str, others: Sequence[str] = ()) -> list[Page]:
    """The pages of what is called `name`: a method, an editor, or one of each.

    Args:
        name: of it.
        others: further names that can be meant, for the suggestion.

    Raises:
        ValueError: nothing is called like that.
    """
    from editing.methods.base import editors
    from mmtune.tuners.registry import methods

    found: list[Page] = []
    if name in methods():
        found.append(method_page(methods()[name]))
    if name in editors():
        found.append(editor_page(editors()[name]))
    if not found:
        known = [*others, *methods(), *editors()]
        raise ValueError(
            f"nothing is called {name!r} here; there are the lists {', '.join(others)}, the "
            f"methods {', '.join(sorted(methods()))} and the editors {', '.join(editors())}."
            + did_you_mean(name, known)
        )
    return found


def shown(page: Page) -> list[Any]:
    """A page as what rich prints."""
    parts: list[Any] = [_bold(f"{page.name} ({page.kind}): {page.summary}"), ""]
    for block in page.body:
        parts += [_equation(block.text) if block.equation else block.text, ""]
    parts += [page.count, ""]
    parts += [_bold("Source"), *page.source, ""]
    parts.append(_options(page))
    if page.tried:
        parts += [*_tried(page), ""]
    parts += [*page.notes]
    parts.append(f"Configs: {', '.join(page.configs) or 'none ships'}.")
    return parts


def _options(page: Page) -> Table:
    table = new_table("option", "type", "default", "what it is", title="options")
    for option in page.options:
        table.add_row(option.name, option.type, option.default, option.text)
    return table


def _tried(page: Page) -> list[Table]:
    table = new_table(
        "settings", "works on", "merges", "fresh: no change", title="what the test suite asserts"
    )
    refused = new_table("settings", "on", "refused, because", title="what is refused")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in page.tried:
        if row.works:
            table.add_row(row.settings, row.works, row.merges, row.starts)
        for backbone, why in row.refuses:
            reasons.setdefault((row.settings, why), []).append(backbone)
    for (settings, why), backbones in reasons.items():
        refused.add_row(settings, ", ".join(backbones), why)
    return [table, refused] if reasons else [table]


def _bold(text: str) -> Any:
    from rich.text import Text

    return Text(text, style="bold")


def _equation(text: str) -> Any:
    from rich.text import Text

    return Text("\n".join(f"    {line}" for line in text.splitlines()), style="cyan")


Listed = dict[str, Callable[[], list[Any]]]


def listed(what: str, tables: Listed) -> list[Any]:
    """One of the `tables`, or the pages of what is called `what`; see `pages`."""
    if what in tables:
        return tables[what]()
    found: list[Any] = []
    for page in pages(what, list(tables)):
        found += ["", *shown(page)] if found else shown(page)
    return found
