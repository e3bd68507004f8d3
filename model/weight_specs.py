"""Which tensors of a checkpoint are one of our weights: their names, shapes and places in it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ExpertSlice:
    """An expert's matrix or bias in a tensor [X, parts * rows, ...] of all experts, which holds `parts` of each."""

    expert: int
    parts: int = 1
    part: int = 0
    interleaved: bool = False  # the rows of the parts alternate; else each part's rows follow each other
    count: str = "X"  # letter of the number of experts, or of heads that have a matrix each


@dataclass(frozen=True, slots=True)
class HeadSlice:
    """A head's matrix in a tensor [H * rows, columns], in which a head has several matrices, one after another."""

    head: int
    rows: tuple[str, ...]  # letters of their numbers of rows
    part: int  # which of them
    transposed: bool  # its columns are our rows


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint: its two names and its shape, in letters of `ModelConfig.dims()`."""

    hf: str
    gguf: str
    shape: tuple[str, ...]
    heads: str | None = None  # "H" or "K" if the rows are rotary heads, which some GGUF files store interleaved
    hf_slice: ExpertSlice | HeadSlice | None = None  # of the tensor with this name, None if it is the expert's own
    gguf_slice: ExpertSlice | HeadSlice | None = None
    gguf_else: "TensorSpec | None" = None  # of GGUF files without a tensor of this name

    @property
    def is_norm(self) -> bool:
        return self.hf.endswith("norm.weight")

    def of_layer(self, i: int) -> "TensorSpec":
        """The tensor with the layer's number in its names."""
        other = None if self.gguf_else is None else self.gguf_else.of_layer(i)
        # Not `replace`, which takes most of the time where a layer has hundreds of experts.
        names = self.hf.format(i=i), self.gguf.format(i=i)
        return TensorSpec(*names, self.shape, self.heads, self.hf_slice, self.gguf_slice, other)


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One of our weights: a path into the Transformer ("{i}" is the layer) and the tensors stacked along axis 0."""

    path: str
    tensors: tuple[TensorSpec, ...]
    role: Literal["plain", "router", "experts"] = (
        "plain"  # a router is never rounded, experts (or heads) are read one by one
    )

    @property
    def is_per_layer(self) -> bool:
        return "{i}" in self.path

    def of_layer(self, i: int) -> "WeightSpec":
        """The weight with the layer's number in all names."""
        tensors = tuple(tensor.of_layer(i) for tensor in self.tensors)
        return WeightSpec(self.path.format(i=i), tensors, self.role)


def tensor_spec(hf: str, gguf: str, *shape: str, heads: str | None = None, kind: str = "weight") -> TensorSpec:
    return TensorSpec(f"model.layers.{{i}}.{hf}.{kind}", f"blk.{{i}}.{gguf}.{kind}", shape, heads)


def layer_weight(path: str, *tensors: TensorSpec) -> WeightSpec:
    return WeightSpec(f"layers.{{i}}.{path}", tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTraits:
    """How the checkpoints of a family of mixtures of experts name and store them."""

    hf_block: str = "mlp"  # module of router and experts
    hf_router: str = "gate"
    hf_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # of one expert's matrices
    hf_fused: tuple[str, str] | None = None  # instead: tensors of all experts, gate and up in the first
    hf_interleaved: bool = False  # rows of gate and up alternate in it
    hf_transposed: bool = False  # floats of these tensors are stored as [X, columns, rows]
    bias: bool = False  # of the router and of all matrices, in tensors of all experts with "_bias" after the name
    hf_size: str = "intermediate_size"  # key of config.json: features of an expert
    gguf_architecture: str | None = None  # None: the family's name
    shared: bool = False  # an MLP for all tokens is added
    choice_bias: bool = False  # a bias is added to the scores for the choice of experts
    gguf_normalized: bool = True  # whether weights of the chosen experts add up to 1, unless a file's key says so


# Our name, GGUF's name and the axes of an expert's matrices.
_EXPERT_MATRICES = (
    ("gate", "ffn_gate_exps", ("XF", "D")),
    ("up", "ffn_up_exps", ("XF", "D")),
    ("down", "ffn_down_exps", ("D", "XF")),
)


_SHARED = (
    layer_weight(
        "mlp.shared.gate_up.weight",
        tensor_spec("mlp.shared_experts.gate_proj", "ffn_gate_shexp", "SF", "D"),
        tensor_spec("mlp.shared_experts.up_proj", "ffn_up_shexp", "SF", "D"),
    ),
    layer_weight("mlp.shared.down.weight", tensor_spec("mlp.shared_experts.down_proj", "ffn_down_shexp", "D", "SF")),
)


def expert_weights(traits: ExpertTraits, count: int) -> tuple[WeightSpec, ...]:
    """The router and the matrices of all experts of a layer, of which each is stacked: [X * XF, D] or [X * D, XF]."""
    block = f"model.layers.{{i}}.{traits.hf_block}"
    router = TensorSpec(f"{block}.{traits.hf_router}.weight", "blk.{i}.ffn_gate_inp.weight", ("X", "D"))
    weights = [WeightSpec("layers.{i}.mlp.router.weight", (router,), "router")]
    if traits.bias:
        router = TensorSpec(f"{block}.{traits.hf_router}.bias", "blk.{i}.ffn_gate_inp.bias", ("X",))
        weights.append(WeightSpec("layers.{i}.mlp.router.bias", (router,)))
    for place, (name, gguf, shape) in enumerate(_EXPERT_MATRICES):
        tensors, biases = [], []
        for expert in range(count):
            hf, part = f"{block}.experts.{expert}.{traits.hf_names[place]}.weight", None
            if traits.hf_fused is not None:
                hf = f"{block}.{traits.hf_fused[name == 'down']}"
                two = ExpertSlice(expert, 2, place, traits.hf_interleaved)
                part = ExpertSlice(expert) if name == "down" else two
            own = ExpertSlice(expert)
            tensors.append(TensorSpec(hf, f"blk.{{i}}.{gguf}.weight", shape, None, part, own))
            biases.append(TensorSpec(f"{hf}_bias", f"blk.{{i}}.{gguf}.bias", shape[:1], None, part, own))
        weights.append(WeightSpec(f"layers.{{i}}.mlp.{name}.weight", tuple(tensors), "experts"))
        weights += [WeightSpec(f"layers.{{i}}.mlp.{name}.bias", tuple(biases))] if traits.bias else []
    if traits.choice_bias:
        bias = TensorSpec(f"{block}.{traits.hf_router}.e_score_correction_bias", "blk.{i}.exp_probs_b.bias", ("X",))
        weights.append(layer_weight("mlp.choice_bias", bias))
    return (*weights, *(_SHARED if traits.shared else ()))
