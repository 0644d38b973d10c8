"""Limits: what is allowed comes back in its canonical type, everything else is an InputError that names the bound."""

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medviz import limits
from medviz.errors import InputError


def test_a_prompt_loses_only_the_blanks_around_it() -> None:
    assert limits.check_prompt("  a dermoscopic  image with hair \n") == "a dermoscopic  image with hair"


def test_a_prompt_may_be_as_long_as_the_limit_and_no_longer() -> None:
    longest = "x" * limits.MAX_PROMPT_CHARS
    assert limits.check_prompt(longest) == longest
    with pytest.raises(
        InputError, match=rf"{limits.MAX_PROMPT_CHARS + 1} characters; at most {limits.MAX_PROMPT_CHARS}"
    ):
        limits.check_prompt(longest + "x")


@pytest.mark.parametrize("prompt", ["", "   ", "\t\n", None, 5, b"hair", ["hair"]])
def test_what_is_no_text_or_empty_is_no_prompt(prompt: object) -> None:
    with pytest.raises(InputError):
        limits.check_prompt(prompt)


@pytest.mark.parametrize("char", ["\x00", "\n", "\t", "\x1b", "\x7f", "\x85", "\ud800", "\u202e", "\u2066"])
def test_control_characters_inside_a_prompt_are_named(char: str) -> None:
    with pytest.raises(InputError, match=f"U\\+{ord(char):04X} at position 4"):
        limits.check_prompt(f"hair{char}ruler")


@pytest.mark.parametrize(
    "char",
    ["\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u034f", "\u115f", "\u3164", "\uffa0", "\ufe0f",
     "\U000e0041", "\U000e0100", "\u2028", "\u2029", "\ue000"],
)  # fmt: skip
def test_characters_that_are_not_shown_are_named(char: str) -> None:
    for check in (limits.check_prompt, limits.check_word):
        with pytest.raises(InputError, match=f"invisible character U\\+{ord(char):04X} at position 4"):
            check(f"hair{char}ruler")


def test_other_languages_and_signs_are_plain_text() -> None:
    assert limits.check_prompt("naevus mélanocytaire 5 µm – 皮膚 😀") == "naevus mélanocytaire 5 µm – 皮膚 😀"


def test_a_word_is_shorter_than_a_prompt() -> None:
    assert limits.check_word(" pigment network ") == "pigment network"
    with pytest.raises(InputError, match="word has 81 characters; at most 80"):
        limits.check_word("x" * 81)


@pytest.mark.parametrize(
    ("check", "low", "high"),
    [
        (limits.check_steps, limits.MIN_STEPS, limits.MAX_STEPS),
        (limits.check_seed, limits.MIN_SEED, limits.MAX_SEED),
    ],
)
def test_whole_numbers_keep_to_their_range(check, low: int, high: int) -> None:
    assert check(low) == low
    assert check(high) == high
    assert check(float(high)) == high
    assert type(check(np.int64(low))) is int
    for wrong in (low - 1, high + 1, True, False, 1.5, math.nan, math.inf, "7", None, [3]):
        with pytest.raises(InputError, match=f"from {low} to {high}"):
            check(wrong)


def test_the_paper_range_of_steps_and_the_defaults_are_within_the_limits() -> None:
    assert limits.check_steps(limits.DEFAULT_STEPS) == 20
    assert limits.check_guidance_scale(limits.DEFAULT_GUIDANCE_SCALE) == 3.0


@pytest.mark.parametrize("wrong", [0.99, 15.01, math.nan, math.inf, -math.inf, True, "3", None, 1j, 10**400])
def test_guidance_is_a_finite_number_in_its_range(wrong: object) -> None:
    with pytest.raises(InputError, match="from 1 to 15"):
        limits.check_guidance_scale(wrong)


def test_guidance_comes_back_as_a_float() -> None:
    assert type(limits.check_guidance_scale(np.float32(3))) is float
    assert limits.check_guidance_scale(15) == 15.0


def test_an_unknown_domain_is_answered_with_the_known_ones() -> None:
    assert limits.check_domain("radiology", ("dermatology", "radiology")) == "radiology"
    for wrong in ("Radiology", "../radiology", "", None, ["radiology"]):
        with pytest.raises(InputError, match="allowed: dermatology, radiology"):
            limits.check_domain(wrong, ("dermatology", "radiology"))


def test_uploads_have_a_size_between_one_byte_and_the_limit() -> None:
    assert limits.check_upload_bytes(limits.MAX_UPLOAD_BYTES) == limits.MAX_UPLOAD_BYTES
    with pytest.raises(InputError, match="at most 32 MiB"):
        limits.check_upload_bytes(limits.MAX_UPLOAD_BYTES + 1)
    with pytest.raises(InputError, match="empty"):
        limits.check_upload_bytes(0)


def test_image_sizes_have_a_smallest_side_a_largest_area_and_a_largest_aspect() -> None:
    assert limits.check_image_size(32, 512) == (32, 512)
    with pytest.raises(InputError, match="at most 16 times"):
        limits.check_image_size(32, 513)
    with pytest.raises(InputError, match="at least 32"):
        limits.check_image_size(31, 4000)
    with pytest.raises(InputError, match="at most 24 million"):
        limits.check_image_size(6000, 4001)


@given(st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.binary(), st.booleans()))
def test_no_value_brings_a_check_to_fail_in_another_way(value: object) -> None:
    for check in (
        limits.check_prompt,
        limits.check_word,
        limits.check_steps,
        limits.check_seed,
        limits.check_guidance_scale,
    ):
        # Any exception but InputError fails the test.
        with contextlib.suppress(InputError):
            check(value)
