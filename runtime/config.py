"""What a model is: its sizes and layers, which the families of runtime/models read from a config.json."""

from bisect import bisect_left
from dataclasses import dataclass, replace

from .layers.attention import Attention
from .layers.compressed import CompressedAttention
from .layers.delta_net import DeltaNet
from .layers.hyper import HyperConnections
from .layers.latent import LatentAttention
from .layers.mamba import Mamba
from .layers.mlp import Dense, Experts, RouterConfig
from .layers.ngrams import NGrams
from .layers.short_conv import ShortConv
from .layers.streams import Streams

MAX_LAYERS, MAX_EXPERTS = 1024, 4096  # more than any model has; a damaged file is refused


Recurrent = DeltaNet | ShortConv | Mamba  # which keep a state of fixed size in place of keys and values
Mixer = Attention | LatentAttention | CompressedAttention | Recurrent  # what a layer lets tokens affect later ones by


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: the attention, then the MLP, or only one of them."""

    attention: Mixer | None
    mlp: Experts | Dense | None
    ngrams: NGrams | None = None  # embeddings that are added before attention


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes and layers of one model. Counts are in elements.

    All layers with experts have the same number of experts, of the same size and with the same router, which only some
    of them may choose by (`hashed`); attention may differ between layers.
    """

    architecture: str
    dim: int  # of the residual stream
    vocab: int
    context: int  # maximum context the model was trained for, in tokens
    layers: tuple[Layer, ...]
    activation: str = "silu"  # silu | gelu_tanh | clamped_swiglu, of every MLP; relu2: of those without a gate
    swiglu_alpha: float = 0.0  # of clamped_swiglu: factor of the gate in the sigmoid
    swiglu_limit: float = 0.0  # of clamped_swiglu: the maximum of the gate, and of the magnitude of up
    swiglu_shift: float = 1.0  # of clamped_swiglu: what is added to up
    streams: Streams | HyperConnections | None = None  # of a residual stream that is several
    norm: str = "rms"  # rms | layer, of the residual stream: an RMSNorm, or a LayerNorm with a bias
    norm_eps: float = 1e-6
    embedding_scale: float = 1.0  # factor of the embeddings before they enter the residual stream
    residual_scale: float = 1.0  # factor of what attention and MLP add to it
    logits_scale: float = 1.0
    logits_cap: float = 0.0  # logits are logits_cap * tanh(logit / logits_cap); 0 is off
    post_norms: bool = False  # RMSNorms of what attention and the MLP add to the residual stream
    layer_scale: bool = False  # the residual stream is multiplied by one number after each layer
    tied_head: bool = False  # the output head is the embedding matrix
    head_bias: bool = False  # added to the logits
    eos_tokens: tuple[int, ...] = ()
    kept: tuple[tuple[int, ...], ...] = ()  # by layer, the checkpoint's indices of the experts kept; () keeps all
    layer_top_k: tuple[int, ...] = ()  # top_k by layer, 0 in a dense layer; () is top_k everywhere

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        """The values that the residual stream has per token."""
        return self.dim * (self.streams.count if self.streams else 1)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(at for at, layer in enumerate(self.layers) if isinstance(layer.mlp, Experts))

    @property
    def dense_layers(self) -> tuple[int, ...]:
        return tuple(at for at, layer in enumerate(self.layers) if isinstance(layer.mlp, Dense))

    @property
    def attentions(self) -> tuple[Mixer, ...]:
        """The different kinds of attention, in the order of the layers that have them first."""
        return tuple(dict.fromkeys(layer.attention for layer in self.layers if layer.attention))

    @property
    def attention(self) -> Mixer:
        """The attention of the first layer that has keys."""
        return next((its for its in self.attentions if not isinstance(its, Recurrent)), self.attentions[0])

    @property
    def tells_received(self) -> bool:
        """Whether it is known in every layer how much attention a token receives."""
        return all(isinstance(layer.attention, Attention) for layer in self.layers)

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """The layers that keep a state of fixed size in place of keys and values."""
        return tuple(at for at, layer in enumerate(self.layers) if isinstance(layer.attention, Recurrent))

    @property
    def chooses_positions(self) -> bool:
        """Whether there are layers whose queries attend to a choice of the positions that they see."""
        return any(
            (isinstance(its, LatentAttention) and its.top)
            or (isinstance(its, Attention | CompressedAttention) and its.index)
            for its in self.attentions
        )

    @property
    def independent_tokens(self) -> int | None:
        """The longest sequence of which every layer can be computed from the layer's input alone; None: any.

        In a longer one some layers attend to positions that layers before them have chosen.
        """
        tops = [its.top for its in self.attentions if isinstance(its, LatentAttention) and its.top and not its.indexer]
        return min(tops, default=None)

    @property
    def routed(self) -> Experts:
        """The Experts value that all layers with experts share, but for whether they are hashed."""
        return next(layer.mlp for layer in self.layers if isinstance(layer.mlp, Experts))

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        """The shapes of the tables of n-gram embeddings, by canonical name."""
        its = {at: layer.ngrams for at, layer in enumerate(self.layers) if layer.ngrams}
        return {f"layers.{at}.ngrams.table": (one.rows, one.cols) for at, one in its.items()}

    @property
    def experts(self) -> int:
        """The number of experts per layer in the checkpoint."""
        return self.routed.experts

    @property
    def top_k(self) -> int:
        """The number of experts that a token uses in a layer, by the checkpoint."""
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
    def gated(self) -> bool:
        """Whether MLPs have a gate, else only up and down."""
        return self.routed.gated

    @property
    def expert_shapes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """The shapes of an expert's gate, up and down; a gate that is not there has no rows."""
        dim, hidden = self.dim, self.expert_hidden
        return (hidden if self.gated else 0, dim), (hidden, dim), (dim, hidden)

    @property
    def router(self) -> RouterConfig:
        return self.routed.router

    @property
    def routing_scale(self) -> float:
        """The factor of the final routing weights; includes the residual scale, for adding the experts' sum to the
        stream."""
        return self.router.scale * self.residual_scale

    @property
    def shared_hidden(self) -> int:
        """The inner size of the shared expert; 0 without one."""
        return self.routed.shared_hidden

    @property
    def shared_gate(self) -> bool:
        return self.routed.shared_gate

    @property
    def own_norms(self) -> bool:
        """Whether router, routed experts and shared expert have norms of their own."""
        return self.routed.own_norms

    @property
    def sums_experts(self) -> bool:
        """Whether experts' outputs are summed before the residual stream gets them, as norms or a factor follow."""
        return self.post_norms or self.own_norms or self.layer_scale or self.streams is not None

    @property
    def dense_hidden(self) -> tuple[int, ...]:
        """The inner size of each layer's dense MLP; 0 without one."""
        return tuple(layer.mlp.hidden if isinstance(layer.mlp, Dense) else 0 for layer in self.layers)

    @property
    def expert_weights(self) -> int:
        """The number of weights of one expert: gate, up and down."""
        return sum(rows * cols for rows, cols in self.expert_shapes)

    @property
    def expert_count(self) -> int:
        """The number of experts of all layers together."""
        return sum(self.experts_of(layer) for layer in range(self.layer_count))

    def of_layers(self, layers: range) -> "ModelConfig":
        """A model of some of the layers, in a row, as far as sizes go."""
        first, after = layers.start, layers.stop
        kept, top_k = self.kept[first:after], self.layer_top_k[first:after]
        return replace(self, layers=self.layers[first:after], kept=kept, layer_top_k=top_k)

    def planned(self, context: int) -> "ModelConfig":
        """The model as computed in a run planned for `context` tokens, whatever the length of its sequences."""
        its = (replace(one, attention=one.attention and one.attention.planned(context)) for one in self.layers)
        return replace(self, layers=tuple(its))

    def is_hashed(self, layer: int) -> bool:
        """Whether a layer looks up the experts of a token by its id."""
        mlp = self.layers[layer].mlp
        return isinstance(mlp, Experts) and mlp.hashed

    def has_experts(self, layer: int) -> bool:
        return isinstance(self.layers[layer].mlp, Experts)

    def experts_of(self, layer: int) -> int:
        """The number of experts that a layer has after dropping; 0 in a dense layer."""
        if not self.has_experts(layer):
            return 0
        return len(self.kept[layer]) if self.kept else self.experts

    def number_of(self, layer: int, expert: int) -> int | None:
        """Convert an expert's index in the checkpoint to its index in this model; None if it was dropped."""
        if not self.kept:
            return expert
        at = bisect_left(self.kept[layer], expert)
        return at if at < len(self.kept[layer]) and self.kept[layer][at] == expert else None

    def top_k_of(self, layer: int) -> int:
        """The number of experts that a token uses in a layer; 0 in a dense layer."""
        if not self.has_experts(layer):
            return 0
        return self.layer_top_k[layer] if self.layer_top_k else self.top_k

    def groups_of(self, layer: int) -> tuple[int, ...]:
        """The router's group of each expert that a layer has; dropping experts does not change the others' groups."""
        size = self.experts // self.router.groups
        numbers = self.kept[layer] if self.kept else range(self.experts_of(layer))
        return tuple(number // size for number in numbers)


FLOAT_MATRICES = (
    "router",
    "shared_router",
    "index.k",
    "index.weights",
    "index.kv",
    "index.gate",
    "index.bias",
    "pool.bias",
    "router_table",
    "delta.write",
    "delta.decay",
    "delta.conv",
    "conv.weights",
    "mamba.step",
    "mamba.conv",
    "attention_mix.share",
    "mlp_mix.share",
    "attention_mix.weights",
    "mlp_mix.weights",
    "output_mix.weights",
    "ngrams.conv",
)  # small, and much depends on them; see layers/indexer.py, compressed.py, delta_net.py, ..., streams.py, hyper.py
TRUNK_KINDS = ("shared", "attention", "delta", "conv", "mamba", "dense", "streams", "embedding", "head")
OF_STREAMS = ("attention_mix", "mlp_mix", "output_mix", "ngrams")  # beginnings of the names of kind streams


def without_layer(name: str) -> str:
    """A tensor's canonical name without its layer, if it has one."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def trunk_kind(name: str) -> str:
    """The kind, one of TRUNK_KINDS, of a matrix of the trunk. name: canonical, with its layer or without."""
    first = without_layer(name).split(".")[0]
    return "streams" if first in OF_STREAMS else first if first in TRUNK_KINDS else "attention"


def stays_float(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the trunk is stored as float32: vectors and FLOAT_MATRICES. name: canonical."""
    return len(shape) == 1 or without_layer(name) in FLOAT_MATRICES


def trunk_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors but routed experts and tables, by canonical name, in the order of use."""
    dim = config.dim

    def norm(name: str, shares: bool = True) -> dict[str, tuple[int, ...]]:
        if config.streams:
            return config.streams.shapes(name.removesuffix("_norm"), dim, shares)
        return {name: (dim,)} | ({f"{name}_bias": (dim,)} if config.norm == "layer" else {})

    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab, dim)}
    for at, layer in enumerate(config.layers):
        parts = layer.ngrams.shapes(dim, config.width) if layer.ngrams else {}
        if layer.attention:
            parts |= {**norm("attention_norm"), **layer.attention.shapes(dim)}
            parts |= {"attention_post_norm": (dim,)} if config.post_norms else {}
        if layer.mlp:
            parts |= {**norm("mlp_norm"), **layer.mlp.shapes(dim, config.experts_of(at), config.vocab)}
            parts |= {"mlp_post_norm": (dim,)} if config.post_norms else {}
        parts |= {"layer_scale": (1,)} if config.layer_scale else {}
        shapes |= {f"layers.{at}.{part}": shape for part, shape in parts.items()}
    shapes |= norm("output_norm", shares=False)
    if not config.tied_head:
        shapes["head"] = (config.vocab, dim)
    if config.head_bias:
        shapes["head_bias"] = (config.vocab,)
    return shapes
