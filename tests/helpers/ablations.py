"""Ablations in small: students of four steps on 24 clips, and jobs for them."""

import json
import re
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import replace

import torch

import runtime
from config import Config
from data import DataConfig
from encoders import TextEncoderConfig, ViTConfig
from helpers.runs import run_main
from masking import MaskConfig
from model import ModelConfig
from tools import ablations
from tools.ablations import Job, Table
from tools.sprites import write_sprites
from tools.toy_teacher import ToyConfig

TINY = Config(          # frames of 4 x 4 tokens; 16 clips to train on, 8 for validation, 8 to test
    batch=8, micro_batch=4, steps=4, unmasked_steps=2, unmasked_batch=8, lr=2e-3, log_every=1, save_every=10 ** 9,
    keep_checkpoints=1, data=DataConfig(num_frames=4, image_size=16), mask=MaskConfig(ratio=0.75, quantile=0.95),
    vit=ViTConfig(patch_size=4, width=16, depth=2, heads=2, drop_path=0.1, pos_embed="3d"),
    text=TextEncoderConfig(width=16, depth=2, heads=2, fusion_layers=1, dropout=0.1, max_length=24),
    model=ModelConfig(embed_dim=8, decoder_width=16, decoder_depth=1, decoder_heads=2, decoder_query_ratio=0.5),
    toy=ToyConfig(width=16, text_depth=1, heads=2, batch=8, steps=2, text_steps=2, text_batch=8),
)
BASE = Job("retrieval", "{}", 0, False)
SETTINGS = {
    "WARM_START": {"batch": 8, "steps": 3, "lr": 2e-3}, "REDUCED": TINY, "FULL": replace(TINY, steps=5),
    "CLIPS": {False: 24, True: 24}, "NUM_TEST": 8, "NUM_VAL": 8, "CHUNK": 5,
    "QA_SETTINGS": {"steps": 3, "batch": 8, "lr": 1e-3},
    "TABLES": {"first": Table("which mask", {"base": {}, "other": {"mask.name": "random_frame"}}),
               "second": Table("a table that has the base too", {"the same": {}, "short": {"unmasked_steps": 1}})},
    "write_sprites": lambda folder, seed, train, test, *_: write_sprites(folder, seed, train, test, 2, "crowd"),
    "num_cpus": lambda: 1,
}


def as_json(changes):
    return json.dumps(changes, sort_keys=True)


def job(task="retrieval", seed=0, full=False, **changes):
    """A job; mask_name="tube" changes mask.name."""
    return Job(task, as_json({re.sub("^(mask|model)_", r"\1.", k): v for k, v in changes.items()}), seed, full)


def shrink(patch):
    for name, value in SETTINGS.items():
        patch.setattr(ablations, name, deepcopy(value))
    patch.setattr(torch.cuda, "is_available", lambda: False)                # equal results are equal bit for bit


class SerialPool:
    """A process pool that runs its jobs in this process."""
    sizes = []

    def __init__(self, count, *_):
        self.sizes.append(count)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def run(capsys, line):
    """`python -m tools.ablations LINE` -> exit code, stdout, stderr."""
    main = lambda: runtime.run_cli("tools.ablations", ablations.cli)
    return run_main(main, ["tools.ablations", *line.split()], capsys)
