"""What a request may ask for: the same limits hold in the browser, over the API and in Python.

Every check returns the value in its canonical type, or raises InputError with the value found and the value allowed.
"""

import math
import operator
import unicodedata
from collections.abc import Sequence

from medviz.errors import InputError

MAX_PROMPT_CHARS = 400
MAX_WORD_CHARS = 80
MIN_STEPS, MAX_STEPS, DEFAULT_STEPS = 1, 50, 20  # denoising steps of one image
MIN_GUIDANCE_SCALE, MAX_GUIDANCE_SCALE, DEFAULT_GUIDANCE_SCALE = 1.0, 15.0, 3.0  # 1 is no guidance
MIN_SEED, MAX_SEED = 0, 2**32 - 1
MAX_UPLOAD_BYTES = 32 * 2**20
MAX_IMAGE_PIXELS = 24_000_000  # checked before an image is decoded
MIN_IMAGE_SIDE_PX = 32
MAX_IMAGE_ASPECT = 16  # the longer side over the shorter one
MAX_QUEUE = 16  # requests waiting for the one model
MAX_REQUEST_S = 120

# The server. A client is an IP address, behind a trusted proxy the one that the proxy names.
MAX_QUEUE_PER_CLIENT = 8  # requests of one client that wait or run
UNATTENDED_S = 2.0  # a request whose messages nobody reads for so long gives way to others
MAX_POSTS, MAX_POSTS_PER_CLIENT = 48, 12  # POST requests in flight
MAX_CONNECTIONS, MAX_CONNECTIONS_PER_CLIENT = 512, 96  # requests of any kind in flight, open event streams included
MAX_JSON_BYTES = 2**20  # body of a POST request that is no upload
MAX_UPLOADS_BYTES, MAX_UPLOADS_BYTES_PER_CLIENT = 2**30, 256 * 2**20  # uploaded within UPLOADS_KEPT_S
UPLOADS_KEPT_S = 3000  # an uploaded file is deleted within this time
MAX_BODY_S = 60.0  # from the first to the last byte of a request's body
MAX_SHUTDOWN_S = 10.0  # running requests may finish within this time once the server is told to stop

# Unicode's Default_Ignorable_Code_Point outside the categories Cc and Cf: shown as nothing, yet part of the text.
_IGNORABLE = frozenset(
    chr(code)
    for first, last in (
        (0x034F, 0x034F),
        (0x115F, 0x1160),
        (0x17B4, 0x17B5),
        (0x180B, 0x180F),
        (0x2065, 0x2065),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0F),
        (0xFFA0, 0xFFA0),
        (0xFFF0, 0xFFF8),
        (0xE0000, 0xE0FFF),
    )
    for code in range(first, last + 1)
)
# Control, format (zero-width, bidirectional, tag), surrogate and private-use characters, line and paragraph separators.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_text(value: object, what: str, max_chars: int) -> str:
    if not isinstance(value, str):
        raise InputError(f"the {what} must be text, got {_shown(value)} ({type(value).__name__})")
    text = value.strip()
    if not text:
        raise InputError(f"the {what} is empty; write at least one word")
    if len(text) > max_chars:
        raise InputError(f"the {what} has {len(text)} characters; at most {max_chars} are allowed")
    for position, char in enumerate(text):
        if unicodedata.category(char) in _HIDDEN_CATEGORIES or char in _IGNORABLE:
            raise InputError(
                f"the {what} holds the control or invisible character U+{ord(char):04X} at position {position}; "
                "write it on one line, as plain text"
            )
    return text


def _check_integer(value: object, what: str, low: int, high: int) -> int:
    allowed = f"a whole number from {low} to {high}"
    if isinstance(value, bool):
        raise InputError(f"{what} must be {allowed}, got {value}")
    if isinstance(value, float):
        # JSON and sliders send 20.0 for 20.
        if not value.is_integer():
            raise InputError(f"{what} must be {allowed}, got {value}")
        number = int(value)
    else:
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise InputError(f"{what} must be {allowed}, got {_shown(value)}") from None
    if not low <= number <= high:
        raise InputError(f"{what} must be {allowed}, got {_shown(number)}")
    return number


