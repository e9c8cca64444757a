"""What reads the config of each command, and what writes it."""

from __future__ import annotations

from editing.config import load_edit_config
from editing.config import to_yaml as edit_yaml
from editing.meta.config import load_meta_config
from editing.meta.config import to_yaml as meta_yaml
from mmtune.compare.config import load_comparison
from mmtune.config import load_config

LOADERS = {"compare": load_comparison, "edit": load_edit_config, "edit-train": load_meta_config}
WRITERS = {"edit": edit_yaml, "edit-train": meta_yaml}


def loader(command):
    return LOADERS.get(command, load_config)
