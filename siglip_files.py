"""
The files of a SigLIP's folder, in Hugging Face's layout, but for its weights: settings of the towers, settings of the
images, tokenizer.

    config.json -> read_tower_config -> VisionConfig, TextConfig
    preprocessor_config.json or processor_config.json -> read_image_processor -> ImageProcessorConfig
    tokenizer.json, tokenizer_config.json -> load_siglip_tokenizer -> Tokenizer

teacher.SigLIP.from_pretrained calls them. An unsupported setting is an error that names the file.
"""

import math
import os
import re
import string
from dataclasses import dataclass, field, fields

import torch.nn.functional as nnf
from tokenizers import Regex, Tokenizer, models, normalizers, processors

from files import config_from_dict, read_json, require
from tokenizer import read_tokenizer
from video import RESAMPLE_MODES

ACTIVATIONS = {
    "gelu_pytorch_tanh": lambda x: nnf.gelu(x, approximate="tanh"),
    "gelu": nnf.gelu,
    "relu": nnf.relu,
}
# A tokenizer.json of these classes is used unchanged. Versions of transformers from 5 on write the last name; some of
# version 4 write the first, even for a fast tokenizer.
PLAIN_TOKENIZER_CLASSES = "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"

# The image processors that are supported, and which of their settings must have which value. Those in HARMLESS_SETTINGS
# change no pixel here: frames are RGB, and the size is explicit.
IMAGE_PROCESSORS = "SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"
FIXED_SETTINGS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False, "do_pad": False}
HARMLESS_SETTINGS = ("do_convert_rgb", "processor_class", "_valid_processor_keys", "data_format", "default_to_square",
                     "disable_grouping", "checksum")


@dataclass
class VisionConfig:
    """Vision tower. Names and defaults are those of Hugging Face's SiglipVisionConfig."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


@dataclass
class TextConfig:
    """Text tower. Names and defaults are those of Hugging Face's SiglipTextConfig."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    vocab_size: int = 32000
    max_position_embeddings: int = 64
    pad_token_id: int = 1
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6


@dataclass
class ImageProcessorConfig:
    """Resizing and normalization. Names and defaults are those of SigLIP's preprocessor_config.json."""
    image_mean: tuple = (0.5, 0.5, 0.5)
    image_std: tuple = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = 3           # Pillow's number of the filter; a key of RESAMPLE_MODES
    size: tuple = ()            # (height, width); empty: the vision tower's image_size


@dataclass
class SigLIPConfig:
    """The config.json and preprocessor_config.json of a SigLIP checkpoint."""
    vision_config: VisionConfig = field(default_factory=VisionConfig)
    text_config: TextConfig = field(default_factory=TextConfig)
    model_type: str = "siglip"
    image_processor: ImageProcessorConfig = field(default_factory=ImageProcessorConfig)

    def __post_init__(self):
        self.image_processor.size = self.image_processor.size or (self.vision_config.image_size,) * 2


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_tower_config(cls: type, config: dict, part: str, path: str) -> VisionConfig | TextConfig:
    """Build `cls` from config[part], where `config` is the content of the config.json at `path`. Fields that the file
    lacks have the published defaults."""
    values = config.get(part) or {}
    require(isinstance(values, dict), path, part, "an object", values)
    values = {k: v for k, v in values.items() if v is not None}
    for key, choices in (("hidden_act", tuple(ACTIVATIONS)), ("num_channels", (3,)), ("vision_use_head", (True,))):
        value = values.get(key, choices[0])
        require(value in choices, path, f"{part}.{key}", " or ".join(map(repr, choices)), value)
    for f in fields(cls):
        value = values.get(f.name, f.default)
        require(isinstance(value, (int, f.type)), path, f"{part}.{f.name}", f"of type {f.type.__name__}", value)
        require(f.type is str or value > 0 or f.name == "pad_token_id" and value == 0, path, f"{part}.{f.name}",
                "positive", value)
    cfg = config_from_dict(cls, values, path, strict=False)
    require(cfg.hidden_size % cfg.num_attention_heads == 0, path, f"{part}.hidden_size",
            f"a multiple of num_attention_heads, {cfg.num_attention_heads}", cfg.hidden_size)
    return cfg


def read_image_processor(folder: str) -> ImageProcessorConfig:
    """
    Read how a folder's images are resized and normalized: from processor_config.json if that says it, as transformers 5
    writes it, else from preprocessor_config.json. Settings that the files lack have transformers' defaults.
    """
    path, values = os.path.join(folder, "processor_config.json"), None
    if os.path.isfile(path):
        values = read_json(path).get("image_processor")
        require(values is None or isinstance(values, dict), path, "image_processor", "an object", values)
    if values is None:
        path = os.path.join(folder, "preprocessor_config.json")
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{folder} has neither preprocessor_config.json nor an image_processor in processor_config.json, so "
                "its preprocessing is unknown: copy one from the SigLIP that it comes from, for example: "
                f"hf download google/siglip-base-patch16-224 preprocessor_config.json --local-dir {folder}")
        values = read_json(path)
    values = {"size": {"height": 224, "width": 224}} | {k: v for k, v in values.items() if v is not None}
    kind = values.pop("image_processor_type", IMAGE_PROCESSORS[0])
    require(kind in IMAGE_PROCESSORS, path, "image_processor_type", " or ".join(IMAGE_PROCESSORS), kind)
    for key, expected in FIXED_SETTINGS.items():
        value = values.pop(key, expected)
        require(value is expected, path, key, str(expected).lower(), value)
    names = [f.name for f in fields(ImageProcessorConfig)]
    for key in values:
        require(key in names or key in HARMLESS_SETTINGS, path, key, "absent, as this setting is not supported",
                values[key])
    return parse_image_processor(values, path)


