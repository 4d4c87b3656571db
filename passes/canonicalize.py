# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The passes that bring an imported graph into the form that calibration and fusion expect.

Afterwards: batch normalization, constant products and sums, explicit padding and bias additions
live inside convolutions and matrix products; clamps are one relu or clip; layer normalization and
activation functions are one node each; convolutions have two spatial axes and are not transposed;
constant weights of matrix products are [K, N].
"""

from __future__ import annotations

from qcompiler.passes.conv_1d_to_2d import Conv1dTo2d
from qcompiler.passes.conv_3d_to_2d import Conv3dTo2d
from qcompiler.passes.conv_to_matmul import ConvToMatmul
from qcompiler.passes.conv_transpose_to_conv import ConvTransposeToConv
from qcompiler.passes.crop_kernels import CropKernels
from qcompiler.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from qcompiler.passes.eliminate_dead import EliminateDead
from qcompiler.passes.factors_behind import FactorsBehind
from qcompiler.passes.fold_affine import FoldAffine
from qcompiler.passes.fold_batch_norm import FoldBatchNorm
from qcompiler.passes.fold_constants import FoldConstants
from qcompiler.passes.fold_pad import FoldPad
from qcompiler.passes.fold_weight_layout import FoldWeightLayout
from qcompiler.passes.free_bias import FreeBias
from qcompiler.passes.hoist_clamps import HoistClamps
from qcompiler.passes.merge_clips import MergeClips
from qcompiler.passes.recognize_activations import RecognizeActivations
from qcompiler.passes.recognize_global_pool import RecognizeGlobalPool
from qcompiler.passes.recognize_layer_norm import RecognizeLayerNorm
from qcompiler.passes.simplify_arithmetic import SimplifyArithmetic
from qcompiler.passes.simplify_movement import SimplifyMovement
from qcompiler.passes.sink_transposes import SinkTransposes
from qcompiler.passes.widen_floats import WidenFloats
from qcompiler.passes.widen_integers import WidenIntegers
from qcompiler.passmanager import Pass


def canonicalize_passes(*, one_size: bool = True) -> tuple[Pass, ...]:
    """Return the passes in order; they work at stages FLOAT and QDQ.

    Args:
        one_size: Whether the graph serves its own extents only; else nothing that follows from
            them changes what it computes with.
    """
    return (
        EliminateDead(),
        WidenFloats(),
        WidenIntegers(only_float=True),
        FoldConstants(),
        # Patterns compare values by identity, so equal subexpressions must be one value first.
        EliminateCommonSubexpressions(),
        FactorsBehind(),
        SinkTransposes(),
        FoldBatchNorm(),
        SimplifyMovement(),
        FoldPad(),
        SimplifyArithmetic(),
        EliminateCommonSubexpressions(),
        # Recognition comes before folding constants away: 0.5 * x must not move into a matmul.
        RecognizeLayerNorm(),
        RecognizeActivations(),
        FoldAffine(),
        MergeClips(),
        RecognizeGlobalPool(),
        FoldWeightLayout(),
        Conv1dTo2d(),
        ConvTransposeToConv(),
        ConvToMatmul(),
        Conv3dTo2d(),
        FreeBias(),
        *((CropKernels(),) if one_size else ()),
        HoistClamps(),
        SimplifyMovement(),
        FoldConstants(),
        EliminateCommonSubexpressions(),
        EliminateDead(),
    )
