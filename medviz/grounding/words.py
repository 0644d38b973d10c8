"""From a word of a prompt to the tokens that carry it, by the character offsets of a fast tokenizer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from medviz.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


def _offsets(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[Span]:
    """The character span of every token of the whole prompt; special tokens have an empty one.

    What the tokenizer adds at the start is there; nothing is cut and nothing padded.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
    encoding = tokenizer(
        prompt,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    reserved = set(tokenizer.all_special_tokens)
    # A special token that someone typed has a place in the text but is no word of it.
    return [
        (0, 0) if added or prompt[start:end] in reserved else (start, end)
        for added, (start, end) in zip(encoding["special_tokens_mask"], encoding["offset_mapping"], strict=True)
    ]


def _last_kept(tokenizer: PreTrainedTokenizerBase, offsets: list[Span]) -> int:
    """Number of leading tokens that survive truncation to the tokenizer's maximum length."""
    trailing = 0
    for start, end in reversed(offsets):
        if end > start:
            break
        trailing += 1
    return min(len(offsets), tokenizer.model_max_length - trailing)


def token_indices(tokenizer: PreTrainedTokenizerBase, prompt: str, word: str) -> tuple[int, ...]:
    """Positions, in the encoded prompt, of the tokens of every occurrence of a word or phrase.

    Case and the width of white space do not matter; "lung" is not found inside "lungs". Special tokens are never
    among them. An occurrence that truncation cuts off, wholly or in part, is left out.

    Raises InputError when the word is empty, is not in the prompt, or lies beyond the tokenizer's maximum length.
    """
    parts = word.split()
    if not parts:
        raise InputError("a word or phrase is needed, found an empty text")
    pattern = r"(?<!\w)" + r"\s+".join(re.escape(part) for part in parts) + r"(?!\w)"
    spans = [match.span() for match in re.finditer(pattern, prompt, flags=re.IGNORECASE)]
    if not spans:
        raise InputError(f"{word!r} is not in the prompt {prompt!r}; choose a word as the prompt has it")
    offsets = _offsets(tokenizer, prompt)
    kept = _last_kept(tokenizer, offsets)
    found: set[int] = set()
    for start, end in spans:
        tokens = [i for i, (low, high) in enumerate(offsets) if low < high and low < end and high > start]
        if tokens and tokens[-1] < kept:
            found.update(tokens)
    if not found:
        raise InputError(
            f"{word!r} lies beyond the {tokenizer.model_max_length} tokens the model reads, so it was cut off; "
            "shorten the prompt or move the word forward"
        )
    return tuple(sorted(found))


def content_indices(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """Positions of all tokens of the prompt that hold a letter or digit; no special tokens, no punctuation."""
    offsets = _offsets(tokenizer, prompt)
    kept = _last_kept(tokenizer, offsets)
    return tuple(
        i for i, (start, end) in enumerate(offsets[:kept]) if any(char.isalnum() for char in prompt[start:end])
    )


def truncated_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The end of the prompt that the model does not read because of the tokenizer's maximum length; "" if none.

    It begins with a whole word: one that the model reads in part counts as not read.
    """
    offsets = _offsets(tokenizer, prompt)
    lost = [start for start, end in offsets[_last_kept(tokenizer, offsets) :] if end > start]
    if not lost:
        return ""
    start = lost[0]
    while start > 0 and prompt[start - 1].isalnum() and prompt[start].isalnum():
        start -= 1
    return prompt[start:].strip()
