"""Keeps the converters' chatter off the terminal, and shows it when they fail."""

__all__ = ["quietly"]

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

from pipeline.errors import ExportError, LayerfoldError

_TAIL_LINES = 8


@contextlib.contextmanager
def quietly(doing: str, *, hint: str = "") -> Iterator[None]:
    """Runs a block with the process's stdout and stderr set aside, and turns what it raises into an ExportError.

    The converters are C++ below Python and write to the file descriptors themselves, so replacing `sys.stdout`
    alone would not reach them; it is replaced as well, since in a notebook or under a test it is no descriptor's. The
    text is dropped when the block ends well; when it raises, its last lines become part
    of the error.

    Args:
        doing: What the block does to what, for the error: ``"convert model.tflite"``.
        hint: What the user can do when it fails.

    Raises:
        ExportError: The block raised; the cause is chained. `LayerfoldError` passes as it is.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = os.dup(1), os.dup(2)
        text = open(os.dup(log.fileno()), "w", encoding="utf-8", errors="replace")  # noqa: PTH123, SIM115
        previous_level = logging.root.manager.disable
        previous_handlers = list(logging.root.handlers)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        logging.disable(logging.ERROR)
        failure: Exception | None = None
        try:
            with text, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                yield
        except LayerfoldError:
            raise
        except Exception as error:  # noqa: BLE001  (a converter may raise anything; it is chained below)
            failure = error
        finally:
            logging.disable(previous_level)
            # A library that sets up logging while it is imported would go on writing to the stream closed above.
            logging.root.handlers[:] = previous_handlers
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
        if failure is not None:
            log.seek(0)
            raise ExportError(_describe(doing, failure, log.read()), hint=hint) from failure


def _describe(doing: str, failure: Exception, log: bytes) -> str:
    message = str(failure).strip() or "no message"
    lines = [line for line in log.decode(errors="replace").splitlines() if "error" in line.lower()]
    text = f"cannot {doing}: {type(failure).__name__}: {message[:1500]}"
    if lines:
        text += "\n  it printed: " + "\n    ".join(line.strip()[:300] for line in lines[-_TAIL_LINES:])
    return text
