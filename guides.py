"""
The teacher's word: asked, or asked once and kept.

A clip with V fixed views (--data.views) shows them again and again. Each is put to the teacher in the first pass over
them, and what it said is read from then on, so that later passes never run it. A view's record in
out/NAME/guide/words has what the student needs: a bit for each token, kept or not; the caption's vector in fp32; of
each kept token how many it stands for, where that counts; the targets p of all tokens, whole in fp16 or as k numbers of
eight bits each (--guide-codes k),

    p ~ mean + W^-1 U U^T W (p - mean),    W = (mean of s s^T over texts)^1/2,  U: k principal axes of W (p - mean),

which loses as little as k numbers can of what the loss compares, (q - p)^T G (q - p) (docs/method.md).
"""

import errno
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
from runs import BadMedia, Run, Word, same_config, whole_state
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


class Records:
    """
    A file with a record for each view: targets (T, N, k) int8 or (T, N, E) fp16, a bit for each token, kept or not, the
    caption's vector (E,) fp32, how many tokens each of the kept stands for (TK,) int16 if sized, and the sum of these
    bytes.
    """

    def __init__(self, path: str, T: int, N: int, K: int, E: int, codes: Codes | None, sized: bool = False):
        self.shape, self.kept, self.codes, self.sized = (T, N, codes.out.shape[0] if codes else E), T * K, codes, sized
        self.sizes = [math.prod(self.shape) * (1 if codes else 2), math.ceil(T * N / 8), 4 * E, 2 * T * K * sized]
        self.size = sum(self.sizes) + 4
        # Records are read with the codes that they were written in, or not at all.
        self.seal = zlib.crc32(b"".join(x.cpu().numpy().tobytes() for x in vars(codes).values())) if codes else 0
        self.file = open(path, "r+b", buffering=0)      # noqa: SIM115  (its owner closes it)

    def sum(self, record, row: int) -> bytes:
        return zlib.crc32(record, (row + 1) ^ self.seal).to_bytes(4, "little")

    def in_numbers(self, told: Guide) -> Guide:
        """What is told in the numbers in which it will be read. A NaN, which no code says, goes on in the text."""
        aligned = self.codes.code(told.aligned) if self.codes else told.aligned.half()
        text = told.text.float() + 0 * told.aligned.float().sum((1, 2, 3))[:, None]
        return Guide(told.keep, aligned, text, self.basis(), told.size)

    def basis(self) -> tuple[Tensor, Tensor] | None:
        return self.codes and (self.codes.mean, self.codes.out)

    def words(self, told: Guide) -> list[Word]:
        """The parts of the records of `in_numbers`, on their way to the host."""
        bits = torch.zeros(len(told.keep), math.prod(self.shape[:2]), dtype=torch.bool, device=told.keep.device)
        size = [Word(told.size.to(torch.int16))] if self.sized else []
        return [Word(told.aligned), Word(bits.scatter(1, told.keep, True)), Word(told.text), *size]

    def write(self, rows: list[int], words: list[Word]):
        targets, bits, *others = (word.tensor().numpy() for word in words)
        for row, *parts in zip(rows, targets, np.packbits(bits, 1), *others, strict=True):
            record = b"".join(part.tobytes() for part in parts)
            record += self.sum(record, row)
            if os.pwrite(self.file.fileno(), record, row * self.size) < self.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self, rows: list[int], device: torch.device) -> Guide | None:
        """None if one of the rows has no whole record."""
        buffer = torch.empty(len(rows), self.size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for row, record in zip(rows, buffer.numpy(), strict=True):
            there = os.preadv(self.file.fileno(), [record], row * self.size)
            if there < self.size or self.sum(record[:-4], row) != record[-4:].tobytes():
                return None
        # Copies, as a part of a lone record may begin at a byte where no number may.
        targets, bits, text, size, _ = (part.clone(memory_format=torch.contiguous_format)
                                        for part in sent(buffer, device).split([*self.sizes, 4], 1))
        aligned = targets.view(torch.int8 if self.codes else torch.float16).unflatten(1, self.shape)
        bits = bits[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8, device=device) & 1     # (B, TN / 8, 8)
        masked = 1 - bits.flatten(1)[:, :math.prod(self.shape[:2])]
        keep = masked.argsort(dim=1, stable=True)[:, :self.kept]
        size = size.view(torch.int16).float() if self.sized else None
        return Guide(keep, aligned, text.view(torch.float32), self.basis(), size)


class Guides:
    """What the teacher tells the student of a step's micro-batches; see above."""

    def __init__(self, run: Run, teacher: SigLIP, clips: Clips, tokenizer):
        cfg = run.cfg
        self.run, self.teacher, self.views, self.bad = run, teacher, cfg.data.views, BadMedia(run.folder)
        self.folder, self.coming = os.path.join(run.folder, "guide"), []
        self.grid = (cfg.data.size // cfg.model.patch,) * 2     # the student's: a teacher token for each of its patches
        one_host = os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")     # writes one file
        why = [reason for reason, there in (
            ("there are images", not isinstance(clips, Clips)),
            ("views come round less than twice", cfg.steps * cfg.batch < 2 * self.views * len(clips)),
            ("there are several hosts", not one_host),
            (f"the mask {cfg.mask.name} draws from what it knows", cfg.mask.drawn and not cfg.mask.blind),
            ("what a drawn token stands for is asked anew", cfg.mask.drawn and cfg.model.proportional)) if there]
        self.kept = self.views > 0 and not why
        if cfg.guide_codes and not self.kept and run.rank == 0:
            print(f"--guide-codes: the teacher is asked at each step, nothing is kept, as {' and '.join(why)}",
                  flush=True)
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
        image = cfg.data.images and batch.video.shape[1] == 1
        return guide(self.teacher, batch, cfg.mask, cfg.mask.image_ratio if image else cfg.mask.ratio, cfg.pool, check,
                     self.grid, cfg.model.proportional)

    def open(self, clips: Clips, tokenizer):
        """The file, from which a resumed run reads on; and the codes."""
        run, cfg = self.run, self.run.cfg
        words, codes, begun = (os.path.join(self.folder, name) for name in ("words", "codes.pt", "config.json"))
        if cfg.resume and os.path.isfile(begun):
            with open(begun) as f:
                same_config(json.load(f), asdict(cfg), begun)
        run.wait()
        N, E = (cfg.data.size // cfg.model.patch) ** 2, self.teacher.cfg.vision_config.hidden_size
        K = keep_count(N, cfg.mask.ratio)
        if run.rank == 0:
            if not (cfg.resume and os.path.isfile(begun)):
                shutil.rmtree(self.folder, ignore_errors=True)
                os.makedirs(self.folder)
            said = ""
            if cfg.guide_codes and not os.path.isfile(codes):   # made once
                run.at.update(folder=run.folder, step="asking the teacher")
                made, lost = self.make_codes(clips, tokenizer)
                with data.appearing(codes) as f:
                    torch.save([*vars(made).values()], f)
                said = f", {cfg.guide_codes} codes a target, which lose {100 * lost:.2g} % of v"
            if not os.path.isfile(words):
                open(words, "wb").close()
        run.wait()
        made = Codes(*torch.load(codes, map_location=run.device, weights_only=True)) if cfg.guide_codes else None
        self.records = Records(words, cfg.data.frames, N, K, E, made, cfg.model.proportional)
        run.closing.enter_context(self.records.file)
        if run.rank == 0 and not os.path.isfile(begun):
            views = self.views * len(clips)
            total, free = self.records.size * views, shutil.disk_usage(self.folder).free
            if total > free:
                raise ValueError(f"{self.folder}: what the teacher says of {views} views takes {total / 1e9:.3g} GB, "
                                 f"and {free / 1e9:.3g} GB are free; with --guide-codes it takes less")
            if said or total > 1e9:
                print(f"{self.folder}: {total / 1e9:.3g} GB{said}", flush=True)
            data.write_atomically(begun, json.dumps(asdict(cfg)))

    def make_codes(self, clips: Clips, tokenizer, chunk: int = 32) -> tuple[Codes, float]:
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
        return fit_codes(p.flatten(0, 1), texts, cfg.guide_codes), lost

    def rows(self, batch: Batch) -> list[int]:
        return (batch.clip * self.views + batch.view).tolist()

    def ask_and_keep(self, batch: Batch) -> Guide:
        """
        What the teacher says now, in the numbers in which it will be read. Its record is written once the host has it:
        at the next call, or before a state is written, which wants it to be there.
        """
        told = self.records.in_numbers(self.ask(batch))
        self.coming.append((self.rows(batch), self.records.words(told)))
        return told

    def write_down(self):
        try:
            for rows, words in self.coming:
                self.records.write(rows, words)
        except OSError as error:
            raise OSError(f"{self.records.file.name} could not be written ({error.strerror}); "
                          f"{whole_state(self.run.folder)}") from None
        self.coming = []

    def settle(self):
        """What all ranks were told is written: a state that goes on from here wants it to be there."""
        self.write_down()
        if self.kept:
            self.run.wait()

    def look_up(self, batch: Batch) -> Guide | None:
        """What was said of these views; None if one of them has no whole record, as when its video was unreadable."""
        cfg, told = self.run.cfg, self.records.read(self.rows(batch), batch.video.device)
        if told and cfg.mask.drawn:         # of the tokens' places alone: drawn as the teacher's answer would be
            told.keep = cfg.mask(told.aligned[..., :1].float(), keep_count(told.aligned.shape[2], cfg.mask.ratio),
                                 check=False, generator=stream(batch, 0), grid=self.grid)
        return told

    def forget(self):
        """What was kept, once nobody needs it."""
        if self.kept:
            self.records.file.close()
        self.run.wait()
        if self.kept and self.run.rank == 0:
            shutil.rmtree(self.folder)
