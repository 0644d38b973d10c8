"""Learned input embeddings of the words of some phrases: what anatomy prompt tuning trains (arXiv 2506.10633).

Inside one of the phrases ("right lower zone") each sub-token's embedding has a learned offset added before the text
encoder reads it; everywhere else, the same sub-token in another word included, the embedding stays what it was. An
offset of zeros is the baseline bit for bit.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from medviz.errors import InputError, ModelError

WEIGHTS_NAME = "prompt_embeddings.safetensors"
WORD_END = "</w>"  # ends the last sub-token of every word of a CLIP tokenizer


class PromptEmbeddings:
    """The codebook of a set of phrases, for one tokenizer.

    phrases: as given. ids (K,): the token ids that occur in them, ascending. offsets (K, D) float32: what is added to
    their input embeddings, a row for each id; the one thing that is trained. enabled: whether it is added now.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, phrases: Sequence[str], width: int) -> None:
        """width: D, of the text encoder. Starts as no change at all, switched off.

        Raises InputError without phrases, for one that the tokenizer makes nothing of, or a tokenizer of another kind.
        """
        vocabulary = tokenizer.get_vocab()
        unknown = {tokenizer.unk_token_id, *tokenizer.all_special_ids}
        self.phrases = tuple(dict.fromkeys(phrases))
        self._sequences: dict[tuple[int, ...], None] = {}
        for phrase in self.phrases:
            ids = tuple(tokenizer(phrase, add_special_tokens=False).input_ids)
            if not ids or unknown & set(ids):
                raise InputError(f"the tokenizer cannot write the phrase {phrase!r}")
            if not tokenizer.convert_ids_to_tokens(ids[-1]).endswith(WORD_END):
                raise InputError(f"{type(tokenizer).__name__} does not end its words with {WORD_END}; CLIP's does")
            self._sequences[ids] = None
        if not self._sequences:
            raise InputError("at least one phrase is needed, found none")
        self.ids = tuple(sorted({token for ids in self._sequences for token in ids}))
        self.tokens = tuple(tokenizer.convert_ids_to_tokens(list(self.ids)))
        self.offsets = torch.nn.Parameter(torch.zeros(len(self.ids), width), requires_grad=False)
        self.enabled = False
        self._row = {token: row for row, token in enumerate(self.ids)}
        self._longest = max(map(len, self._sequences))
        special = set(tokenizer.all_special_ids)
        self._word_ends = {token for text, token in vocabulary.items() if text.endswith(WORD_END)} | special

    def rows(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The codebook row of every token of input_ids (B, L) that lies in a phrase, -1 elsewhere: int64 (B, L).

        Of phrases that overlap the longest that begins first counts; a phrase begins and ends with whole words.
        """
        return torch.tensor([self._rows(ids) for ids in input_ids.tolist()], device=input_ids.device)

    def _rows(self, ids: list[int]) -> list[int]:
        rows, at = [-1] * len(ids), 0
        while at < len(ids):
            length = 0
            if at == 0 or ids[at - 1] in self._word_ends:
                for longest in range(min(self._longest, len(ids) - at), 0, -1):
                    if tuple(ids[at : at + longest]) in self._sequences:
                        length = longest
                        break
            for place in range(at, at + length):
                rows[place] = self._row[ids[place]]
            at += max(1, length)
        return rows

    def attach(self, text_encoder: CLIPTextModel) -> None:
        """Let the text encoder's input embeddings pass through here; while not `enabled` nothing is changed.

        Raises ModelError when the text encoder has another width.
        """
        embedding = text_encoder.get_input_embeddings()
        if embedding.weight.shape[1] != self.offsets.shape[1] or max(self.ids) >= embedding.weight.shape[0]:
            raise ModelError(
                f"these embeddings fit a text encoder of width {self.offsets.shape[1]} and more than {max(self.ids)} "
                f"tokens, found {tuple(reversed(embedding.weight.shape))}"
            )
        embedding.register_forward_hook(self._on_embedding)

    def _on_embedding(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        if not self.enabled:
            return None
        rows = self.rows(args[0])
        if not bool((rows >= 0).any()):
            return None
        offsets = self.offsets.to(output.device)[rows.clamp(min=0)].to(output.dtype)
        return torch.where((rows >= 0)[..., None], output + offsets, output)

    def save(self, folder: Path) -> Path:
        """Write the offsets with their phrases and tokens to `folder`; the same embeddings give the same file."""
        card = json.dumps({"phrases": list(self.phrases), "tokens": list(self.tokens)})
        path = Path(folder) / WEIGHTS_NAME
        # One entry: safetensors writes several in an order of chance.
        save_file({"offsets": self.offsets.detach().to("cpu").contiguous()}, path, metadata={"card": card})
        return path

    @classmethod
    def load(cls, folder: Path, tokenizer: PreTrainedTokenizerBase) -> "PromptEmbeddings":
        """Read what `save` wrote, switched off and frozen.

        Raises ModelError when the file is missing, damaged, or was made with another tokenizer.
        """
        path = Path(folder) / WEIGHTS_NAME
        try:
            with safe_open(path, "pt") as stored:
                card = json.loads((stored.metadata() or {})["card"])
                offsets = stored.get_tensor("offsets").float()
            phrases, tokens = [str(phrase) for phrase in card["phrases"]], tuple(card["tokens"])
            if offsets.shape != (len(tokens), *offsets.shape[1:2]) or not bool(torch.isfinite(offsets).all()):
                raise ValueError(f"offsets {tuple(offsets.shape)} for {len(tokens)} tokens, or not all finite")
            found = cls(tokenizer, phrases, offsets.shape[1])
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ModelError(f"the embeddings {path} cannot be loaded: {error}") from error
        if found.tokens != tokens:
            raise ModelError(f"the embeddings {path} were made with another tokenizer")
        with torch.no_grad():
            found.offsets.copy_(offsets)
        return found
