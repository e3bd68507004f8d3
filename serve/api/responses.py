"""The shapes of answers, for /openapi.json and the tests. Answers are written as dictionaries, which is faster."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.config.config import LogprobsMode

_Logprob = Annotated[float, Field(le=0, ge=-9999, description="natural log; -9999 where the probability is 0")]
_Rank = Annotated[int, Field(ge=1, description="place in the whole vocabulary, 1 = most likely; unique")]
_Bytes = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(description="true bytes of the token")]
_FinishReason = Literal["stop", "length"]


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ErrorDetail(_Answer):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """OpenAI's envelope."""

    error: ErrorDetail


class CachedTokens(_Answer):
    """`usage.prompt_tokens_details`."""

    cached_tokens: int


class UsageAnswer(_Answer):
    """Counted tokens; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TokenAlternative(_Answer):
    """One token of a distribution."""

    token: str
    logprob: _Logprob
    bytes: _Bytes
    token_id: int
    rank: _Rank


class TokenEntry(TokenAlternative):
    """A generated token and the most likely ones in its place."""

    top_logprobs: list[TokenAlternative]


class ChatLogprobsAnswer(_Answer):
    """`choices[].logprobs` of chat: an entry for every generated token, the stop token included."""

    content: list[TokenEntry]
    refusal: None


class PromptEntry(_Answer):
    """One token in `prompt_logprobs`."""

    logprob: _Logprob
    rank: _Rank
    decoded_token: str


PromptEntries = Annotated[
    list[dict[str, PromptEntry] | None],
    Field(description="for each prompt token null (the first has none) or entries by token id, its own first"),
]


class PromptColumns(_Answer):
    """`prompt_logprobs_columns`: row i is of prompt token start + i."""

    start: int
    token_ids: list[int]
    logprobs: list[_Logprob]
    ranks: list[_Rank]
    top_token_ids: list[list[int]]
    top_logprobs: list[list[_Logprob]]
    top_ranks: list[list[_Rank]]


class _Header(_Answer):
    id: str
    created: int
    model: str
    system_fingerprint: str | None
    logprobs_mode: LogprobsMode | None = None


class ReplyMessage(_Answer):
    """`choices[].message`."""

    role: str
    content: str
    refusal: None


class ChatChoiceAnswer(_Answer):
    """One reply."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobsAnswer | None
    finish_reason: _FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None


class ChatCompletionAnswer(_Header):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoiceAnswer]
    usage: UsageAnswer
    prompt_token_ids: list[int] | None
    prompt_text: str | None = None
    prompt_logprobs: PromptEntries | None
    prompt_logprobs_columns: PromptColumns | None = None


class ReplyDelta(_Answer):
    """`choices[].delta`."""

    role: str | None = None
    content: str


class ChatChunkChoice(_Answer):
    """What an event adds to a reply."""

    index: int
    delta: ReplyDelta
    logprobs: ChatLogprobsAnswer | None
    finish_reason: _FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatChunk(_Header):
    """An event of a streamed /v1/chat/completions. A choice's first has its role and what is told of the prompt."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None
    prompt_logprobs: PromptEntries | None = None
    prompt_logprobs_columns: PromptColumns | None = None


class CompletionLogprobsAnswer(_Answer):
    """`choices[].logprobs` of completions: columns over the tokens, those of an echoed prompt first."""

    tokens: list[str]
    token_logprobs: list[_Logprob | None]
    top_logprobs: list[dict[str, _Logprob] | None]
    top_token_ids: list[list[int] | None]
    text_offset: Annotated[list[int], Field(description="code points of the text before the token")]


class CompletionChunkChoice(_Answer):
    """What an event adds to a text."""

    index: int
    text: str
    logprobs: CompletionLogprobsAnswer | None
    finish_reason: _FinishReason | None
    stop_reason: str | int | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: PromptEntries | None = None
    prompt_logprobs_columns: PromptColumns | None = None


class CompletionChoiceAnswer(CompletionChunkChoice):
    """One text."""

    finish_reason: _FinishReason


class CompletionAnswer(_Header):
    """The answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoiceAnswer]
    usage: UsageAnswer


class CompletionChunk(_Header):
    """An event of a streamed /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: UsageAnswer | None = None


class ModelCard(_Answer):
    """A served model, and what it can be asked."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    max_logprobs: int
    whole_vocabulary: bool


class ModelList(_Answer):
    """The answer of /v1/models."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(_Answer):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(_Answer):
    """The answer of /detokenize."""

    prompt: str
    token_bytes: list[_Bytes] | None = None


class TokenizerInfo(BaseModel):
    """The answer of /tokenizer_info."""

    model_config = ConfigDict(strict=True, extra="allow")

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None
    eos_token_ids: list[int]
    special_token_ids: list[int]
    model_max_length: int
    vocab_size: int


class Version(_Answer):
    """The answer of /version."""

    version: str


class Load(_Answer):
    """The answer of /load."""

    server_load: Annotated[int, Field(description="unfinished requests to the engine")]
