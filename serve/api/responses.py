"""Schemas of responses, for /openapi.json and the tests. The handlers build plain dictionaries, which is faster."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.token_logprobs import MIN_LOGPROB
from serve.api.reply import ReplyDelta, ReplyMessage
from serve.config.config import LogprobsMode

_Logprob = Annotated[
    float, Field(le=0, ge=MIN_LOGPROB, description=f"natural logarithm; {MIN_LOGPROB:.0f} for probability 0")
]
_Rank = Annotated[
    int, Field(ge=1, description="rank in the full vocabulary; 1 is the most likely token; ties go to the lower id")
]
_Mass = Annotated[float, Field(ge=0, description="probability that the model gave to all tokens that were allowed")]
_Bytes = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(description="bytes of the token")]
_FinishReason = Literal["stop", "length"]
_ChatFinishReason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """OpenAI's envelope."""

    error: ErrorDetail


class CachedTokens(Answer):
    cached_tokens: int


class ReasoningTokens(Answer):
    reasoning_tokens: int


class UsageAnswer(Answer):
    """Token counts; a prompt is counted once for all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens | None = None


class TokenAlternative(Answer):
    token: str
    logprob: _Logprob
    bytes: _Bytes
    token_id: int
    rank: _Rank


class TokenEntry(TokenAlternative):
    """A generated token and the most likely alternatives."""

    processed_logprob: _Logprob | None = None
    allowed_mass: _Mass | None = None
    forced: Annotated[Literal[True] | None, Field(description="the grammar allowed no other token")] = None
    top_logprobs: list[TokenAlternative]


class ChatLogprobsAnswer(Answer):
    """`choices[].logprobs` of chat: one entry per generated token, including the stop token."""

    content: list[TokenEntry]
    refusal: None


class PromptEntry(Answer):
    logprob: _Logprob
    rank: _Rank
    decoded_token: str


PromptEntries = Annotated[
    list[dict[str, PromptEntry] | None],
    Field(description="per prompt token, entries by token id, the actual token first; null for the first token"),
]


class PromptColumns(Answer):
    """`prompt_logprobs_columns`: row i belongs to prompt token start + i."""

    start: int
    token_ids: list[int]
    logprobs: list[_Logprob]
    ranks: list[_Rank]
    top_token_ids: list[list[int]]
    top_logprobs: list[list[_Logprob]]
    top_ranks: list[list[_Rank]]


class _Header(Answer):
    id: str
    created: int
    model: str
    system_fingerprint: str | None
    logprobs_mode: LogprobsMode | None = None


class RoutedExperts(Answer):
    """Ids of the experts of tokens of the prompt and the output: int16, little-endian, in C order."""

    data: Annotated[str, Field(description="in base64", json_schema_extra={"contentEncoding": "base64"})]
    shape: Annotated[
        list[int],
        Field(description="tokens, layers and experts per token, the best first; 0 in layers without experts"),
    ]
    start: Annotated[int, Field(description="index of the first token in prompt and output")]
    dtype: Literal["int16"]


_AnswerStart = Annotated[int | None, Field(description="token at which the answer after the reasoning starts")]


class ChatChoiceAnswer(Answer):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobsAnswer | None
    finish_reason: _ChatFinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None
    routed_experts: RoutedExperts | None = None
    answer_start: _AnswerStart = None


class ChatCompletionAnswer(_Header):
    object: Literal["chat.completion"]
    choices: list[ChatChoiceAnswer]
    usage: UsageAnswer
    prompt_token_ids: list[int] | None
    prompt_text: str | None = None
    prompt_logprobs: PromptEntries | None
    prompt_logprobs_columns: PromptColumns | None = None
    warnings: list[str] | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ReplyDelta
    logprobs: ChatLogprobsAnswer | None
    finish_reason: _ChatFinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    routed_experts: RoutedExperts | None = None
    answer_start: _AnswerStart = None


class ChatChunk(_Header):
    """Chunk of a streamed chat completion. A choice's first chunk has its role and the fields of the prompt."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: UsageAnswer | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None
    prompt_logprobs: PromptEntries | None = None
    prompt_logprobs_columns: PromptColumns | None = None
    warnings: list[str] | None = None


class CompletionLogprobsAnswer(Answer):
    """`choices[].logprobs` of completions: arrays over the tokens, starting with an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[_Logprob | None]
    top_logprobs: list[dict[str, _Logprob] | None]
    top_token_ids: list[list[int] | None]
    text_offset: Annotated[list[int], Field(description="code points of the text that precede the token")]
    processed_logprobs: list[_Logprob | None] | None = None
    allowed_mass: list[_Mass | None] | None = None
    forced: list[bool | None] | None = None


class CompletionChunkChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobsAnswer | None
    finish_reason: _FinishReason | None
    stop_reason: str | int | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    routed_experts: RoutedExperts | None = None
    prompt_logprobs: PromptEntries | None = None
    prompt_logprobs_columns: PromptColumns | None = None


class CompletionChoiceAnswer(CompletionChunkChoice):
    finish_reason: _FinishReason


class CompletionAnswer(_Header):
    object: Literal["text_completion"]
    choices: list[CompletionChoiceAnswer]
    usage: UsageAnswer


class CompletionChunk(_Header):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: UsageAnswer | None = None


class ModelCard(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    max_logprobs: int
    whole_vocabulary: bool
    bits_per_weight: Annotated[float | None, Field(description="of the model's matrices in memory")]
    sampling_defaults: Annotated[dict[str, float], Field(description="values of sampling fields that a request omits")]


class ShortModelCard(Answer):
    """The card of TypeSafe's API."""

    name: str
    description: str
    release_date: Annotated[str, Field(description="YYYY-MM-DD; the day on which the server was started")]


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelCard]
    models: list[ShortModelCard]


_Probability = Annotated[float, Field(ge=0, le=1)]


class ScoreAnswer(Answer):
    """Response of /v1/score: one list per item, in the order of its labels."""

    object: Literal["scoring"]
    scores: list[list[_Probability]]
    token_logprobs: list[list[_Logprob]] | None
    model: str
    usage: UsageAnswer


class GenerativeScore(Answer):
    index: int
    object: Literal["score"]
    score: Annotated[_Probability, Field(description="of the first label")]
    probabilities: list[_Probability] | None = None
    token_logprobs: list[_Logprob] | None = None


class GenerativeScoringAnswer(Answer):
    id: str
    object: Literal["list"]
    created: int
    data: list[GenerativeScore]
    model: str
    usage: UsageAnswer


class Tokenized(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    prompt: str
    token_bytes: list[_Bytes] | None = None


class TokenizerInfo(BaseModel):
    """Response of /tokenizer_info."""

    model_config = ConfigDict(strict=True, extra="allow")

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    tokenizer_class: str
    chat_template: str | None
    eos_token_ids: list[int]
    special_token_ids: list[int]
    model_max_length: int
    vocab_size: int


class Version(Answer):
    version: str


class Load(Answer):
    server_load: Annotated[int, Field(description="unfinished requests in the engine")]
