"""What reads the config of each command, and what writes it."""

from __future__ import annotations

from data_builders.config import load_build_config
from data_builders.config import to_yaml as build_yaml
from editing.config import load_edit_config
from editing.config import to_yaml as edit_yaml
from editing.meta.config import load_meta_config
from editing.meta.config import to_yaml as meta_yaml
from mmtune.compare.config import load_comparison
from mmtune.config import load_config
from mmtune.probe.config import load_probe_config
from mmtune.probe.config import to_yaml as probe_yaml

LOADERS = {
    "build": load_build_config,
    "compare": load_comparison,
    "edit": load_edit_config,
    "edit-train": load_meta_config,
    "probe": load_probe_config,
}
WRITERS = {
    "build": build_yaml,
    "edit": edit_yaml,
    "edit-train": meta_yaml,
    "probe": probe_yaml,
}


def loader(command):
    return LOADERS.get(command, load_config)
