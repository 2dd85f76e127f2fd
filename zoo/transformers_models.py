"""transformers: small configurations of the models that people bring, with the widths' ratios of the real ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from zoo.sample import Sample, images, tokens

Inputs = Callable[[], Any]


def _text() -> dict[str, Any]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {"input_ids": tokens(12), "attention_mask": mask}


def _pair() -> dict[str, Any]:
    return {"input_ids": tokens(12), "decoder_input_ids": tokens(7)}


def _image() -> dict[str, Any]:
    return {"pixel_values": images(3, 32, 32)[0]}


def _image_and_text() -> dict[str, Any]:
    return {"pixel_values": images(3, 32, 32)[0], "input_ids": tokens(12), "attention_mask": torch.ones(2, 12).long()}


def _features() -> dict[str, Any]:
    return {"input_features": images(16, 64)[0], "decoder_input_ids": tokens(7)}


def _sound() -> dict[str, Any]:
    return {"input_values": images(800)[0]}


_ENCODER = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 88}
_TEXT = {**_ENCODER, "vocab_size": 99, "max_position_embeddings": 40}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 12, "use_cache": False, "pad_token_id": 0}
_SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 88,
    "decoder_ffn_dim": 88,
    "use_cache": False,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any], Inputs]] = {
    "bert": ("BertForSequenceClassification", _TEXT, _text),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 99, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 88, "max_position_embeddings": 40},
        _text,
    ),
    "roberta": ("RobertaForSequenceClassification", _TEXT, _text),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 99, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 40, "use_cache": False},
        _text,
    ),
    "opt": (
        "OPTForCausalLM",
        {**_TEXT, "ffn_dim": 88, "word_embed_proj_dim": 48, "use_cache": False},
        _text,
    ),
    "llama": ("LlamaForCausalLM", _DECODER, _text),
    "mistral": ("MistralForCausalLM", {**_DECODER, "sliding_window": 8}, _text),
    "qwen2": ("Qwen2ForCausalLM", _DECODER, _text),
    "gemma": ("GemmaForCausalLM", _DECODER, _text),
    "phi": ("PhiForCausalLM", {**_TEXT, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}, _text),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 99,
            "d_model": 48,
            "d_kv": 12,
            "d_ff": 88,
            "num_layers": 2,
            "num_heads": 4,
            "use_cache": False,
        },
        _pair,
    ),
    "bart": ("BartForConditionalGeneration", _SEQ2SEQ, _pair),
    "vit": ("ViTForImageClassification", {**_ENCODER, "image_size": 32, "patch_size": 8}, _image),
    "deit": ("DeiTForImageClassification", {**_ENCODER, "image_size": 32, "patch_size": 8}, _image),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        _image,
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [12, 20, 32, 44], "depths": [1, 1, 2, 1]},
        _image,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {
            "hidden_sizes": [16, 24, 40, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 4, 8],
            "decoder_hidden_size": 36,
        },
        _image,
    ),
    "clip": (
        "CLIPModel",
        {
            "text_config": {**_TEXT, "num_hidden_layers": 4, "eos_token_id": 2},
            "vision_config": {**_ENCODER, "num_hidden_layers": 4, "image_size": 32, "patch_size": 4},
            "projection_dim": 36,
        },
        _image_and_text,
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {
            **_SEQ2SEQ,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 20,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        _features,
    ),
    "wav2vec2": (
        "Wav2Vec2ForSequenceClassification",
        {
            **_ENCODER,
            "conv_dim": [24, 24, 32],
            "conv_stride": [5, 2, 2],
            "conv_kernel": [10, 3, 3],
            "num_feat_extract_layers": 3,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        _sound,
    ),
}


def configured(name: str, **changes: Any) -> Sample:
    """A model of the sweep, with some options of its configuration changed."""
    architecture, options, inputs = _CONFIGS[name]
    kind = getattr(transformers, architecture)
    config: PretrainedConfig = kind.config_class(**{**options, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Sample(kind(config), inputs())


MODELS = {name: functools.partial(configured, name) for name in _CONFIGS}
