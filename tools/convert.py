"""
Checkpoints of others -> folders of ours.

    python -m tools.convert b16_25m.pth out/umt-b16 --tokenizer bert-base-uncased/tokenizer.json
    python -m tools.convert b16_ptk710_f8_res224.pth out/umt-b16-stage1
    python -m tools.convert qa_msrvtt_b16_25m.pth out/umt-qa --task msrvtt-qa --tokenizer vocab.txt

The files are UMT's (OpenGVLab/unmasked_teacher, multi_modality/MODEL_ZOO.md). A folder is one for load_model: a
ClusterSTM, or of a QA file a VideoToText; or of a stage-1 file a ViT alone, for a student to begin with. report.txt in
it says what became of every key. A key that is missing, left over or of another shape ends it all.
"""

import json
import os
import pickle
import re
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import torch
import tyro
from torch import Tensor, nn

import data
from model import ClusterSTM, ModelConfig, VideoToText, ViT, save_weights
from tasks import KINDS, find_task
from train import PRESETS

MASK_ID, SEED = 103, 0      # of [MASK] in bert-base-uncased and bert-large-uncased; of the weights that are new
VIT = ("patch", "width", "depth", "heads", "drop_path", "positions")        # what a ViT is made of


@dataclass
class Config:
    """A checkpoint of UMT -> a folder of ours."""
    file: tyro.conf.Positional[str]     # .pth file: stage 1, stage 2, or fine-tuned for retrieval or QA
    out: tyro.conf.Positional[str]      # folder to write; must not be there yet, or be empty
    task: str = ""                      # row of tasks.TASKS it is fine-tuned for; eval.py then takes as many frames
    tokenizer: str = ""                 # tokenizer of bert-base-uncased, to go into the folder; eval.py wants one
    trust: bool = False                 # open a pickle of more than tensors, an inert stand-in for each of its classes


# What the files hold. In a key * stands for anything, and beside it for the same.

@dataclass
class Family:
    """A row of FAMILIES: a file is of the first row whose marks all fit some of its keys."""
    marks: tuple[str, ...]
    rules: dict[str, str]       # their key: our name; or "= " and the name it repeats; or "- " and why it is skipped
    new: tuple[str, ...]        # what those names of ours begin with that no key becomes
    alone: bool = False         # a ViT, not a whole model
    asks: bool = False          # a VideoToText, not a ClusterSTM
    frames: int = 4             # a clip, in its training
    length: int = 32            # word pieces of a text, in its training
    tuned: tuple[str, ...] = ()     # the kinds of tasks that it can be fine-tuned for


def vit(prefix: str) -> dict[str, str]:
    return {prefix + theirs: "vit." + ours for theirs, ours in {
        "patch_embed.proj.*": "embed.*", "blocks.*.norm*": "blocks.*.norm*",
        "blocks.*.attn.qkv.weight": "blocks.*.qkv.weight", "blocks.*.attn.(q_bias, 0, v_bias)": "blocks.*.qkv.bias",
        "blocks.*.attn.proj.*": "blocks.*.proj.*", "blocks.*.mlp.fc*": "blocks.*.fc*", "norm.*": "norm.*",
    }.items()}


VISION, TEXT, DECODER = "vision_encoder.encoder.", "text_encoder.", "text_decoder."
WORDS = "bert.embeddings.word_embeddings.weight"
HEADS = {"vision_encoder.pool_norm.*": "pool_norm.*", "vision_proj.*": "vision_proj.*", "text_proj.*": "text_proj.*",
         "itm_head.*": "itm_head.*", "temp": "temp"}
ALIGNMENT, BUFFER = "- alignment with CLIP, where we have MRM", "- a buffer: 0, 1, 2, ..."
HEAD_NAMES = tuple(name.rstrip("*") for name in HEADS.values())


def bert(theirs: str, ours: str) -> dict[str, str]:
    """A BERT and its head, whose decoder is the word embedding."""
    return {theirs + "bert.embeddings.position_ids": BUFFER, theirs + "bert.*": ours + "bert.*",
            theirs + "cls.predictions.decoder.weight": f"= {ours}{WORDS}",
            theirs + "cls.predictions.decoder.bias": f"= {ours}cls.predictions.bias",
            theirs + "cls.predictions.*": ours + "cls.predictions.*"}


