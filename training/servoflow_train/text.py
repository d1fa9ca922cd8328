"""From a sentence and a state to token ids, as openpi's pi0.5 does it, with a vocabulary of this policy's own.

The text is `Task: {sentence}, State: {b0 b1 b2 b3};\\nAction: ` with each state value in one of 256 bins. Every bin is one
piece of the vocabulary, so that a value costs one token and stands at one place.
"""

from __future__ import annotations

import io
import pathlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import sentencepiece

from servoflow_eval.metaworld import TASKS, prompts

PAD, EOS, BOS, UNKNOWN = 0, 1, 2, 3
BINS = 256
STATE_DIMS = 4
VOCABULARY = 512

# Bounds of the hand's x, y, z in metres and of the gripper's opening, wider than anything the experts reach. They serve
# as the quantiles of openpi's statistics: value -> [-1, 1] -> bin. Actions are in [-1, 1] already.
STATE_LOW = (-0.5, 0.35, 0.0, 0.0)
STATE_HIGH = (0.55, 1.0, 0.45, 1.0)

_OTHER_WORDS = (
    "Pick up the block and put it on the plate",
    "Open the drawer and close the window with the gripper",
    "Press the red button, then reach the blue mark on the left",
    "Turn the green knob to the right; insert the peg into the hole",
    "Do nothing. Wait above the box, cup, bowl, ball, door and lever",
    "unknown",
)


def all_prompts() -> list[tuple[str, str]]:
    """(task, sentence) of every training sentence, in a fixed order; the order is the data's prompt index."""
    return [(task, sentence) for task in TASKS for sentence in prompts(task)]


def train_tokenizer() -> bytes:
    """The SentencePiece model: BPE over the sentences, the 256 bins and -1 as whole pieces. The same bytes every time."""
    numbers = [f"▁{k}" for k in range(-1, BINS)]
    sentences = []
    for _, sentence in all_prompts():
        sentences += [f"Task: {sentence}, State: unknown;\nAction: "] * 8
    for sentence in _OTHER_WORDS:
        sentences += [f"Task: {sentence}, State: unknown;\nAction: "] * 2
    sentences.append("ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz 0123456789 .,;:-'!?\"()/")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        pad_id=PAD,
        eos_id=EOS,
        bos_id=BOS,
        unk_id=UNKNOWN,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=1.0,
        user_defined_symbols=["\n", *numbers],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def state_bins(state: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """[..., 4] in metres and opening -> bins -1 to 255, openpi's way: normalised in double, counted among 256 left edges."""
    low, high = np.asarray(STATE_LOW), np.asarray(STATE_HIGH)
    normalized = (np.asarray(state, np.float64) - low) / (high - low + 1e-6) * 2.0 - 1.0
    edges = np.linspace(-1, 1, BINS + 1)[:-1]
    return np.asarray(np.digitize(normalized, edges) - 1, np.int64)


def clean(sentence: str) -> str:
    """openpi's cleaning of a sentence."""
    return sentence.strip().replace("_", " ").replace("\n", " ")


class Tokenizer:
    """Ids of whole prompts, and the parts that training puts together on the GPU."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        assert self._pieces.vocab_size() == VOCABULARY
        assert (self._pieces.pad_id(), self._pieces.bos_id()) == (PAD, BOS)

    @staticmethod
    def read(path: pathlib.Path) -> Tokenizer:
        return Tokenizer(path.read_bytes())

    def encode(self, sentence: str, state: npt.NDArray[np.float32]) -> list[int]:
        """The ids of one observation's prompt, BOS first."""
        numbers = " ".join(str(b) for b in state_bins(state))
        return self._encode(f"Task: {clean(sentence)}, State: {numbers};\nAction: ")

    def _encode(self, text: str) -> list[int]:
        return [BOS, *self._pieces.encode(text)]

    def parts(self) -> PromptParts:
        """The training sentences in pieces around the state's four ids. Raises AssertionError if they do not compose."""
        ids = {k: self._pieces.piece_to_id(f"▁{k}") for k in range(-1, BINS)}
        assert len(set(ids.values())) == BINS + 1 and UNKNOWN not in ids.values()
        unknown = self._pieces.encode(" unknown")
        assert len(unknown) == 1, "the word for a dropped state must be one piece"
        tail = self._pieces.encode(";\nAction: ")
        heads = [[BOS, *self._pieces.encode(f"Task: {clean(s)}, State:")] for _, s in all_prompts()]
        for (_, sentence), head in zip(all_prompts(), heads):
            for state in ((0.0, 0.6, 0.2, 1.0), (-9.0, 0.8, 9.0, 0.33)):
                values = np.asarray(state, np.float32)
                whole = [*head, *(ids[int(b)] for b in state_bins(values)), *tail]
                assert whole == self.encode(
                    sentence, values
                ), f"the parts of {sentence!r} do not make the whole"
        width = max(len(h) for h in heads)
        table = np.full((len(heads), width), PAD, np.int64)
        for k, head in enumerate(heads):
            table[k, : len(head)] = head
        return PromptParts(
            heads=table,
            lengths=np.asarray([len(h) for h in heads], np.int64),
            numbers=np.asarray([ids[k] for k in range(-1, BINS)], np.int64),
            unknown=unknown[0],
            tail=np.asarray(tail, np.int64),
        )


@dataclass(frozen=True)
class PromptParts:
    """`heads` [prompts, width] up to "State:", `numbers` [257] the id of bin k at k + 1, `unknown` for a dropped value."""

    heads: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]
    unknown: int
    tail: npt.NDArray[np.int64]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(self.lengths.max()) + STATE_DIMS + len(self.tail)
