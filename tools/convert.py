"""
Convert a checkpoint of UMT to a folder of this project.

    python -m tools.convert b16_25m.pth out/umt-b16 --tokenizer bert-base-uncased/tokenizer.json
    python -m tools.convert b16_ptk710_f8_res224.pth out/umt-b16-stage1
    python -m tools.convert qa_msrvtt_b16_25m.pth out/umt-qa --task msrvtt-qa --tokenizer vocab.txt

    .pth file: UMT's keys and tensors  ->  OUT: config.json, model.safetensors, report.txt, tokenizer.json if given

The files are those of OpenGVLab/unmasked_teacher, multi_modality/MODEL_ZOO.md. load_model reads the folder as a
ClusterSTM, or as a VideoToText if the file answers questions. A stage-1 file gives a ViT alone, from which train.py
--init-from can start. report.txt says what became of every key. Nothing is written if a key is missing, unknown or of
the wrong shape.
"""

import os
import pickle
import re
import tarfile
import tempfile
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn
from tyro.conf import Positional, arg

from config import PRESETS
from encoders import ViT
from files import atomic_write_text, escape_control, save_weights, write_json
from model import ClusterSTM, VideoToText
from runtime import run_cli
from tasks import TASK_KINDS, TASKS, get_task
from tokenizer import load_tokenizer

MASK_ID = 103           # id of [MASK] in bert-base-uncased and bert-large-uncased
SEED = 0                # of the weights that the file does not have


@dataclass
class Config:
    """Convert a checkpoint of UMT to a folder of this project."""
    # UMT's .pth file: stage 1, stage 2, or fine-tuned for retrieval or QA
    file: Annotated[Positional[str], arg(metavar="FILE")]
    out: Annotated[Positional[str], arg(metavar="OUT")]     # folder to write; it must be new or empty
    task: Annotated[str, arg(help=f"benchmark that the file is fine-tuned for; empty: none; {', '.join(TASKS)}")] = ""
    tokenizer: str = ""         # tokenizer.json or vocab.txt of bert-base-uncased to add to OUT; eval.py needs it
    trust: bool = False         # open a pickle that holds other objects than tensors, without running its code


# ---------------------------------------------------------------------------------------------------------------------
# What the files hold

@dataclass
class Family:
    """
    A kind of file. A file is of the first family for which each pattern of `signature` matches some of its keys.

    rules: pattern of UMT's key -> our name. A * matches anything, and stands for the same in the name. Instead of a
    name, "= NAME" marks a copy of that weight and "- REASON" a key that is skipped.
    """
    signature: tuple[str, ...]
    rules: dict[str, str]
    new_prefixes: tuple[str, ...]           # how the names of our weights begin that the file does not have
    vit_only: bool = False                  # it has a ViT and no text encoder
    has_question: bool = False              # it becomes a VideoToText that answers questions, else a ClusterSTM
    num_frames: int = 4                     # frames of a clip in its training
    max_length: int = 32                    # tokens of a text in its training
    task_kinds: tuple[str, ...] = ()        # kinds of tasks that it can be fine-tuned for


def vit_rules(prefix: str) -> dict[str, str]:
    return {prefix + key: "vit." + name for key, name in {
        "patch_embed.proj.*": "patch_embed.*", "blocks.*.norm*": "blocks.*.norm*",
        "blocks.*.attn.qkv.weight": "blocks.*.qkv.weight", "blocks.*.attn.(q_bias, 0, v_bias)": "blocks.*.qkv.bias",
        "blocks.*.attn.proj.*": "blocks.*.proj.*", "blocks.*.mlp.fc*": "blocks.*.fc*", "norm.*": "norm.*",
    }.items()}


VISION, TEXT, DECODER = "vision_encoder.encoder.", "text_encoder.", "text_decoder."
WORDS = "bert.embeddings.word_embeddings.weight"
HEADS = {"vision_encoder.pool_norm.*": "pool_norm.*", "vision_proj.*": "vision_proj.*", "text_proj.*": "text_proj.*",
         "itm_head.*": "itm_head.*", "temp": "temp"}
HEAD_NAMES = tuple(name.rstrip("*") for name in HEADS.values())
ALIGNMENT, BUFFER = "- aligns with CLIP, for which this project has MRM", "- a buffer: 0, 1, 2, ..."


