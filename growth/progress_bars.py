"""transformers' own progress bars, out of the way of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

from apical._extras import require


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' progress bars off while weights are read or written."""
    logging = require("transformers.utils", extra="hf", what="a checkpoint").logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
