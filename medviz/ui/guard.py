"""What a person is told when something goes wrong: their own mistakes in full, ours in general, the log everything."""

import html
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from medviz.errors import Cancelled, InputError, MedvizError, ModelError

logger = logging.getLogger(__name__)


def message(text: str, title: str = "Please check your input") -> gr.Error:
    """Return the error to raise. The text is escaped: gradio shows messages as HTML, and they may quote a person."""
    return gr.Error(html.escape(text, quote=False), title=title, duration=12, print_exception=False)


@contextmanager
def telling() -> Iterator[None]:
    """Turn the package's errors, and those of the libraries under it, into messages for the screen or the client."""
    try:
        yield
    except InputError as error:
        raise message(_sentence(str(error))) from error
    except Cancelled as error:
        raise message(_sentence(str(error)), title="Stopped") from error
    except ModelError as error:
        logger.exception("a model could not be used")
        raise message("The models of this domain cannot be used; the server's log says why.", title="Model") from error
    except (MedvizError, RuntimeError, OSError, MemoryError) as error:
        logger.exception("a request failed")
        raise message("The request failed on the server; its log says why. Nothing was lost.", title="Error") from error


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
