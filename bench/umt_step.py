"""
The stage-2 pretraining step of UMT's public code (OpenGVLab/unmasked_teacher): a checkout and shapes -> a step to time
beside ours on the same GPU.

    step, facts = umt_step("unmasked_teacher", "cuda", batch=128)
    loss = step()                       # one step; step.losses has the losses that it adds up

None of UMT's code is here: its model, losses and optimizer are imported from the checkout, with the settings of its
exp/pretraining/b16_5m.py. `facts` lists what differs: weights are random, bfloat16 replaces float16 and its scaler, the
share of masked tokens follows from `keep`, and nothing is wrapped in DistributedDataParallel. Decoding, tokenizing, the
copy to the GPU, the schedule and logging (five .item() per step) are left out.

UMT depends on timm, einops, scipy and transformers 4.21. While its code is imported, those of them that cannot be
imported, or no longer have the names it asks for (transformers 5 is too new), are replaced by stubs: the few lines that
the step runs. With the stubs, the losses of twelve steps of `small` on a CPU equal those with transformers 4.21.2,
einops 0.4.1 and the drop_path of timm 0.4.12 bit for bit.
"""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager, suppress
from dataclasses import fields, make_dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor, nn

EXPERIMENT, BERT_JSON = "exp/pretraining/b16_5m.py", "configs/config_bert.json"
UMT_PACKAGES = ("models", "utils", "configs")                   # top-level packages of the checkout
PATCH = 16
SPECIAL = SimpleNamespace(pad_token_id=0, cls_token_id=101, mask_token_id=103)      # of bert-base-uncased
FIRST_WORD = 1000                                               # lower ids are special tokens or single letters
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # of ImageNet, for the student and the teacher

# The same classes with sizes for a test on a CPU.
SMALL_VISION = dict(d_model=64, encoder_embed_dim=64, encoder_depth=3, encoder_num_heads=2, clip_decoder_embed_dim=64,
                    clip_output_dim=32, clip_return_layer=2)
SMALL_TEACHER = dict(width=48, layers=3, heads=2, output_dim=32)
SMALL_BERT = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, vocab_size=2000)
SMALL_FUSION = 2                                                # first text layer that attends to the video

# ---------------------------------------------------------------------------------------------------------------------
# Stubs: what the step runs of each package, written from its documentation


def not_stubbed(*args, **kwargs):
    raise NotImplementedError("the stub has only what the timed step runs")


def drop_path(x: Tensor, p: float = 0.0, training: bool = False) -> Tensor:
    """timm's drop_path: set each sample of the batch to 0 with probability p, or else scale it by 1 / (1 - p)."""
    if p == 0.0 or not training:
        return x
    mask = torch.rand(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device) >= p
    return x / (1 - p) * mask


class PretrainedConfig:
    """transformers' PretrainedConfig: the defaults that BERT reads."""
    chunk_size_feed_forward = 0
    output_attentions = output_hidden_states = False
    use_return_dict = tie_word_embeddings = True

    def __init__(self, **settings):
        self.__dict__.update(settings)

    @classmethod
    def from_json_file(cls, path: str):
        with open(path) as f:
            return cls(**json.load(f))


