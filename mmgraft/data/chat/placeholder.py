"""The id that fills an image position in ``input_ids``."""

import re

from transformers import PreTrainedTokenizerBase

_UNUSED = re.compile(
    r"reserved|unused|place_?holder|extra[_-]?(id|token)?[_-]?\d|special[_-]\d|control[_-]\d"
    r"|(image|vision|img)_?pad|dummy",
    re.IGNORECASE,
)


def choose_placeholder(
    tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> tuple[int, str]:
    """Choose a valid id for the slots that images stand in.

    ``mm_token_type_ids`` alone says which positions are an image's; the id only fills the slot. It
    is a row of the embedding all the same, so that nothing that indexes by id (an embedding, a
    repetition penalty) meets one past the end. The base's vocabulary is never resized.

    Args:
        tokenizer: The base's; None takes the last id.
        vocab_size: Rows of the base's embedding.

    Returns:
        The id, and in words why this one: the first there is of an embedding row without a token, a
        reserved token, a padding token of its own, the unknown token, the last id.
    """
    if tokenizer is None:
        return vocab_size - 1, "the last id, for want of a tokenizer to choose by"
    vocab = tokenizer.get_vocab()
    used = set(vocab.values())
    for index in range(len(tokenizer), vocab_size):
        if index not in used:
            return index, "a row of the embedding that no token uses"
    taken = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    added = tokenizer.added_tokens_decoder
    for index in sorted(added):
        token = added[index].content
        if index < vocab_size and index not in taken and _UNUSED.search(token):
            return index, f"the reserved token {token}"
    for name, index in (("padding", tokenizer.pad_token_id), ("unknown", tokenizer.unk_token_id)):
        if isinstance(index, int) and index < vocab_size and index not in taken:
            return index, f"the {name} token {tokenizer.convert_ids_to_tokens(index)}"
    return vocab_size - 1, "the last id, for want of an unused one"
