"""Tiny random models of each family; tests/model/golden has torch's outputs for them.

Weights are generated from a seed, equal on every platform and numpy version. make_golden.py imports this module in an
environment with torch, so it must run on Python 3.11 without this project's packages.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

SEED = 1
# Cases in which SEED gives near ties, whose ranks could differ by rounding.
OTHER_SEEDS = {
    "mistral": 2,
    "olmo2": 2,
    "gemma3": 4,
    "qwen3moe": 2,
    "glm4_moe_lite": 3,
    "mixtral": 2,
    "olmo3": 2,
    "granite": 2,
    "stablelm": 2,
}
TOKENS = 70  # more than one page of 64


def tiny_configs() -> dict[str, dict[str, Any]]:
    """Return case name -> config.json of a Hugging Face model.

    No two sizes are equal, so that mixing them up fails: an odd vocabulary, H * E unlike D, 2 to 7 query heads per
    key/value head.
    """
    return {
        "llama": _config("Llama", 64, 96, 131, (4, 2), 1e-5, head_dim=20, rope_theta=10000.0),
        "llama_tied": _config("Llama", 48, 80, 128, (6, 2), 1e-5, rope_theta=100000.0, tie_word_embeddings=True),
        "qwen2": _config(
            "Qwen2",
            56,
            72,
            140,
            (7, 1),
            1e-6,
            rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
            tie_word_embeddings=True,
        ),
        "llama3": _config("Llama", 48, 64, 120, (4, 2), 1e-5, rope_theta=500000.0, rope_scaling=_LLAMA3),
        "yarn": _config("Qwen2", 48, 64, 110, (3, 1), 1e-6, rope_theta=10000.0, rope_scaling=_YARN),
        "qwen3": _config("Qwen3", 48, 64, 122, (6, 2), 1e-6, head_dim=16, rope_theta=1000000.0),
        "mistral": _config("Mistral", 40, 72, 118, (4, 1), 1e-5, head_dim=12, sliding_window=20),
        "smollm3": _config("SmolLM3", 48, 56, 126, (4, 2), 1e-6, rope_theta=2000000.0, no_rope_layers=[1, 0]),
        "olmo2": _config("Olmo2", 48, 64, 124, (6, 3), 1e-6, rope_theta=500000.0),
        "phi3": _config("Phi3", 56, 64, 116, (7, 7), 1e-5, sliding_window=30),
        "phi3_long": _config(
            "Phi3",
            64,
            48,
            130,
            (8, 4),
            1e-5,
            original_max_position_embeddings=64,
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.3, 1.6],
                "long_factor": [1.2, 1.9, 2.7, 4.1],
            },
        ),
        "gemma2": _config(
            "Gemma2",
            48,
            64,
            134,
            (4, 2),
            1e-6,
            head_dim=16,
            sliding_window=24,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=2.0,  # small enough to have an effect
            final_logit_softcapping=8.0,
            **_GELU,
        ),
        "gemma3": _config(
            "Gemma3",
            40,
            56,
            136,
            (4, 1),
            1e-6,
            model_type="gemma3_text",
            head_dim=16,
            sliding_window=24,
            query_pre_attn_scalar=20,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
            **_GELU,
        ),
        "qwen3moe": _config(
            "Qwen3Moe",
            48,
            64,
            126,
            (6, 2),
            1e-6,
            model_type="qwen3_moe",
            head_dim=16,
            rope_theta=1000000.0,
            num_experts=7,
            num_experts_per_tok=3,
            moe_intermediate_size=40,
            mlp_only_layers=[0],
            norm_topk_prob=True,
        ),
        "mixtral": _config(
            "Mixtral", 40, 56, 118, (4, 2), 1e-5, num_local_experts=5, num_experts_per_tok=2, rope_theta=1000000.0
        ),
        "granitemoe": _config(
            "GraniteMoe",
            40,
            48,
            118,
            (4, 2),
            1e-5,
            num_local_experts=5,
            num_experts_per_tok=2,
            embedding_multiplier=9.0,
            attention_multiplier=0.21,
            residual_multiplier=0.37,
            logits_scaling=0.7,
        ),
        "gpt_oss": _config(
            "GptOss",
            48,
            40,
            128,
            (6, 2),
            1e-5,
            model_type="gpt_oss",
            head_dim=16,
            sliding_window=20,
            rope_theta=150000.0,
            rope_scaling=_YARN | {"truncate": False},
            num_local_experts=5,
            num_experts_per_tok=2,
        ),
        "olmoe": _config("Olmoe", 48, 40, 124, (6, 3), 1e-5, num_experts=6, num_experts_per_tok=3, rope_theta=10000.0),
        **latent_configs(),
        **newer_configs(),
    }


def latent_configs() -> dict[str, dict[str, Any]]:
    """Families with multi-head latent attention: without and with a latent of queries, groups, YaRN."""
    sizes = {"kv_lora_rank": 24, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 14}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
    yarn = _YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}
    return {
        "deepseek2": _config(
            "DeepseekV2",
            48,
            40,
            126,
            (4, 4),
            1e-6,
            **sizes | experts,
            model_type="deepseek_v2",
            q_lora_rank=None,
            first_k_dense_replace=1,
            n_shared_experts=2,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=3.5,
            rope_theta=10000.0,
            rope_scaling=yarn,
        ),
        "deepseek3": _config(
            "DeepseekV3",
            48,
            40,
            130,
            (6, 6),
            1e-5,
            **sizes | experts,
            model_type="deepseek_v3",
            q_lora_rank=18,
            first_k_dense_replace=1,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            rope_theta=10000.0,
            rope_scaling=_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        ),
        "glm4_moe_lite": _config(
            "Glm4MoeLite",
            48,
            40,
            124,
            (4, 4),
            1e-5,
            **sizes | experts,
            model_type="glm4_moe_lite",
            q_lora_rank=18,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.8,
            rope_theta=1000000.0,
        ),
    }


LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")  # types of models with latent attention


def newer_configs() -> dict[str, dict[str, Any]]:
    """Families that differ from the others in one kind of block each."""
    windows: dict[str, Any] = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}
    long = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.2, 1.9, 2.7]}
    growth = {"llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 24, "mscale": 1.0, "mscale_all_dim": 1.0}
    return {
        "phi4": _config(
            "Phi3",
            48,
            64,
            114,
            (6, 2),
            1e-5,
            partial_rotary_factor=0.75,
            original_max_position_embeddings=64,
            rope_scaling=long,
            tie_word_embeddings=True,
        ),
        "olmo3": _config("Olmo3", 48, 64, 123, (6, 3), 1e-6, rope_theta=500000.0, rope_scaling=_YARN, **windows),
        "ministral3": _config(
            "Ministral3",
            40,
            72,
            117,
            (4, 2),
            1e-5,
            head_dim=12,
            rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, **growth},
        ),
        "granite": _config(
            "Granite",
            40,
            72,
            119,
            (4, 2),
            1e-5,
            embedding_multiplier=9.0,
            attention_multiplier=0.21,
            residual_multiplier=0.37,
            logits_scaling=0.7,
        ),
        "seed_oss": _config(
            "SeedOss",
            48,
            64,
            121,
            (6, 2),
            1e-6,
            model_type="seed_oss",
            head_dim=12,
            rope_theta=1e6,
            attention_bias=True,
        ),
        "glm4": _config("Glm4", 48, 64, 125, (4, 2), 1e-5, head_dim=16, partial_rotary_factor=0.5, attention_bias=True),
        "exaone4": _config("Exaone4", 48, 64, 127, (6, 2), 1e-5, rope_scaling=_LLAMA3, rope_theta=1e6, **windows),
        "ernie4_5": _config(
            "Ernie4_5", 48, 64, 129, (6, 2), 1e-5, head_dim=12, rope_theta=500000.0, tie_word_embeddings=True
        ),
        "hunyuan": _config(
            "HunYuanDenseV1",
            40,
            72,
            131,
            (4, 2),
            1e-5,
            model_type="hunyuan_v1_dense",
            head_dim=12,
            rope_scaling={"type": "dynamic", "alpha": 50.0, "factor": 1.0},
        ),
        "cohere2": _config(
            "Cohere2",
            48,
            64,
            133,
            (6, 2),
            1e-5,
            layer_norm_eps=1e-5,
            logit_scale=1.7,
            tie_word_embeddings=True,
            **windows,
        ),
        "stablelm": _config(
            "StableLm", 48, 64, 135, (4, 2), 1e-5, layer_norm_eps=1e-5, partial_rotary_factor=0.5, use_qkv_bias=True
        ),
        "apertus": _config(
            "Apertus", 48, 64, 137, (6, 2), 1e-5, hidden_act="xielu", rope_theta=1e6, rope_scaling=_LLAMA3
        ),
        "arcee": _config(
            "Arcee", 48, 64, 139, (6, 2), 1e-5, hidden_act="relu2", rope_theta=10000.0, rope_scaling=_YARN
        ),
        "helium": _config("Helium", 48, 64, 141, (6, 3), 1e-8, head_dim=8, rope_theta=100000.0),
    }


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_GELU: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_ONE_ADDED = ("gemma2", "gemma3_text")  # families that add 1 to norm weights
_POST_NORM = ("olmo2", "olmo3", "exaone4")  # families without norms of inputs
# Norms of a layer, of families that name them in other ways than Llama.
_NORMS: dict[str, tuple[str, ...]] = {
    "glm4": ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    "cohere2": ("input_layernorm",),
    "apertus": ("attention_layernorm", "feedforward_layernorm"),
}
_XIELU: dict[str, Any] = {"alpha_p": [0.3], "alpha_n": [-0.4], "beta": 0.5, "eps": -1e-6}

# Modules of router and experts, and the names of an expert's matrices.
_EXPERTS = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    **dict.fromkeys(LATENT, ("mlp", ("gate_proj", "up_proj", "down_proj"))),
}


def seed_of(case: str) -> int:
    """Return the seed of a case."""
    return OTHER_SEEDS.get(case, SEED)


def _config(
    name: str, hidden: int, mlp: int, vocab: int, heads: tuple[int, int], epsilon: float, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": 2,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": epsilon,
        "tie_word_embeddings": False,
    } | more


def random_weights(config: dict[str, Any], seed: int) -> dict[str, NDArray[np.float32]]:
    """Return Hugging Face tensor name -> float32 values, reproducible from the seed.

    Matrices keep the scale of what they multiply. Embeddings are as small as trained ones, so that the epsilon of the
    first norms shows in the results; norm weights lie around 1 (0 where 1 is added to them), biases
    around 0.
    """
    bits = np.random.PCG64(seed)
    weights = {}
    for name, shape in _shapes(config).items():
        if name == "model.embed_tokens.weight":
            weights[name] = _uniform(bits, shape, 0.0, 0.2)
        elif ".act_fn." in name:
            weights[name] = np.array(_XIELU[name.rsplit(".", 1)[1]], np.float32)
        elif name.endswith("norm.weight"):
            weights[name] = _uniform(bits, shape, 0.0 if config["model_type"] in _ONE_ADDED else 1.0, 0.5)
        elif name.endswith(".sinks"):
            weights[name] = _uniform(bits, shape, 0.0, 2.0)
        elif name.endswith("gate_up_proj_bias"):  # far enough from 0 for the clamped activation
            weights[name] = _uniform(bits, shape, 0.0, 9.0)
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # transposed
            scale = 0.1 if name.endswith("down_proj") else 1.0  # the activation's values are large
            weights[name] = _uniform(bits, shape, 0.0, scale * math.sqrt(3 / shape[-2]))
        elif name.endswith("bias"):
            weights[name] = _uniform(bits, shape, 0.0, 0.5)
        else:
            weights[name] = _uniform(bits, shape, 0.0, math.sqrt(3 / shape[-1]))
    return weights


def random_tokens(config: dict[str, Any], seed: int) -> NDArray[np.int32]:
    """Return TOKENS ids below the vocabulary size, int32 [T], reproducible from the seed."""
    raw = np.random.PCG64([seed, 1]).random_raw(TOKENS)
    return (raw % np.uint64(config["vocab_size"])).astype(np.int32)


def write_checkpoint(folder: Path, config: dict[str, Any], weights: dict[str, NDArray[np.float32]]) -> None:
    """Write config.json and model.safetensors into an existing folder."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")