class PreTrainedModel(nn.Module):
    """transformers' PreTrainedModel: initial weights, output weights tied to the word embeddings, the two masks."""
    def __init__(self, config):
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def get_output_embeddings(self):
        return None

    def get_input_embeddings(self):
        return getattr(self, self.base_model_prefix).get_input_embeddings()

    def init_weights(self):
        self.apply(self._init_weights)
        head = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            head.weight = self.get_input_embeddings().weight

    def invert_attention_mask(self, mask: Tensor) -> Tensor:
        """mask (B, N), 1 for attended positions -> (B, 1, 1, N): 0 for these, the lowest number for the others."""
        return (1.0 - mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min

    def get_head_mask(self, mask: None, layers: int) -> list[None]:
        return [None] * layers if mask is None else not_stubbed()


class ModelOutput:
    """transformers' ModelOutput: fields that can also be indexed by their position among those that are not None."""
    def __getitem__(self, i: int):
        return [v for v in (getattr(self, f.name) for f in fields(self)) if v is not None][i]


def model_outputs() -> dict[str, type]:
    """The output classes, with fields for those that the step makes; the others are only imported by name."""
    optional = ("hidden_states", "attentions")
    used = {
        "BaseModelOutputWithPastAndCrossAttentions":
            ("last_hidden_state", "past_key_values", *optional, "cross_attentions"),
        "BaseModelOutputWithPoolingAndCrossAttentions":
            ("last_hidden_state", "pooler_output", *optional, "past_key_values", "cross_attentions"),
        "MaskedLMOutput": ("loss", "logits", *optional),
    }
    unused = ("CausalLMOutputWithCrossAttentions", "MultipleChoiceModelOutput", "NextSentencePredictorOutput",
              "QuestionAnsweringModelOutput", "SequenceClassifierOutput", "TokenClassifierOutput")
    return {name: make_dataclass(name, [(f, object, None) for f in used.get(name, ())], bases=(ModelOutput,))
            for name in (*used, *unused)}


def stubs() -> dict[str, dict[str, dict]]:
    """Package -> module -> the names that can be imported from it."""
    unchanged = lambda *args, **kwargs: lambda decorated: decorated
    docs = ("add_start_docstrings", "add_start_docstrings_to_model_forward", "replace_return_docstrings")
    logger = SimpleNamespace(set_verbosity_error=lambda: None, get_logger=importlib.import_module("logging").getLogger)
    return {
        "timm": {"timm.models.layers": dict(
            drop_path=drop_path, to_2tuple=lambda n: n if isinstance(n, tuple) else (n, n), trunc_normal_=not_stubbed)},
        "einops": {"einops": dict(rearrange=not_stubbed)},
        "scipy": {"scipy": dict(interpolate=SimpleNamespace(interp2d=not_stubbed))},
        "transformers": {
            "transformers": dict(logging=logger),
            "transformers.activations": dict(ACT2FN={"gelu": nnf.gelu}),
            "transformers.configuration_utils": dict(PretrainedConfig=PretrainedConfig),
            "transformers.file_utils": dict(ModelOutput=ModelOutput, **dict.fromkeys(docs, unchanged)),
            "transformers.modeling_outputs": model_outputs(),
            "transformers.modeling_utils": dict(
                PreTrainedModel=PreTrainedModel, prune_linear_layer=not_stubbed,
                find_pruneable_heads_and_indices=not_stubbed,
                apply_chunking_to_forward=lambda run, size, dim, *x: run(*x) if size == 0 else not_stubbed()),
            "transformers.utils": dict(logging=logger),
        },
    }


def modules_of(packages) -> dict[str, ModuleType]:
    """The imported modules of these top-level packages, by name."""
    return {name: m for name, m in sys.modules.items() if name.split(".")[0] in packages}


def install_stub(package: str) -> dict[str, ModuleType]:
    """Replace a package in sys.modules by its stub -> the modules that were there."""
    before = modules_of([package])
    for name in before:
        del sys.modules[name]
    for name, names in stubs()[package].items():
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            path = ".".join(parts[:n])
            if path not in sys.modules:
                sys.modules[path] = importlib.util.module_from_spec(ModuleSpec(path, None, is_package=True))
                if n > 1:
                    setattr(sys.modules[".".join(parts[:n - 1])], parts[n - 1], sys.modules[path])
        sys.modules[name].__dict__.update(names)
    return before


# ---------------------------------------------------------------------------------------------------------------------
# The checkout

@contextmanager
def imports_of(root: str):
    """
    Let imports find the checkout first; restore sys.path and sys.modules at the end.

    Yields a dict to fill: the name of each stubbed package -> the modules that its stub replaced.
    """
    stubbed, before = {}, modules_of(UMT_PACKAGES)
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, root)
    importlib.invalidate_caches()
    try:
        yield stubbed
    finally:
        with suppress(ValueError):
            sys.path.remove(root)
        for name in modules_of({*UMT_PACKAGES, *stubbed}):
            del sys.modules[name]
        for modules in (before, *stubbed.values()):
            sys.modules.update(modules)


