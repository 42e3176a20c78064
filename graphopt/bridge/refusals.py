"""Operators that are not trained, on purpose: why, and what helps."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.bridge import ops_quant

_BODY = "its body runs as often as the data say, and gradients through that are not kept"
_UNROLL = (
    "train a graph with its loop unrolled (export with a fixed number of steps; recurrent layers as LSTM, GRU or RNN); "
    "fold_constants in `graphopt optimize` drops loops whose data are constant"
)

REFUSED: Mapping[str, tuple[str, str]] = {
    **ops_quant.REFUSED,
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
            "LinearClassifier", "LinearRegressor", "ArrayFeatureExtractor", "Binarizer", "FeatureVectorizer", "Imputer",
            "Normalizer", "OneHotEncoder", "Scaler", "ZipMap",
        ),
        ("it is no operator of neural networks", "train such a model with the library that it came from"),
    ),
    **dict.fromkeys(
        ("Adagrad", "Adam", "Momentum", "Gradient"),
        ("it is a step of training itself", "cut the model where its outputs are, and train that"),
    ),
    **dict.fromkeys(
        ("LinearAttention", "CausalConvWithState", "FlexAttention"),
        ("the bridge has opsets up to 23, and what later ones share with them", "use an older opset"),
    ),
    **dict.fromkeys(
        (
            "GroupQueryAttention", "PackedAttention", "PackedMultiHeadAttention", "DecoderMaskedMultiHeadAttention",
            "DecoderMaskedSelfAttention", "SparseAttention", "LongformerAttention", "MoE", "GroupNorm", "SkipGroupNorm",
            "BiasSplitGelu", "BiasAdd", "NhwcConv", "NhwcFusedConv", "BeamSearch", "GreedySearch", "Sampling",
        ),
        ("it is ONNX Runtime's own, made when it optimized the model", "train the model from before that"),
    ),
    "MelWeightMatrix": ("it makes constants", "fold_constants in `graphopt optimize` computes it once"),
    "ImageDecoder": ("it decodes files", "cut the decoding off and train the rest on images"),
    "BitCast": ("bits have no gradient", "cut the model before it"),
    "MaxRoiPool": ("its boxes are rounded to elements", "use RoiAlign with mode max"),
}  # fmt: skip


def refusal(op: str) -> tuple[str, str]:
    """Return why an operator that is not in the table cannot be trained, and what helps."""
    unknown = ("the bridge does not know it", "graphopt optimize may lower it; else cut the model before it")
    return REFUSED.get(op, unknown)
