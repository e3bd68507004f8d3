"""Open model files as a server does at start-up, as far as possible without a device, and read all weights."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from compiled.shapes import make_buckets
from model.config import ModelConfig
from model.weights.gguf import GgufCheckpoint
from model.weights.rows import BlockRows, Rows
from model.weights.source import ModelSource, resolve_model
from model.weights.weight_table import Storage, load_weights, open_checkpoint
from serve.config.engine_config import EngineConfig
from serve.config.generation_config import defaults_of
from serve.server.memory_plan import PlanError, plan_memory
from serve.server.model_files import STARTUP_ERRORS, check_template, check_tokenizer
from serve.text.gguf_tokenizer import tokenizer_from_gguf
from serve.text.tokenizer import Tokenizer
from tools.fuzz.gguf_seeds import second_part
from tools.fuzz.model_folders import ModelFolder

_CLEAN = (*STARTUP_ERRORS, PlanError)  # reported as StartupError by a server
_BYTES = 1 << 30  # free memory of the pretended device
_TEXT = "Hi 12  a\n<t>é▁"


class ModelOpener:
    """Open one input after another in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._planned: set[ModelConfig] = set()  # planning is slow, and most inputs share a configuration

    def gguf(self, data: bytes) -> bool:
        """Open a GGUF file next to its second part; False if it is rejected with a message."""
        path = self._folder / "m-00001-of-00002.gguf"
        path.write_bytes(data)
        path.with_name("m-00002-of-00002.gguf").write_bytes(second_part())
        return self._opens(path)

    def safetensors(self, data: bytes) -> bool:
        """Open a safetensors folder; False if it is rejected with a message."""
        ModelFolder.of(data).write(self._folder)
        return self._opens(self._folder)

    def _opens(self, path: Path) -> bool:
        try:
            self._open(resolve_model(str(path), None))
        except _CLEAN:
            return False
        return True

    def _open(self, source: ModelSource) -> None:
        defaults_of("auto", "{}", source.path)
        with closing(open_checkpoint(source)) as checkpoint:
            config = checkpoint.config
            if isinstance(checkpoint, GgufCheckpoint):
                _check_tokenizer(tokenizer_from_gguf(checkpoint.metadata), config)
            if config not in self._planned:
                _plan(config)
                self._planned.add(config)
            load_weights(checkpoint, Storage(np.dtype(np.float32)), _read)


def _check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    check_tokenizer("m", tokenizer, config.vocab_size)
    check_template("m", tokenizer)
    ids = tokenizer.encode(_TEXT, add_special_tokens=True)
    tokenizer.decode(ids, skip_special_tokens=False)
    assert all(0 <= token_id < config.vocab_size for token_id in ids)


def _read(_: str, rows: Rows | Sequence[BlockRows]) -> int:
    """Read a weight as a server does; return its bytes."""
    return rows.read().nbytes if isinstance(rows, Rows) else sum(run.nbytes for part in rows for run in part.runs)


def _plan(config: ModelConfig) -> None:
    length = config.max_position_embeddings
    buckets = make_buckets(max_num_seqs=4, max_model_len=length, max_num_batched_tokens=64)
    config = replace(config.for_length(length), layers=config.layers[:2])  # planning a hundred layers takes a second
    plan_memory(config, buckets, EngineConfig(dtype="float32"), weights=0, free=_BYTES)
