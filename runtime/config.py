"""What a model is: its sizes and its layers, as the families of runtime/models read them from a config.json."""

from bisect import bisect_left
from dataclasses import dataclass, replace

from .layers.attention import Attention
from .layers.latent import LatentAttention
from .layers.mlp import Dense, Experts, RouterConfig

MAX_LAYERS, MAX_EXPERTS = 1024, 4096  # beyond any model; a damaged file stops here


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: what it mixes tokens with, and what each token passes through after that."""

    attention: Attention | LatentAttention
    mlp: Experts | Dense


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and layers of one model. Counts are in elements.

    All layers with experts have as many, of the same size and with the same router; attention differs where a model's
    does.
    """

    architecture: str
    dim: int  # of the residual stream
    vocab: int
    context: int  # longest context the model was made for, in tokens
    layers: tuple[Layer, ...]
    activation: str = "silu"  # silu | gelu_tanh, of every MLP
    norm: str = "rms"  # rms | layer, of the residual stream: an RMSNorm, or a LayerNorm with a bias
    norm_eps: float = 1e-6
    embedding_scale: float = 1.0  # of the embeddings on their way into the residual stream
    residual_scale: float = 1.0  # of what attention and MLP add to it
    logits_scale: float = 1.0
    tied_head: bool = False  # the output head is the embedding
    head_bias: bool = False  # added to the logits
    eos_tokens: tuple[int, ...] = ()
    kept: tuple[tuple[int, ...], ...] = ()  # by layer, the checkpoint's numbers of the experts left; () is all of them
    layer_top_k: tuple[int, ...] = ()  # by layer, 0 in a dense one; () is top_k everywhere

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(at for at, layer in enumerate(self.layers) if isinstance(layer.mlp, Experts))

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(at for at, layer in enumerate(self.layers) if isinstance(layer.mlp, Dense))

    @property
    def attention(self) -> Attention | LatentAttention:
        """The first layer's attention."""
        return self.layers[0].attention

    @property
    def latent(self) -> bool:
        """Whether every layer's attention is over a latent."""
        return all(isinstance(layer.attention, LatentAttention) for layer in self.layers)

    @property
    def routed(self) -> Experts:
        """The experts of every layer that has any."""
        return next(layer.mlp for layer in self.layers if isinstance(layer.mlp, Experts))

    @property
    def experts(self) -> int:
        """Experts of a layer in the checkpoint."""
        return self.routed.experts

    @property
    def top_k(self) -> int:
        """Experts that a token uses in a layer, by the checkpoint."""
        return self.routed.top_k

    @property
    def expert_hidden(self) -> int:
        """Inner size of one expert."""
        return self.routed.hidden

    @property
    def expert_bias(self) -> bool:
        """Whether a vector is added to each product of a routed expert."""
        return self.routed.output_bias

    @property
    def router(self) -> RouterConfig:
        return self.routed.router

    @property
    def routing_scale(self) -> float:
        """What routing weights are multiplied by at last, so that their sum over experts can go into the stream."""
        return self.router.scale * self.residual_scale

    @property
    def shared_hidden(self) -> int:
        """Inner size of the shared expert; 0 is none."""
        return self.routed.shared_hidden

    @property
    def shared_gate(self) -> bool:
        return self.routed.shared_gate

    @property
    def dense_hidden(self) -> int:
        """The largest inner size of a dense layer's MLP; 0 is none."""
        return max((layer.mlp.hidden for layer in self.layers if isinstance(layer.mlp, Dense)), default=0)

    @property
    def expert_weights(self) -> int:
        """Number of weights of one expert: gate, up and down."""
        return 3 * self.dim * self.expert_hidden

    @property
    def expert_count(self) -> int:
        """Experts of all layers together."""
        return sum(self.experts_of(layer) for layer in range(self.layer_count))

    def planned(self, context: int) -> "ModelConfig":
        """The model as a run of `context` tokens computes it, however long its sequences come to be."""
        its = (replace(layer.attention, rope=layer.attention.rope.planned(context)) for layer in self.layers)
        return replace(self, layers=tuple(map(Layer, its, (layer.mlp for layer in self.layers))))

    def has_experts(self, layer: int) -> bool:
        return isinstance(self.layers[layer].mlp, Experts)

    def experts_of(self, layer: int) -> int:
        """Experts a layer has: those that were not dropped, none in a dense layer."""
        if not self.has_experts(layer):
            return 0
        return len(self.kept[layer]) if self.kept else self.experts

    def number_of(self, layer: int, expert: int) -> int | None:
        """An expert's number in this model by its number in the checkpoint; None when it was dropped."""
        if not self.kept:
            return expert
        at = bisect_left(self.kept[layer], expert)
        return at if at < len(self.kept[layer]) and self.kept[layer][at] == expert else None

    def top_k_of(self, layer: int) -> int:
        """Experts a token uses in a layer, none in a dense one."""
        if not self.has_experts(layer):
            return 0
        return self.layer_top_k[layer] if self.layer_top_k else self.top_k

    def groups_of(self, layer: int) -> tuple[int, ...]:
        """The router's group of each expert that a layer has; what was dropped moves no other to another group."""
        size = self.experts // self.router.groups
        numbers = self.kept[layer] if self.kept else range(self.experts_of(layer))
        return tuple(number // size for number in numbers)


TRUNK_KINDS = ("shared", "attention", "dense", "embedding", "head")


def without_layer(name: str) -> str:
    """A tensor's canonical name without the layer that it is of, which may be none."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def trunk_kind(name: str) -> str:
    """Which of TRUNK_KINDS a matrix of the trunk is. name: canonical, with its layer or without."""
    first = without_layer(name).split(".")[0]
    return first if first in TRUNK_KINDS else "attention"


def trunk_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that is not a routed expert, by canonical name, in the order it is used."""
    dim = config.dim

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {name: (dim,)} | ({f"{name}_bias": (dim,)} if config.norm == "layer" else {})

    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab, dim)}
    for at, layer in enumerate(config.layers):
        parts = {**norm("attention_norm"), **layer.attention.shapes(dim), **norm("mlp_norm")}
        parts |= layer.mlp.shapes(dim, config.experts_of(at))
        shapes |= {f"layers.{at}.{part}": shape for part, shape in parts.items()}
    shapes |= norm("output_norm")
    if not config.tied_head:
        shapes["head"] = (config.vocab, dim)
    if config.head_bias:
        shapes["head_bias"] = (config.vocab,)
    return shapes
