"""
The stage-2 pretraining step of UMT's public code (OpenGVLab/unmasked_teacher), to time beside ours on the same GPU.

    step, facts = umt_step("unmasked_teacher", "cuda", batch=128)
    loss = step()                       # one step; step.losses holds what it sums

Nothing of it is here: the model, its losses and its optimizer are imported from a checkout, at the settings of its
exp/pretraining/b16_5m.py. `facts` lists what differs: weights are random, bfloat16 stands for float16 and its scaler,
the share of masked tokens follows `keep`, and nothing is wrapped in DistributedDataParallel. Decoding, tokenizing, the
copy to the GPU, the schedule and logging (five .item() a step) are left out.

Of its dependencies timm, einops, scipy and transformers, those that cannot be imported, or no longer have the names it
asks for (it was written for transformers 4.21; 5 is too new), have stand-ins while it is imported: the few lines that
the step runs. With these the losses of twelve steps of `small` on a CPU are, bit for bit, those with transformers
4.21.2, einops 0.4.1 and the drop_path of timm 0.4.12.
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
import torch.nn.functional as nn
from torch import Tensor

EXPERIMENT, BERT_JSON = "exp/pretraining/b16_5m.py", "configs/config_bert.json"
OWN = ("models", "utils", "configs")                            # what the checkout calls its packages
PATCH = 16
SPECIAL = SimpleNamespace(pad_token_id=0, cls_token_id=101, mask_token_id=103)      # of bert-base-uncased
FIRST_WORD = 1000                                               # ids below are special, or single letters
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # ImageNet's, for the student and the teacher

# The same classes at sizes for a test on a CPU.
SMALL_VISION = dict(d_model=64, encoder_embed_dim=64, encoder_depth=3, encoder_num_heads=2, clip_decoder_embed_dim=64,
                    clip_output_dim=32, clip_return_layer=2)
SMALL_TEACHER = dict(width=48, layers=3, heads=2, output_dim=32)
SMALL_BERT = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, vocab_size=2000)
SMALL_FUSION = 2                                                # text layers below those that see the video

# ---------------------------------------------------------------------------------------------------------------------
# Stand-ins: what the step runs of each package, from its documentation


def unused(*args, **kwargs):
    raise NotImplementedError("a stand-in was asked for what the timed step does not run")


def drop_path(x: Tensor, p: float = 0.0, training: bool = False) -> Tensor:
    """timm's: each sample of the batch is 0 with probability p, else scaled by 1 / (1 - p)."""
    if p == 0.0 or not training:
        return x
    kept = torch.rand(len(x), *[1] * (x.ndim - 1), dtype=x.dtype, device=x.device) >= p
    return x / (1 - p) * kept


class PretrainedConfig:
    """transformers': the defaults that BERT reads."""
    chunk_size_feed_forward = 0
    output_attentions = output_hidden_states = False
    use_return_dict = tie_word_embeddings = True

    def __init__(self, **given):
        self.__dict__.update(given)

    @classmethod
    def from_json_file(cls, path: str):
        with open(path) as f:
            return cls(**json.load(f))


