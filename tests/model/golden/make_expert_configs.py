# mypy: disable-error-code="import-not-found"
"""Remakes expert_configs.json: the experts that Hugging Face's modules have with mutated configurations.

    python -m tests.model.golden.make_expert_configs

from the repository's root, with torch and transformers installed (versions.json says which were used). The file holds

    bases   name -> config.json
    cases   base, change (of its keys), drop (keys), and either the exception's type under "error" or layers: for each
            layer [experts, experts of a token, features of an expert, weights add up to 1], null for a dense one
"""

import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

FILE = Path(__file__).with_name("expert_configs.json")
CASES = 200
LAYERS = 4
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # architecture -> model_type and the keys that the family needs
    "Qwen3Moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 24}),
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
    "Olmoe": ("olmoe", {"num_experts": 4}),
    "GraniteMoe": ("granitemoe", {"num_local_experts": 4}),
}
_CHANGES: dict[str, list[Any]] = {
    "num_experts": [3, 6],
    "num_local_experts": [3, 6],
    "num_experts_per_tok": [1, 3, 4, 5, 0],
    "intermediate_size": [16, 32],
    "moe_intermediate_size": [16, 32],
    "norm_topk_prob": [True, False],
    "decoder_sparse_step": [1, 2, 3],
    "mlp_only_layers": [[], [0], [1, 3], [9]],
    "router_jitter_noise": [0.0, 0.1],
    "router_aux_loss_coef": [0.5],
    "output_router_logits": [False],
    "layer_types": [["full_attention"] * LAYERS, ["full_attention"] * (LAYERS - 1)],
}
_FOREIGN: dict[str, list[Any]] = {
    "clip_qkv": [8.0],
    "shared_expert_intermediate_size": [16],
    "n_shared_experts": [1],
    "scoring_func": ["sigmoid"],
    "routed_scaling_factor": [2.0],
    "n_group": [2],
    "first_k_dense_replace": [1],
}


def main() -> None:
    """Writes the file."""
    random = Random(5)
    bases = {name: _base(name) for name in _FAMILIES}
    cases = []
    for i in range(CASES):
        base = random.choice(list(bases))
        choices = _CHANGES | (_FOREIGN if i % 8 == 0 else {})
        keys = random.sample(list(_FOREIGN if i % 8 == 0 else _CHANGES), random.choice([1, 1, 2]))
        change = {key: random.choice(choices[key]) for key in keys}
        drop = [random.choice([*_FAMILIES[base][1], "num_experts_per_tok"])] if random.random() < 0.08 else []
        config = {key: value for key, value in (bases[base] | change).items() if key not in drop}
        cases.append({"base": base, "change": change, "drop": drop} | _experts(config))
    FILE.write_text(json.dumps({"bases": bases, "cases": cases}) + "\n")


def _base(name: str) -> dict[str, Any]:
    model_type, keys = _FAMILIES[name]
    return {
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
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    } | keys


def _experts(config: dict[str, Any]) -> dict[str, Any]:
    """Experts of the module that transformers builds, which must compute something."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            loaded = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(loaded, attn_implementation="eager").eval()
        model(input_ids=torch.arange(12)[None] % 32)
    except Exception as error:  # noqa: BLE001 - whatever transformers and torch raise
        return {"error": type(error).__name__}
    return {"layers": [_layer(getattr(layer, "mlp", None) or layer.block_sparse_moe) for layer in model.model.layers]}


def _layer(block: Any) -> list[Any] | None:
    if not hasattr(block, "experts"):
        return None
    router = next(module for module in block.modules() if type(module).__name__.endswith("TopKRouter"))
    features = block.experts.down_proj.shape[-1]
    return [len(router.weight), router.top_k, features, getattr(router, "norm_topk_prob", True)]


if __name__ == "__main__":
    main()
