"""A chat model of transformers that writes answers in batches, each from a seed of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCHEMES = "hf:REPOSITORY, hf:./FOLDER or zoo:smollm2"
UNFINISHED = "…"  # ends an answer that was longer than it may be
Messages = Sequence[Mapping[str, str]]


class ChatModel:
    """Writes what follows a conversation.

    Each answer is drawn from a generator of its own, one number a token, so it depends on its
    conversation and its seed, not on its neighbours nor on who runs it. What padding and the size
    of a batch do is to move logits in their last bits: in float32 that hardly ever changes a token,
    in bfloat16 it changes some answers. The same batches always give the same.

    Args:
        name: one of `SCHEMES`.
        dtype: of the weights.
        device: where it runs.
        template_options: for the chat template, such as {"enable_thinking": False}.

    Raises:
        ValueError: it cannot be loaded, or is no chat model.
    """

    def __init__(
        self,
        name: str,
        dtype: str = "float32",
        device: str = "cpu",
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from mmtune.backbones.loading import torch_dtype

        self.name, self.template_options = name, dict(template_options or {})
        folder = _folder(name)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype(dtype))
        except (OSError, ValueError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(
                f"{name} cannot be loaded as a language model: {why} Expected {SCHEMES}."
            ) from None
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{name} has no chat template, so it does not follow requests. Choose a model that "
                "was tuned to, such as one whose name ends in -Instruct."
            )
        self.tokenizer.padding_side = "left"  # answers begin where the longest conversation ends
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = model.to(device).eval()

    def text(self, messages: Messages) -> str:
        """A conversation as the model reads it, up to where its answer begins."""
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **self.template_options
        )

    def write(
        self,
        conversations: Sequence[Messages],
        seeds: Sequence[int],
        max_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> list[str]:
        """One answer each, computed as one batch; one that was cut off ends in `UNFINISHED`.

        Args:
            conversations: at least one.
            seeds: of what is drawn, one each.
            max_tokens: of an answer.
            temperature: 0 takes the likeliest token, whatever the seed.
            top_p: tokens are drawn among the likeliest that have this probability together.
        """
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        texts = [self.text(one) for one in conversations]
        read = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        read = read.to(self.model.device)
        known = self.model.generation_config
        config = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=known.eos_token_id or self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        processors = LogitsProcessorList()
        length = read["input_ids"].shape[1]
        if temperature > 0:
            numbers = [
                torch.rand(max_tokens, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
            processors.append(Drawn(torch.stack(numbers), length, temperature, top_p))
        with torch.no_grad():
            written = self.model.generate(
                input_ids=read["input_ids"],
                attention_mask=read["attention_mask"],
                generation_config=config,
                logits_processor=processors,
            )
        texts = self.tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
        ends = torch.as_tensor(config.eos_token_id, device=written.device).reshape(-1)
        ended = torch.isin(written[:, length:], ends).any(-1).tolist()
        return [
            text if done else text + UNFINISHED for text, done in zip(texts, ended, strict=True)
        ]


class Drawn:
    """Leaves one token of each row: that which the row's own number in [0, 1) falls on.

    Args:
        numbers: [rows, tokens], float32, one for each token that may be written.
        start: length of what the model is given.
        temperature: above 0.
        top_p: in (0, 1].
    """

    def __init__(self, numbers: Tensor, start: int, temperature: float, top_p: float) -> None:
        self.numbers, self.start = numbers, start
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        import torch

        likely = torch.softmax(scores.float() / self.temperature, dim=-1)
        likely, order = likely.sort(dim=-1, descending=True, stable=True)
        reached = likely.cumsum(-1)
        kept = likely * (reached - likely < self.top_p)  # the first is always among them
        reached = kept.cumsum(-1)
        at = self.numbers[:, input_ids.shape[1] - self.start].to(scores.device)
        place = torch.searchsorted(reached, at[:, None] * reached[:, -1:], right=True)
        place = place.minimum((kept > 0).sum(-1, keepdim=True) - 1)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(-1, order.gather(-1, place), 0.0)  # type: ignore[return-value]


def _folder(name: str) -> str:
    scheme, _, rest = name.partition(":")
    if name == "zoo:smollm2":
        from mmtune.zoo.smollm import language_folder

        return str(language_folder())
    if scheme != "hf" or not rest:
        raise ValueError(f"no chat model {name!r}; expected {SCHEMES}")
    if rest.startswith((".", "/")) and not Path(rest).is_dir():
        raise ValueError(f"{name}: there is no folder {Path(rest).absolute()}")
    return rest
