"""The algorithms, one per file. Imported as `fxcompress.passes`."""

if __name__ == "passes":
    raise ImportError(
        "this directory was imported as `passes`, because the root of the repository is on sys.path; "
        "its import name is `fxcompress.passes`"
    )

from fxcompress.passes.activation_apoz_rank_filter_pruner import (
    ActivationAPoZRankFilterPruner as ActivationAPoZRankFilterPruner,
)
from fxcompress.passes.activation_mean_rank_filter_pruner import (
    ActivationMeanRankFilterPruner as ActivationMeanRankFilterPruner,
)
from fxcompress.passes.admm_pruner import ADMMPruner as ADMMPruner
from fxcompress.passes.agp_pruner import AGPPruner as AGPPruner
from fxcompress.passes.autocompress_pruner import AutoCompressPruner as AutoCompressPruner
from fxcompress.passes.bnn_quantizer import BNNQuantizer as BNNQuantizer
from fxcompress.passes.bnn_quantizer import clip_weights as clip_weights
from fxcompress.passes.channel_pruner import ChannelPruner as ChannelPruner
from fxcompress.passes.compensate_bias import CompensateBias as CompensateBias
from fxcompress.passes.dorefa_quantizer import DoReFaQuantizer as DoReFaQuantizer
from fxcompress.passes.fine_tune import FineTune as FineTune
from fxcompress.passes.fold_batch_norm import FoldBatchNorm as FoldBatchNorm
from fxcompress.passes.fpgm_pruner import FPGMPruner as FPGMPruner
from fxcompress.passes.l1_filter_pruner import L1FilterPruner as L1FilterPruner
from fxcompress.passes.l2_filter_pruner import L2FilterPruner as L2FilterPruner
from fxcompress.passes.level_pruner import LevelPruner as LevelPruner
from fxcompress.passes.linear_pruner import LinearPruner as LinearPruner
from fxcompress.passes.lottery_ticket_pruner import LotteryTicketPruner as LotteryTicketPruner
from fxcompress.passes.lower import Lower as Lower
from fxcompress.passes.lsq_quantizer import LSQQuantizer as LSQQuantizer
from fxcompress.passes.movement_pruner import MovementPruner as MovementPruner
from fxcompress.passes.naive_quantizer import NaiveQuantizer as NaiveQuantizer
from fxcompress.passes.netadapt_pruner import NetAdaptPruner as NetAdaptPruner
from fxcompress.passes.ptq_quantizer import PTQQuantizer as PTQQuantizer
from fxcompress.passes.qat_quantizer import QATQuantizer as QATQuantizer
from fxcompress.passes.quantizer import Quantizer as Quantizer
from fxcompress.passes.random_filter_pruner import RandomFilterPruner as RandomFilterPruner
from fxcompress.passes.recalibrate_batch_norm import RecalibrateBatchNorm as RecalibrateBatchNorm
from fxcompress.passes.scheduled_pruner import ScheduledPruner as ScheduledPruner
from fxcompress.passes.scoring import Layer as Layer
from fxcompress.passes.sensitivity_pruner import SensitivityPruner as SensitivityPruner
from fxcompress.passes.simulated_annealing_pruner import SimulatedAnnealingPruner as SimulatedAnnealingPruner
from fxcompress.passes.slim_pruner import SlimPruner as SlimPruner
from fxcompress.passes.speedup import Speedup as Speedup
from fxcompress.passes.taylor_fo_pruner import TaylorFOPruner as TaylorFOPruner
from fxcompress.passes.tuned_pruner import TunedPruner as TunedPruner
from fxcompress.passes.tuned_quantizer import TunedQuantizer as TunedQuantizer
from fxcompress.quantization.observers import MSE as MSE
from fxcompress.quantization.observers import Entropy as Entropy
from fxcompress.quantization.observers import MinMax as MinMax
from fxcompress.quantization.observers import MovingAverage as MovingAverage
from fxcompress.quantization.observers import Observer as Observer
from fxcompress.quantization.observers import Percentile as Percentile
