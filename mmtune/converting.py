"""The arguments of `mmtune convert`, and what it shows."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmtune.shown import Findings

FAILED = 1


def add_commands(new: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the command; `new` makes its parser from its name and summary.

    The parsed options have `show`, which takes them and returns `Findings`.
    """
    convert = new("convert", "turn another code's checkpoint into a model")
    layouts = convert.add_subparsers(
        title="layouts", metavar="LAYOUT", dest="layout", required=True
    )
    blip = _layout(layouts, "blip", "the original BLIP code's .pth", _blip)
    blip.add_argument("file", type=Path, metavar="FILE", help="the checkpoint")
    blip.add_argument(
        "--kind", choices=("retrieval", "vqa", "caption"), required=True, help="the stock class"
    )
    blip.add_argument(
        "--tokenizer", default="bert-base-uncased", help="folder or hub name (default: %(default)s)"
    )
    minigpt4 = _layout(
        layouts, "minigpt4", "MiniGPT-4's .pth and the files it builds on", _minigpt4
    )
    minigpt4.add_argument(
        "file", type=Path, metavar="FILE", help="its checkpoint, such as pretrained_minigpt4.pth"
    )
    minigpt4.add_argument(
        "--vision", type=Path, required=True, metavar="FILE", help="EVA's ViT-g: eva_vit_g.pth"
    )
    minigpt4.add_argument(
        "--qformer",
        type=Path,
        required=True,
        metavar="FILE",
        help="BLIP-2's Q-Former: blip2_pretrained_flant5xxl.pth",
    )
    minigpt4.add_argument(
        "--language", required=True, metavar="MODEL", help="Vicuna: folder or hub name"
    )


def _layout(layouts: Any, name: str, summary: str, show: Any) -> argparse.ArgumentParser:
    parser = layouts.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])
    parser.set_defaults(show=show)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, for hf:FOLDER")
    parser.add_argument("--image-size", type=int, help="pixels; default: the checkpoint's")
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    return parser


def _blip(options: argparse.Namespace) -> Findings:
    from mmtune.backbones.blip_checkpoints import write
    from mmtune.tables import conversion_table

    converted, problem = write(
        options.file, options.kind, options.out, options.image_size, options.tokenizer
    )
    table = conversion_table(converted)
    if problem is None:
        return Findings([table], [_name(options)])
    error = (
        f"{options.out} has no tokenizer and cannot be loaded by hf:FOLDER: {problem}. Delete it "
        "and convert again with --tokenizer FOLDER."
    )
    return Findings([table], [], FAILED, errors=[error])


def _minigpt4(options: argparse.Namespace) -> Findings:
    from mmtune.backbones.minigpt4_checkpoints import write
    from mmtune.tables import conversion_table

    converted = write(
        options.file,
        options.vision,
        options.qformer,
        options.language,
        options.out,
        options.image_size,
    )
    return Findings([conversion_table(converted)], [_name(options)])


def _name(options: argparse.Namespace) -> str:
    return f"model.name: hf:{options.out}"