def _uniform(bits: np.random.PCG64, shape: tuple[int, ...], center: float, radius: float) -> NDArray[np.float32]:
    # numpy guarantees a generator's raw bits across versions, but not its distributions.
    raw = bits.random_raw(math.prod(shape)) >> np.uint64(11)
    unit = raw.astype(np.float64) * 2.0**-52 - 1.0  # [-1, 1)
    return (center + radius * unit).astype(np.float32).reshape(shape)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return Hugging Face tensor name -> shape, in the order in which random bits are used."""
    D, V = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    shapes |= {"model.norm.bias": (D,)} if config["model_type"] == "stablelm" else {}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in _layer_shapes(config, i).items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def _layer_shapes(config: dict[str, Any], i: int) -> dict[str, tuple[int, ...]]:
    D, F = config["hidden_size"], config["intermediate_size"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    E = config.get("head_dim", D // H)
    kind = config["model_type"]
    if kind in _NORMS:
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (D,) for name in _NORMS[kind]}
    else:
        shapes = {} if kind in _POST_NORM else {"input_layernorm.weight": (D,)}
    if kind in LATENT:
        shapes |= _latent_shapes(config)
    elif kind == "phi3":
        shapes["self_attn.qkv_proj.weight"] = ((H + 2 * K) * E, D)
    else:
        shapes |= {f"self_attn.{n}_proj.weight": (size * E, D) for n, size in (("q", H), ("k", K), ("v", K))}
    shapes["self_attn.o_proj.weight"] = (D, H * config.get("v_head_dim", E))
    shapes |= {} if kind in _NORMS else {"post_attention_layernorm.weight": (D,)}
    if (
        kind in (*_EXPERTS, "granitemoe", "gpt_oss")
        and i not in config.get("mlp_only_layers", ())
        and not (kind in LATENT and i == 0)
    ):
        shapes |= _expert_shapes(config)
    elif kind in ("phi3", "glm4"):
        shapes |= {"mlp.gate_up_proj.weight": (2 * F, D), "mlp.down_proj.weight": (D, F)}
    elif kind in ("apertus", "arcee"):
        shapes |= {"mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
    else:
        shapes |= {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
    if kind == "qwen2" or config.get("attention_bias") or config.get("use_qkv_bias"):
        shapes |= {f"self_attn.{n}_proj.bias": (size * E,) for n, size in (("q", H), ("k", K), ("v", K))}
    if kind == "gpt_oss":
        shapes |= {"self_attn.o_proj.bias": (D,), "self_attn.sinks": (H,)}
        shapes |= {f"self_attn.{n}_proj.bias": (size * E,) for n, size in (("q", H), ("k", K), ("v", K))}
    if kind == "stablelm":
        shapes |= {"input_layernorm.bias": (D,), "post_attention_layernorm.bias": (D,)}
    if kind == "apertus":
        shapes |= {"mlp.act_fn.alpha_p": (1,), "mlp.act_fn.alpha_n": (1,), "mlp.act_fn.beta": (), "mlp.act_fn.eps": ()}
    if kind == "hunyuan_v1_dense":
        shapes |= {"self_attn.query_layernorm.weight": (E,), "self_attn.key_layernorm.weight": (E,)}
    if kind in ("qwen3", "gemma3_text", "olmo2", "olmo3", "exaone4", "apertus", "qwen3_moe", "olmoe"):
        q, k = (H * E, K * E) if kind in ("olmo2", "olmo3", "olmoe") else (E, E)
        shapes |= {"self_attn.q_norm.weight": (q,), "self_attn.k_norm.weight": (k,)}
    if kind in (*_ONE_ADDED, *_POST_NORM):
        shapes["post_feedforward_layernorm.weight"] = (D,)
    if kind in _ONE_ADDED:
        shapes["pre_feedforward_layernorm.weight"] = (D,)
    return shapes


def _latent_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    D, H, rank, query_rank = (
        config[name] for name in ("hidden_size", "num_attention_heads", "kv_lora_rank", "q_lora_rank")
    )
    nope, rope, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa": (rank + rope, D),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (H * (nope + value), rank),
    }
    if query_rank:
        shapes |= {"q_a_proj": (query_rank, D), "q_a_layernorm": (query_rank,)}
    shapes |= {"q_b_proj" if query_rank else "q_proj": (H * (nope + rope), query_rank or D)}
    return {f"self_attn.{name}.weight": shape for name, shape in shapes.items()}


def _expert_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    D, F = config["hidden_size"], config.get("moe_intermediate_size", config["intermediate_size"])
    X = config.get("num_experts") or config.get("n_routed_experts") or config["num_local_experts"]
    if config["model_type"] == "granitemoe":
        shapes: dict[str, tuple[int, ...]] = {
            "router.layer": (X, D),
            "input_linear": (X, 2 * F, D),
            "output_linear": (X, D, F),
        }
        return {f"block_sparse_moe.{name}.weight": shape for name, shape in shapes.items()}
    if config["model_type"] == "gpt_oss":
        return {
            "mlp.router.weight": (X, D),
            "mlp.router.bias": (X,),
            "mlp.experts.gate_up_proj": (X, D, 2 * F),
            "mlp.experts.gate_up_proj_bias": (X, 2 * F),
            "mlp.experts.down_proj": (X, F, D),
            "mlp.experts.down_proj_bias": (X, D),
        }
    block, names = _EXPERTS[config["model_type"]]
    shapes = {f"{block}.gate.weight": (X, D)}
    for expert in range(X):
        sizes = zip(names, ((F, D), (F, D), (D, F)), strict=True)
        shapes |= {f"{block}.experts.{expert}.{name}.weight": shape for name, shape in sizes}
    if config["model_type"] in LATENT:
        SF = F * config["n_shared_experts"]
        sizes = zip(names, ((SF, D), (SF, D), (D, SF)), strict=True)
        shapes |= {f"{block}.shared_experts.{name}.weight": shape for name, shape in sizes}
        shapes |= {} if config["model_type"] == "deepseek_v2" else {f"{block}.gate.e_score_correction_bias": (X,)}
    return shapes
