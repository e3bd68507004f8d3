"""Text to token ids and back: tokenizers, chat templates, exact bytes of tokens. No device, no HTTP."""

import logging


def _is_not_advice(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


# transformers advises to install PyTorch when it is imported. Only its text utilities are used here.
_logger = logging.getLogger("transformers")
_logger.addFilter(_is_not_advice)
import transformers  # noqa: E402, F401

_logger.removeFilter(_is_not_advice)
