"""A page in the browser: images found by text, and a model that is asked before and after edits.

What a tab does is in a module without a page (`search`, `editing`); gradio is imported by the
modules of the page alone (`app`, `search_tab`, `editing_tab`).
"""
