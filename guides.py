"""
The teacher's word: asked, or asked once and kept.

A clip with V fixed views (--data.views) shows them again and again. Each is put to the teacher in the first pass over
them, and what it said is read from then on, so that later passes never run it. A view's record in
out/NAME/guide/words has what the student needs: a bit for each token, kept or not; the caption's vector in fp32; the
targets p of all tokens, whole in fp16 or as k numbers of eight bits each (--guide-codes k),

    p ~ mean + W^-1 U U^T W (p - mean),    W = (mean of s s^T over texts)^1/2,  U: k principal axes of W (p - mean),

which loses as little as k numbers can of what the loss compares, (q - p)^T G (q - p) (docs/method.md).
"""

import json
import math
import os
import shutil
import zlib
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

import data
from data import Batch, Clips, UnreadableError
from masking import keep_count, sent
from model import stream
from runs import BadMedia, Run, Word, same_config
from teacher import Guide, SigLIP, guide

CLIPS, TEXTS = 512, 4096        # of which the codes are made


@dataclass
class Codes:
    """Vectors of width E as k whole numbers from -127 to 127."""
    mean: Tensor        # (E,)
    into: Tensor        # (E, k)
    out: Tensor         # (k, E)

    def code(self, p: Tensor) -> Tensor:
        """p (..., E) -> (..., k) int8."""
        with torch.autocast(p.device.type, enabled=False):      # a step's bf16 has no more bits than the codes
            return ((p.float() - self.mean) @ self.into).round_().clamp_(-127, 127).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """(..., k) -> (..., E) fp32."""
        with torch.autocast(codes.device.type, enabled=False):
            return self.mean + codes.float() @ self.out


def fit_codes(p: Tensor, texts: Tensor, k: int) -> Codes:
    """From targets p (n, E) and texts (M, E)."""
    E = p.shape[1]
    if not 1 <= k <= E:
        raise ValueError(f"guide_codes {k}: targets have {E} numbers, 1 to {E} can be kept of them")
    p, texts = p.double(), texts.double()
    gram = texts.T @ texts / len(texts)
    values, axes = torch.linalg.eigh(gram + 1e-3 * gram.trace() / E * torch.eye(E, dtype=gram.dtype))
    root, inverse = (axes * values ** power @ axes.T for power in (0.5, -0.5))
    mean = p.mean(0)
    away = (p - mean) @ root
    _, axes = torch.linalg.eigh(away.T @ away)
    axes = axes[:, -k:].flip(1)                                                     # (E, k), the widest first
    unit = (away @ axes).abs().amax(0).clamp_min(1e-12) / 120                       # a little room past the widest seen
    return Codes(mean.float(), (root @ axes / unit).float(), ((axes * unit).T @ inverse).float())


def relevance_error(codes: Codes, p: Tensor, texts: Tensor) -> float:
    """What the codes lose of p (clips, n, E), as a share of v: what they add to the loss of a perfect student."""
    gram = texts.double().T @ texts.double() / len(texts)
    form = lambda e: ((e.double() @ gram) * e.double()).sum(-1).mean()
    return (form(p - codes.decode(codes.code(p))) / form(p - p.mean(1, keepdim=True))).item()


