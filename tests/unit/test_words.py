"""From words to tokens, and from recorded attention to maps on one scale."""

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from medviz.errors import InputError
from medviz.grounding.capture import AttentionMaps
from medviz.grounding.heat_maps import grounding_heat_map, joint_scale, word_heat_maps
from medviz.grounding.words import content_indices, token_indices, truncated_text
from tests import tiny

PROMPT = "a dermoscopic image with melanoma (MEL) showing hair, gel bubble, with pigment network"


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return tiny.make_tokenizer("dermatology")


def text_of(tokenizer: CLIPTokenizer, prompt: str, indices: tuple[int, ...]) -> str:
    """What the model reads at these positions, as the encoded and padded prompt has it."""
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    return tokenizer.decode([ids[index] for index in indices]).replace(" ", "")


@pytest.mark.parametrize("word", ["melanoma", "hair", "gel bubble", "pigment network", "MEL", "image", "a"])
def test_a_word_is_found_where_the_encoder_reads_it(tokenizer: CLIPTokenizer, word: str) -> None:
    indices = token_indices(tokenizer, PROMPT, word)
    assert text_of(tokenizer, PROMPT, indices) == word.lower().replace(" ", "")


def test_case_and_white_space_do_not_matter(tokenizer: CLIPTokenizer) -> None:
    loose = "A  dermoscopic image\twith Melanoma showing GEL   bubble"
    assert text_of(tokenizer, loose, token_indices(tokenizer, loose, " gel bubble ")) == "gelbubble"
    assert token_indices(tokenizer, loose, "MELANOMA") == token_indices(tokenizer, loose, "melanoma")


def test_characters_of_several_bytes_do_not_shift_the_words(tokenizer: CLIPTokenizer) -> None:
    prompt = "naïve café – 5 µm → 😀 hair"
    assert text_of(tokenizer, prompt, token_indices(tokenizer, prompt, "hair")) == "hair"


def test_every_occurrence_counts(tokenizer: CLIPTokenizer) -> None:
    prompt = "hair, ruler, hair"
    indices = token_indices(tokenizer, prompt, "hair")
    assert text_of(tokenizer, prompt, indices) == "hairhair"
    assert len(indices) == 2 * len(token_indices(tokenizer, "hair", "hair"))


def test_words_of_several_tokens_are_complete(tokenizer: CLIPTokenizer) -> None:
    prompt = "hair with xylophonically unusual ruler"
    indices = token_indices(tokenizer, prompt, "xylophonically")
    assert len(indices) > 1
    assert text_of(tokenizer, prompt, indices) == "xylophonically"


@pytest.mark.parametrize("word", ["air", "hairs", "net", "melanoma hair", "nevus"])
def test_a_word_that_is_not_there_is_refused(tokenizer: CLIPTokenizer, word: str) -> None:
    with pytest.raises(InputError, match="not in the prompt"):
        token_indices(tokenizer, PROMPT, word)


@pytest.mark.parametrize("word", ["", "  ", "\n"])
def test_an_empty_word_is_refused(tokenizer: CLIPTokenizer, word: str) -> None:
    with pytest.raises(InputError, match="empty"):
        token_indices(tokenizer, PROMPT, word)


def test_pattern_characters_are_read_as_written(tokenizer: CLIPTokenizer) -> None:
    assert token_indices(tokenizer, PROMPT, "melanoma (MEL)")
    with pytest.raises(InputError):
        token_indices(tokenizer, PROMPT, "h.ir")


def test_special_tokens_are_no_words(tokenizer: CLIPTokenizer) -> None:
    content = content_indices(tokenizer, PROMPT)
    ids = tokenizer(PROMPT).input_ids
    assert not {0, len(ids) - 1} & set(content)
    assert text_of(tokenizer, PROMPT, content) == "".join(char for char in PROMPT.lower() if char.isalnum())
    typed = f"hair {tokenizer.eos_token} ruler"
    assert set(content_indices(tokenizer, typed)) == {
        *token_indices(tokenizer, typed, "hair"),
        *token_indices(tokenizer, typed, "ruler"),
    }


