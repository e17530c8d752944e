"""The description of an examined base."""

from dataclasses import field

from torch import nn

from mmgraft.frozen import Frozen


class Anatomy(Frozen):
    """The parts and sizes of one causal LM. Paths are dotted names from the model itself.

    Attributes:
        model_type: Transformers' name of the architecture, such as ``llama``.
        class_name: The model's class, such as ``LlamaForCausalLM``.
        layers_path: The list of decoder layers, such as ``model.layers``.
        attention_name: The attention inside a decoder layer, such as ``self_attn``.
        embedding_path: The token embedding.
        norm_path: The norm after the last layer; None where the model has none.
        head_path: The linear layer that gives the logits.
        num_layers: Decoder layers.
        hidden_size: Width of the state that goes from layer to layer.
        embedding_size: Width of the token embedding; differs from ``hidden_size`` in OPT-350M.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a query head.
        vocab_size: Rows of the embedding.
        max_positions: Longest sequence the base was made for; None if it states none (Bloom).
        position_table: Longest row that it can take at all, where positions are looked up in a
            table (GPT-2, OPT); None where they are computed.
        layer_types: One of ``full_attention``, ``sliding_attention``, ... a layer, as its cache is.
        sliding_window: Positions that a sliding layer sees; None without such layers.
        takes_positions: Positions can be given to it (``position_ids``).
        rope_theta: Base of the rotary frequencies (of the full layers where they differ by layer
            type); None without rotary positions.
        tied: The head's weight is the embedding's.
        parallel_block: The feed-forward reads the layer's input, not the attention's result.
        residual_scale: Factor on the attention's output where it joins the residual stream.
        branch_norm: Name of the norm inside the layer that stands between the attention's output
            and the residual stream (Gemma 2 and 3, OLMo 2, GLM-4, ...).
        attention_in_registry: The attention calls a function of transformers' attention registry.
        explicit_weights: Why a graft that reads the attention's weights needs them written out;
            None if columns beside the values give it what it reads.
        logit_scale: Factor on the head's output (Cohere, Granite, ...).
        logit_softcap: Bound c of ``c * tanh(logits / c)`` after that factor; None without one.
        linears: Layer -> dotted name of a linear layer in it that is given each position by
            itself -> widths of what goes in and comes out; a mixture's experts are not among them.
        layer_numbers: Names of the attributes, inside a layer, that hold its number.
        blocked: Layer -> why it cannot carry a graft.
        branch_blocked: Why nothing can be added to the attention's branch; None if it can.
        logits_blocked: Why logits cannot be computed from ``norm_path``, ``head_path``,
            ``logit_scale`` and ``logit_softcap`` alone; None if they can.
    """

    model_type: str
    class_name: str
    layers_path: str
    attention_name: str
    embedding_path: str
    norm_path: str | None
    head_path: str
    num_layers: int
    hidden_size: int
    embedding_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int | None
    layer_types: tuple[str, ...]
    sliding_window: int | None
    rope_theta: float | None
    tied: bool
    parallel_block: bool = False
    position_table: int | None = None
    takes_positions: bool = True
    residual_scale: float = 1.0
    branch_norm: str | None = None
    attention_in_registry: bool = True
    explicit_weights: str | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    linears: dict[int, dict[str, tuple[int, int]]] = field(default_factory=dict)
    layer_numbers: frozenset[str] = frozenset()
    blocked: dict[int, str] = field(default_factory=dict)
    branch_blocked: str | None = None
    logits_blocked: str | None = None

    @property
    def trunk_path(self) -> str:
        """Return the module that owns the list of layers: ids or embeddings in, states out."""
        return self.layers_path.rpartition(".")[0]


def get_path(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path, such as ``model.layers``."""
    return model.get_submodule(path)


def decoder_layers(model: nn.Module, anatomy: Anatomy) -> nn.ModuleList:
    """Return the base's list of decoder layers."""
    layers = get_path(model, anatomy.layers_path)
    assert isinstance(layers, nn.ModuleList)
    return layers
