"""Labels of a conversation: the ids of every answer and of the token that ends it.

The chat template decides, not pieces of text. It writes the conversation once, each answer is found
in that text by its characters, and the text is tokenised once. Where the template marks what the
assistant writes with ``{% generation %}``, its marks are used. Where it does not:

- An answer begins where the prompt for it ends. The prompt's ids must be the first ids of the whole
  conversation, so that a model is trained on the ids that it will see. Templates that write a turn
  differently once more turns follow (Qwen3 drops the reasoning of all but the last) are fine as
  long as that holds; where it does not, an error names row and turn.
- An answer ends with its content and what the template writes after it, up to the end-of-turn token
  (``transcript.py``). The newline that some templates put after that is not supervised, because no
  model has to write it.
"""

from collections.abc import Sequence
from dataclasses import replace

from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.chat.template import apply, marks_answers
from mmgraft.data.chat.transcript import Transcript, closing_of, content_ends, split_at_answer
from mmgraft.data.chat.turns import Message, answering
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError

Span = tuple[int, int]


def supervise_row(processor: GraftProcessor, row: Row) -> Encoded:
    """Tokenise a row, with the spans to supervise; see ``supervise``."""
    return supervise(processor, row.messages, row.tools, row.where)


def supervise(
    processor: GraftProcessor,
    messages: Sequence[Message],
    tools: Sequence[object] | None = None,
    where: str = "the conversation",
) -> Encoded:
    """Tokenise a whole conversation and find what is supervised in it.

    A template that ends the last answer with nothing at all gets the tokenizer's end-of-sequence
    token there, so that the model learns to stop. Image positions are never supervised.

    Returns:
        The ids with ``spans``, and so ``labels``.

    Raises:
        UsageError: A conversation without an answer, one that the template refuses, or one whose
            answers do not continue their prompts; each names the row, the last also the turn.
    """
    turns = answer_turns(messages, where)
    transcript = processor.transcript(messages, tools, where)
    if transcript.tokenizer.is_fast and marks_answers(transcript.source):
        ids, spans = _marked(transcript)
    else:
        try:
            ids, spans = _found(transcript, turns)
        except UsageError:
            if "strftime_now" not in transcript.source:
                raise
            # The template writes the time of day or the date; it may have changed in between.
            ids, spans = _found(replace(transcript), turns)
    encoded = processor.expand(transcript, ids, spans)
    if all(label == -100 for label in encoded.labels):
        raise UsageError(f"{where}: nothing to learn is left after its template; leave the row out")
    return encoded


def answer_turns(messages: Sequence[Message], where: str) -> list[int]:
    """Find the turns in which the assistant says something.

    Raises:
        UsageError: There is none, so that no token of the row is supervised.
    """
    turns = answering(messages)
    if not turns:
        raise UsageError(
            f"{where}: nothing to learn, because no assistant turn says anything; add an answer, "
            "or leave the row out"
        )
    return turns


def _marked(transcript: Transcript) -> tuple[list[int], list[Span]]:
    """Take the spans of ``{% generation %}``, each with an end-of-turn token that it leaves out."""
    encoding = apply(
        transcript.template,
        transcript.tokenizer,
        transcript.messages,
        transcript.where,
        tools=list(transcript.tools) if transcript.tools else None,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **transcript.options,
    )
    ids, mask = list(encoding["input_ids"]), list(encoding["assistant_masks"])
    closing = closing_of(transcript, len(transcript.messages) - 1, transcript.where)
    ends = {transcript.ids(text)[-1] for text in (closing.last, closing.inner) if text}
    spans: list[Span] = []
    at = 0
    while at < len(mask):
        start = at
        while at < len(mask) and mask[at]:
            at += 1
        if at > start:
            closed = ids[at - 1] in ends
            at += at < len(ids) and not closed and not mask[at] and ids[at] in ends
            spans.append((start, at))
        else:
            at += 1
    return ids, spans


