"""The descriptor by which a method tells the rest of the code about itself. Free of torch."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.strict import LayerChoice, StrictModel

if TYPE_CHECKING:
    from mmgraft.anatomy import Anatomy


def _promise(sentence: str, level: str = "", unless: str = "") -> Any:
    return field(default=unless, metadata={"sentence": sentence, "level": level})


class Promises(Frozen):
    """Promises of a graft: each is empty where it is kept, else the reason why not.

    Four of them are levels of unchanged text, all bit for bit: of a batch of text (E0), of a text
    row beside rows with an image (E1), of what stands before an image (E2), of a new graft (E3).

    Attributes:
        text: Rows without an image give the base's logits (E0).
        beside: So they do beside rows with an image (E1).
        before: Positions before the first image of a row have the base's states, keys and values
            (E2), so that a cache that was filled with text goes on when an image arrives. A method
            must say so: by default it is not promised.
        fresh: A new graft gives what its projector alone gives (E3).
        cache: Decoding with a cache gives what the full forward gives.
        neighbours: A row depends neither on its neighbours nor on padding.
        causal: No position sees a later one.
        padding: Rows of a batch may be padded on either side.
        packing: Several rows may stand in one sequence.
        no_image: A row without an image may run the graft.
        training: Gradients of the graft are worth following.
    """

    text: str = _promise("text rows give the base's logits", "E0")
    beside: str = _promise("text rows give the base's logits beside image rows", "E1")
    before: str = _promise("", "E2", "its method does not promise it")
    fresh: str = _promise("a fresh graft changes nothing on image rows", "E3")
    cache: str = _promise("cached decoding equals the full forward")
    neighbours: str = _promise("a row depends neither on its neighbours nor on padding")
    causal: str = _promise("no position sees a later one")
    padding: str = _promise("rows may be padded on either side")
    packing: str = _promise("several rows may be packed into one sequence")
    no_image: str = _promise("a row without an image may run the graft")
    training: str = _promise("the graft can be trained")

    def broken(self) -> dict[str, str]:
        """Return the sentences that do not hold, each with the reason; E2 has none."""
        reasons = {one.metadata["sentence"]: getattr(self, one.name) for one in fields(self)}
        return {sentence: reason for sentence, reason in reasons.items() if sentence and reason}

    @property
    def levels(self) -> dict[str, str]:
        """Return the reasons why levels of unchanged text do not hold, empty where they do."""
        found = {one.metadata["level"]: getattr(self, one.name) for one in fields(self)}
        return {level: reason for level, reason in found.items() if level}


class StageSwitches(StrictModel):
    """Switches of a graft in a stage of a recipe: fields stand flat among the stage's keys.

    A method with switches names its subclass in :attr:`Method.stage`, and its graft reads them in
    :meth:`Graft.switch`. Every field needs a default, which must mean "as the graft is".
    """

    def check_switches(self, train: Sequence[str]) -> None:
        """Refuse switches that do not go together with the groups that the stage trains.

        Args:
            train: Names of the groups.

        Raises:
            ValueError: Says what is wrong; the stage's name is put before it.
        """


class FrozenBase(StageSwitches):
    """Nothing to switch; the base stays frozen in every stage."""

    def check_switches(self, train: Sequence[str]) -> None:
        if "base" in train:
            raise ValueError("this method keeps its base frozen; take base out of train")


def without_linears(anatomy: "Anatomy") -> str | None:
    """Return the reason why a base cannot take a method that stands on its linear layers."""
    if not any(anatomy.linears.values()):
        return f"the layers of {anatomy.model_type} hold no linear layers outside of experts"
    return None


class PlainDecoder(Frozen):
    """A graft as an ordinary decoder, with layers of its own after some of the base's.

    Attributes:
        layers: Base layers that are followed by one of the graft's, in order; None for none.
        owns: Which of ``embedding``, ``norm`` and ``head`` are the graft's own.
        untie: Own embedding and own head are two tensors also where the base ties them.
        lacks: What of the graft such a decoder has no place for, as a sentence for the user; rows
            with an image are then what the projector alone gives.
        gated: How the layers are added where they are no plain ones: ``"after"``, the output of a
            layer goes through its gate and is added to that of the base layer it follows;
            ``"beside"``, that, and a layer is fed with the input of the base layer and the output
            of the graft's layer before. Their gates are ``gates.K``.
    """

    layers: LayerChoice | None = None
    owns: frozenset[str] = frozenset()
    untie: bool = False
    lacks: str = ""
    gated: Literal["", "after", "beside"] = ""


class PlainAdapter(Frozen):
    """A graft as a LoRA adapter of the ordinary kind, switched on for rows with an image.

    Attributes:
        rank, alpha: As PEFT has them.
        tensors: Names of the graft's tensors, each with its name there below the decoder's layers:
            ``0.self_attn.q_proj.lora_A.weight``.
    """

    rank: int
    alpha: float
    tensors: Mapping[str, str]


class Method(Frozen):
    """One way of grafting sight onto a base.

    Attributes:
        name: The word in ``--method``, in recipes and in ``graft_config.json``.
        title: One line for people.
        paper: Where it comes from, as an arXiv id or an address; empty for none.
        config_class: Its settings; the field ``method`` holds :attr:`name`. Must import without
            torch.
        graft: Where its graft class is, as "package.module:Class", or a callable that returns it.
        recipe: What ``mmgraft graft`` writes into a new run folder as its recipe, if anything: the
            file name of a shipped one, or the whole path of a file of the method's own package.
        groups: Groups of parameters that a stage may train beside ``projector``, ``graft`` (all of
            the method's) and ``base``, each with a line of description; None leaves the check to
            the model.
        stage: What a stage of a recipe may switch.
        refuses: Gives the reason why a base cannot take the method, or None where it can.
        promises: Gives what holds for a graft of these settings.
        unused: Gives the names of settings that do nothing beside the others; reports leave them
            out.
        part_of: Gives the name under which ``inspect`` and the model card count a tensor, from its
            name in the graft; by default the name's first word.
        as_decoder: Gives a graft of these settings as a plain decoder, for exports; its second
            argument says whether the graft is in the path.
        as_adapter: Gives a graft of these settings and tensors' names as a LoRA adapter.
        memory: An image's vectors stand beside the sequence, in which it has one position.
        rates: Learning rates of groups, where a stage's ``lr`` names none for them.
        origin: The package that brought it, filled in by the registry.

    ``as_decoder`` and ``as_adapter`` raise UsageError with the reason where the graft is none.
    """

    name: str
    title: str
    paper: str
    config_class: type[StrictModel]
    graft: str | Callable[[], type[Any]] = field(repr=False)
    recipe: str | None = None
    groups: Mapping[str, str] | None = None
    stage: type[StageSwitches] = StageSwitches
    refuses: "Callable[[Anatomy], str | None]" = lambda anatomy: None
    promises: Callable[[Any], Promises] = lambda config: Promises()
    unused: Callable[[Any], Sequence[str]] = lambda config: ()
    part_of: Callable[[str], str] = lambda tensor: tensor.split(".")[0]
    as_decoder: Callable[[Any, bool], PlainDecoder] | None = None
    as_adapter: Callable[[Any, Sequence[str]], PlainAdapter] | None = None
    memory: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    origin: str = "mmgraft"

    def positions(self, vectors: int) -> int:
        """Return how many positions an image takes in its row, of which there are so many vectors
        from the projector.
        """
        return 1 if self.memory else vectors

    def levels(self) -> dict[str, list[str]]:
        """Return the levels of unchanged text that it keeps; see :class:`Promises`.

        With each come the settings, as ``gate: token``, that keep it where the default does not.
        """
        config = self.config_class.model_construct()
        found = {level: [] for level, reason in self.promises(config).levels.items() if not reason}
        for name, info in self.config_class.model_fields.items():
            for value in (
                get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
            ):
                other = config.model_copy(update={name: value})
                for level, reason in self.promises(other).levels.items():
                    if not reason and found.get(level, [""]):
                        found.setdefault(level, []).append(f"{name}: {value}")
        return dict(sorted(found.items()))

    def load_graft(self) -> type[Any]:
        """Import the graft class, and torch with it.

        Raises:
            UsageError: The class cannot be imported; names the package to mend.
        """
        if not isinstance(self.graft, str):
            return self.graft()
        module_name, _, class_name = self.graft.partition(":")
        try:
            return getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise UsageError(
                f"method {self.name!r} names {self.graft!r}, which cannot be loaded ({error}); "
                f"reinstall or mend the package {self.origin!r}"
            ) from error
