# mypy: disable-error-code="import-not-found"
"""Remakes the golden files from the Hugging Face modules in torch. Run by hand; the tests need no torch.

    python -m tests.model.golden.make_golden [CASE ...]

from the repository's root, with torch and transformers installed (versions.json says which were used); arguments are
the cases to make, without any all of them. Every file
holds tokens [T] int32, token_logprobs [T-1] float32 and token_ranks [T-1] int32 of all tokens but the first, and, for
some positions [P] int32, float32 arrays under the names of our own sub-layers:

    embed, norm [P, D], logits [P, V], and for layer i, each with the prefix "layers.i":
    .attention_norm [P, D]; .attention.q, .k, .v before and .q_rotated, .k_rotated after rotary, [P, heads * E];
    .attention.heads [P, H * E] before and .attention [P, D] after the output map; .mlp_norm, .mlp [P, D];
    .attention_post_norm, .mlp_post_norm [P, D]; the layer's output [P, D] under the prefix itself

A family has those of the norms that its layers have, with latent attention none of .attention.q to .k_rotated. A family
with experts has experts [T, L, k] int16, the ids that each layer's router chooses for each token, in its order; 0 in
dense layers. multimodal.npz holds the logits [P, V] of multimodal modules.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tests.support.tiny import LATENT, random_tokens, random_weights, seed_of, tiny_configs, write_checkpoint
from tests.support.tiny_multimodal import architecture, multimodal

FOLDER = Path(__file__).parent
# Both ends, some in between, and both sides of the border between two pages of 64 tokens.
POSITIONS = np.array([0, 1, 2, 5, 13, 22, 40, 62, 63, 64, 65, 69], np.int32)
_GRANITE = {
    "mlp.router.layer.weight": "block_sparse_moe.router.weight",
    "mlp.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
    "mlp.output_linear.weight": "block_sparse_moe.experts.down_proj",
}
_MATRICES = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
SMALLEST_GAP = 5e-5  # of a token's logit to any other: ranks are then equal wherever logits are within 2e-5
SMALLEST_ROUTER_GAP = 5e-6  # of the logits of two experts that a router compares


def main() -> None:
    """Writes one .npz per tiny model, and versions.json."""
    torch.set_num_threads(1)
    configs = tiny_configs()
    for name in sys.argv[1:] or configs:
        config = configs[name]
        with torch.no_grad():
            arrays: dict[str, Any] = _golden(config, seed_of(name))
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
    with torch.no_grad():
        np.savez_compressed(FOLDER / "multimodal.npz", **_multimodal())
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def _multimodal() -> dict[str, Any]:
    """Logits [P, V] of the language models of multimodal modules, by architecture."""
    logits = {}
    for name, case in multimodal().items():
        model_class = getattr(transformers, architecture(name)["architectures"][0])
        with tempfile.TemporaryDirectory() as folder:  # the module has random weights for images
            write_checkpoint(Path(folder), case.config | architecture(name), case.text_tensors())
            model = model_class.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        tokens = torch.from_numpy(random_tokens(tiny_configs()[case.text], seed_of(case.text)))[None].long()
        logits[name] = model(input_ids=tokens, use_cache=False).logits[0][POSITIONS].numpy()
    return logits


def _golden(config: dict[str, Any], seed: int) -> dict[str, NDArray[Any]]:
    model = _module(config, seed)
    values: dict[str, Any] = {}
    _record_layers(model, values)
    tokens = random_tokens(config, seed)
    routes = _recorded_routes(model)
    is_latent = config["model_type"] in LATENT  # whose heads of queries and keys are never made here
    with nullcontext() if is_latent else _recording_attention(model, values):
        logits = model(torch.from_numpy(tokens)[None].long(), use_cache=False).logits[0]
    values["logits"] = logits
    arrays = {key: value.reshape(len(tokens), -1).numpy()[POSITIONS] for key, value in values.items()}
    if routes:
        none = np.zeros_like(next(iter(routes.values())))
        arrays["experts"] = np.stack([routes.get(i, none) for i in range(len(model.model.layers))], axis=1)
    return (
        arrays | {"tokens": tokens, "positions": POSITIONS} | _scores(logits[:-1], torch.from_numpy(tokens[1:]).long())
    )


def _recorded_routes(model: Any) -> dict[int, NDArray[np.int16]]:
    """A dictionary that the next call fills: layer -> ids [T, k] that its router chooses."""
    routes: dict[int, NDArray[np.int16]] = {}

    def keep(layer: int) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            logits, _, ids = output
            best = logits.sort(dim=-1, descending=True).values[:, : ids.shape[1] + 1]
            chooses_best = torch.equal(logits.topk(ids.shape[1], dim=-1).indices, ids)  # without groups and biases
            if chooses_best and (best[:, :-1] - best[:, 1:]).min() < SMALLEST_ROUTER_GAP:
                raise ValueError("two experts are almost equal: give the case another seed")
            routes[layer] = ids.numpy().astype(np.int16)

        return hook

    for i, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if type(module).__name__.lower().endswith("topkrouter"):
                module.register_forward_hook(keep(i))
    return routes


def _scores(logits: Any, targets: Any) -> dict[str, NDArray[Any]]:
    """Log-prob and unique rank of targets [n] under logits [n, V]."""
    own = logits.gather(1, targets[:, None])
    ids = torch.arange(logits.shape[1])
    others = (logits - own).abs()[ids != targets[:, None]]
    if others.min() < SMALLEST_GAP:
        raise ValueError(f"two logits are only {others.min()} apart: give the case another seed")
    ahead = (logits > own) | ((logits == own) & (ids < targets[:, None]))
    return {
        "token_logprobs": torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0].numpy(),
        "token_ranks": (1 + ahead.sum(1)).to(torch.int32).numpy(),
    }


def _module(config: dict[str, Any], seed: int) -> Any:
    """The Hugging Face module with the tiny weights, float32, attention written out."""
    model_class = getattr(transformers, config["architectures"][0])
    hf_config = model_class.config_class(**config, pad_token_id=0, attn_implementation="eager")
    model = model_class(hf_config).eval().float()
    weights = {name: torch.from_numpy(array) for name, array in random_weights(config, seed).items()}
    missing, unexpected = model.load_state_dict(_fused(weights), strict=False)
    if unexpected or missing != (["lm_head.weight"] if config["tie_word_embeddings"] else []):
        raise ValueError(f"missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def _fused(weights: dict[str, Any]) -> dict[str, Any]:
    """The tensors of experts as the modules have them: of all experts together, gate before up."""
    fused: dict[str, Any] = {}
    experts: dict[str, dict[tuple[int, int], Any]] = {}
    for name, values in weights.items():
        block, _, rest = name.replace(".block_sparse_moe.", ".mlp.").partition(".experts.")
        if "." not in rest:  # of no single expert
            for ours, theirs in _GRANITE.items():
                block = block.replace(ours, theirs)
            fused[f"{block}.experts.{rest}" if rest else block] = values
            continue
        expert, matrix, _ = rest.split(".")
        place = next(i for i, names in enumerate(_MATRICES) if matrix in names)
        experts.setdefault(f"{block}.experts", {})[place, int(expert)] = values
    for path, parts in experts.items():
        gate, up, down = (torch.stack([parts[place, e] for e in range(len(parts) // 3)]) for place in range(3))
        fused |= {f"{path}.gate_up_proj": torch.cat([gate, up], 1), f"{path}.down_proj": down}
    return fused


def _record_layers(model: Any, values: dict[str, Any]) -> None:
    """Has every sub-layer put its output into `values`."""
    core = model.model
    core.layers[0].register_forward_pre_hook(_keep_input(values, "embed"))
    config = model.config
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    core.norm.register_forward_hook(_keep(values, "norm", scale))  # ours includes the scale of logits
    for i, layer in enumerate(core.layers):
        at = f"layers.{i}"
        named = {
            at: layer,
            f"{at}.attention": layer.self_attn,
            f"{at}.mlp": getattr(layer, "mlp", None) or layer.block_sparse_moe,
        }
        named |= {f"{at}.{name}": module for name, module in _norms(layer).items()}
        for name, module in named.items():
            module.register_forward_hook(_keep(values, name))
        layer.self_attn.o_proj.register_forward_pre_hook(_keep_input(values, f"{at}.attention.heads"))


def _norms(layer: Any) -> dict[str, Any]:
    """Our name of a norm -> module."""
    has_both = hasattr(layer, "post_self_attn_layernorm")
    has_post = not has_both and hasattr(layer, "post_feedforward_layernorm")
    names = {
        "input_layernorm": "attention_norm",
        "attention_layernorm": "attention_norm",
        "feedforward_layernorm": "mlp_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_self_attn_layernorm": "attention_post_norm",
        "post_attention_layernorm": "attention_post_norm" if has_post else "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
        "post_mlp_layernorm": "mlp_post_norm",
    }
    return {name: getattr(layer, module) for module, name in names.items() if hasattr(layer, module)}


def _keep(values: dict[str, Any], name: str, scale: float = 1.0) -> Callable[[Any, Any, Any], None]:
    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        values[name] = output[0] if isinstance(output, tuple) else output * scale

    return hook


def _keep_input(values: dict[str, Any], name: str) -> Callable[[Any, Any], None]:
    def hook(_module: Any, inputs: Any) -> None:
        values[name] = inputs[0]

    return hook


def _half_split(heads: Any, config: Any) -> Any:
    """Heads [1, h, T, E] in our order of dimensions: the first of all pairs before the second."""
    if config.model_type not in ("glm4", "ernie4_5", "cohere2", "helium"):
        return heads
    size = int(heads.shape[-1] * (config.rope_parameters.get("partial_rotary_factor") or 1))
    return torch.cat([heads[..., 0:size:2], heads[..., 1:size:2], heads[..., size:]], -1)


@contextmanager
def _recording_attention(model: Any, values: dict[str, Any]) -> Iterator[None]:
    """A context in which what enters the modelling file's rotary and attention functions is recorded too."""
    modelling = sys.modules[type(model).__module__]
    rotary, attention = modelling.apply_rotary_pos_emb, modelling.eager_attention_forward
    before: dict[str, Any] = {}  # queries and keys of the layer at work, where it is told the positions

    def recording_rotary(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        before.update(q=q, k=k)
        return rotary(q, k, *args, **kwargs)

    def recording_attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        found = {"q_rotated": query, "k_rotated": key, "v": value, "q": query, "k": key, **before}  # [1, heads, T, E]
        before.clear()
        for name in ("q", "k"):  # of StableLM, which gives the rotated part only
            rest = found[f"{name}_rotated"][..., found[name].shape[-1] :]
            found[name] = torch.cat([found[name], rest], -1)
        for name, heads in found.items():
            ours = heads if name == "v" else _half_split(heads, model.config)
            values[f"layers.{module.layer_idx}.attention.{name}"] = ours[0].transpose(0, 1)
        return attention(module, query, key, value, *args, **kwargs)

    with (
        patch.object(modelling, "apply_rotary_pos_emb", recording_rotary),
        patch.object(modelling, "eager_attention_forward", recording_attention),
    ):
        yield


if __name__ == "__main__":
    main()
