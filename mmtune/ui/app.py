"""The page: its tabs, and the server that shows it on this machine alone unless told otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# Read by gradio when it is imported: it is not to tell anybody that it runs.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from mmtune.ui.editing_tab import add_editing_tab
from mmtune.ui.problems import PageProblem
from mmtune.ui.search_tab import add_search_tab

if TYPE_CHECKING:
    from mmtune.ui.editing import Desk
    from mmtune.ui.search import ImageSearch

STYLE = Path(__file__).with_name("style.css")
FORGOTTEN = (
    86400  # seconds after which copies of shown pictures are deleted; so are they at the end
)


def page(search: ImageSearch | None = None, desk: Desk | None = None) -> gr.Blocks:
    """The page with a tab for each of the two that there is."""
    with gr.Blocks(
        analytics_enabled=False, title="mmtune", delete_cache=(FORGOTTEN, FORGOTTEN)
    ) as made:
        gr.Markdown("# mmtune", elem_id="title")
        if search is not None:
            with gr.Tab("Search", elem_id="tab-search"):
                add_search_tab(search, made)
        if desk is not None:
            with gr.Tab("Edit", elem_id="tab-edit"):
                add_editing_tab(desk)
    return made


def serve(made: gr.Blocks, host: str, port: int) -> tuple[str, Callable[[], None]]:
    """Start the server.

    Args:
        made: the page.
        host: address to listen at.
        port: to listen at; 0 takes one that is free.

    Returns:
        Where the page is, and what waits until the server is stopped.

    Raises:
        PageProblem: the port is taken.
    """
    # Gradio asks its own page whether it is there; a proxy is for other machines.
    os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), host)))
    try:
        _, url, _ = made.launch(
            server_name=host,
            server_port=port or _free_port(host),
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            pwa=False,
            footer_links=[],
            theme=_theme(),
            css_paths=STYLE,
        )
    except OSError as error:
        raise PageProblem(
            f"the page cannot be shown at {host}:{port} ({error}). Choose another port with --port."
        ) from None
    return url, made.block_thread


def _theme() -> gr.themes.Base:
    """Gradio's own, with the machine's fonts, and greys and blues that can be read (4.5 : 1)."""
    fonts = [gr.themes.Font(name) for name in ("system-ui", "Segoe UI", "Roboto", "sans-serif")]
    return gr.themes.Default(primary_hue="blue", font=fonts).set(
        body_text_color_subdued="*neutral_500",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        color_accent="*primary_600",  # style.css has that of the dark page
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as found:
        found.bind((host, 0))
        return found.getsockname()[1]