class PreTrainedModel(torch.nn.Module):
    """transformers': first weights, the output's tied to the word embeddings, and the two masks."""
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
        """mask (B, N), 1 where attended -> (B, 1, 1, N), 0 there and the lowest number elsewhere."""
        return (1.0 - mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min

    def get_head_mask(self, mask: None, layers: int) -> list[None]:
        return [None] * layers if mask is None else unused()


class ModelOutput:
    """transformers': fields that are also counted, without those that are None."""
    def __getitem__(self, i: int):
        return [v for v in (getattr(self, f.name) for f in fields(self)) if v is not None][i]


def outputs() -> dict[str, type]:
    """Those that the step makes have their fields; the others are only named by what is imported."""
    seen = ("hidden_states", "attentions")
    made = {
        "BaseModelOutputWithPastAndCrossAttentions":
            ("last_hidden_state", "past_key_values", *seen, "cross_attentions"),
        "BaseModelOutputWithPoolingAndCrossAttentions":
            ("last_hidden_state", "pooler_output", *seen, "past_key_values", "cross_attentions"),
        "MaskedLMOutput": ("loss", "logits", *seen),
    }
    named = ("CausalLMOutputWithCrossAttentions", "MultipleChoiceModelOutput", "NextSentencePredictorOutput",
             "QuestionAnsweringModelOutput", "SequenceClassifierOutput", "TokenClassifierOutput")
    return {name: make_dataclass(name, [(f, object, None) for f in made.get(name, ())], bases=(ModelOutput,))
            for name in (*made, *named)}


def stand_ins() -> dict[str, dict[str, dict]]:
    """Package -> module -> what can be imported from it."""
    as_is = lambda *args, **kwargs: lambda decorated: decorated
    docs = ("add_start_docstrings", "add_start_docstrings_to_model_forward", "replace_return_docstrings")
    quiet = SimpleNamespace(set_verbosity_error=lambda: None, get_logger=importlib.import_module("logging").getLogger)
    return {
        "timm": {"timm.models.layers": dict(drop_path=drop_path, to_2tuple=lambda n: n if isinstance(n, tuple) else
                                            (n, n), trunc_normal_=unused)},
        "einops": {"einops": dict(rearrange=unused)},
        "scipy": {"scipy": dict(interpolate=SimpleNamespace(interp2d=unused))},
        "transformers": {
            "transformers": dict(logging=quiet),
            "transformers.activations": dict(ACT2FN={"gelu": nn.gelu}),
            "transformers.configuration_utils": dict(PretrainedConfig=PretrainedConfig),
            "transformers.file_utils": dict(ModelOutput=ModelOutput, **dict.fromkeys(docs, as_is)),
            "transformers.modeling_outputs": outputs(),
            "transformers.modeling_utils": dict(
                PreTrainedModel=PreTrainedModel, prune_linear_layer=unused, find_pruneable_heads_and_indices=unused,
                apply_chunking_to_forward=lambda run, size, dim, *x: run(*x) if size == 0 else unused()),
            "transformers.utils": dict(logging=quiet),
        },
    }


def modules_of(packages) -> dict[str, ModuleType]:
    return {name: m for name, m in sys.modules.items() if name.split(".")[0] in packages}


def install(package: str) -> dict[str, ModuleType]:
    """The stand-in takes the package's place in sys.modules -> what was there."""
    before = modules_of([package])
    for name in before:
        del sys.modules[name]
    for name, names in stand_ins()[package].items():
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
    """Yields a dict for the stand-ins in use, and what they displace. Then sys.path and sys.modules are as before."""
    used, before = {}, modules_of(OWN)
    for name in before:
        del sys.modules[name]
    sys.path.insert(0, root)
    importlib.invalidate_caches()
    try:
        yield used
    finally:
        with suppress(ValueError):
            sys.path.remove(root)
        for name in modules_of({*OWN, *used}):
            del sys.modules[name]
        for modules in (before, *used.values()):
            sys.modules.update(modules)


def culprit(e: Exception, packages) -> str | None:
    """The package of these whose import ended in e: the one not found, or the first that was being read."""
    reading = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(e.__traceback__)]
    return next((top for top in (name.split(".")[0] for name in (getattr(e, "name", "") or "", *reading))
                 if top in packages), None)


def load(root: str, used: dict) -> tuple:
    """The modules models.umt, the teacher's, BERT's, utils.optimizer and utils.easydict; `used` gains stand-ins."""
    wanted = ("models.umt", "models.backbones.vit.clip", "models.backbones.bert.xbert", "utils.optimizer",
              "utils.easydict")
    while True:
        try:
            return tuple(importlib.import_module(name) for name in wanted)
        except Exception as e:      # a package that is there can fail to be read in any way
            package = culprit(e, stand_ins().keys() - used.keys())
            if package is None:
                raise ValueError(f"{root}: wanted UMT's {', '.join(wanted)}, got {type(e).__name__}: "
                                 f"{next(iter(str(e).splitlines()), '')}") from e
        used[package] = install(package)
        for name in modules_of(OWN):                            # half of them hold what could not be imported
            del sys.modules[name]


def commit_of(folder: str) -> str:
    """The commit of a checkout, not of a repository that the folder happens to lie in."""
    git = lambda *a: subprocess.run(["git", "-C", folder, *a], capture_output=True, text=True, check=True).stdout
    try:
        top, commit = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
        changed = git("diff", "HEAD", "--stat")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + "+changes" * bool(changed) if os.path.samefile(top.strip(), folder) else "unknown"