TUNED = vit(VISION) | {TEXT + "embeddings.position_ids": BUFFER, TEXT + "*": "bert.bert.*"}

FAMILIES = {
    "UMT stage 1": Family(("encoder.blocks.*",), vit("encoder.") | {"clip_decoder.*": ALIGNMENT},
                          new=("bert.", "decoder.", *HEAD_NAMES), alone=True, frames=8),
    "UMT stage 2": Family(
        (VISION + "blocks.*", TEXT + "bert.*"), vit(VISION) | HEADS | bert(TEXT, "bert.") | {
            "clip_teacher.*": "- UMT's teacher, no part of the student", "vision_encoder.clip_decoder.*": ALIGNMENT},
        new=("decoder.",)),
    # Its encoder has no head of words; its decoder, which looks at the states of the question, has one of its own.
    "UMT QA": Family((VISION + "blocks.*", TEXT + "encoder.*", DECODER + "*"), bert(DECODER, DECODER) | TUNED,
                     new=("bert.cls.",), asks=True, frames=12, length=25, tuned=("qa",)),
    "UMT retrieval": Family((VISION + "blocks.*", TEXT + "encoder.*"), TUNED | HEADS,
                            new=("bert.cls.", "decoder."), frames=12, tuned=("retrieval", "choice")),
}


def look_up(rules: dict[str, str], key: str) -> str | None:
    """What the first rule that fits says of the key, its stars filled in; None where none fits."""
    for pattern, says in rules.items():
        if fits := re.fullmatch(re.escape(pattern).replace(r"\*", "(.+)"), key):
            for star in fits.groups():
                says = says.replace("*", star, 1)
            return says
    return None


# Reading

def misfit(file: str, key: str, found, wanted) -> ValueError:
    return ValueError(f"{file}: {key} is {found}, wanted {wanted}")


class StandIn(dict):
    """In place of a class or a function that a pickle names: takes whatever it is given and does nothing."""
    __hash__ = object.__hash__
    __init__ = __setstate__ = lambda self, *args, **kwargs: None


PLAIN = "collections.OrderedDict", "torch.Size", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"


def stand_ins(strange: set[str]) -> SimpleNamespace:
    """A pickle module that knows what tensors want; all else that a file names is a StandIn, and told in `strange`."""
    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if f"{module}.{name}" in PLAIN or module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return super().find_class(module, name)
            strange.add(f"{module}.{name}")
            return type(name, (StandIn,), {})

    return SimpleNamespace(__name__="stand_ins", Unpickler=Unpickler, load=lambda f, **how: Unpickler(f, **how).load())


