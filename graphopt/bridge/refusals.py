"""Operators that are not trained, on purpose: why, and what helps."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.bridge import ops

_BODY = "its body runs as often as the data say, and gradients through that are not kept"
_UNROLL = (
    "train a graph with its loop unrolled (export with a fixed number of steps; recurrent layers as LSTM, GRU or RNN); "
    "fold_constants in `graphopt optimize` drops loops whose data are constant"
)

REFUSED: Mapping[str, tuple[str, str]] = {
    "Loop": (_BODY, _UNROLL),
    "Scan": (_BODY, _UNROLL),
    **dict.fromkeys(
        (
            "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
            "SequenceMap", "SplitToSequence", "ConcatFromSequence", "Optional", "OptionalGetElement",
            "OptionalHasElement",
        ),
        (
            "sequences are no tensors",
            "graphopt optimize --stage canonical replaces sequences of known length (unpack-sequences)",
        ),
    ),
    **dict.fromkeys(
        (
            "StringNormalizer", "TfIdfVectorizer", "LabelEncoder", "CategoryMapper", "StringConcat", "StringSplit",
            "RegexFullMatch", "DictVectorizer",
        ),
        ("strings have no gradient", "cut the text part off and train the rest"),
    ),
    **dict.fromkeys(
        (
            "TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor", "SVMClassifier", "SVMRegressor",
            "LinearClassifier", "LinearRegressor",
        ),
        ("it is not a neural network's operator", "train such a model with the library that it came from"),
    ),
}  # fmt: skip


def refusal(domain: str, op: str) -> tuple[str, str]:
    """Return why an operator cannot be trained, and what helps."""
    return REFUSED.get(op) or ops.refusal(domain, op)