def published(root: str, frames: int, size: int, keep: int, small: bool) -> dict:
    """The experiment's settings with the frames, the size and the kept tokens asked for, and no weights to read."""
    found = runpy.run_path(f"{root}/{EXPERIMENT}")
    settings = {name: found[name] for name in ("model", "criterion", "optimizer", "gradient_checkpointing")}
    N = (size // PATCH) ** 2
    model = settings["model"]
    text = model["text_encoder"] = dict(found["TextEncoders"][found["text_enc"]])           # both were "${...}"
    model["vision_encoder"].update(
        num_frames=frames, img_size=size, clip_img_size=size, pretrained=None,
        video_mask_ratio=(N - keep + 0.5) / N)                  # half a token from where rounding could move it
    if small:
        model["vision_encoder"].update(SMALL_VISION)
        model["embed_dim"] = SMALL_TEACHER["output_dim"]
        text.update(d_model=SMALL_BERT["hidden_size"], fusion_layer=SMALL_FUSION)
    return settings


def build(modules: tuple, root: str, settings: dict, small: bool) -> tuple[torch.nn.Module, int]:
    """-> model, size of its vocabulary. What UMT reads from files gets its constructors' first weights."""
    umt, clip, xbert, _, easydict = modules
    vision, text = settings["model"]["vision_encoder"], settings["model"]["text_encoder"]
    xbert.BertForMaskedLM.from_pretrained = classmethod(lambda cls, name, config, **_: (cls(config), {}))
    width, grid = SMALL_TEACHER["width"] if small else 768, vision["clip_img_size"] // PATCH
    if small:
        tower = clip.VisionTransformer
        clip.VisionTransformer = lambda **given: tower(**given | SMALL_TEACHER)
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{root}/{BERT_JSON}") as f:
            bert = json.load(f) | (SMALL_BERT if small else {})
        text["config"], clip._MODELS["ViT-B/16"] = f"{folder}/bert.json", f"{folder}/clip.pth"
        with open(text["config"], "w") as f:
            json.dump(bert, f)
        # Its loader wants a table of positions, and takes what else a file has.
        torch.save({"positional_embedding": torch.randn(grid * grid + 1, width) / width ** 0.5},
                   clip._MODELS["ViT-B/16"])
        model = umt.UMT(easydict.EasyDict(settings), SPECIAL, is_pretrain=True)
    return model, bert["vocab_size"]


class Step:
    """One training step on the same inputs at each call -> the sum of the losses, which `losses` holds by name."""
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
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.losses = {name: value.detach() for name, value in losses.items()}
        return loss.detach()


def umt_step(folder: str, device: str, batch: int, frames: int = 4, size: int = 224, keep: int = 29, length: int = 32,
             small: bool = False) -> tuple[Step, dict]:
    """
    A step on `batch` random clips of `frames` frames, `keep` tokens of each visible, and captions of `length` tokens
    without padding -> the step, facts about it. On a GPU under bfloat16 autocast, on a CPU in float32. `small`: the
    same classes, narrow and shallow. Starts a process group of one where there is none (UMT's losses gather) and leaves
    it: torch.distributed.destroy_process_group() ends it.
    """
    folder = os.path.abspath(folder)
    root, N = f"{folder}/multi_modality", (size // PATCH) ** 2
    for path in (EXPERIMENT, BERT_JSON, "models/umt.py"):
        if not os.path.isfile(f"{root}/{path}"):
            raise ValueError(f"{folder} is no checkout of unmasked_teacher: wanted multi_modality/{path}")
    if size % PATCH or not 1 <= keep <= N:
        raise ValueError(f"size {size}, keep {keep}: wanted a multiple of {PATCH}, and 1 to {N} of its tokens")
    if batch < 2 or frames < 2 or length < 2:
        raise ValueError(f"batch {batch}, frames {frames}, length {length}: wanted at least 2 of each")
    place = torch.device(device)
    with imports_of(root) as used, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = load(root, used)
        settings = published(root, frames, size, keep, small)
        model, words = build(modules, root, settings, small)
        pixels = torch.rand(batch, frames, 3, size, size)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        tokens = torch.randint(FIRST_WORD, words, (batch, length))
    tokens[:, 0] = SPECIAL.cls_token_id
    tokens = tokens.to(place)
    text = SimpleNamespace(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                                world_size=1)
    model.to(place).train()
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
        stand_ins=sorted(used),
        set_here=["no student weights to read", "BertForMaskedLM.from_pretrained gives first weights",
                  "the teacher's file holds random positions alone", "tokenizer: three special ids",
                  "video_mask_ratio from keep"] + ["widths and depths of a test"] * small,
    )
    inputs = (((pixels - mean) / std).to(place), text, torch.arange(batch, device=place))
    return Step(model, optimizer, inputs, place, settings["optimizer"]["max_grad_norm"]), facts
