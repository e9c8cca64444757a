"""P-tuning v2: several tasks in one adapter, a shared prompt, classification heads."""

import peft
import pytest
import torch
from safetensors.torch import load_file

from mmtune import load_adapter
from mmtune.backbones import backbone_of
from mmtune.conformance.backbones import build, images_and_texts, pair_embeddings
from mmtune.tuners.prefix import PrefixConfig, eject
from mmtune.tuners.ptuning_v2 import PTuningV2Config, classify, set_task


def wrap(backbone="clip", **settings):
    model = build(backbone)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, PTuningV2Config(**settings))
    return wrapped.eval(), backbone_of(model)


def embeddings(model, view):
    with torch.no_grad():
        return pair_embeddings(model, view, images_and_texts(0, 3))


def count(model):
    return model.get_nb_trainable_parameters()[0]


LP = 2 * 2 * (48 + 32)  # 2 L d of both towers: what one token of a prompt has


def test_one_task_is_a_flat_prefix():
    wrapped, view = wrap(tokens=4)
    other = build("clip")
    prefix = peft.get_peft_model(other, PrefixConfig(tokens=4, reparameterise=False)).eval()
    with torch.no_grad():
        for key, value in prefix.prefixes.mmtune_keys["default"].items():
            ours = view.model.deep_prompts.mmtune_keys["default"][key.replace("prefix", "task", 1)]
            value.copy_(ours)
    assert torch.equal(embeddings(wrapped, view), embeddings(prefix, backbone_of(other)))


def test_count_sums_tasks_shared_prompt_and_heads():
    wrapped, _ = wrap(tasks={"a": 3, "b": 5}, shared=2, classes={"b": 7})
    assert count(wrapped) == (3 + 5 + 2) * LP + 7 * 24 + 7


def test_each_task_has_its_own_prompt_and_its_gradient_stays_there():
    wrapped, view = wrap(tasks={"a": 3, "b": 5}, shared=2)
    first = embeddings(wrapped, view)
    set_task(wrapped, "b")
    assert not torch.allclose(embeddings(wrapped, view), first)
    pair_embeddings(wrapped, view, images_and_texts(0, 2)).pow(3).sum().backward()
    parts = view.model.deep_prompts.mmtune_keys["default"]
    touched = {key.split("__")[0] for key, p in parts.items() if p.grad is not None}
    assert touched == {"shared", "b"}
    set_task(wrapped, "a")
    assert torch.equal(embeddings(wrapped, view), first)


def test_shared_and_own_prompt_are_one_longer_prompt():
    wrapped, view = wrap(tasks={"a": 3}, shared=2)
    one, one_view = wrap(tokens=5)
    theirs = view.model.deep_prompts.mmtune_keys["default"]
    with torch.no_grad():
        for branch in ("vision", "text"):
            table = one_view.model.deep_prompts.mmtune_keys["default"][f"task__{branch}__table"]
            table.copy_(torch.cat([theirs[f"{n}__{branch}__table"] for n in ("shared", "a")]))
    assert torch.equal(embeddings(wrapped, view), embeddings(one, one_view))


def test_the_file_holds_all_tasks_and_remembers_the_one_in_use(tmp_path):
    wrapped, view = wrap(tasks={"a": 3, "b": 5}, classes={"a": 2})
    set_task(wrapped, "b")
    want = embeddings(wrapped, view)
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == 8 * LP + 2 * 24 + 2
    again = load_adapter(build("clip"), tmp_path, adapter_name="renamed").eval()
    assert torch.equal(embeddings(again, backbone_of(again)), want)
    set_task(again, "a", "renamed")
    set_task(wrapped, "a")
    assert torch.equal(embeddings(again, backbone_of(again)), embeddings(wrapped, view))
    batch = images_and_texts(0, 2)
    with torch.no_grad():
        ours, theirs = classify(wrapped, batch, "a"), classify(again, batch, "a", "renamed")
    assert torch.equal(ours, theirs)


def test_reparameterised_prompts_eject_without_their_heads_changing():
    wrapped, view = wrap(
        tasks={"a": 3, "b": 5}, reparameterise=True, bottleneck=6, classes={"a": 2}
    )
    batch = images_and_texts(0, 2)
    with torch.no_grad():
        before = {task: embeddings(wrapped, view) for task in "ab" if not set_task(wrapped, task)}
        logits = classify(wrapped, batch, "a")
        eject(wrapped)
        for task, want in before.items():
            set_task(wrapped, task)
            assert torch.equal(embeddings(wrapped, view), want)
        assert torch.equal(classify(wrapped, batch, "a"), logits)
    assert count(wrapped) == 8 * LP + 2 * 24 + 2


@pytest.mark.parametrize("backbone", ["clip", "open_clip", "siglip"])
@pytest.mark.parametrize("feature", ["image", "text"])
def test_logits_are_the_head_on_the_pooled_embedding(backbone, feature):
    wrapped, view = wrap(backbone, tokens=2, classes={"task": 4}, feature=feature)
    batch = images_and_texts(0, 3)
    with torch.no_grad():
        pairs = view.embed_pairs(wrapped, batch)
        head = view.model.deep_prompts.mmtune_heads["default"]
        embedding = pairs.image if feature == "image" else pairs.text
        want = embedding @ head["task_weight"].T + head["task_bias"]
        assert torch.allclose(classify(wrapped, batch), want, atol=1e-6)


def test_it_learns_a_toy_classification():
    """Texts whose second word decides the class; the base model's head alone would not be told."""
    wrapped, _ = wrap(tokens=4, branches=["text"], classes={"task": 2}, feature="text")
    batch = images_and_texts(0, 32)
    labels = (batch["input_ids"][:, 1] > 30).long()
    frozen = {n: p.clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(classify(wrapped, batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert (classify(wrapped, batch).argmax(1) == labels).float().mean() > 0.95
    after = dict(wrapped.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in frozen.items())


def test_a_head_wants_a_dual_encoder():
    with pytest.raises(TypeError, match="embeds no pairs"):
        wrap("llava", classes={"task": 2})


def test_unknown_tasks_are_named_with_those_there_are():
    wrapped, _ = wrap(tasks={"vqa": 3, "captions": 3}, classes={"vqa": 2})
    with pytest.raises(ValueError, match="no task 'caption'; there are vqa, captions"):
        set_task(wrapped, "caption")
    with pytest.raises(ValueError, match="'captions' has no classification head"):
        classify(wrapped, images_and_texts(0, 2), "captions")
    with pytest.raises(ValueError, match="no such adapter"):
        set_task(wrapped, "vqa", "other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "ptuning_v2.tokens must be at least 1, got 0"),
        ({"tasks": {"a": 0}}, "ptuning_v2.tasks.a must be at least 1"),
        ({"tasks": {"a.b": 2}}, "'a.b' names no task"),
        ({"tasks": {"shared": 2}}, "'shared' names no task"),
        ({"shared": -1}, "ptuning_v2.shared must be at least 0"),
        ({"tasks": {"a": 2}, "task": "b"}, "no task 'b'; there are a"),
        ({"classes": {"b": 2}}, "no task 'b'; there are task"),
        ({"classes": {"task": 1}}, "ptuning_v2.classes.task must be at least 2"),
        ({"bottleneck": 0}, "ptuning_v2.bottleneck must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PTuningV2Config(**settings)