def failing_package(error: Exception, packages) -> str | None:
    """The package among these whose import raised the error: the missing one, or the first that was being imported."""
    importing = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = (getattr(error, "name", "") or "", *importing)
    return next((package for package in (name.split(".")[0] for name in names) if package in packages), None)


def load(root: str, stubbed: dict) -> tuple:
    """
    Import models.umt, the teacher, BERT, utils.optimizer and utils.easydict, with stubs if needed, listed in `stubbed`.
    """
    names = ("models.umt", "models.backbones.vit.clip", "models.backbones.bert.xbert", "utils.optimizer",
             "utils.easydict")
    while True:
        try:
            return tuple(importlib.import_module(name) for name in names)
        except Exception as e:      # an installed package can fail to import in any way
            package = failing_package(e, stubs().keys() - stubbed.keys())
            if package is None:
                raise ValueError(f"{root} must have UMT's {', '.join(names)}, got {type(e).__name__}: "
                                 f"{next(iter(str(e).splitlines()), '')}") from e
        stubbed[package] = install_stub(package)
        for name in modules_of(UMT_PACKAGES):                   # those that were half imported
            del sys.modules[name]


def commit_of(folder: str) -> str:
    """The commit of a checkout; "unknown" without git, or if the folder only lies within another repository."""
    git = lambda *a: subprocess.run(["git", "-C", folder, *a], capture_output=True, text=True, check=True).stdout
    try:
        top, commit = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
        changed = git("diff", "HEAD", "--stat")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + "+changes" * bool(changed) if os.path.samefile(top.strip(), folder) else "unknown"


