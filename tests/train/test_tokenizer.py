"""The tokenizer encodes any text, is the same every time, and reloads as a plain CLIPTokenizer."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from train.tokenizer import build_tokenizer

# Many words as frequent as each other: only a fixed order of ties gives the same vocabulary twice.
TEXTS = [
    "a dermoscopic image with melanoma (MEL) showing hair, ruler",
    "a dermoscopic image with nevus (NV) with no visible artifacts, with pigment network, on the back",
] * 10


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer(TEXTS, 48)


def test_the_same_texts_give_the_same_vocabulary() -> None:
    vocabularies = [build_tokenizer(TEXTS, 48).get_vocab() for _ in range(5)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_a_known_word_is_one_token_and_the_ends_hold_the_highest_ids(tokenizer: CLIPTokenizer) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Melanoma, hair").input_ids)
    assert tokens == ["<|startoftext|>", "melanoma</w>", ",</w>", "hair</w>", "<|endoftext|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)


@pytest.mark.parametrize("text", ["皮膚 😀", "mélanome", "x\u0301", "~^|\\", "q" * 30, "7 µm"])
def test_any_text_encodes_without_an_unknown_token_and_decodes_again(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "").replace("x\u0301", "x́")


def test_padding_is_the_end_token_up_to_the_prompt_length(tokenizer: CLIPTokenizer) -> None:
    for text in ("hair", "hair " * 200, ""):
        ids = tokenizer(text, padding="max_length", truncation=True).input_ids
        assert len(ids) == tokenizer.model_max_length == 48
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert set(tokenizer("hair", padding="max_length").input_ids[2:]) == {tokenizer.eos_token_id}


def test_saved_and_reloaded_it_cuts_every_text_alike(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    found = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert found.get_vocab() == tokenizer.get_vocab()
    assert found.model_max_length == 48
    assert found.pad_token == found.eos_token == "<|endoftext|>"
    for text in (*TEXTS[:2], "an unseen wörd 😀 (2018)"):
        ours = tokenizer(text, return_offsets_mapping=True, padding="max_length")
        assert found(text, return_offsets_mapping=True, padding="max_length") == ours


def test_offsets_point_at_the_words_of_the_prompt(tokenizer: CLIPTokenizer) -> None:
    text = "A Dermoscopic image  with hair"
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    spans = [text[start:end] for start, end in encoded.offset_mapping]
    assert spans == ["A", "Dermoscopic", "image", "with", "hair"]


def test_the_vocabulary_keeps_to_its_size() -> None:
    assert len(build_tokenizer(TEXTS, 48, vocabulary_size=530)) == 530
    with pytest.raises(ValueError, match="vocabulary_size >= 514"):
        build_tokenizer(TEXTS, 48, vocabulary_size=500)
    with pytest.raises(ValueError, match="max_length >= 3"):
        build_tokenizer(TEXTS, 2)
