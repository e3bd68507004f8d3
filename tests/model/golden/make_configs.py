# mypy: disable-error-code="import-not-found"
"""Remakes configs.json: what Hugging Face's modules make of several hundred mutated configurations.

    python -m tests.model.golden.make_configs

from the repository's root, with torch and transformers installed (versions.json says which were used). The file holds

    bases   name -> config.json
    tables  lists of inverse frequencies
    cases   base, change (of its keys), drop (keys), and either the exception's type under "error" or the network's
            sizes and layers: [index of the table, of the table of long texts, attention factor, window] or, without
            rotary embedding, [window]
    eos     config and generation (the contents of the two files) and the ids that transformers finds in either
"""

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Mutation = Callable[[], dict[str, Any]]

FILE = Path(__file__).with_name("configs.json")
CASES = 810
NEWER_CASES = 390  # of the families below these
SPARSE_CASES = 60  # of those below these
LAYERS = 6
FULL, SLIDING = "full_attention", "sliding_attention"
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # architecture -> model_type and the keys that the family needs
    "Llama": ("llama", {}),
    "Mistral": ("mistral", {"sliding_window": 9}),
    "Qwen2": ("qwen2", {}),
    "Qwen3": ("qwen3", {"head_dim": 16}),
    "SmolLM3": ("smollm3", {"pad_token_id": 0}),
    "Olmo2": ("olmo2", {}),
    "Phi3": ("phi3", {"original_max_position_embeddings": 64, "pad_token_id": 0}),
    "Gemma2": ("gemma2", {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}),
    "Gemma3": ("gemma3_text", {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}),
}
_NEWER: dict[str, tuple[str, dict[str, Any]]] = {
    "Olmo3": ("olmo3", {"sliding_window": 9}),
    "Ministral3": ("ministral3", {"head_dim": 16}),
    "Granite": ("granite", {}),
    "SeedOss": ("seed_oss", {"head_dim": 16}),
    "Glm4": ("glm4", {"head_dim": 16}),
    "Exaone4": ("exaone4", {"sliding_window": 9}),
    "Ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "HunYuanDenseV1": ("hunyuan_v1_dense", {"head_dim": 16}),
    "Cohere2": ("cohere2", {"sliding_window": 9, "layer_norm_eps": 1e-5}),
    "StableLm": ("stablelm", {"layer_norm_eps": 1e-5}),
    "Apertus": ("apertus", {"hidden_act": "xielu"}),
    "Arcee": ("arcee", {"hidden_act": "relu2"}),
    "Helium": ("helium", {"head_dim": 16}),
}
_SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "GptOss": (
        "gpt_oss",
        {"head_dim": 16, "sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
_IGNORED = {
    "attention_dropout": 0.5,
    "initializer_range": 0.5,
    "pretraining_tp": 4,
    "use_cache": False,
    "temperature": 0.2,
    "torch_dtype": "float16",
    "auto_map": {"AutoConfig": "configuration.Config"},
    "transformers_version": "4.1.0",
    "_sliding_window_pattern": 2,
}
_UNKNOWN = {"clip_qkv": 8.0, "residual_multiplier": 0.5, "logits_scaling": 4.0, "use_rope": False}


def bases() -> dict[str, dict[str, Any]]:
    """Base name -> config.json."""
    return {
        name: {
            "architectures": [f"{name}ForCausalLM"],
            "model_type": model_type,
            "vocab_size": 32,
            "hidden_size": 64,
            "intermediate_size": 40,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        | keys
        for name, (model_type, keys) in (_FAMILIES | _NEWER | _SPARSE).items()
    }


def scaling(random: Random, name: str, *, nested: bool = False) -> dict[str, Any]:
    """Rotary parameters of any type, some of them contradictory or incomplete."""
    kinds = ["default", "linear", "llama3", "yarn", "yarn", "longrope", *["dynamic"] * (name in _NEWER)]
    kind = random.choice(["default", "longrope", "longrope", "su", "yarn", "linear"] if name == "Phi3" else kinds)
    values: dict[str, Any] = {random.choice(["rope_type"] * 3 + ["type"]): kind}
    if kind in ("longrope", "su") or (name == "Phi3" and kind == "yarn"):
        values["short_factor"] = [round(1 + 0.1 * i, 2) for i in range(8)]
        values["long_factor"] = [round(1 + 0.4 * i, 2) for i in range(8)]
    elif kind != "default":
        values["factor"] = random.choice([2.0, 4.0, 8.0, 16])
    if kind == "llama3":
        values |= {"low_freq_factor": random.choice([1.0, 2.0]), "high_freq_factor": random.choice([4.0, 8])}
    if kind == "yarn":
        options: dict[str, list[Any]] = {
            "beta_fast": [32, 16.0, 2.0],
            "beta_slow": [1, 0.5, 40.0],
            "mscale": [0.7, 1.0],
            "mscale_all_dim": [0.5, 1.0],
            "truncate": [True, False],
        }
        values |= {key: random.choice(choices) for key, choices in options.items() if random.random() < 0.4}
    extra: dict[str, list[Any]] = {
        "attention_factor": [1.25, 0.5],
        "original_max_position_embeddings": [32, 64, 256, 4096, 10**6],
        "rope_theta": [5.0, 500.0, 10000, 1e6],
        "partial_rotary_factor": [1.0, 0.5, 0.75],
        "factor": [4.0],
        "type": [kind, kind, "linear"],
        "mrope_section": [[2, 3, 3]],
        "short_mscale": [1.1],
    }
    chances = {"rope_theta": 0.8 if nested else 0.4, "original_max_position_embeddings": 0.5}
    for key, choices in extra.items():
        if random.random() < chances.get(key, 0.05):
            values[key] = random.choice(choices)
    return values


def _parameters(random: Random, name: str) -> dict[str, Any]:
    """`rope_parameters`, per kind of layer for Gemma 3 and sometimes for others."""
    if random.random() < (0.8 if name == "Gemma3" else 0.05):
        kinds = [kind for kind in (FULL, SLIDING) if random.random() < 0.8]
        return {kind: scaling(random, name, nested=True) for kind in kinds}
    return scaling(random, name, nested=True)


def _types(random: Random) -> list[str]:
    kinds = random.choice([[FULL], [SLIDING], [FULL, SLIDING]])
    return [random.choice(kinds) for _ in range(LAYERS)]


def mutations(random: Random, name: str) -> list[Mutation]:
    """Changes of config.json; those of the rotary embedding are the most frequent."""

    def value(key: str, *choices: Any) -> Mutation:
        return lambda: {key: random.choice(choices)}

    rotary: list[Mutation] = [
        lambda: {"rope_scaling": random.choice([None, {}, *[scaling(random, name) for _ in range(6)]])},
        lambda: {"rope_parameters": _parameters(random, name)},
        lambda: {"rope_parameters": _parameters(random, name), "rope_scaling": scaling(random, name)},
        value("rope_theta", 300.0, 20000, 1e6),
    ]
    common = [
        value("original_max_position_embeddings", 32, 128, None),
        value("max_position_embeddings", 256, 1024, 4096),
        value("partial_rotary_factor", 1.0, 0.5, None),
        value("head_dim", 16, 24, None),
        value("num_key_value_heads", 1, 4, None),
        value("rms_norm_eps", 1e-6, 1e-3),
        value("tie_word_embeddings", True, False),
        value("sliding_window", None, 8, 4),
        lambda: {"layer_types": _types(random)},
        lambda: dict([random.choice(list(_IGNORED.items()))]),
    ]
    # Keys that only some families have.
    growth = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    windows = [
        value("use_sliding_window", True, True, False),
        value("max_window_layers", 0, 2, 4),
        lambda: {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": random.choice([0, 3])},
    ]
    own: dict[str, list[Mutation]] = {
        "Qwen2": windows,
        "Qwen3": windows,
        "SmolLM3": [
            *windows,
            lambda: {"no_rope_layers": [random.choice([0, 1]) for _ in range(LAYERS)]},
            value("no_rope_layer_interval", 2, 3),
        ],
        "Ministral3": [value("rope_scaling", *(growth | {"llama_4_scaling_beta": beta} for beta in (0.1, 0.3)))],
        "Granite": [
            value("embedding_multiplier", 2.0, 12),
            value("attention_multiplier", 0.5, 0.1),
            value("residual_multiplier", 0.3),
            value("logits_scaling", 4.0, 3),
        ],
        "SeedOss": [value("attention_bias", True, False), value("attention_out_bias", True, False)],
        "Glm4": [value("attention_bias", True, False), value("partial_rotary_factor", 0.25, 1.0, 0.75)],
        "Exaone4": [value("sliding_window_pattern", 2, 3), value("sliding_window", None)],
        "Ernie4_5": [value("use_bias", True, False)],
        "HunYuanDenseV1": [value("rope_scaling", {"type": "dynamic", "alpha": 50.0, "factor": 1.0})],
        "Cohere2": [value("logit_scale", 0.5, 2), value("sliding_window_pattern", 2, 3), value("layer_norm_eps", 1e-3)],
        "StableLm": [
            value("use_qkv_bias", True, False),
            value("partial_rotary_factor", 0.5, 1.0),
            value("use_parallel_residual", True),
            value("qk_layernorm", True),
            value("layer_norm_eps", 1e-3),
        ],
        "GptOss": [
            value("attention_bias", True, False),
            value("num_experts_per_tok", 1, 3),
            value("num_local_experts", 3, 5),
            value("swiglu_limit", 7.0, 5.0),
            value("swiglu_alpha", 1.702, 1.5),
            value("initial_context_length", 64),
            value("experts_per_token", 2),
        ],
        "Gemma2": [value("query_pre_attn_scalar", 16, 20), value("attn_logit_softcapping", None, 20.0)],
        "Gemma3": [
            value("sliding_window_pattern", 2, 3),
            value("rope_local_base_freq", 777.0),
            value("final_logit_softcapping", None, 20.0),
        ],
    }
    foreign: list[Mutation] = [
        *(
            change
            for key, changes in own.items()
            for change in changes
            if (name in _NEWER or key not in _NEWER) and key not in _SPARSE
        ),
        value("hidden_act", "silu", "gelu", "gelu_pytorch_tanh"),
        value("hidden_activation", "gelu_pytorch_tanh", "silu"),
        value("attention_bias", True, False),
        value("mlp_bias", True, False),
        value("model_type", "llama", "mistral", "qwen2"),
        lambda: dict([random.choice(list(_UNKNOWN.items()))]),
    ]

    def unusual() -> dict[str, Any]:
        return random.choice(foreign)()

    return [*rotary * 4, *common, *own.get(name, []) * 2, unusual]


class Tables:
    """Lists of numbers, each stored once."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def index(self, values: torch.Tensor) -> int:
        row = [float(f"{value:.8g}") for value in values.tolist()]
        if row not in self.rows:
            self.rows.append(row)
        return self.rows.index(row)


def network(config: dict[str, Any], tables: Tables) -> dict[str, Any]:
    """Sizes and layers of the module that transformers builds, which must compute something."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        loaded = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(loaded, attn_implementation="eager").eval()
    layers = [_layer(model, i, tables) for i in range(loaded.num_hidden_layers)]
    if not model(input_ids=torch.arange(12)[None] % 32).logits.isfinite().all():
        raise ArithmeticError("not finite")
    first = model.model.layers[0]
    return {
        "family": type(model).__name__.removesuffix("ForCausalLM"),
        "layers": layers,
        "head_dim": first.self_attn.head_dim,
        "num_kv_heads": loaded.num_key_value_heads,
        "rms_norm_eps": getattr(loaded, "layer_norm_eps", None) or loaded.rms_norm_eps,
        "tied": bool(loaded.tie_word_embeddings),
        "scale": first.self_attn.scaling,
        **_factors(loaded),
        **_experts(loaded),
        "caps": _caps(loaded),
        "activation": _activation(first.mlp),
        "biases": sorted(
            {name.split(".", 3)[-1] for name, _ in model.named_parameters() if name.endswith(".bias")},
        ),
    }


def _factors(config: Any) -> dict[str, float]:
    """Constants that only some families have, and the growth of queries."""
    names = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale")
    beta = (config.rope_parameters or {}).get("llama_4_scaling_beta")
    growth = {} if beta is None else {"growth": [beta, config.rope_parameters["original_max_position_embeddings"]]}
    return {name: getattr(config, name) for name in names if hasattr(config, name)} | growth


def _experts(config: Any) -> dict[str, list[int]]:
    """Number of experts, and those of a token."""
    count = getattr(config, "num_local_experts", None)
    return {} if count is None else {"experts": [count, config.num_experts_per_tok]}


def _layer(model: Any, index: int, tables: Tables) -> list[Any]:
    attention, rotary, config = model.model.layers[index].self_attn, model.model.rotary_emb, model.config
    everywhere = config.sliding_window if config.model_type in ("mistral", "phi3", "ministral3") else None
    window = getattr(attention, "sliding_window", everywhere) or 0
    uses_rope = getattr(attention, "use_rope", True)
    if config.model_type == "exaone4":
        uses_rope, window = attention.sliding_window is None or attention.is_sliding, window * attention.is_sliding
    if not uses_rope or (config.model_type == "cohere2" and not window):
        return [window]
    kind = config.layer_types[index] if config.model_type in ("gemma3_text", "olmo3") else None
    prefix = f"{kind}_" if kind else ""
    type_ = rotary.rope_type[kind] if kind else rotary.rope_type
    short = tables.index(getattr(rotary, f"{prefix}inv_freq"))
    long = short
    if type_ == "longrope":
        parameters = config.rope_parameters[kind] if kind else config.rope_parameters
        length = parameters["original_max_position_embeddings"] + 1
        long = tables.index(ROPE_INIT_FUNCTIONS[type_](config, None, seq_len=length, layer_type=kind)[0])
    scale = getattr(rotary, f"{prefix}attention_scaling")
    return [short, long, scale, window]


def _caps(config: Any) -> list[float | None]:
    """Of scores and logits; Gemma 3 has a key for the first that it does not use."""
    scores = config.attn_logit_softcapping if config.model_type == "gemma2" else None
    return [scores, config.final_logit_softcapping if config.model_type.startswith("gemma") else None]


def _activation(mlp: Any) -> str:
    if hasattr(mlp, "experts"):
        return "clamped_silu" if (mlp.experts.alpha, mlp.experts.limit) == (1.702, 7.0) else "other"
    probe = torch.tensor([-1.0, 0.5, 2.0])
    function = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
    known = {"silu": torch.nn.functional.silu, "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}
    known |= {
        "relu2": lambda x: torch.relu(x) ** 2,
        "xielu": transformers.activations.XIELUActivation(dtype=torch.float32),
    }
    names = [name for name, other in known.items() if torch.allclose(function(probe), other(probe), atol=1e-6)]
    return names[0] if names else "other"


def eos_cases(random: Random) -> list[dict[str, Any]]:
    """Contents of the two files that name EOS ids, and what transformers reads from each."""
    choices: list[Any] = [0, 5, 9, [3], [4, 7], [5, 9, 11]]
    cases = []
    for _ in range(60):
        config, generation = ({"eos_token_id": random.choice(choices)} for _ in range(2))
        generation = random.choice([generation, generation, {}, {"eos_token_id": None}, {"temperature": 0.5}])
        loaded = transformers.LlamaConfig(**config)
        read = transformers.GenerationConfig(**generation)
        ids = [_ids(loaded.eos_token_id), _ids(read.eos_token_id)]
        cases.append({"config": config, "generation": generation, "ids": ids})
    return cases


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _case(random: Random, name: str, tables: Tables) -> dict[str, Any]:
    """One mutated configuration, and what transformers makes of it."""
    change: dict[str, Any] = {}
    for mutate in random.sample(mutations(random, name), random.choice([1, 1, 2, 2, 3])):
        change |= mutate()
    keys = ["num_key_value_heads", "rms_norm_eps", "head_dim"]
    drop = [random.choice(keys)] if random.random() < 0.1 else []
    config = {key: value for key, value in (bases()[name] | change).items() if key not in drop}
    try:
        with torch.no_grad():
            found = network(json.loads(json.dumps(config)), tables)
    except Exception as error:  # noqa: BLE001 - whatever transformers and torch raise
        found = {"error": type(error).__name__}
    return {"base": name, "change": change, "drop": drop} | found


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    tables, cases = Tables(), []
    groups = ((24, _FAMILIES, CASES), (25, _NEWER, NEWER_CASES), (26, _SPARSE, SPARSE_CASES))
    for seed, families, count in groups:
        random, names = Random(seed), list(families)
        cases += [_case(random, names[i % len(names)], tables) for i in range(count)]
    content: dict[str, Any] = {"bases": bases(), "tables": tables.rows, "cases": cases, "eos": eos_cases(Random(5))}
    lines = [f'"{key}": {json.dumps(content[key])}' for key in ("bases", "tables")]
    for key in ("cases", "eos"):
        rows = ",\n".join(json.dumps(case, separators=(",", ":")) for case in content[key])
        lines.append(f'"{key}": [\n{rows}\n]')
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
