"""torchvision: all that ``list_models`` names.

Detectors end in operators of torchvision's C++ library (regions are pooled and suppressed), which a CPU build of torch
does not load: of those the backbone and the heads run, on the features where regions would be pooled.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.video import mvit

from zoo.sample import Sample, images

#: Sides of images where 64 is too small.
_SIDE = {"inception_v3": 75, "quantized_inception_v3": 75, "maxvit_t": 224, "raft_large": 128, "raft_small": 128}
#: Options of models that are built for one size, and the size: a few patches in each direction.
_SIZED: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "vit_b_16": ({"image_size": 64}, (3, 64, 64)),
    "vit_b_32": ({"image_size": 96}, (3, 96, 96)),
    "vit_h_14": ({"image_size": 56}, (3, 56, 56)),
    "vit_l_16": ({"image_size": 64}, (3, 64, 64)),
    "vit_l_32": ({"image_size": 96}, (3, 96, 96)),
}


#: Frames, height and width of clips for models that are built for one size, 16 x 224 x 224 by default.
_CLIP = (8, 64, 64)
_FULL_MVIT = mvit._mvit
#: Frames, height and width by kind of video model; s3d ends in a window of 7 x 7.
_CLIPS = {"video.mvit": _CLIP, "video.s3d": (16, 224, 224)}


class DenseDetector(nn.Module):
    """A detector without regions, up to what its head says about every anchor."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x: [batch, 3, height, width]."""
        features = self.backbone(x)
        return self.head(list(features.values()))  # type: ignore[no-any-return]


class RegionDetector(nn.Module):
    """A detector with regions: proposals' scores, and what the heads say about one region, the whole image."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.proposals, self.heads = detector.backbone, detector.rpn.head, detector.roi_heads
        for name in ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool"):
            setattr(self.heads, name, None)

    def forward(self, x: Tensor) -> list[Any]:
        """x: [batch, 3, height, width]."""
        features = list(self.backbone(x).values())
        region = features[0]
        found = [self.proposals(features), self.heads.box_predictor(self.heads.box_head(self._pooled(region, 7)))]
        if self.heads.mask_head is not None:
            found.append(self.heads.mask_predictor(self.heads.mask_head(self._pooled(region, 14))))
        if self.heads.keypoint_head is not None:
            found.append(self.heads.keypoint_predictor(self.heads.keypoint_head(self._pooled(region, 14))))
        return found

    def _pooled(self, features: Tensor, side: int) -> Tensor:
        return F.adaptive_avg_pool2d(features, side)


def _build(name: str) -> Sample:
    builder = torchvision.models.get_model_builder(name)
    kind = builder.__module__.removeprefix("torchvision.models.")
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in builder.__annotations__ or kind.startswith(("detection", "segmentation")):
        options["weights_backbone"] = None
    if name.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    side = _SIDE.get(name, 64)
    sized, shape = _SIZED.get(name, ({}, (3, side, side)))
    small = {"temporal_size": _CLIP[0], "spatial_size": _CLIP[1:]}
    with mock.patch.object(mvit, "_mvit", lambda **given: _FULL_MVIT(**given | small)):  # no options of theirs
        model = builder(**options, **sized)
    if kind.startswith("video"):
        return Sample(model, images(3, *_CLIPS.get(kind, (16, 64, 64))))
    if kind.startswith("optical_flow"):
        return Sample(model, images(3, side, side) * 2)
    if kind.startswith("detection"):
        model = (RegionDetector if hasattr(model, "roi_heads") else DenseDetector)(model)
        return Sample(model, images(3, 320, 320) if name.startswith("ssd") else images(3, 128, 128))
    return Sample(model, images(*shape))


MODELS = {name: functools.partial(_build, name) for name in torchvision.models.list_models()}