def umt_settings(root: str, frames: int, size: int, keep: int, small: bool) -> dict:
    """The settings of the experiment, with these frames, size and visible tokens, and no weights to load."""
    experiment = runpy.run_path(f"{root}/{EXPERIMENT}")
    settings = {name: experiment[name] for name in ("model", "criterion", "optimizer", "gradient_checkpointing")}
    N = (size // PATCH) ** 2
    model = settings["model"]
    text = model["text_encoder"] = dict(experiment["TextEncoders"][experiment["text_enc"]])     # both were "${...}"
    model["vision_encoder"].update(
        num_frames=frames, img_size=size, clip_img_size=size, pretrained=None,
        video_mask_ratio=(N - keep + 0.5) / N)      # + 0.5: half a token away from where rounding could change it
    if small:
        model["vision_encoder"].update(SMALL_VISION)
        model["embed_dim"] = SMALL_TEACHER["output_dim"]
        text.update(d_model=SMALL_BERT["hidden_size"], fusion_layer=SMALL_FUSION)
    return settings


def build(modules: tuple, root: str, settings: dict, small: bool) -> tuple[nn.Module, int]:
    """Build the model, with initial weights instead of those that UMT reads from files -> model, vocabulary size."""
    umt, clip, xbert, _, easydict = modules
    vision, text = settings["model"]["vision_encoder"], settings["model"]["text_encoder"]
    xbert.BertForMaskedLM.from_pretrained = classmethod(lambda cls, name, config, **_: (cls(config), {}))
    width, side = SMALL_TEACHER["width"] if small else 768, vision["clip_img_size"] // PATCH
    if small:
        tower = clip.VisionTransformer
        clip.VisionTransformer = lambda **settings: tower(**settings | SMALL_TEACHER)
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{root}/{BERT_JSON}") as f:
            bert = json.load(f) | (SMALL_BERT if small else {})
        text["config"], clip._MODELS["ViT-B/16"] = f"{folder}/bert.json", f"{folder}/clip.pth"
        with open(text["config"], "w") as f:
            json.dump(bert, f)
        # UMT's loader needs a table of positions; other weights may be missing.
        torch.save({"positional_embedding": torch.randn(side * side + 1, width) / width ** 0.5},
                   clip._MODELS["ViT-B/16"])
        model = umt.UMT(easydict.EasyDict(settings), SPECIAL, is_pretrain=True)
    return model, bert["vocab_size"]


class UmtStep:
    """A training step on the same inputs at each call -> the sum of the losses, which `losses` has by name."""
    def __init__(self, model, optimizer, inputs: tuple, device: torch.device, max_norm: float):
        self.model, self.optimizer, self.inputs = model, optimizer, inputs
        self.device, self.max_norm, self.losses = device, max_norm, {}

    def __call__(self) -> Tensor:
        video, text, ids = self.inputs
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses = self.model(video, text, idx=ids)
            loss = sum(losses.values())
        self.optimizer.zero_grad()
        loss.backward()
        if self.max_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.losses = {name: value.detach() for name, value in losses.items()}
        return loss.detach()


def check_arguments(folder: str, batch: int, frames: int, size: int, keep: int, length: int):
    """Raise a ValueError if the folder is no checkout, or UMT has no step of these shapes."""
    for path in (EXPERIMENT, BERT_JSON, "models/umt.py"):
        if not os.path.isfile(f"{folder}/multi_modality/{path}"):
            raise ValueError(f"{folder} must be a checkout of unmasked_teacher: it has no multi_modality/{path}")
    if size % PATCH:
        raise ValueError(f"size must be a multiple of {PATCH}, got {size}")
    if not 1 <= keep <= (size // PATCH) ** 2:
        raise ValueError(f"keep must be 1 to {(size // PATCH) ** 2}, the tokens of a frame, got {keep}")
    for name, value in (("batch", batch), ("frames", frames), ("length", length)):
        if value < 2:
            raise ValueError(f"{name} must be at least 2, got {value}")


def umt_step(folder: str, device: str, batch: int, frames: int = 4, size: int = 224, keep: int = 29, length: int = 32,
             small: bool = False) -> tuple[UmtStep, dict]:
    """
    Build a step on `batch` random clips of `frames` frames of size x size pixels, `keep` tokens of each frame visible,
    and captions of `length` tokens without padding -> the step, and facts about it.

    On a GPU it runs under bfloat16 autocast, on a CPU in float32. `small`: the same classes, narrow and shallow.
    UMT's losses gather over ranks: if there is no process group, one with a single process is started, which
    torch.distributed.destroy_process_group() ends.
    """
    folder = os.path.abspath(folder)
    check_arguments(folder, batch, frames, size, keep, length)
    root, N, device = f"{folder}/multi_modality", (size // PATCH) ** 2, torch.device(device)
    with imports_of(root) as stubbed, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = load(root, stubbed)
        settings = umt_settings(root, frames, size, keep, small)
        model, vocab_size = build(modules, root, settings, small)
        pixels = torch.rand(batch, frames, 3, size, size)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        tokens = torch.randint(FIRST_WORD, vocab_size, (batch, length))
    tokens[:, 0] = SPECIAL.cls_token_id
    tokens = tokens.to(device)
    text = SimpleNamespace(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                                world_size=1)
    model.to(device).train()
    optimizer = modules[3].create_optimizer(modules[4].EasyDict(settings["optimizer"]), model)
    count = lambda part: sum(p.numel() for p in part.parameters())
    ratio = settings["model"]["vision_encoder"]["video_mask_ratio"]
    facts = dict(
        commit=commit_of(folder),
        losses=[name for name, weight in settings["criterion"]["loss_weight"].items() if weight],
        keep=N - int(N * ratio), tokens=N, ratio=ratio,
        parameters={name: count(part) for name, part in model.named_children() if count(part)} | {"all": count(model)},
        checkpointed=dict(vision=settings["model"]["vision_encoder"]["use_checkpoint"],
                          text=settings["gradient_checkpointing"]),
        optimizer=settings["optimizer"],
        stubs=sorted(stubbed),
        changes=["no student weights are loaded", "BertForMaskedLM.from_pretrained gives initial weights",
                 "the teacher's file has random positions only", "the tokenizer is three special ids",
                 "video_mask_ratio follows from keep"] + ["widths and depths are those of a test"] * small,
    )
    inputs = (((pixels - mean) / std).to(device), text, torch.arange(batch, device=device))
    return UmtStep(model, optimizer, inputs, device, settings["optimizer"]["max_grad_norm"]), facts
