"""What the ONNX parser of each TensorRT reads: operators, element types, opsets.

A table, kept here so that a bundle can be checked on any machine, with neither TensorRT nor a GPU.
The base is the operator list of the onnx-tensorrt project for TensorRT 10.1 (`docs/operators.md`),
which is also the floor for 10.3, the version that JetPack 6 ships. `CHANGES` is what later versions
added: from the project's changelog (10.2 to 10.6), from its list for 10.15, and from the release
notes of NVIDIA/TensorRT 11.0 to 11.5. Where only a late version is known to have something, it
counts from that version on: the table errs towards a warning. Types are spelt as ONNX spells them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from anyflow_deploy.errors import AnyFlowError


class Version(NamedTuple):
    """TensorRT's major and minor number; patches do not change the parser's list."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


OLDEST = Version(10, 1)
JETPACK_6 = Version(10, 3)
CURRENT = Version(11, 4)

MIN_OPSET = 9
MAX_OPSETS = ((OLDEST, 20), (Version(10, 14), 23), (Version(10, 15), 24), (Version(11, 5), 25))
"""Newest opset from each version on. 10.14: the first to read `Attention`, which is of opset 23."""

_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
_NUMBERS = (*_FLOATS, "INT32", "INT64")
_ANY = (*_NUMBERS, "BOOL")
_FOUR_BIT = ("INT4", "FLOAT4E2M1")
_FP8 = "FLOAT8E4M3FN"

TENSOR_TYPES = {*_ANY, "UINT8", "INT8", _FP8, *_FOUR_BIT}
"""Types that a tensor may have at all; each operator accepts fewer."""

QUANTIZED_TYPES = ("INT8", _FP8, "INT4", "FLOAT4E2M1")
"""Types that QuantizeLinear may produce, and that nothing but Q/DQ may touch."""

_BASE: tuple[tuple[tuple[str, ...] | None, str], ...] = (
    (
        _NUMBERS,
        (
            "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less"
            " LessOrEqual Max Min Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum"
            " ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
            " Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK"
        ),
    ),
    (
        _FLOATS,
        (
            "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv"
            " ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool"
            " GlobalLpPool GlobalMaxPool GroupNormalization GRU HardSigmoid HardSwish Hardmax"
            " ImageScaler InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax"
            " LRN LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization"
            " ParametricSoftplus Pow PRelu QuantizeLinear RandomNormal RandomNormalLike"
            " RandomUniform RandomUniformLike Reciprocal Resize RNN Round ScaledTanh Scan Selu"
            " Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample"
        ),
    ),
    (
        _ANY,
        (
            "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND"
            " Identity If Loop OneHot Reshape ReverseSequence Shape Size Slice Split Squeeze Tile"
            " Transpose Trilu Unsqueeze Where"
        ),
    ),
    (("BOOL",), "And Not Or Xor"),
    ((*_NUMBERS, "UINT8", "BOOL"), "Cast CastLike"),
    (("FLOAT", "FLOAT16"), "DeformConv GridSample Mish NonMaxSuppression NonZero RoiAlign"),
    (("INT8", _FP8, "INT4"), "DequantizeLinear"),
    ((*_NUMBERS, "INT8"), "Gelu"),
    ((*_NUMBERS, _FP8), "Mean"),
    (
        None,
        (
            "AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor"
            " BlackmanWindow Col2Im CenterCropPad Compress ConcatFromSequence ConvInteger DFT Det"
            " DynamicQuantizeLinear HammingWindow HannWindow ImageDecoder MatMulInteger MaxRoiPool"
            " MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional"
            " OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch STFT"
            " SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert"
            " SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat"
            " StringNormalizer StringSplit TfIdfVectorizer Unique"
        ),
    ),
)

CHANGES: tuple[tuple[Version, str, tuple[str, ...]], ...] = (
    (Version(10, 4), "BlackmanWindow HammingWindow HannWindow", ("FLOAT", "FLOAT16")),
    (Version(10, 5), "STFT", ("FLOAT",)),
    (Version(10, 14), "Attention", (*_FLOATS, "INT8", _FP8)),
    (Version(10, 15), "RMSNormalization RotaryEmbedding", _FLOATS),
    (Version(10, 15), "TensorScatter", (*_FLOATS, "INT32")),
    (Version(10, 15), "Constant ConstantOfShape", (*_ANY, _FP8, *_FOUR_BIT)),
    (Version(10, 15), "DequantizeLinear", ("INT8", _FP8, *_FOUR_BIT)),
    (Version(10, 15), "Pow", _NUMBERS),
    (Version(11, 0), "Swish", _FLOATS),
    (Version(11, 2), "DFT", _FLOATS),
)
"""What a version added or widened, oldest first. The release notes name no types for Swish and DFT:
those are assumed."""

OPERATORS = {name: types for types, names in _BASE for name in names.split()}


def accepted_types(operator: str, version: Version) -> tuple[str, ...] | None:
    """Types that `version` takes for `operator`; None where it does not know or does not support
    the operator."""
    types = OPERATORS.get(operator)
    for since, names, later in CHANGES:
        if version >= since and operator in names.split():
            types = later
    return types


def first_version(operator: str) -> Version | None:
    """The oldest version in the table that reads `operator`; None where none does."""
    versions = [OLDEST, *(since for since, _, _ in CHANGES)]
    return next(
        (version for version in versions if accepted_types(operator, version) is not None), None
    )


def max_opset(version: Version) -> int:
    """The newest opset that `version` reads."""
    return max(opset for since, opset in MAX_OPSETS if version >= since)


def version_from_text(text: str) -> Version:
    """`"10.3"` or `"10.3.0"` as a Version.

    Raises:
        AnyFlowError: anything else, or a version older than the table.
    """
    match = re.fullmatch(r"(\d{1,4})\.(\d{1,4})(\.\d+)*", text.strip())
    if match is None:
        raise AnyFlowError(
            f"TensorRT version {text!r}; allowed is a number like {JETPACK_6} or {CURRENT}."
        )
    version = Version(int(match[1]), int(match[2]))
    if version < OLDEST:
        raise AnyFlowError(
            f"TensorRT {version} is older than what is known here; allowed is {OLDEST} and newer."
        )
    return version
