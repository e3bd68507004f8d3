"""Promise 2 under load: a small model with a tiny cache answers every request with the same bits as alone."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import jax
import pytest

from compiled.runner import ModelRunner
from compiled.shapes import READ_EXPERTS, Buckets
from model.token_logprobs import TokenLogprobs
from serve.engine.core import EngineCore
from serve.engine.request import (
    FinishReason,
    PromptScoring,
    Request,
    SamplingParams,
    TokenEvent,
)
from serve.engine.request_state import RequestState
from tests.support.runners import make_runner
from tests.support.tiny import random_weights, write_checkpoint

pytestmark = pytest.mark.slow

# The head shape of SmolLM2-135M, for which XLA's attention is the same to the last bit (docs/design.md).
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
GELU: dict[str, Any] = CONFIG | {"hidden_act": "gelu_pytorch_tanh", "sliding_window": 70, "query_pre_attn_scalar": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": CONFIG,
    "gemma2": GELU
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 9.0,
    },
    "gemma3": GELU
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3moe": CONFIG
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
    "deepseek3": CONFIG
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_key_value_heads": 9,
        "head_dim": 32,
        "kv_lora_rank": 128,
        "q_lora_rank": 192,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 256,
        "n_group": 4,
        "topk_group": 2,
    },
    "cohere2": CONFIG
    | {
        "architectures": ["Cohere2ForCausalLM"],
        "model_type": "cohere2",
        "sliding_window": 70,
        "layer_types": ["sliding_attention", "full_attention"],
        "logit_scale": 0.7,
    },
}
BUCKETS = Buckets(decode_rows=(1, 2, 4), prefill_chunks=(16, 64), score_rows=64, pages_per_row=4)
REQUESTS = 80


@pytest.fixture(
    scope="module",
    params=[
        "llama-float32-float32",
        "llama-bfloat16-bfloat16",
        "llama-Q4_1 float32-float32",
        "gemma2-bfloat16-float32",
        "gemma3-float32-bfloat16",
        "qwen3moe-bfloat16-bfloat16",
        "qwen3moe-Q4_1 float32-float32",
        "deepseek3-bfloat16-bfloat16",
        "cohere2-float32-float32",
    ],
)
def small_runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A tiny model, by family, weights and dtype of the cache."""
    folder = tmp_path_factory.mktemp("model")
    family, weights, kv_dtype = request.param.split("-")
    write_checkpoint(folder, CONFIGS[family], random_weights(CONFIGS[family], seed=3))
    return make_runner(folder, weights, BUCKETS, pages=10, kv_dtype=kv_dtype)


@dataclass(frozen=True, slots=True)
class Case:
    prompt: list[int]
    params: SamplingParams
    arrival: int  # step
    leaves: int | None  # step


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything returned for a request, as bits."""

    token_ids: list[int]
    logprobs: list[tuple[bytes, ...]]
    prompt: tuple[bytes, ...] | None
    reason: FinishReason | None
    experts: bytes


def random_cases(random: Random, *, has_experts: bool) -> list[Case]:
    beginnings = [[random.randrange(300) for _ in range(200)] for _ in range(3)]
    cases = []
    for i in range(REQUESTS):
        own = [random.randrange(300) for _ in range(random.randint(1, 60))]
        prompt = (random.choice(beginnings)[: random.choice((0, 30, 64, 100, 128, 150))] + own)[:200]
        scoring = PromptScoring(random.randint(1, len(prompt))) if random.random() < 0.6 else None
        params = SamplingParams(
            max_tokens=random.choice((0, 1, random.randint(2, 50))),
            temperature=random.choice((0.0, 0.8, 1.3)),
            top_p=random.choice((1.0, 0.9)),
            top_k=random.choice((0, 10)),
            seed=random.getrandbits(32),
            prompt=scoring if len(prompt) > 1 else None,
        )
        if random.random() < 0.3:
            params = replace(params, frequency_penalty=0.7, repetition_penalty=1.2, logit_bias=((5, 3.0),))
        if random.random() < 0.3:
            params = replace(params, allowed_token_ids=frozenset(random.sample(range(300), 40)))
        if random.random() < 0.2:
            params = replace(params, requested_ids=(7, 3, 299))
        if has_experts:
            params = replace(params, experts_start=i * 7 % len(prompt))
        leaves = i * 3 + random.randint(1, 30) if random.random() < 0.1 else None
        cases.append(Case(prompt, params, i * 3, leaves))
    return cases


def run(runner: ModelRunner, cases: list[Case], *, prefix_caching: bool) -> tuple[list[Answer], int]:
    """Return the answer to each request and the number of prefix cache hits."""
    core = EngineCore(runner, max_model_len=256, max_num_batched_tokens=68, prefix_caching=prefix_caching)
    events: list[list[TokenEvent]] = [[] for _ in cases]
    step = 0
    while step <= cases[-1].arrival or core.scheduler.num_requests:
        for i, case in enumerate(cases):
            if case.arrival == step:
                core.add(RequestState(Request(f"{i}", case.prompt, case.params), seed=case.params.seed or 0))
            if case.leaves == step and (gone := core.abort(f"{i}")) is not None:
                events[i].append(gone[1])
        for request, event in core.step():
            events[int(request.id)].append(event)
        core.scheduler.check()
        step += 1
    starts = [case.params.prompt.start if case.params.prompt else 1 for case in cases]
    cached = sum(bool(each and each[0].cached_tokens) for each in events)
    return [_answer_of(each, start) for each, start in zip(events, starts, strict=True)], cached


def test_crowd_answers_equal_those_alone(small_runner: ModelRunner) -> None:
    cases = random_cases(Random(11), has_experts=READ_EXPERTS in small_runner.programs)
    crowd, cached = run(small_runner, cases, prefix_caching=True)
    assert cached > 10
    for case, returned in zip(cases, crowd, strict=True):
        (alone,), _ = run(small_runner, [replace(case, arrival=0, leaves=None)], prefix_caching=False)
        if returned.reason is FinishReason.ABORT:
            assert returned.token_ids == alone.token_ids[: len(returned.token_ids)]
            assert returned.logprobs == alone.logprobs[: len(returned.logprobs)]
            assert alone.experts.startswith(returned.experts)
        else:
            assert returned == alone


def test_a_generated_token_has_the_experts_of_a_prompt_token(small_runner: ModelRunner) -> None:
    if READ_EXPERTS not in small_runner.programs:
        return
    prompt = random_cases(Random(5), has_experts=True)[0].prompt[:40]
    params = SamplingParams(50, temperature=0.0, experts_start=0)
    ((generated,), _) = run(small_runner, [Case(prompt, params, 0, None)], prefix_caching=False)
    again = Case([*prompt, *generated.token_ids], replace(params, max_tokens=0), 0, None)
    ((scored,), _) = run(small_runner, [again], prefix_caching=False)
    assert len(generated.experts) == 2 * (40 + 50 - 1) * 2 * 3
    assert scored.experts == generated.experts


def _answer_of(events: list[TokenEvent], start: int) -> Answer:
    prompt = events[0].prompt_logprobs
    return Answer(
        [token for event in events for token in event.token_ids],
        [_bits(event.logprobs) for event in events if event.token_ids],
        None if prompt is None else _bits(prompt[start - 1 :]),
        events[-1].finish_reason,
        b"".join(event.experts.tobytes() for event in events if event.experts is not None),
    )


def _bits(scores: TokenLogprobs) -> tuple[bytes, ...]:
    return tuple(column.tobytes() for column in jax.tree.leaves(scores))