def _found(transcript: Transcript, turns: Sequence[int]) -> tuple[list[int], list[Span]]:
    """Find the span of each answer by its characters in the text."""
    tokens, eos = transcript.tokens, transcript.tokenizer.eos_token_id
    answers = _Answers(transcript, turns)
    ids: list[int] = tokens.ids
    spans: list[Span] = []
    for turn in turns:
        where = f"{transcript.where}, turn {turn + 1}"
        last_character, closed = answers.end(turn, where)
        first_character = answers.start(turn, last_character, where)
        start, continues = tokens.before(first_character)
        if not continues:
            begins = tokens.text[first_character : first_character + 8]
            raise UsageError(
                f"{where}: the tokens of this answer do not continue those of its prompt, because "
                f"its first characters, {begins!r}, melt into the last ones before it; take white "
                "space off the answer's start (in plain text also off the end of the turn before)"
            )
        end = max(start, tokens.before(last_character)[0])
        if turn == len(transcript.messages) - 1 and not closed and isinstance(eos, int):
            ids = [*ids[:end], eos]
            end += 1
        spans.append((start, end))
    return ids, spans


class _Answers:
    """Start and end of answers in the text of a conversation, in characters.

    Prompts are written for the first and the last answer. What a prompt writes after the turn
    before the answer is looked up in the text for the answers between them.
    """

    def __init__(self, transcript: Transcript, turns: Sequence[int]) -> None:
        self.transcript, self.turns = transcript, turns
        self.text = transcript.tokens.text
        self.contents = content_ends(transcript, {*turns, *(turn - 1 for turn in turns)})
        self.headers: dict[str, str] = {}  # of answers, by the role of the turn before

    def end(self, turn: int, where: str) -> tuple[int, bool]:
        """Give the character behind an answer, and whether an end of turn closes it.

        Raises:
            UsageError: It cannot be found.
        """
        messages, text = self.transcript.messages, self.text
        if messages[turn].get("tool_calls") and not messages[turn].get("content"):
            written = self.transcript.render(messages[: turn + 1]).rstrip()
            if text.startswith(written):  # it may write calls where it writes no content
                tokens = list(self.transcript.copies.added_tokens.finditer(written))
                return len(written), bool(tokens) and tokens[-1].end() == len(written)
        closing = closing_of(self.transcript, turn, where)
        ending = closing.last if turn == len(messages) - 1 else closing.inner
        content = self.contents.get(turn)
        if content is not None and text.startswith(ending, content):
            return content + len(ending), bool(ending)
        _, tail = split_at_answer(self.transcript, turn, where)
        # A call of tools without a word may have less before its end than one that says something.
        rest = tail if messages[turn].get("content") else tail[len(ending) :]
        if not tail.startswith(ending) or not text.endswith(rest):
            raise UsageError(
                f"{where}: what the chat template writes after this answer depends on the answer, "
                "so its end cannot be found; give a template file that marks answers with "
                "{% generation %}"
            )
        return len(text) - len(tail) + len(ending), bool(ending)

    def start(self, turn: int, end: int, where: str) -> int:
        """Give the first character of an answer, which is the one behind its prompt.

        Raises:
            UsageError: The text does not begin with the prompt.
        """
        messages, before = self.transcript.messages, self.contents.get(turn - 1)
        role = messages[turn - 1]["role"]
        if before is not None and turn not in (self.turns[0], self.turns[-1]):
            header = self.headers.get(role)
            if header is not None and self.text.startswith(header, before):
                return before + len(header)
        if turn:
            head = self.transcript.render(messages[:turn], add_generation_prompt=True)
        else:
            head, _ = split_at_answer(self.transcript, turn, where)
        if not self.text.startswith(head) or len(head) > end:
            raise UsageError(
                f"{where}: the chat template writes the turns before this answer differently once "
                "the answer is there, so a model would be trained on a prompt that it never sees; "
                "change those turns (a system message, for one), or give a template file that "
                "marks answers with {% generation %}"
            )
        if before is not None:
            self.headers.setdefault(role, head[before:])
        return len(head)
