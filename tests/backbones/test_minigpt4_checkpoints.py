"""MiniGPT-4's files: every key finds its place, or is named."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmtune import backbones, cli
from mmtune.backbones.minigpt4 import MiniGPT4
from mmtune.backbones.minigpt4_checkpoints import convert, ends
from mmtune.backbones.original_checkpoints import CheckpointError

VISION, QFORMER, WORDS = 176, 128, 24  # two heads of 88, two of 64
QUERIES, PATCH, SIDE = 3, 8, 2


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def drawn(shapes, seed):
    g = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def eva(blocks=3, seed=0):
    """EVA's ViT as its file has it: no prefix, no bias of keys, an output of its own."""
    shapes = {
        "cls_token": (1, 1, VISION),
        "pos_embed": (1, 1 + SIDE**2, VISION),
        "patch_embed.proj.weight": (VISION, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (VISION,),
        **norm("norm", VISION),
        **linear("head", 5, VISION),
    }
    for i in range(blocks):
        block = f"blocks.{i}"
        shapes |= norm(f"{block}.norm1", VISION) | norm(f"{block}.norm2", VISION)
        shapes |= {f"{block}.attn.qkv.weight": (3 * VISION, VISION)}
        shapes |= {f"{block}.attn.{x}_bias": (VISION,) for x in "qv"}
        shapes |= linear(f"{block}.attn.proj", VISION, VISION)
        shapes |= linear(f"{block}.mlp.fc1", 40, VISION) | linear(f"{block}.mlp.fc2", VISION, 40)
    return drawn(shapes, seed)


def qformer(seed=1):
    """BLIP-2's checkpoint: queries, Q-Former with what reads words, and T5's projection."""
    bert = "Qformer.bert"
    shapes = {
        "query_tokens": (1, QUERIES, QFORMER),
        **norm("ln_vision", VISION),
        **norm(f"{bert}.embeddings.LayerNorm", QFORMER),
        f"{bert}.embeddings.word_embeddings.weight": (9, QFORMER),
        f"{bert}.embeddings.position_ids": (1, 9),
        "Qformer.cls.predictions.bias": (9,),
        **linear("t5_proj", 7, QFORMER),
    }
    for i in range(3):
        layer = f"{bert}.encoder.layer.{i}"
        for kind, source in (("attention", QFORMER), ("crossattention", VISION)):
            if kind == "attention" or i in (0, 2):
                shapes |= linear(f"{layer}.{kind}.self.query", QFORMER, QFORMER)
                shapes |= linear(f"{layer}.{kind}.self.key", QFORMER, source)
                shapes |= linear(f"{layer}.{kind}.self.value", QFORMER, source)
                shapes |= linear(f"{layer}.{kind}.output.dense", QFORMER, QFORMER)
                shapes |= norm(f"{layer}.{kind}.output.LayerNorm", QFORMER)
        for end in ("", "_query"):
            shapes |= linear(f"{layer}.intermediate{end}.dense", 48, QFORMER)
            shapes |= linear(f"{layer}.output{end}.dense", QFORMER, 48)
            shapes |= norm(f"{layer}.output{end}.LayerNorm", QFORMER)
    return drawn(shapes, seed)


def own(seed=2):
    return drawn(linear("llama_proj", 32, QFORMER), seed)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def state():
    return {f"visual_encoder.{name}": value for name, value in eva().items()} | qformer() | own()


def tokenizer():
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "###": 3, "a": 4, "##": 5, "#": 6}
    words |= {f"w{i}": i for i in range(7, WORDS)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    pieces = pre_tokenizers.Split(r"w\d+|a|###", "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pieces])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def seen(tensors, pixels, blocks):
    """The original ViT's forward pass, without its output."""
    x = F.conv2d(
        pixels, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=PATCH
    )
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1)
    x = x + tensors["pos_embed"]
    for i in range(blocks):
        at = {n.removeprefix(f"blocks.{i}."): t for n, t in tensors.items()}
        y = F.layer_norm(x, (VISION,), at["norm1.weight"], at["norm1.bias"], 1e-6)
        bias = torch.cat([at["attn.q_bias"], torch.zeros(VISION), at["attn.v_bias"]])
        q, k, v = F.linear(y, at["attn.qkv.weight"], bias).unflatten(-1, (3, 2, -1)).unbind(2)
        scores = torch.einsum("bthe,bshe->bhts", q, k) / 88**0.5
        y = torch.einsum("bhts,bshe->bthe", scores.softmax(-1), v).flatten(2)
        x = x + F.linear(y, at["attn.proj.weight"], at["attn.proj.bias"])
        y = F.layer_norm(x, (VISION,), at["norm2.weight"], at["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, at["mlp.fc1.weight"], at["mlp.fc1.bias"]))
        x = x + F.linear(y, at["mlp.fc2.weight"], at["mlp.fc2.bias"])
    return x


@torch.no_grad()
def test_vision_tower_computes_what_the_original_does_without_its_last_block():
    tensors, made = eva(), state()
    found = convert(made, llama(), 0, vision_layers=2)
    pixels = torch.randn(2, 3, PATCH * SIDE, PATCH * SIDE)
    want = seen(tensors, pixels, 2)
    want = F.layer_norm(want, (VISION,), made["ln_vision.weight"], made["ln_vision.bias"], 1e-6)
    got = found.model.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert found.left_out["blocks of the ViT behind the first 2"] == 13


def test_every_tensor_is_in_its_place_once():
    """Told by values: each original tensor that has a place is found there, unchanged."""
    made, language = state(), llama()
    found = convert(made, language, 0)
    have = found.model.state_dict()
    rest = {n: t for n, t in have.items() if not n.startswith("language_model.")}
    sums = sorted(float(t.double().sum()) for t in rest.values())
    lost = re.compile(
        r".*(t5_proj|Qformer\.cls|word_embeddings|position_ids|encoder\.norm|encoder\.head"
        r"|layer\.\d\.(intermediate|output)\.).*"
    )
    kept = {n: t for n, t in made.items() if not lost.fullmatch(n)}
    biases = [n for n in kept if re.search(r"attn\.[qv]_bias", n)]
    want = [float(t.double().sum()) for n, t in kept.items() if n not in biases]
    want += [
        float(kept[n].double().sum() + kept[n.replace("q_bias", "v_bias")].double().sum())
        for n in biases
        if n.endswith("q_bias")
    ]
    assert sums == pytest.approx(sorted(want))
    assert sum(found.left_out.values()) == len(made) - len(kept)
    assert found.left_out == {
        "EVA's own output": 4,
        "what the Q-Former reads words with": 3 + 3 * 6,
        "projections to other language models": 2,
    }
    language_state = language.state_dict()
    assert all(torch.equal(have[f"language_model.{n}"], t) for n, t in language_state.items())
    layer = "encoder.layer.2.crossattention"
    assert torch.equal(
        have[f"qformer.{layer}.attention.value.weight"],
        made[f"Qformer.bert.{layer}.self.value.weight"],
    )
    assert torch.equal(have["language_projection.bias"], made["llama_proj.bias"])
    assert found.model.config.qformer_config.cross_attention_frequency == 2
    assert not any(t.is_meta for t in have.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama_proj.bias": None}, "missing key(s): language_projection.bias"),
        ({"query_tokens": None}, "the key query_tokens is missing"),
        ({"visual_encoder.blocks.1.attn.v_bias": None}, "blocks.1.attn.v_bias is missing"),
        ({"llama_proj.weight": torch.zeros(9, QFORMER)}, "llama_proj.weight: [9, 128], expected"),
        ({"llama_model.x": torch.zeros(1)}, "unknown key(s): llama_model.x"),
        ({"visual_encoder.rel_pos_bias": torch.zeros(1)}, "unknown key(s): visual_encoder.rel"),
        ({"visual_encoder.pos_embed": torch.zeros(1, 7, VISION)}, "7 positions"),
    ],
)
def test_a_key_that_does_not_fit_is_named(change, message):
    made = {name: value for name, value in (state() | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert(made, llama(), 0)


@pytest.fixture
def files(tmp_path):
    for name, tensors in (("eva", eva()), ("qformer", qformer()), ("own", own())):
        torch.save(tensors if name == "eva" else {"model": tensors}, tmp_path / f"{name}.pth")
    llama().save_pretrained(tmp_path / "vicuna")
    tokenizer().save_pretrained(tmp_path / "vicuna")
    return tmp_path


def command(files, *more):
    parts = ["--vision", files / "eva.pth", "--qformer", files / "qformer.pth"]
    parts += ["--language", files / "vicuna", "--out", files / "out", *more]
    return [str(part) for part in ("convert", "minigpt4", files / "own.pth", *parts)]


@torch.no_grad()
def test_converted_folder_is_a_stock_model_that_answers(files, capsys):
    assert cli.main(command(files, "--image-size", "24")) == 0
    printed = capsys.readouterr().out
    assert "projections to other language models" in printed
    assert "positions interpolated from 16" in printed
    loaded = backbones.load(f"hf:{files / 'out'}")
    view = loaded.backbone
    assert isinstance(view, MiniGPT4)
    assert (loaded.image.size, loaded.image.resize) == (24, "squash")
    want = convert(state(), llama(), 0, 24).model.state_dict()
    have = loaded.model.state_dict()
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], want[name]) for name in want)
    assert view.ends == [3, 2]
    assert view.pad == 2
    text = view.templates["question"].replace("{question}", "w9 a")
    batch = view.prompts(loaded.tokenizer, [text])
    before, _, after = text.partition("<image>")
    ids = loaded.tokenizer(before)["input_ids"], loaded.tokenizer(after)["input_ids"][1:]
    assert batch["input_ids"].tolist() == [[*ids[0], 0, 0, 0, *ids[1]]]
    assert cli.main(command(files)) == 2
    assert "exists already" in capsys.readouterr().err


def test_what_is_missing_is_named(files, capsys):
    (files / "qformer.pth").unlink()
    assert cli.main(command(files)) == 2
    assert "qformer.pth" in capsys.readouterr().err


def test_answers_end_where_the_separator_begins():
    """Llama's tokenizer cuts it in another way where it stands alone."""
    assert ends(tokenizer()) == [3, 2]

    class Cut:
        unk_token_id, eos_token_id = 0, 2

        def __call__(self, text, add_special_tokens):
            return {"input_ids": {"a": [4], "a###": [4, 5, 6], "###": [3]}[text]}

    assert ends(Cut()) == [5, 3, 2]