class Guides:
    """What the teacher tells the student of a step's micro-batches; see above."""

    def __init__(self, run: Run, teacher: SigLIP, clips: Clips, tokenizer):
        cfg = run.cfg
        self.run, self.teacher, self.views, self.bad = run, teacher, cfg.data.views, BadMedia(run.folder)
        self.folder, self.codes, self.coming = os.path.join(run.folder, "guide"), None, []
        again = self.views and cfg.steps * cfg.batch >= 2 * self.views * len(clips) and isinstance(clips, Clips)
        one_host = os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")     # writes one file
        self.kept = bool(again and one_host and (not cfg.mask.drawn or cfg.mask.blind))
        if self.kept:
            self.pass_ends = math.ceil(self.views * len(clips) / cfg.batch) * cfg.batch     # the sample after it
            self.met = False
            self.open(clips, tokenizer)

    def __call__(self, batches: list[Batch]) -> list[Guide]:
        if not self.kept:
            return [self.ask(b) for b in batches]
        self.write_down()
        if batches[0].n < self.pass_ends:
            return [self.ask_and_keep(b) for b in batches]
        if not self.met:            # before anything is read, all ranks have written
            self.run.wait()
            self.met = True
        return [self.look_up(b) or self.ask_and_keep(b) for b in batches]

    def ask(self, batch: Batch) -> Guide:
        cfg = self.run.cfg
        # On a GPU a NaN shows in the loss: the mask does not wait for the device to look for one.
        check = batch.video.device.type != "cuda"
        grid = (cfg.data.size // cfg.model.patch,) * 2          # the student's: a teacher token for each of its patches
        image = cfg.data.images and batch.video.shape[1] == 1
        return guide(self.teacher, batch, cfg.mask, cfg.mask.image_ratio if image else cfg.mask.ratio, cfg.pool, check,
                     grid)

    # A record of the file: codes of the targets, bits, text, and the sum of these bytes

    def open(self, clips: Clips, tokenizer):
        """The file, from which a resumed run reads on; and the codes."""
        run, cfg = self.run, self.run.cfg
        path, begun = os.path.join(self.folder, "words"), os.path.join(self.folder, "config.json")
        if cfg.resume and os.path.isfile(begun):
            with open(begun) as f:
                same_config(json.load(f), asdict(cfg), begun)
        run.wait()
        if run.rank == 0 and not (cfg.resume and os.path.isfile(begun)):
            shutil.rmtree(self.folder, ignore_errors=True)
            os.makedirs(self.folder)
            open(path, "wb").close()
            data.write_atomically(begun, json.dumps(asdict(cfg)))
        run.wait()
        self.file = os.open(path, os.O_RDWR | os.O_CREAT)
        run.closing.callback(os.close, self.file)
        N = (cfg.data.size // cfg.model.patch) ** 2
        E = self.teacher.cfg.vision_config.hidden_size
        self.shape = (cfg.data.frames, N, cfg.guide_codes or E)                         # of a record's targets
        self.sizes = [math.prod(self.shape) * (1 if cfg.guide_codes else 2), math.ceil(cfg.data.frames * N / 8), 4 * E]
        path = os.path.join(self.folder, "codes.pt")            # made once: what they were, the records are read by
        if cfg.guide_codes and run.rank == 0 and not os.path.isfile(path):
            run.at.update(folder=run.folder, step="asking the teacher")
            codes, said = self.make_codes(clips, tokenizer)
            with data.appearing(path) as f:
                torch.save(codes, f)
            total = (sum(self.sizes) + 4) * self.views * len(clips) / 1e9
            print(f"{self.folder}: {cfg.guide_codes} codes a target lose {100 * said:.2g} % of v; {total:.3g} GB",
                  flush=True)
        run.wait()
        if cfg.guide_codes:
            self.codes = Codes(*torch.load(path, map_location=run.device, weights_only=True))

    def make_codes(self, clips: Clips, tokenizer, chunk: int = 32) -> tuple[list[Tensor], float]:
        """The codes of a sample's targets, and what such codes of half of it lose on the other half."""
        cfg, p, texts = self.run.cfg, [], []
        spaced = lambda most: torch.linspace(0, len(clips) - 1, min(len(clips), most), dtype=torch.float64).long()
        with torch.no_grad():
            for rows in spaced(TEXTS).split(256):
                captions = [clips.rows[row].captions[0] for row in rows.tolist()]
                texts.append(self.teacher.encode_text(self.teacher.tokenize(captions)).float().cpu())
        for rows in spaced(CLIPS).split(chunk):
            samples = []
            for row in rows.tolist():
                try:
                    samples.append(clips.view(row, 0))
                except UnreadableError as error:
                    self.bad.add([error.about])
            if samples:
                batch = data.collate(samples, tokenizer, cfg.model.text_length, seed=0, sep=cfg.model.sep)
                told = self.ask(batch.to(self.run.device))
                every = max(1, told.aligned[0, ..., 0].numel() // 64)                   # 64 tokens of a clip are enough
                p.append(told.aligned.flatten(1, 2)[:, ::every].float().cpu())
        if sum(map(len, p)) < 2:
            raise ValueError(f"guide_codes {cfg.guide_codes}: of {len(clips)} clips two are wanted that can be read")
        p, texts = torch.cat(p), torch.cat(texts)
        lost = relevance_error(fit_codes(p[::2].flatten(0, 1), texts[::2], cfg.guide_codes), p[1::2], texts[1::2])
        codes = fit_codes(p.flatten(0, 1), texts, cfg.guide_codes)
        return [codes.mean, codes.into, codes.out], lost

    def rows(self, batch: Batch) -> list[int]:
        return (batch.clip * self.views + batch.view).tolist()

    def ask_and_keep(self, batch: Batch) -> Guide:
        """
        What the teacher says now, in the numbers in which it will be read. Its record is written once the host has it:
        at the next call, or before a state is written, which wants it to be there.
        """
        told = self.ask(batch)
        targets = self.codes.code(told.aligned) if self.codes else told.aligned.half()
        bits = torch.zeros(told.keep.shape[0], math.prod(self.shape[:2]), dtype=torch.bool, device=told.keep.device)
        self.coming.append((self.rows(batch), [Word(targets), Word(bits.scatter(1, told.keep, True)),
                                               Word(told.text.float())]))
        return Guide(told.keep, targets, told.text.float(), self.basis())

    def settle(self):
        """What all ranks were told is written: a state that goes on from here wants it to be there."""
        self.write_down()
        if self.kept:
            self.run.wait()

    def write_down(self):
        for rows, words in self.coming:
            targets, bits, text = (word.tensor().numpy() for word in words)
            for row, *parts in zip(rows, targets, np.packbits(bits, 1), text, strict=True):
                record = b"".join(part.tobytes() for part in parts)
                record += zlib.crc32(record, row + 1).to_bytes(4, "little")
                os.pwrite(self.file, record, row * len(record))
        self.coming = []

    def look_up(self, batch: Batch) -> Guide | None:
        """What was said of these views; None if one of them has no whole record, as when its video was unreadable."""
        size, records, cfg = sum(self.sizes) + 4, [], self.run.cfg
        for row in self.rows(batch):
            record = os.pread(self.file, size, row * size)
            if len(record) < size or zlib.crc32(record[:-4], row + 1) != int.from_bytes(record[-4:], "little"):
                return None
            records.append(np.frombuffer(record, np.uint8))
        targets, bits, text = np.split(np.stack(records)[:, :-4], np.cumsum(self.sizes[:2]), 1)
        targets = np.ascontiguousarray(targets).view(np.int8 if self.codes else np.float16)
        there = np.unpackbits(bits, 1, count=math.prod(self.shape[:2]))                 # (B, TN)
        device = batch.video.device
        aligned = sent(torch.from_numpy(targets), device).unflatten(1, self.shape)
        if cfg.mask.drawn:
            keep = cfg.mask(aligned[..., :1].float(), keep_count(self.shape[1], cfg.mask.ratio), check=False,
                            generator=stream(batch, 0))
        else:
            keep = sent(torch.from_numpy(there.nonzero()[1].reshape(len(there), -1)), device)
        text = sent(torch.from_numpy(np.ascontiguousarray(text).view(np.float32)), device)
        return Guide(keep, aligned, text, self.basis())

    def basis(self) -> tuple[Tensor, Tensor] | None:
        return self.codes and (self.codes.mean, self.codes.out)

    def forget(self):
        """What was kept, once nobody needs it."""
        self.run.wait()
        if self.kept and self.run.rank == 0:
            shutil.rmtree(self.folder)