def read(file: str, trust: bool, told: list) -> tuple[dict[str, Tensor], str, Family]:
    """A file's keys, flat or under "model", and their tensors; its row of FAMILIES."""
    strange = set()
    how = {"weights_only": False, "pickle_module": stand_ins(strange)} if trust else {"weights_only": True}
    try:
        saved = torch.load(file, map_location="cpu", **how)
    except OSError:
        raise
    except Exception as error:          # an unpickler can raise anything at a file that is no pickle
        if not trust and (more := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise ValueError(f"{file}: its pickle wants {more[1]}, which is no tensor; UMT's own training writes such "
                             "files. --trust opens it, with inert stand-ins for what is no tensor") from None
        raise ValueError(f"{file} is no checkpoint that torch.load can read: {type(error).__name__} "
                         f"{str(error).split('WeightsUnpickler error: ')[-1]!r:.120}") from None
    if not isinstance(saved, dict):
        raise ValueError(f"{file} holds a {type(saved).__name__}, wanted a dict of tensors")
    told += [f"stand-in {name}" for name in sorted(strange)]
    if isinstance(saved.get("model"), dict):
        told += [f"beside   {key}: not of the model" for key in saved if key != "model"]
        saved = saved["model"]
    saved = {str(key): x for key, x in saved.items()}
    for title, family in FAMILIES.items():
        if all(any(look_up({mark: "fits"}, key) for key in saved) for mark in family.marks):
            if other := [key for key, x in saved.items() if not isinstance(x, Tensor)]:
                raise misfit(file, other[0], f"a {type(saved[other[0]]).__name__}", "a tensor")
            return saved, title, family
    raise ValueError(f"{file} is of no known family: its keys are {', '.join([*saved][:4]) or 'none'}, ...; known are "
                     f"{', '.join(FAMILIES)}")


# Converting

def sizes(family: Family, shapes: dict[str, tuple], file: str, back: dict[str, str]) -> ModelConfig:
    """The student's, read off the shapes, which go by our names; `back` leads to theirs."""
    def shape(name, n, wide=None):
        have = shapes.get(name, ())
        if len(have) != n or wide is not None and have[wide] not in range(64, 2 ** 16, 64):
            wanted = f"of {n} dimensions" + f", number {wide} of heads of 64 channels" * (wide is not None)
            raise misfit(file, look_up(back, name), have or "not there", wanted)
        return have

    layers = lambda pattern: [int(found[1]) for name in shapes if (found := re.match(pattern, name))]
    C, *_, p = shape("vit.embed.weight", 5, 0)
    usual = PRESETS["large" if C >= 1024 else "base"].model
    cfg = replace(usual, patch=p, width=C, heads=C // 64, depth=1 + max(layers(r"vit\.blocks\.(\d+)\."), default=-1))
    if not family.alone:
        words, D = shape("bert." + WORDS, 2, 1)
        embed = cfg.embed if family.asks else shape("vision_proj.weight", 2)[0]
        cfg = replace(cfg, vocab=words, mask_id=MASK_ID, embed=embed, target=C, text_width=D, text_heads=D // 64,
                      text_length=family.length,
                      text_depth=1 + max(layers(r"bert\.bert\.encoder\.layer\.(\d+)\."), default=-1),
                      fusion=len({*layers(r"bert\.bert\.encoder\.layer\.(\d+)\.crossattention\.")}) or 1)
    have, wanted = ((c.depth, c.text_depth, c.fusion) for c in (cfg, usual))
    if C == usual.width and have != wanted:
        raise misfit(file, f"the number of blocks, text layers, fusion layers at width {C}", have, wanted)
    return cfg


def with_biases(saved: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """Their attention has no bias of k: q_bias and v_bias, 0 between them, go by a key of their own."""
    for stem in dict.fromkeys(key[:-6] for key in saved if key.endswith((".q_bias", ".v_bias"))):
        q, v = (saved.pop(stem + name, torch.empty(0)) for name in ("q_bias", "v_bias"))
        if q.shape != v.shape or q.ndim != 1:
            raise misfit(file, stem + "q_bias, v_bias", (*q.shape, *v.shape), "two of one length")
        saved[stem + "(q_bias, 0, v_bias)"] = torch.cat([q, torch.zeros_like(q), v])
    return saved


def convert(family: Family, saved: dict[str, Tensor], file: str, told: list) -> tuple[nn.Module, ModelConfig]:
    """Our model with their weights. What became of each key, and what is new, is told."""
    saved, origin, tied = with_biases(dict(saved), file), {}, {}
    back = {says: key for key, says in family.rules.items() if says[0] not in "-="}
    for key, x in saved.items():
        says = look_up(family.rules, key)
        if says is None:
            raise misfit(file, key, tuple(x.shape), "no such key: no rule of FAMILIES in tools/convert.py fits it")
        how = "taken" if says == key else "joined" if key.endswith(")") else "renamed"
        how, sign = {"-": ("skipped", ":"), "=": ("tied", " =")}.get(says[0], (how, " ->"))
        what = says.lstrip("-= ")
        told.append(f"{how:9}{key} {tuple(x.shape)} {str(x.dtype)[6:]}{sign} {what}")
        {"tied": tied, "skipped": {}}.get(how, origin)[what] = key
    cfg = sizes(family, {name: tuple(saved[key].shape) for name, key in origin.items()}, file, back)
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        if family.alone:
            model = nn.ModuleDict({"vit": ViT(*(getattr(cfg, name) for name in VIT))})
        else:
            model = VideoToText(cfg, asks=True) if family.asks else ClusterSTM(cfg)
    state, weights = model.state_dict(), {}
    wanted = {name: tuple(x.shape) for name, x in state.items() if not name.startswith(family.new)}
    wanted["vit.embed.weight"] = cfg.width, 3, 1, cfg.patch, cfg.patch      # a Conv3d over one frame
    for name in [*wanted, *(name for name in origin if name not in wanted)]:
        key = origin.get(name) or look_up(back, name)
        have = tuple(saved[key].shape) if key in saved else "not there"
        if have != wanted.get(name):
            raise misfit(file, key, have, wanted.get(name, f"no such key: a model of these sizes has no {name}"))
        weights[name] = saved[key].float().reshape(state[name].shape)
    for name, key in tied.items():
        if not torch.equal(saved[key].float(), weights[name]):
            raise misfit(file, key, f"another than {origin[name]}", "the same, as ours is one for both")
    told += [f"new      {name} {tuple(x.shape)}: no key becomes it; drawn, seed {SEED}"
             for name, x in state.items() if name not in weights]
    model.load_state_dict(state | weights)
    return model, cfg


@torch.no_grad()
def main(cfg: Config):
    out = os.path.abspath(cfg.out)
    if os.path.exists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise ValueError(f"{cfg.out} is there already, and is no empty folder")
    tokenizer, told = data.load_tokenizer(cfg.tokenizer) if cfg.tokenizer else None, []
    saved, title, family = read(cfg.file, cfg.trust, told)
    task = find_task(cfg.task) if cfg.task else None
    if task and task.kind not in family.tuned:
        raise ValueError(f"{cfg.file}: a file of {title} is not fine-tuned for {cfg.task}, {KINDS[task.kind]}")
    model, student = convert(family, saved, cfg.file, told)
    if task:
        student = replace(student, text_length=task.length)
    config = {"model_type": "clusterstm" + "-vit" * family.alone, "source": f"{title}: {os.path.basename(cfg.file)}",
              "model": {name: x for name, x in asdict(student).items() if name in VIT or not family.alone},
              "new": family.new, "data": {"frames": family.frames, "size": 224}, "mask": {"name": "umt", "ratio": 0.8},
              "teacher": "", "task": cfg.task}
    if tokenizer:
        have = tokenizer.get_vocab_size(), tokenizer.token_to_id("[MASK]")
        if have != (wanted := "none: a ViT reads no text" if family.alone else (student.vocab, MASK_ID)):
            raise misfit(cfg.tokenizer, "a tokenizer whose size and id of [MASK]", have, wanted)
    told.append(f"{cfg.file}, {title}, {len(saved)} keys: "
                + ", ".join(f"{n} {how}" for how, n in Counter(line.split()[0] for line in told).items()))
    if family.tuned and not task:
        told.append("task is not told, so eval.py takes as many frames as of a pretrained model: --task names it, or "
                    f"eval.py --frames {family.frames}")
    if not (tokenizer or family.alone):
        told.append("tokenizer.json is missing, which eval.py wants: --tokenizer adds bert-base-uncased's")
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=os.path.basename(out) + ".", dir=os.path.dirname(out)) as folder:
        data.write_atomically(os.path.join(folder, "config.json"), json.dumps(config, indent=1))
        data.write_atomically(os.path.join(folder, "report.txt"), "\n".join(told) + "\n")
        if tokenizer:
            tokenizer.save(os.path.join(folder, "tokenizer.json"))
        save_weights(model, folder)
        os.chmod(folder, 0o755)                     # temporary folders are private
        os.replace(folder, out)
    print(*told, f"written to {cfg.out}", sep="\n")


if __name__ == "__main__":
    data.command("tools.convert", lambda: main(tyro.cli(Config)))