def check_prompt(prompt: object) -> str:
    """Return the prompt without surrounding blanks; InputError if empty, too long or holding control characters."""
    return _check_text(prompt, "prompt", MAX_PROMPT_CHARS)


def check_word(word: object) -> str:
    """Return the word or phrase to look at without surrounding blanks; the same rules as a prompt, but shorter."""
    return _check_text(word, "word", MAX_WORD_CHARS)


def check_domain(domain: object, allowed: Sequence[str]) -> str:
    """Return the domain's name; InputError, naming the allowed ones, for any other value."""
    if not isinstance(domain, str) or domain not in allowed:
        raise InputError(f"unknown domain {_shown(domain)}; allowed: {', '.join(allowed)}")
    return domain


def check_steps(steps: object) -> int:
    """Return the number of denoising steps as int, MIN_STEPS to MAX_STEPS."""
    return _check_integer(steps, "steps", MIN_STEPS, MAX_STEPS)


def check_seed(seed: object) -> int:
    """Return the seed as int, MIN_SEED to MAX_SEED."""
    return _check_integer(seed, "the seed", MIN_SEED, MAX_SEED)


def check_guidance_scale(guidance_scale: object) -> float:
    """Return the guidance scale as a finite float, MIN_GUIDANCE_SCALE to MAX_GUIDANCE_SCALE."""
    allowed = f"a number from {MIN_GUIDANCE_SCALE:g} to {MAX_GUIDANCE_SCALE:g}"
    if isinstance(guidance_scale, (bool, str, bytes)):
        raise InputError(f"the guidance scale must be {allowed}, got {_shown(guidance_scale)}")
    try:
        number = float(guidance_scale)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"the guidance scale must be {allowed}, got {_shown(guidance_scale)}") from None
    if not math.isfinite(number) or not MIN_GUIDANCE_SCALE <= number <= MAX_GUIDANCE_SCALE:
        raise InputError(f"the guidance scale must be {allowed}, got {number:g}")
    return number


def check_upload_bytes(size_bytes: int) -> int:
    """Return the size of an uploaded file; InputError when it is empty or over MAX_UPLOAD_BYTES."""
    if size_bytes <= 0:
        raise InputError("the file is empty")
    if size_bytes > MAX_UPLOAD_BYTES:
        raise InputError(
            f"the file has {size_bytes / 2**20:.1f} MiB; at most {MAX_UPLOAD_BYTES // 2**20} MiB are allowed"
        )
    return size_bytes


def check_image_size(width_px: int, height_px: int) -> tuple[int, int]:
    """Return (width_px, height_px).

    Raises InputError for more than MAX_IMAGE_PIXELS, a side under MIN_IMAGE_SIDE_PX, or sides further apart than
    MAX_IMAGE_ASPECT.
    """
    if min(width_px, height_px) < MIN_IMAGE_SIDE_PX:
        raise InputError(
            f"the image is {width_px} x {height_px} pixels; both sides need at least {MIN_IMAGE_SIDE_PX} pixels"
        )
    if width_px * height_px > MAX_IMAGE_PIXELS:
        raise InputError(
            f"the image is {width_px} x {height_px} pixels, {width_px * height_px / 1e6:.1f} million; "
            f"at most {MAX_IMAGE_PIXELS / 1e6:.0f} million are allowed"
        )
    if max(width_px, height_px) > MAX_IMAGE_ASPECT * min(width_px, height_px):
        raise InputError(
            f"the image is {width_px} x {height_px} pixels; "
            f"the longer side may be at most {MAX_IMAGE_ASPECT} times the shorter one"
        )
    return width_px, height_px