def bert_rules(prefix: str, new_prefix: str) -> dict[str, str]:
    """A BERT with its MLM head, whose output matrix is the word embedding."""
    return {prefix + "bert.embeddings.position_ids": BUFFER, prefix + "bert.*": new_prefix + "bert.*",
            prefix + "cls.predictions.decoder.weight": f"= {new_prefix}{WORDS}",
            prefix + "cls.predictions.decoder.bias": f"= {new_prefix}cls.predictions.bias",
            prefix + "cls.predictions.*": new_prefix + "cls.predictions.*"}


FINETUNED = vit_rules(VISION) | {TEXT + "embeddings.position_ids": BUFFER, TEXT + "*": "bert.bert.*"}

FAMILIES = {
    "UMT stage 1": Family(("encoder.blocks.*",), vit_rules("encoder.") | {"clip_decoder.*": ALIGNMENT},
                          ("bert.", "decoder.", *HEAD_NAMES), vit_only=True, num_frames=8),
    "UMT stage 2": Family(
        (VISION + "blocks.*", TEXT + "bert.*"), vit_rules(VISION) | HEADS | bert_rules(TEXT, "bert.") | {
            "clip_teacher.*": "- UMT's teacher", "vision_encoder.clip_decoder.*": ALIGNMENT}, ("decoder.",)),
    # The encoder has no MLM head. The decoder, which attends to the states of the question, has one of its own.
    "UMT QA": Family((VISION + "blocks.*", TEXT + "encoder.*", DECODER + "*"), bert_rules(DECODER, DECODER) | FINETUNED,
                     ("bert.cls.",), has_question=True, num_frames=12, max_length=25, task_kinds=("qa",)),
    "UMT retrieval": Family((VISION + "blocks.*", TEXT + "encoder.*"), FINETUNED | HEADS, ("bert.cls.", "decoder."),
                            num_frames=12, task_kinds=("retrieval", "choice")),
}


def match_rule(rules: dict[str, str], key: str) -> str | None:
    """The right side of the first rule that matches the key, its stars replaced. None if no rule matches."""
    for pattern, result in rules.items():
        if match := re.fullmatch(re.escape(pattern).replace(r"\*", "(.+)"), key):
            for part in match.groups():
                result = result.replace("*", part, 1)
            return result
    return None


