"""The algorithms, one per file. Imported as `fxcompress.passes`."""

if __name__ == "passes":
    raise ImportError(
        "this directory was imported as `passes`, because the root of the repository is on sys.path; "
        "its import name is `fxcompress.passes`"
    )

from fxcompress.passes.bnn_quantizer import BNNQuantizer as BNNQuantizer
from fxcompress.passes.channel_pruner import ChannelPruner as ChannelPruner
from fxcompress.passes.channel_pruner import Layer as Layer
from fxcompress.passes.dorefa_quantizer import DoReFaQuantizer as DoReFaQuantizer
from fxcompress.passes.fine_tune import FineTune as FineTune
from fxcompress.passes.fold_batch_norm import FoldBatchNorm as FoldBatchNorm
from fxcompress.passes.fpgm_pruner import FPGMPruner as FPGMPruner
from fxcompress.passes.l1_filter_pruner import L1FilterPruner as L1FilterPruner
from fxcompress.passes.l2_filter_pruner import L2FilterPruner as L2FilterPruner
from fxcompress.passes.level_pruner import LevelPruner as LevelPruner
from fxcompress.passes.lower import Lower as Lower
from fxcompress.passes.lsq_quantizer import LSQQuantizer as LSQQuantizer
from fxcompress.passes.naive_quantizer import NaiveQuantizer as NaiveQuantizer
from fxcompress.passes.ptq_quantizer import PTQQuantizer as PTQQuantizer
from fxcompress.passes.qat_quantizer import QATQuantizer as QATQuantizer
from fxcompress.passes.quantizer import Quantizer as Quantizer
from fxcompress.passes.random_filter_pruner import RandomFilterPruner as RandomFilterPruner
from fxcompress.passes.speedup import Speedup as Speedup
