"""The tokenizer of a domain: byte-level BPE with CLIP's rules, trained on the domain's own captions.

The splitting and normalising are those of `transformers.CLIPTokenizer` itself, so that a tokenizer saved here and
loaded by `CLIPTokenizer.from_pretrained` cuts a text at inference exactly as it did in training.
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

BOS_TOKEN, EOS_TOKEN = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
VOCABULARY_SIZE = 2000  # at most; 512 byte symbols and the two special tokens are part of it


def build_tokenizer(texts: Iterable[str], max_length: int, vocabulary_size: int = VOCABULARY_SIZE) -> CLIPTokenizer:
    """Train a CLIP tokenizer on texts; the same texts in the same order give the same tokenizer.

    max_length: tokens of a padded prompt with its start and end, `model_max_length` of the result. All 256 bytes are in
    the vocabulary, within a word and at its end, so that any text encodes without an unknown token. As in CLIP, the
    padding token is the end token, and the two special tokens hold the highest ids: that is where
    `CLIPTextModel` looks for the end of the text. Raises ValueError when the sizes leave no room for a word.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = symbols + [symbol + WORD_END for symbol in symbols]
    if max_length < 3 or vocabulary_size < len(base) + 2:
        raise ValueError(
            f"need max_length >= 3 and vocabulary_size >= {len(base) + 2}, got {max_length} and {vocabulary_size}"
        )
    merges = _learn_merges(texts, symbols, vocabulary_size - 2)
    tokens = dict.fromkeys([*base, *(left + right for left, right in merges), BOS_TOKEN, EOS_TOKEN])
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        model_max_length=max_length,
    )


def _learn_merges(texts: Iterable[str], symbols: list[str], vocabulary_size: int) -> list[tuple[str, str]]:
    """Return BPE merges in the order they were learned, cut by CLIP's own normalizer and pre-tokenizer."""
    clip = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    learner.normalizer = clip.normalizer
    learner.pre_tokenizer = clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        initial_alphabet=symbols,
        # Given here, the word-end symbols get their ids in this order. Otherwise the trainer numbers them as a hash map
        # happens to list the words, and breaks ties between equally frequent pairs differently in every run.
        special_tokens=[symbol + WORD_END for symbol in symbols],
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
