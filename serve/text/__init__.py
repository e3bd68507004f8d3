"""Text to token ids and back: tokenizers, chat templates, exact bytes of tokens. No device, no HTTP."""

import logging

# Only transformers' text utilities are used, so its advice to install PyTorch, logged on import, does not apply.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
