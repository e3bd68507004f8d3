# mypy: disable-error-code="import-not-found"
"""Remakes latent_configs.json: what Hugging Face's modules make of mutated configurations with latent attention.

    python -m tests.model.golden.make_latent_configs

as make_configs.py. Each case has its name in `latent_configs()`, the change of its keys, and either "error" (the
exception's type) or the scores' factor, inverse frequencies, factor of the angles, layers with experts, and the
router's experts, experts per token, factor, groups, open groups, and whether weights are normalized (null in V2).
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

from tests.support.tiny import latent_configs

FILE = Path(__file__).with_name("latent_configs.json")
CASES = 150
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "n_group": (1, 2, 4, 8, 3, None),
    "topk_group": (1, 2, 4, None),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "norm_topk_prob": (True, False),
    "routed_scaling_factor": (1.0, 2.7, 16.0),
    "first_k_dense_replace": (0, 1, 2, 3),
    "mlp_layer_types": (None, ["dense", "sparse"], ["sparse", "dense"], ["sparse", "sparse"]),
    "num_experts_per_tok": (1, 2, 6),
    "n_routed_experts": (8, 16),
    "num_experts": (4, 8),
    "num_local_experts": (4, 8),
    "scoring_func": ("softmax", "sigmoid"),
    "moe_layer_freq": (1, 2),
    "q_lora_rank": (None, 18, 12),
    "qk_nope_head_dim": (10, 16),
    "qk_rope_head_dim": (8, 12),
    "head_dim": (8, 16),
    "num_key_value_heads": (None, 4, 6),
    "rope_interleave": (True, False),
    "attention_bias": (True, False),
    "partial_rotary_factor": (1.0, 0.5),
    "rope_theta": (1e4, 5e5),
    "rope_scaling": (
        None,
        _YARN,
        *(_YARN | {"mscale": share, "mscale_all_dim": share} for share in (0.7, 1.0)),
        _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        _YARN | {"mscale_all_dim": 1.0},
        _YARN | {"attention_factor": 1.3, "mscale_all_dim": 1.0},
        {"rope_type": "linear", "factor": 2.0, "mscale_all_dim": 1.0},
    ),
}


def _network(config: dict[str, Any]) -> dict[str, Any]:
    model_class: Callable[..., Any] = getattr(transformers, config["architectures"][0])
    model: Any = model_class(model_class.config_class(**config)).eval()  # type: ignore[attr-defined]
    model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    routers = [getattr(layer.mlp, "gate", None) for layer in model.model.layers]
    router = next((router for router in routers if router is not None), None)
    names = ("top_k", "routed_scaling_factor", "num_group", "topk_group", "norm_topk_prob")
    values = [None if router is None else getattr(router, name, None) for name in names]
    if getattr(router, "topk_method", None) == "greedy":
        values[2:4] = 1, 1
    rotary = model.model.rotary_emb
    return {
        "scale": model.model.layers[0].self_attn.scaling,
        "frequencies": rotary.inv_freq.tolist(),
        "rotary_scale": rotary.attention_scaling,
        "sparse": [router is not None for router in routers],
        "router": None if router is None else [len(router.weight), *values],
    }


def _case(random: Random) -> dict[str, Any]:
    name = random.choice(list(latent_configs()))
    change = {
        key: random.choice(_CHOICES[key]) for key in random.sample(list(_CHOICES), random.choice([1, 1, 2, 2, 3]))
    }
    try:
        with torch.no_grad():
            found = _network(json.loads(json.dumps(latent_configs()[name] | change)))
    except Exception as error:  # noqa: BLE001 - whatever transformers and torch raise
        found = {"error": type(error).__name__}
    return {"name": name, "change": change} | found


def main() -> None:
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    random = Random(27)
    rows = [json.dumps(_case(random), separators=(",", ":")) for _ in range(CASES)]
    FILE.write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
    main()