def parse_image_processor(values: dict, path: str) -> ImageProcessorConfig:
    """Build the config from the settings in the file at `path`."""
    def is_number(value):
        return type(value) in (int, float) and math.isfinite(value)

    size = values["size"]
    is_size = isinstance(size, dict) and all(type(size.get(k)) is int and size[k] > 0 for k in ("height", "width"))
    require(is_size, path, "size", "height and width in pixels", size)
    values["size"] = size["height"], size["width"]
    for key in ("image_mean", "image_std"):
        if key in values:
            value = values[key]
            require(isinstance(value, list) and len(value) == 3 and all(map(is_number, value)), path, key, "3 numbers",
                    value)
            values[key] = tuple(value)
    cfg = config_from_dict(ImageProcessorConfig, values, path, strict=False)
    require(min(cfg.image_std) > 0, path, "image_std", "positive", cfg.image_std)
    require(is_number(cfg.rescale_factor) and cfg.rescale_factor > 0, path, "rescale_factor", "a positive number",
            cfg.rescale_factor)
    require(type(cfg.resample) is int and cfg.resample in RESAMPLE_MODES, path, "resample",
            f"one of {RESAMPLE_MODES}", cfg.resample)
    return cfg


def load_siglip_tokenizer(folder: str, cfg: TextConfig) -> Tokenizer:
    """
    Load a folder's tokenizer.json and make it do what the checkpoint's processor does. Sets cfg.pad_token_id.

    SigLIP (sentencepiece, a Unigram model): lower case, no punctuation, single spaces; </s> ends and pads.
    SigLIP 2 (Gemma's, a BPE model): lower case; no <bos>, <eos> ends, <pad> pads. Others are used unchanged.
    """
    path, config_path = (os.path.join(folder, name) for name in ("tokenizer.json", "tokenizer_config.json"))
    require_tokenizer(folder)
    tokenizer = read_tokenizer(path)
    options = read_json(config_path) if os.path.isfile(config_path) else {}
    lower, steps, end, pad = options.get("do_lower_case", True), [], None, None
    if options.get("tokenizer_class") in PLAIN_TOKENIZER_CLASSES and "do_lower_case" not in options:
        pass
    elif isinstance(tokenizer.model, models.Unigram) and tokenizer.token_to_id("</s>") is not None:
        # SigLIP's processor calls Python's lower(), which maps a capital sigma at the end of a word to a final sigma.
        # Lowercase() does not.
        steps = [normalizers.Replace(Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς"), normalizers.Lowercase()] if lower else []
        steps += [normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
                  normalizers.Replace(Regex(r"[\s▁]+"), " "), normalizers.Strip()]
        end = pad = "</s>"
    elif isinstance(tokenizer.model, models.BPE) and tokenizer.token_to_id("<eos>") is not None:
        steps, end, pad = [normalizers.Lowercase()] if lower else [], "<eos>", "<pad>"
    if steps:
        old_steps = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([*steps, *old_steps])
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))])
    pad = options.get("pad_token") or pad
    if pad is not None:
        pad = pad.get("content") if isinstance(pad, dict) else pad
        pad_id = tokenizer.token_to_id(pad) if isinstance(pad, str) else None
        require(pad_id is not None, config_path, "pad_token", "a token of tokenizer.json", pad)
        cfg.pad_token_id = pad_id
    largest_id = max(*tokenizer.get_vocab().values(), cfg.pad_token_id)
    require(largest_id < cfg.vocab_size, path, "its largest id",
            f"below text_config.vocab_size, {cfg.vocab_size}, of config.json", largest_id)
    return tokenizer


def require_tokenizer(folder: str):
    """Raise a FileNotFoundError that says how to get a tokenizer.json if a folder has none."""
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        return
    advice = "copy it from the SigLIP that these weights come from"
    if os.path.isfile(os.path.join(folder, "spiece.model")):        # all that transformers saves of SigLIP's tokenizer
        advice = ("spiece.model is not read; convert it in that folder (pip install transformers sentencepiece "
                  'protobuf): python -c "from transformers import SiglipTokenizer; from '
                  "transformers.convert_slow_tokenizer import SpmConverter; "
                  "SpmConverter(SiglipTokenizer('spiece.model')).converted().save('tokenizer.json')\"")
    raise FileNotFoundError(f"{folder} has no tokenizer.json, which captions need: {advice}")
