"""
Measure what fp8 in the teacher's image tower changes in masks and targets: a teacher, clips -> a table.

    python -m tools.fp8 --teacher out/demo/seed0/teacher    # the teacher of the demo
    python -m tools.fp8 --preset base --count 4             # a SigLIP-B/16 of random weights

The reference is the teacher in fp32. It is compared with the teacher in bf16, and with the teacher in bf16 whose image
tower has its layers in fp8 (teacher.use_fp8). PyTorch multiplies fp8 matrices on a CPU too (torch 2.13).

ids changed     share of the visible ids of the reference that the row's mask does not keep
tokens          cosine of a patch token with the reference's; mean, and the 1 % quantile over tokens
token targets   the same of the token targets
text embeds     the same of the captions' embeddings; the text tower is in bf16 in both rows
"""

import copy
import tempfile
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as nnf
import tyro
from torch import Tensor

from annotations import read_annotations
from config import PRESETS
from data import ClipDataset, DataConfig
from runtime import run_cli
from siglip_files import SigLIPConfig, TextConfig
from targets import compute_targets
from teacher import SigLIP, use_fp8
from tokenizer import build_wordpiece, load_tokenizer
from tools.tables import banner, print_header, print_row


@dataclass
class Config:
    """Compare the masks and targets of a teacher in bf16 and in fp8 with those in fp32."""
    teacher: str = ""           # folder or hub id of a SigLIP; empty: a SigLIP-B/16 of random weights
    preset: Literal["sprites", "base"] = "sprites"      # preset of train.py that gives the mask
    clips: str = "data/sprites"     # folder that tools.sprites wrote
    count: int = 32             # clips of its test split
    commit: str = ""            # commit to print above the table; empty: ask git

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"--count must be at least 1, got {self.count}")


def load_batch(cfg: Config) -> SimpleNamespace:
    """Read the first clips of the test split -> video (B, T, 3, H, W), captions, seed."""
    annotations = read_annotations(f"{cfg.clips}/sprites_test.json", f"{cfg.clips}/videos", check=False)
    dataset = ClipDataset(annotations, DataConfig(frame_cache=False), train=False)
    samples = [dataset[i] for i in range(min(cfg.count, len(annotations)))]
    return SimpleNamespace(video=torch.stack([s.video for s in samples]), captions=[s.caption for s in samples], seed=0)


def build_teacher(cfg: Config, captions: list[str], folder: str) -> SigLIP:
    """Load the teacher in fp32, or build one of random weights with a tokenizer of the captions, written to folder."""
    if cfg.teacher:
        return SigLIP.from_pretrained(cfg.teacher)
    build_wordpiece(captions, f"{folder}/tokenizer.json")
    torch.manual_seed(0)
    model = SigLIP(SigLIPConfig(text_config=TextConfig(pad_token_id=0)), load_tokenizer(f"{folder}/tokenizer.json"))
    return model.eval().requires_grad_(False)


def compare(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Cosines of the vectors of a and b (..., C) -> their mean and their 1 % quantile."""
    cosine = nnf.cosine_similarity(a.double(), b.double(), dim=-1).flatten()
    return cosine.mean().item(), cosine.sort().values[int(0.01 * len(cosine))].item()


@torch.no_grad()
def run_teacher(teacher: SigLIP, batch: SimpleNamespace, mask) -> dict[str, Tensor]:
    """Apply a teacher and the mask -> visible ids (B, S), tokens (F, N, C), token targets, text embeddings."""
    targets = compute_targets(teacher, batch, mask, mask.ratio, grid=teacher.patch_grid)
    tokens = teacher.forward_features(teacher.normalize(batch.video.flatten(0, 1), teacher.patch_grid))
    return {"visible_ids": targets.visible_ids, "tokens": tokens, "token targets": targets.token_targets,
            "text embeds": targets.text_embeds}


def share_changed(ids: Tensor, expected: Tensor) -> float:
    """Share of the expected ids (B, S), of each clip without repeats, that ids (B, S) does not have."""
    return 1 - (ids[:, :, None] == expected[:, None]).any(1).double().mean().item()


def main(cfg: Config):
    banner("cpu", cfg.commit, "tools.fp8")
    batch, mask = load_batch(cfg), PRESETS[cfg.preset].mask
    with tempfile.TemporaryDirectory() as folder:
        teacher = build_teacher(cfg, batch.captions, folder)
    expected, names = run_teacher(teacher, batch, mask), ("tokens", "token targets", "text embeds")
    title = f"{cfg.teacher or 'SigLIP-B/16 of random weights'}, {len(batch.video)} clips, {mask.name} {mask.ratio}"
    print_header(f"{title}: cosines with fp32", "teacher", "ids changed",
                 *(f"{name}, {of}" for name in names for of in ("mean", "1 %")))
    for row, fp8 in (("bf16", False), ("bf16, image tower in fp8", True)):
        changed = copy.deepcopy(teacher).bfloat16()
        if fp8:
            use_fp8(changed)
        result = run_teacher(changed, batch, mask)
        cosines = (f"{x:.5f}" for name in names for x in compare(result[name], expected[name]))
        print_row(row, f"{100 * share_changed(result['visible_ids'], expected['visible_ids']):.2f} %", *cosines)


if __name__ == "__main__":
    run_cli("tools.fp8", lambda: main(tyro.cli(Config, prog="python -m tools.fp8")))
