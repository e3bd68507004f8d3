"""Which tensors of a checkpoint are one of our weights: their names, shapes and places in it."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint: its two names and its shape, in letters of `ModelConfig.dims()`."""

    hf: str
    gguf: str
    shape: tuple[str, ...]
    heads: str | None = None  # "H" or "K" if the rows are rotary heads, which some GGUF files store interleaved

    @property
    def is_norm(self) -> bool:
        return self.hf.endswith("norm.weight")


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One of our weights: a path into the Transformer ("{i}" is the layer) and the tensors stacked along axis 0."""

    path: str
    tensors: tuple[TensorSpec, ...]

    @property
    def is_per_layer(self) -> bool:
        return "{i}" in self.path

    def of_layer(self, i: int) -> "WeightSpec":
        """The weight with the layer's number in all names."""
        tensors = (replace(t, hf=t.hf.format(i=i), gguf=t.gguf.format(i=i)) for t in self.tensors)
        return WeightSpec(self.path.format(i=i), tuple(tensors))


def tensor_spec(hf: str, gguf: str, *shape: str, heads: str | None = None, kind: str = "weight") -> TensorSpec:
    return TensorSpec(f"model.layers.{{i}}.{hf}.{kind}", f"blk.{{i}}.{gguf}.{kind}", shape, heads)


def layer_weight(path: str, *tensors: TensorSpec) -> WeightSpec:
    return WeightSpec(f"layers.{{i}}.{path}", tensors)