def mismatch(file: str, key: str, expected, value) -> ValueError:
    return ValueError(f"{file}: {key} must be {expected}, got {value}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading a file

class InertClass(dict):
    """Takes the place of a class or function that a pickle names: it accepts any arguments and does nothing."""
    __hash__ = object.__hash__
    __init__ = __setstate__ = lambda self, *args, **kwargs: None


SAFE_NAMES = ("collections.OrderedDict", "torch.Size", "torch._utils._rebuild_tensor_v2",
              "torch._utils._rebuild_parameter")


def inert_pickle(replaced: set[str]) -> SimpleNamespace:
    """A pickle module for torch.load that imports only what tensors need. Other names are added to `replaced`."""
    # This is the unpickler in Python: that in C allocates as much memory as a hostile file says.
    class Unpickler(pickle._Unpickler):
        dispatch = {op: load for op, load in pickle._Unpickler.dispatch.items() if op != pickle.BYTEARRAY8[0]}

        def find_class(self, module, name):
            is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if f"{module}.{name}" in SAFE_NAMES or is_dtype:
                return super().find_class(module, name)
            replaced.add(f"{module}.{name}")
            return type(name, (InertClass,), {})

    return SimpleNamespace(__name__="inert_pickle", Unpickler=Unpickler,
                           load=lambda f, **options: Unpickler(f, **options).load())


class UnsafeArchiveError(ValueError):
    """torch.load would run code of the file, write files or need far more memory than the file's size."""


def check_archive(file: str):
    """Raise an UnsafeArchiveError unless the file is as torch.save writes it, a zip archive or a pickle."""
    if os.path.exists(file) and not os.path.isfile(file):
        raise UnsafeArchiveError(f"{file} must be a file, got a folder or a device")
    with open(file, "rb") as f:
        is_zip = f.read(4) == b"PK\3\4"
    if is_zip:
        reader = torch._C.PyTorchFileReader(file)           # torch.load reads the file with the same class
        names = reader.get_all_records()
        if any(name == "constants.pkl" or name.startswith("code/") for name in names):
            raise UnsafeArchiveError(f"{file} is a TorchScript archive, which runs code when it is opened: it is not "
                                     "read, with --trust neither; UMT's files are written by torch.save")
        size, claimed = os.path.getsize(file), sum(map(reader.get_record_size, names))
        if claimed > size:
            raise UnsafeArchiveError(f"{file}: its records must be uncompressed, as torch.save writes them; they have "
                                     f"{claimed} bytes, the file {size}")
        return
    with suppress(tarfile.TarError), tarfile.open(file, "r:"):
        raise UnsafeArchiveError(f"{file} is a tar archive, as torch.save wrote before PyTorch 0.2: it is not read")


def check_weights(weights: dict, file: str):
    """Raise a ValueError unless all are dense tensors whose elements are in the file."""
    for key, x in weights.items():
        if not isinstance(x, Tensor):
            raise mismatch(file, key, "a tensor", f"a {type(x).__name__}")
        if x.layout != torch.strided or x.is_meta or x.is_quantized or x.is_complex():
            raise mismatch(file, key, "a dense tensor of real numbers", f"{x.layout}, {x.device}, {x.dtype}")
        if x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise mismatch(file, key, "a tensor whose elements are all in the file", f"{tuple(x.shape)} with strides "
                           f"{x.stride()}")


def read(file: str, trust: bool, report: list[str]) -> tuple[dict[str, Tensor], str, Family]:
    """Read a file whose tensors are at the top or under "model" -> (tensors by key, title of the family, family)."""
    replaced = set()
    options = {"weights_only": False, "pickle_module": inert_pickle(replaced)} if trust else {"weights_only": True}
    try:
        check_archive(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # of old or odd files; what matters is said below
            content = torch.load(file, map_location="cpu", **options)
    except (OSError, UnsafeArchiveError):
        raise
    except Exception as error:          # an unpickler can raise anything if a file is no pickle
        if not trust and (name := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise ValueError(f"{file}: its pickle needs {name[1]}, which is no tensor, as in files that UMT's own "
                             "training writes; --trust opens it without running its code") from None
        reason = str(error).split("WeightsUnpickler error: ")[-1]
        raise ValueError(f"{file} is not a checkpoint that torch.load can read: {type(error).__name__} "
                         f"{reason!r:.120}") from None
    if not isinstance(content, dict):
        raise mismatch(file, "the content", "a dict of tensors", f"a {type(content).__name__}")
    for part in (content, content.get("model")):
        if isinstance(part, dict) and (others := [key for key in part if not isinstance(key, str)]):
            raise mismatch(file, "each key", "a text", f"a {type(others[0]).__name__}")
    report += [f"replaced {name} by an object that does nothing" for name in sorted(replaced)]
    if isinstance(content.get("model"), dict):
        report += [f"ignored  {key}: outside of the model" for key in content if key != "model"]
        content = content["model"]
    for title, family in FAMILIES.items():
        if all(any(match_rule({pattern: ""}, key) is not None for key in content) for pattern in family.signature):
            check_weights(content, file)
            return content, title, family
    raise mismatch(file, "its family", f"one of {', '.join(FAMILIES)}",
                   f"the keys {', '.join([*content][:4]) or 'of an empty dict'}, ...")


# ---------------------------------------------------------------------------------------------------------------------
# Converting

def join_qv_bias(weights: dict[str, Tensor], file: str) -> dict[str, Tensor]:
    """
    Replace q_bias and v_bias by one bias of q, k and v, under the key "(q_bias, 0, v_bias)".

    UMT's attention has no bias of k.
    """
    weights = dict(weights)
    for stem in dict.fromkeys(key[:-6] for key in weights if key.endswith((".q_bias", ".v_bias"))):
        q, v = (weights.pop(stem + name, torch.empty(0)) for name in ("q_bias", "v_bias"))
        if q.shape != v.shape or q.ndim != 1:
            raise mismatch(file, stem + "q_bias and v_bias", "vectors of one length", f"{(*q.shape, *v.shape)}")
        weights[stem + "(q_bias, 0, v_bias)"] = torch.cat([q, torch.zeros_like(q), v])
    return weights


def map_keys(family: Family, weights: dict[str, Tensor], file: str,
             report: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Report each key -> (our name: its key, our name: the key of a copy of this weight)."""
    keys, copies = {}, {}
    for key, x in weights.items():
        result = match_rule(family.rules, key)
        if result is None:
            raise mismatch(file, key, "absent, as no rule of FAMILIES matches it", tuple(x.shape))
        sign, name = {"-": ":", "=": " ="}.get(result[0], " ->"), result.lstrip("-= ")
        if sign == ":":
            action = "skipped"
        elif sign == " =":
            action, copies[name] = "tied", key
        else:
            action = "taken" if name == key else "joined" if key.endswith(")") else "renamed"
            keys[name] = key
        report.append(f"{action:9}{key} {tuple(x.shape)} {str(x.dtype)[6:]}{sign} {name}")
    return keys, copies


def infer_configs(family: Family, shapes: dict[str, tuple], file: str, key_rules: dict[str, str]) -> dict:
    """
    Infer the student's configs from the shapes of weights, by our names -> part of config.json: its dataclass.

    key_rules lead from our names to UMT's keys, for error messages.
    """
    def find_shape(name, ndim, width_axis=None):
        shape = shapes.get(name)
        if shape is None or len(shape) != ndim or (
                width_axis is not None and shape[width_axis] not in range(64, 2 ** 16, 64)):
            heads = f", number {width_axis} a multiple of the 64 channels of a head" * (width_axis is not None)
            raise mismatch(file, match_rule(key_rules, name), f"of {ndim} dimensions{heads}",
                           "no weight" if shape is None else shape)
        return shape

    def layers(pattern):
        numbers = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
        if max(numbers, default=0) >= len(shapes):
            raise mismatch(file, "the number of a layer", f"less than the number of keys, {len(shapes)}", max(numbers))
        return numbers

    C, *_, patch_size = find_shape("vit.patch_embed.weight", 5, 0)
    preset = PRESETS["large" if C >= 1024 else "base"]
    vit = replace(preset.vit, patch_size=patch_size, width=C, heads=C // 64,
                  depth=1 + max(layers(r"vit\.blocks\.(\d+)\."), default=-1))
    configs, layer_counts, usual_counts = {"vit": vit}, [vit.depth], [preset.vit.depth]
    if not family.vit_only:
        vocab_size, D = find_shape("bert." + WORDS, 2, 1)
        embed_dim = preset.model.embed_dim if family.has_question else find_shape("vision_proj.weight", 2)[0]
        layer = r"bert\.bert\.encoder\.layer\.(\d+)\."
        text = configs["text"] = replace(
            preset.text, width=D, heads=D // 64, depth=1 + max(layers(layer), default=-1),
            fusion_layers=len(layers(layer + r"crossattention\.")) or 1, vocab_size=vocab_size, mask_token_id=MASK_ID,
            max_length=family.max_length)
        configs["model"] = replace(preset.model, embed_dim=embed_dim, target_dim=C)
        layer_counts += text.depth, text.fusion_layers
        usual_counts += preset.text.depth, preset.text.fusion_layers
    if C == preset.vit.width and layer_counts != usual_counts:
        raise mismatch(file, f"the number of blocks, text layers and fusion layers of width {C}", usual_counts,
                       layer_counts)
    return configs


def build_model(family: Family, configs: dict) -> nn.Module:
    """A model with random weights, which depend on SEED alone; a ViT by itself is under the name "vit"."""
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        if family.vit_only:
            return nn.ModuleDict({"vit": ViT(configs["vit"])})
        parts = configs["vit"], configs["text"], configs["model"]
        return VideoToText(*parts, has_question=True) if family.has_question else ClusterSTM(*parts)


def convert(family: Family, weights: dict[str, Tensor], file: str, report: list[str]) -> tuple[nn.Module, dict]:
    """
    Build our model with UMT's weights -> (model, its configs by part of config.json).

    The report gets a line for each key of the file, and for each weight that the file does not have.
    """
    weights = join_qv_bias(weights, file)
    keys, copies = map_keys(family, weights, file, report)
    key_rules = {name: key for key, name in family.rules.items() if name[0] not in "-="}
    configs = infer_configs(family, {name: tuple(weights[key].shape) for name, key in keys.items()}, file, key_rules)
    model = build_model(family, configs)
    state, loaded = model.state_dict(), {}
    expected = {name: tuple(x.shape) for name, x in state.items() if not name.startswith(family.new_prefixes)}
    vit = configs["vit"]
    expected["vit.patch_embed.weight"] = vit.width, 3, 1, vit.patch_size, vit.patch_size    # a Conv3d over one frame
    for name in [*expected, *(name for name in keys if name not in expected)]:
        key = keys.get(name) or match_rule(key_rules, name)
        shape = tuple(weights[key].shape) if key in weights else "no weight"
        if shape != expected.get(name):
            raise mismatch(file, key, expected.get(name, f"absent, as a model of these sizes has no {name}"), shape)
        loaded[name] = weights[key].float().reshape(state[name].shape)
    for name, key in copies.items():
        if not torch.equal(weights[key].float(), loaded[name]):
            raise mismatch(file, key, f"equal to {keys[name]}, as the two are one weight here", "other values")
    report += [f"new      {name} {tuple(x.shape)}: not in the file; initialised with seed {SEED}"
               for name, x in state.items() if name not in loaded]
    model.load_state_dict(state | loaded)
    return model, configs


def check_tokenizer(tokenizer, path: str, family: Family, configs: dict):
    """Raise a ValueError unless the tokenizer's vocabulary is that of the file's word embedding."""
    if family.vit_only:
        raise ValueError(f"--tokenizer must be empty for a file that has a ViT alone, got {path}")
    expected = configs["text"].vocab_size, MASK_ID
    sizes = tokenizer.get_vocab_size(), tokenizer.token_to_id("[MASK]")
    if sizes != expected:
        raise mismatch(path, "its size and the id of [MASK]", expected, sizes)


def write_folder(out: str, config: dict, report: list[str], model: nn.Module, tokenizer):
    """Write the folder `out`, complete or not at all."""
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=os.path.basename(out) + ".", dir=os.path.dirname(out)) as folder:
        write_json(os.path.join(folder, "config.json"), config)
        atomic_write_text(os.path.join(folder, "report.txt"), "\n".join(report) + "\n")
        if tokenizer:
            atomic_write_text(os.path.join(folder, "tokenizer.json"), tokenizer.to_str(pretty=True))
        save_weights(model, folder)
        os.chmod(folder, 0o755)                     # temporary folders are private
        os.replace(folder, out)


@torch.no_grad()
def main(cfg: Config):
    """Convert as `cfg` says, and print the report."""
    out, report, tokenizer = os.path.abspath(cfg.out), [], None
    if os.path.exists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise ValueError(f"out must be a new or an empty folder, got {cfg.out}, which exists")
    if cfg.tokenizer:
        tokenizer = load_tokenizer(cfg.tokenizer)
    weights, title, family = read(cfg.file, cfg.trust, report)
    task = get_task(cfg.task) if cfg.task else None
    if task and task.kind not in family.task_kinds:
        kinds = " or ".join(TASK_KINDS[kind] for kind in family.task_kinds)
        raise ValueError(f"{cfg.file}: task must be {kinds or 'empty'} for a file of {title}, got {cfg.task}, "
                         f"{TASK_KINDS[task.kind]}")
    model, configs = convert(family, weights, cfg.file, report)
    if task:
        configs["text"] = replace(configs["text"], max_length=task.max_text_length)
    if tokenizer:
        check_tokenizer(tokenizer, cfg.tokenizer, family, configs)
    counts = Counter(line.split()[0] for line in report)
    report.append(f"{cfg.file}, {title}, {len(weights)} keys: "
                  + ", ".join(f"{n} {action}" for action, n in counts.items()))
    if family.task_kinds and not task:
        report.append("--task was not given, so eval.py takes as many frames as for a pretrained model; give the task, "
                      f"or call eval.py --frames {family.num_frames}")
    if not (tokenizer or family.vit_only):
        report.append("tokenizer.json is missing, which eval.py needs: --tokenizer adds that of bert-base-uncased")
    report = [escape_control(line) for line in report]          # a file's keys and names may hold anything
    config = {"model_type": "clusterstm" + "-vit" * family.vit_only, "source": f"{title}: {os.path.basename(cfg.file)}",
              **{part: asdict(values) for part, values in configs.items()}, "new": family.new_prefixes,
              "data": {"num_frames": family.num_frames, "image_size": 224}, "mask": {"name": "umt", "ratio": 0.8},
              "teacher": "", "task": cfg.task}
    write_folder(out, config, report, model, tokenizer)
    print(*report, f"written to {cfg.out}", sep="\n")


if __name__ == "__main__":
    run_cli("tools.convert", lambda: main(tyro.cli(Config, prog="python -m tools.convert")))
