"""Tokens that end a turn by their names: model files often name only one id, of several that the model generates."""

from collections.abc import Mapping

# llama.cpp's list; it also takes padding and separators of files in code, which do not end a turn.
END_OF_TURN = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>"),
        *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "</s>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
        *("<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<turn|>", "<|tool_response>"),
    )
)


def end_of_turn_ids(special: Mapping[str, int]) -> set[int]:
    """Ids of the tokens above among a vocabulary's special tokens; a text that looks like one ends nothing."""
    names = END_OF_TURN & special.keys()
    if names & {"<|call|>", "<|calls|>"} and names & {"<|return|>", "<|flush|>"}:
        names -= {"<|end|>"}  # there it ends one of several messages
    if "<|tool_response>" in names:
        names -= {"</s>"}  # there it is HTML
    return {special[name] for name in names}
