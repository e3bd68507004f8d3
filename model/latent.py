"""Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2"): its sizes, and the tensors of its weights."""

from dataclasses import dataclass

from model.weight_specs import ExpertSlice, HeadSlice, TensorSpec, WeightSpec, layer_weight, tensor_spec

EPSILON = 1e-6  # of the norms of latents, whatever that of other norms is, as in transformers


@dataclass(frozen=True, slots=True)
class Latent:
    """Sizes of latent attention. A token is cached as its rotated key, which all heads share, and its latent."""

    rank: int  # of the latent
    rope: int  # rotated elements of a query or key
    nope: int  # its other elements
    value: int  # elements of a value
    query_rank: int = 0  # of the queries' own latent; 0: none

    @property
    def cached(self) -> int:
        """Cached elements of a token."""
        return self.rope + self.rank

    @property
    def query(self) -> int:
        """Elements of a query, whose scores are scaled by it."""
        return self.nope + self.rope

    def dims(self, heads: int) -> dict[str, int]:
        """As `ModelConfig.dims`: LR, LE, QR, NE and VE of one head or token, HQ and HV of all heads."""
        return {
            "LR": self.rank,
            "LE": self.cached,
            "QR": self.query_rank,
            "NE": self.nope,
            "VE": self.value,
            "HQ": heads * self.query,
            "HV": heads * self.value,
        }

    def weights(self, heads: int) -> tuple[WeightSpec, ...]:
        """The weight table of a layer's attention."""
        if self.query_rank:
            queries = [
                layer_weight("attention.q_a.weight", tensor_spec("self_attn.q_a_proj", "attn_q_a", "QR", "D")),
                layer_weight(
                    "attention.q_a_norm.weight", tensor_spec("self_attn.q_a_layernorm", "attn_q_a_norm", "QR")
                ),
                layer_weight(
                    "attention.q.weight", tensor_spec("self_attn.q_b_proj", "attn_q_b", "HQ", "QR", heads="H")
                ),
            ]
        else:
            queries = [
                layer_weight("attention.q.weight", tensor_spec("self_attn.q_proj", "attn_q", "HQ", "D", heads="H"))
            ]
        return (
            *queries,
            layer_weight(
                "attention.kv_a.weight",
                tensor_spec("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa", "LE", "D", heads="K"),
            ),
            layer_weight("attention.kv_a_norm.weight", tensor_spec("self_attn.kv_a_layernorm", "attn_kv_a_norm", "LR")),
            _of_heads("k_b", heads, ("LR", "NE"), part=0),
            _of_heads("v_b", heads, ("VE", "LR"), part=1),
            layer_weight("attention.out.weight", tensor_spec("self_attn.o_proj", "attn_output", "D", "HV")),
        )


def _of_heads(name: str, heads: int, shape: tuple[str, str], *, part: int) -> WeightSpec:
    """A matrix of each head. In checkpoints of Hugging Face and old GGUF files one tensor has those of keys and values.

    Those of keys are transposed there: ours take a query to the latent.
    """
    tensors = []
    for head in range(heads):
        joined = HeadSlice(head, ("NE", "VE"), part, transposed=part == 0)
        hf, gguf = "model.layers.{i}.self_attn.kv_b_proj.weight", "blk.{i}.attn_kv_b.weight"
        old = TensorSpec(hf, gguf, shape, None, joined, joined)
        split = ExpertSlice(head, count="H")
        tensors.append(TensorSpec(hf, f"blk.{{i}}.attn_{name}.weight", shape, None, joined, split, gguf_else=old))
    return WeightSpec(f"layers.{{i}}.attention.{name}.weight", tuple(tensors), "experts")