def test_a_word_beyond_the_maximum_length_is_reported(tokenizer: CLIPTokenizer) -> None:
    filler = "hair, " * 60
    with pytest.raises(InputError, match="beyond the 48 tokens"):
        token_indices(tokenizer, filler + "ruler", "ruler")
    assert truncated_text(tokenizer, filler + "ruler").endswith("ruler")
    assert truncated_text(tokenizer, PROMPT) == ""


def test_the_last_word_that_fits_is_found_and_the_next_is_not(tokenizer: CLIPTokenizer) -> None:
    one = len(tokenizer("hair").input_ids) - 2
    fitting = " ".join(["hair"] * ((48 - 2) // one))
    assert max(token_indices(tokenizer, fitting, "hair")) <= 46
    assert truncated_text(tokenizer, fitting) == ""
    assert truncated_text(tokenizer, fitting + " hair") == "hair"
    assert token_indices(tokenizer, fitting + " hair", "hair") == token_indices(tokenizer, fitting, "hair")


def test_what_was_not_read_begins_with_a_whole_word(tokenizer: CLIPTokenizer) -> None:
    word = "xylographically"
    assert len(tokenizer(word).input_ids) - 2 > 3, "the word has to have several tokens"
    lost = {truncated_text(tokenizer, "hair, " * count + f"{word} ruler") for count in range(15, 26)}
    assert f"{word} ruler" in lost
    starts = [rest.split()[0].strip(",") for rest in lost if rest]
    assert set(starts) <= {"hair", word, "ruler"}


def maps_of(tokenizer: CLIPTokenizer, prompt: str, word: str, *peaks: float) -> AttentionMaps:
    """A 4 x 4 capture in which only `word` is read, most at row 1, column 2: one sample for each of the peaks."""
    probs = torch.zeros(len(peaks), 4, 4, 48)
    indices = list(token_indices(tokenizer, prompt, word))
    probs[..., indices] = 0.01
    probs[:, 1, 2, indices] = torch.tensor(peaks)[:, None]
    probs[..., 0] = 1 - probs[..., 1:].sum(dim=-1)
    maps = AttentionMaps()
    maps.add("layer", probs)
    return maps


def test_a_pair_shares_one_scale(tokenizer: CLIPTokenizer) -> None:
    maps = maps_of(tokenizer, PROMPT, "hair", 0.06, 0.11)
    weak, strong = word_heat_maps(maps, tokenizer, PROMPT, "hair", (4, 4), samples=(0, 1))
    assert np.unravel_index(strong.argmax(), (4, 4)) == (1, 2)
    assert (strong.max(), strong.min(), weak.min()) == (1.0, 0.0, 0.0)
    assert weak.max() == pytest.approx(0.5, abs=1e-5)
    assert weak.dtype == strong.dtype == np.float32
    with pytest.raises(InputError, match="at least one sample"):
        word_heat_maps(maps, tokenizer, PROMPT, "hair", (4, 4), samples=())


def test_share_of_the_prompt_needs_rivals(tokenizer: CLIPTokenizer) -> None:
    maps = maps_of(tokenizer, PROMPT, "hair", 0.2)
    (shared,) = word_heat_maps(maps, tokenizer, PROMPT, "hair", (4, 4), relative_to_prompt=True)
    assert not shared.any()


def test_a_flat_map_shows_nothing() -> None:
    flat = np.full((3, 3), 0.1, dtype=np.float32)
    flat[0, 0] += 1e-8
    assert not joint_scale(flat)[0].any()
    with pytest.raises(InputError, match="not finite"):
        joint_scale(np.full((2, 2), np.nan))


def test_grounding_map_peaks_where_every_layer_looks(tokenizer: CLIPTokenizer) -> None:
    maps = maps_of(tokenizer, PROMPT, "hair", 0.2)
    heat = grounding_heat_map(maps, token_indices(tokenizer, PROMPT, "hair"), (32, 32))
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert (row // 8, column // 8) == (1, 2)
    assert (heat.dtype, heat.min(), heat.max()) == (np.float32, 0.0, 1.0)
