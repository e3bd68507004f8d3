"""Text to token ids and back: tokenizers, chat templates, true bytes of a token. No device, no HTTP."""

import os

# transformers says on import that PyTorch is missing; only its text utilities are used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
