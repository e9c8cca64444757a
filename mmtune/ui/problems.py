"""What goes wrong on the page because of what was typed, told there in a sentence."""

from __future__ import annotations

import html

# What our libraries and those below raise for inputs, models and files that do not fit.
EXPECTED = (ValueError, LookupError, TypeError, OSError, RuntimeError)
MISSING = (
    "`mmtune ui` shows its page with gradio, which is not installed. Run: pip install 'mmtune[ui]'"
)


class PageProblem(ValueError):
    """What the page says in place of a result."""


def require_gradio() -> None:
    """ImportError that says how to install gradio, where it is missing."""
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise ImportError(MISSING)


def problem(error: BaseException | str) -> str:
    """A message as HTML that stands out; several lines stay several."""
    return f'<p class="problem" role="alert">{_escaped(error)}</p>'


def note(text: str) -> str:
    """A remark as HTML."""
    return f'<p class="note" role="status">{_escaped(text)}</p>' if text else ""


def _escaped(text: BaseException | str) -> str:
    said = str(text) or type(text).__name__
    return html.escape(said).replace("\n", "<br>")
