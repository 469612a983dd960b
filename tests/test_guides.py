"""The teacher's word that is kept: what is read is what was said, whatever befell the file; and what codes lose."""

import math
import os
import re
import shutil
from copy import deepcopy
from types import SimpleNamespace

import pytest
import test_train
import torch
from test_train import (  # noqa: F401  (two are fixtures)
    Killed,
    argv,
    assert_close_runs,
    assert_one_line,
    assert_same,
    command,
    first_run,
    kill,
    log,
    on_ranks,
    small_sprites,
    weights,
)

import data
import train
from data import Clips
from guides import Guides, fit_codes, relevance_error
from teacher import Guide, SigLIP, guide

given = test_train.given                            # fixture
B, E, TN = 8, 16, 4 * 16                            # of a step, as TINY has it: 24 clips, frames of 4 x 4 tokens


# ---------------------------------------------------------------------------------------------------------------------
# What is read is what was said

class Told:
    """Guides as a run has them, the micro-batches of its steps, and how many frames the teacher saw."""

    def __init__(self, cfg, step=0):
        cfg = deepcopy(cfg)
        self.clips = Clips(data.read_annotations(cfg.data.train, cfg.data.root), cfg.data, cfg.seed)
        self.tokenizer = data.load_tokenizer(cfg.text)
        self.run = train.Run(cfg, f"out/{cfg.name}", torch.device("cpu"), 0, 1)
        self.teacher, self.frames = SigLIP.from_pretrained(cfg.teacher), 0
        real = self.teacher.tokens

        def tokens(pixels):
            self.frames += len(pixels)
            return real(pixels)

        self.teacher.tokens = tokens
        self.guides = Guides(self.run, self.teacher, self.clips, self.tokenizer)
        self.groups = train.micro_batches(self.run, self.clips, self.tokenizer, "pretrain", cfg.batch,
                                          cfg.micro_batch or cfg.batch, step, cfg.steps)
        self.frames = 0

    def step(self, group=None):
        """-> [(micro-batch, what is said of it)], how many of its clips the teacher was asked about."""
        group, before = group or next(self.groups), self.frames
        told = self.guides(group)
        return list(zip(group, told, strict=True)), (self.frames - before) // 4

    def asked(self, batch):
        """What the teacher says, on a side channel."""
        cfg, before = self.run.cfg, self.frames
        told = guide(self.teacher, batch, cfg.mask, cfg.mask.ratio, cfg.pool, grid=(16 // cfg.model.patch,) * 2,
                     sized=cfg.model.proportional)
        self.frames = before
        return told

    @property
    def codes(self):
        return self.guides.records.codes if self.guides.kept else None

    def leave(self):
        self.run.closing.close()


def assert_told(told, asked, codes=None):
    """To fp16, or to the codes."""
    assert torch.equal(told.keep, asked.keep) and told.keep.dtype == torch.int64
    assert told.size is asked.size is None or torch.equal(told.size, asked.size) and told.size.max() > 1
    torch.testing.assert_close(told.text, asked.text, rtol=0, atol=1e-6)
    assert told.text.dtype == torch.float32
    every = torch.arange(asked.aligned[0, ..., 0].numel()).expand(len(asked.keep), -1)
    found, expected = told.at(every), asked.aligned.flatten(1, 2)
    assert found.dtype == torch.float32
    if codes is None or told.basis is None:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)
    else:
        unit = codes.out.abs().sum(0)               # a code's last bit may fall otherwise in another micro-batch
        assert ((found - codes.decode(codes.code(expected))).abs() <= 0.01 * unit + 1e-5).float().mean() > 0.99
        assert told.aligned.dtype == torch.int8


@pytest.mark.parametrize("flags, kept", [
    ("--data.views 1", True),
    ("--data.views 1 --guide-codes 5", True),
    ("--data.views 2", True),
    ("--data.views 2 --guide-codes 16 --mask.name tube", True),
    ("--data.views 2 --mask.name random_frame", True),
    ("--data.views 1 --mask.name random", True),
    ("--data.views 1 --mask.name block3d", True),
    ("--data.views 1 --mask.name divprune --guide-codes 5", True),
    ("--data.views 1 --mask.pick centre --pool mean", True),
    ("--data.views 1 --model.patch 8", True),       # whose tokens are 16 of the teacher's, put in 4
    ("--data.views 1 --data.frames 3 --model.patch 8 --mask.ratio 0.5", True),      # 12 tokens: not whole bytes
    ("--data.views 1 --mask.ratio 0", True),
    ("--data.views 1 --model.proportional", True),
    ("--data.views 2 --model.proportional --guide-codes 5 --mask.name dynamic", True),
    ("--data.views 1 --model.proportional --data.frames 3 --model.patch 8 --mask.ratio 0.5 --micro-batch 1", True),
    ("--data.views 2 --model.proportional --mask.name random_frame", False),            # what is drawn is not measured
    ("--data.views 1 --model.proportional --mask.name tube --guide-codes 5", False),
    ("--data.views 1 --batch 10 --micro-batch 5", True),                            # a pass ends within a step
    ("--data.views 1 --mask.pick random", False),   # the teacher's clusters, drawn from anew
    ("--data.views 1 --mask.name umt", False),
    ("--data.views 0", False),
    ("--data.views 4", False),                      # a view comes round less than twice
])
def test_each_view_is_asked_about_once_and_read_as_it_was_said(given, flags, kept):
    a = Told(given(f"--name a {flags}"))
    cfg, keeps = a.run.cfg, {}
    assert a.guides.kept == kept == os.path.exists("out/a/guide")
    first = math.ceil(24 * cfg.data.views / cfg.batch) if kept else 99      # steps in which it is asked
    for step in range(2 * first + 2 if kept else 6):
        said, asked = a.step()
        assert asked * 4 // cfg.data.frames in (cfg.batch * (step < first), cfg.batch * (step < first) * 3 // 4)
        for batch, told in said:
            assert_told(told, a.asked(batch), a.codes)
            assert told.basis is not None or not cfg.guide_codes or step < first
            for clip, view, keep in zip(batch.clip.tolist(), batch.view.tolist(), told.keep.tolist(), strict=True):
                keeps.setdefault((clip, view), []).append(tuple(keep))
    assert not kept or min(map(len, keeps.values())) > 1 and len(keeps) == 24 * cfg.data.views
    anew = sum(len(set(some)) > 1 for some in keeps.values())
    assert anew == 0 if not cfg.mask.drawn else not kept or anew > 10
    a.guides.forget()
    assert not os.path.exists("out/a/guide")
    a.leave()


def test_what_a_mix_of_videos_and_images_shows_is_not_kept(given):
    a = Told(given("--name a"))
    shutil.rmtree("out")
    mix = Guides(a.run, a.teacher, data.Mix(a.clips, a.clips, 8), a.tokenizer)
    assert not mix.kept and not os.path.exists("out/a/guide")


@pytest.mark.parametrize("codes, frames, patch, sized", [
    (0, 4, 4, False), (5, 4, 4, False), (16, 3, 8, False), (1, 1, 8, False), (0, 4, 4, True), (5, 3, 8, True)])
def test_a_record_is_as_long_as_it_is_said_to_be(given, capsys, codes, frames, patch, sized):
    a = Told(given(f"--name a --guide-codes {codes} --data.frames {frames} --model.patch {patch} --data.views 2 "
                   f"--mask.ratio 0.5 {'--model.proportional' * sized}"))
    for _ in range(7):                              # one past the first pass, whose last records it writes
        a.step()
    tokens = frames * (16 // patch) ** 2
    size = tokens * (codes or 2 * E) + math.ceil(tokens / 8) + 4 * E + 2 * (tokens // 2) * sized + 4
    assert os.path.getsize("out/a/guide/words") == size * 2 * 24
    said = capsys.readouterr().out
    assert (f"{size * 48 / 1e9:.3g} GB" in said and f"{codes} codes a target" in said) == bool(codes)


def test_nobody_waits_for_what_is_to_be_written(given):
    a = Told(given("--name a"))
    a.step()
    assert os.path.getsize("out/a/guide/words") == 0
    a.step()
    rows = os.path.getsize("out/a/guide/words")
    record = a.guides.records.size
    with open("out/a/guide/words", "rb") as f:
        assert sum(any(f.read(record)) for _ in range(rows // record)) == B


# ---------------------------------------------------------------------------------------------------------------------
# Damage, and going on

def flip(at):
    def damage(path, row, size, sizes):
        with open(path, "r+b") as f:
            place = row * size + {"targets": 7, "bits": sizes[0] + 1, "text": sum(sizes) - 5, "sum": size - 2}[at]
            f.seek(place)
            byte = f.read(1)
            f.seek(place)
            f.write(bytes([byte[0] ^ 16]))
    return damage


def truncate(path, row, size, sizes):
    os.truncate(path, row * size + size // 3)


def page(path, row, size, sizes):
    with open(path, "r+b") as f:
        f.seek(max(0, row * size - 100))
        f.write(bytes(4096))


def other(path, row, size, sizes):
    """The whole record of another view."""
    with open(path, "r+b") as f:
        f.seek((row + 1) % 24 * size)
        record = f.read(size)
        f.seek(row * size)
        f.write(record)


@pytest.mark.parametrize("codes", [0, 5])
@pytest.mark.parametrize("damage", [*map(flip, ("targets", "bits", "text", "sum")), truncate, page, other],
                         ids=["targets", "bits", "text", "sum", "cut", "zeros", "another's"])
def test_a_record_that_is_damaged_is_asked_anew_and_written_again(given, codes, damage):
    a = Told(given(f"--name a --guide-codes {codes}"))
    for _ in range(4):
        a.step()
    record, group = a.guides.records.size, next(a.groups)
    whole = open("out/a/guide/words", "rb").read()
    row = group[1].clip[2].item()
    damage("out/a/guide/words", row, record, a.guides.records.sizes)
    lost = {i for i in range(24) if open("out/a/guide/words", "rb").read()[i * record:(i + 1) * record]
            != whole[i * record:(i + 1) * record]}
    assert row in lost
    said, asked = a.step(group)
    assert asked == 4 * sum(bool(lost & {*b.clip.tolist()}) for b in group) > 0
    for batch, told in said:
        assert_told(told, a.asked(batch), a.codes)
    said, asked = a.step(group)
    assert asked == 0
    for batch, told in said:
        assert_told(told, a.asked(batch), a.codes)


@pytest.mark.parametrize("flags", ["--data.views 2", "--data.views 2 --guide-codes 5",
                                   "--data.views 2 --mask.name tube --guide-codes 3",
                                   "--data.views 2 --guide-codes 5 --model.proportional"])
def test_a_resumed_run_reads_on_and_asks_about_what_was_not_written(given, flags):
    a = Told(given(f"--name a {flags}"))
    said = [a.step()[0] for _ in range(9)]          # 6 of them ask
    a.leave()
    cfg, parts = given(f"--name a --resume {flags}"), ["keep", "aligned", "text"]
    parts += ["size"] * cfg.model.proportional
    b = Told(cfg, step=7)
    for step in (7, 8):
        again, asked = b.step()
        assert asked == 0
        for (_, one), (_, other) in zip(said[step], again, strict=True):
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in parts)
    b.leave()
    c = Told(cfg, step=4)                           # from a state of the first pass, whose steps ask again
    assert [c.step()[1] for _ in range(4)] == [B, B, 0, 0]
    c.leave()
    os.truncate("out/a/guide/words", 0)
    d = Told(cfg, step=7)
    assert [d.step()[1] for _ in range(2)] == [B, B]
    d.leave()
    e = Told(given(f"--name a {flags}"))            # not resumed: nothing is believed
    assert os.path.getsize("out/a/guide/words") == 0 and e.step()[1] == B
    e.leave()


def test_a_resumed_run_has_the_codes_it_began_with(given, monkeypatch):
    """Whatever can be read by then, and whatever the machine makes of it."""
    a = Told(given("--name a --guide-codes 5"))
    said = [a.step()[0] for _ in range(5)]
    a.leave()
    real, good = Clips.view, iter([False])

    def view(self, clip, number):
        if not next(good, True):
            raise data.UnreadableError(self.rows[clip], OSError("the disk is away"))
        return real(self, clip, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clips, "view", view)
        b = Told(given("--name a --guide-codes 5 --resume"), step=4)
    again, asked = b.step()
    assert asked == 0
    for (_, one), (_, other) in zip(said[4], again, strict=True):
        for x, y in zip((one.aligned, *one.basis), (other.aligned, *other.basis), strict=True):
            assert torch.equal(x, y)
    b.leave()


def test_records_in_codes_that_are_lost_are_not_read_in_others(given):
    a = Told(given("--name a --guide-codes 5"))
    for _ in range(4):
        a.step()
    a.leave()
    os.remove("out/a/guide/codes.pt")
    with pytest.MonkeyPatch.context() as patch:                             # and those that are made now are others
        patch.setattr("guides.fit_codes", lambda p, texts, k: fit_codes(-p, texts, k))
        b = Told(given("--name a --guide-codes 5 --resume"), step=4)
    said, asked = b.step()
    assert asked == B
    for batch, told in said:
        assert torch.equal(told.keep, b.asked(batch).keep)
    b.leave()


@pytest.mark.parametrize("flags, why", [
    ("--data.views 4", "views come round less than twice"), ("--mask.name umt", "the mask umt draws"),
    ("--mask.pick random --data.views 4", "less than twice and the mask cluster_stm draws"),
    ("--mask.name tube --model.proportional", "as what a drawn token stands for is asked anew")])
def test_where_codes_are_asked_for_and_nothing_is_kept_that_is_said(given, capsys, flags, why):
    a = Told(given(f"--name a --guide-codes 5 {flags}"))
    out = capsys.readouterr().out
    assert not a.guides.kept and re.search(f"--guide-codes: the teacher is asked at each step.*{why}", out)
    assert not Told(given(f"--name b {flags}")).guides.kept and not capsys.readouterr().out


def test_a_disk_without_room_is_told_before_the_first_step_and_in_the_middle(given, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("guides.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
        with pytest.raises(ValueError, match="out/a/guide: .* 24 views takes .* GB, and 1e-06 GB are free; .*-codes"):
            Told(given("--name a"))
    for full in (lambda *_: 100, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))):
        a = Told(given("--name a"))
        a.step()
        with monkeypatch.context() as patch:
            patch.setattr("guides.os.pwrite", full)
            with pytest.raises(OSError, match="guide/words could not be written .No space left on device.; no state"):
                a.step()
        a.leave()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_codes_too_when_it_is_said_and_when_it_is_read(given, bad):
    a = Told(given("--name a --guide-codes 5 --batch 8 --micro-batch 8"))
    batch, = next(a.groups)
    told = a.asked(batch)
    told.aligned[2, 1, 3, 4] = bad
    a.guides.ask = lambda batch: told
    said, = a.guides([batch])
    a.guides.write_down()
    for found in (said, a.guides.look_up(batch)):
        assert found.text.isfinite().all(1).tolist() == [i != 2 for i in range(8)]
        assert torch.equal(found.text[:2], told.text[:2])
    a.leave()


def test_the_file_is_closed_before_it_is_removed(given, monkeypatch):
    a, real = Told(given("--name a")), shutil.rmtree

    def rmtree(folder):
        assert a.guides.records.file.closed
        real(folder)

    monkeypatch.setattr("guides.shutil.rmtree", rmtree)
    a.guides.forget()
    assert not os.path.exists("out/a/guide")
    a.leave()


@pytest.mark.parametrize("flag, then, now", [
    ("--mask.quantile 0.3", "mask.quantile = 0.95", "0.3"), ("--mask.ratio 0.5", "mask.ratio = 0.75", "0.5"),
    ("--pool mean", "pool = 'map'", "'mean'"), ("--guide-codes 4", "guide_codes = 5", "4"),
    ("--guide-codes 0", "guide_codes = 5", "0"), ("--data.views 2", "data.views = 1", "2")])
def test_what_was_said_under_other_settings_is_not_read(given, sprites, first, capsys, flag, then, now):
    weights = f"--teacher {first}/out/first/teacher --text {first}/out/first/text --guide-codes 5 --name a "
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", 3)                  # before the first state
        with pytest.raises(Killed):
            train.main(given("--name a --guide-codes 5"))
    weights = weights.replace("--guide-codes 5", "") if "codes" in flag else weights
    code, _, err = command("train.py", argv(sprites, f"{weights} --resume {flag}"), capsys)
    assert_one_line("train.py", code, err, f"out/a/guide/config.json is of a run with {then}, asked for is {now}$")
    before = os.path.getsize("out/a/guide/words")
    a = Told(given(f"--name a {flag}"))             # a run that begins anew begins anew
    assert before > 0 and os.path.getsize("out/a/guide/words") == 0
    for _ in range(2 * 24 // B):
        for batch, told in a.step()[0]:
            assert_told(told, a.asked(batch), a.codes)
    a.leave()


@pytest.mark.parametrize("flags, message", [
    ("--guide-codes 5 --data.views 0", "guide_codes 5 with data.views 0: what is seen once is not kept"),
    ("--guide-codes 17", "guide_codes 17: targets have 16 numbers, 1 to 16 can be kept of them"),
    ("--guide-codes -1", "guide_codes -1")])
def test_codes_that_cannot_be_are_refused_in_one_line(given, sprites, first, capsys, flags, message):
    weights = f"--teacher {first}/out/first/teacher --text {first}/out/first/text "
    code, _, err = command("train.py", argv(sprites, weights + flags), capsys)
    assert_one_line("train.py", code, err, message)


@pytest.mark.parametrize("codes", [0, 5])
def test_what_could_not_be_read_in_the_first_pass_and_then_can_is_asked_about_once(given, codes):
    a = Told(given(f"--name a --guide-codes {codes}"))

    def view(self, clip, number, real=Clips.view):
        if clip in (3, 17):
            raise data.UnreadableError(self.rows[clip], OSError("the disk is away"))
        return real(self, clip, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clips, "view", view)
        assert [a.step()[1] for _ in range(3)] == [B] * 3
    seen = []
    for step in range(3, 9):
        said, asked = a.step()
        seen.append(asked)
        for batch, told in said:
            assert_told(told, a.asked(batch), a.codes)
        assert asked == 4 * sum(bool({3, 17} & {*b.clip.tolist()}) for b, _ in said) * (step < 6)
    assert sum(seen) in (4, 8)                      # their micro-batches
    a.leave()


def test_codes_are_made_of_what_can_be_read(given):
    def view(self, clip, number, real=Clips.view):
        if clip % 3:
            raise data.UnreadableError(self.rows[clip], OSError("the disk is away"))
        return real(self, clip, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clips, "view", view)
        a = Told(given("--name a --guide-codes 16"))
    with open("out/a/bad_media.jsonl") as f:
        assert len(f.readlines()) == 16
    for batch, _ in a.step()[0]:
        told = a.asked(batch)
        assert relevance_error(a.codes, told.aligned.flatten(1, 2), told.text) < 0.05
    a.leave()


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

SHORT = "--steps 9 --unmasked-steps 0 "             # 3 of them ask


@pytest.fixture
def left(monkeypatch):
    """What was kept stays where it was."""
    monkeypatch.setattr(Guides, "forget", lambda self: self.run.wait())


@pytest.mark.parametrize("codes", [0, 5])
def test_two_ranks_keep_one_file_and_train_as_one_does(given, left, monkeypatch, codes):
    train.main(given(f"--name one --guide-codes {codes}"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")     # torchrun says so: they have one disk
    on_ranks(2, given(f"--name two --guide-codes {codes}"))
    assert_close_runs("out/one", "out/two")
    one, two = (open(f"out/{name}/guide/words", "rb").read() for name in ("one", "two"))
    assert one == two and len(one) == 24 * (TN * (codes or 2 * E) + TN // 8 + 4 * E + 4)


def test_ranks_with_a_disk_each_keep_nothing(given, left):
    on_ranks(2, given(f"{SHORT} --name two"))       # LOCAL_WORLD_SIZE is 1
    assert not os.path.exists("out/two/guide") and len(log("out/two")) == 9


def test_with_codes_the_student_learns_nearly_what_it_learns_without(given):
    train.main(given(f"{SHORT} --name whole"))
    train.main(given(f"{SHORT} --name coded --guide-codes 16"))
    whole, coded = log("out/whole"), log("out/coded")
    for key, row in whole.items():                  # v is small for 8 bits: so small a teacher says nearly one thing
        for name in ("mrm", "vtc", "vtm", "mlm"):
            assert row[name] == pytest.approx(coded[key][name], rel=0.15 if name == "mrm" else 0.01), key
    assert all(whole[key] != coded[key] for key in list(whole)[3:])         # which read


@pytest.mark.parametrize("codes", [0, 5])
@pytest.mark.parametrize("step, every", [(2, 1), (3, 1), (4, 1), (2, 2), (6, 4), (7, 1)])
def test_a_run_killed_among_the_passes_ends_bit_for_bit_as_an_unbroken_one(given, codes, step, every):
    flags = f"{SHORT} --guide-codes {codes} --save-every {every}"
    train.main(given(f"{flags} --name whole"))
    with pytest.MonkeyPatch.context() as patch:
        kill(patch, "pretrain", step)               # its batches are not yet asked for
        with pytest.raises(Killed):
            train.main(given(f"{flags} --name killed"))
    train.main(given(f"{flags} --name killed --resume"))
    assert log("out/killed") == log("out/whole")
    assert_same(weights("out/killed"), weights("out/whole"))
    assert not os.path.exists("out/killed/guide") and not os.path.exists("out/whole/guide")


# ---------------------------------------------------------------------------------------------------------------------
# Codes

def sample(n=400, texts=3000, width=12, seed=0):
    """p (n, E), a mean and a covariance far from round; texts (M, E), in all directions but not equally."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g, dtype=torch.float64) * 0.6 ** torch.arange(width)
    p = torch.randn(n, width, generator=g, dtype=torch.float64) @ mix.T + 3
    s = torch.randn(texts, width, generator=g, dtype=torch.float64) * (1 + torch.arange(width) / 3)
    return p, s


def form(e, texts):
    """e^T G e, G = 1/M sum_m s_m s_m^T: the mean over texts of <e, s>^2."""
    return (e @ texts.T).square().mean(-1).mean()


def sharp(codes, p):
    """The code without rounding, and back."""
    mean, into, out = (x.double() for x in (codes.mean, codes.into, codes.out))
    return mean + (p - mean) @ into @ out


@pytest.mark.parametrize("k", [1, 3, 8, 11, 12])
def test_codes_lose_what_the_axes_they_leave_out_have(k):
    p, texts = sample()
    gram = texts.T @ texts / len(texts)
    values, axes = torch.linalg.eigh(gram)
    W = axes @ values.sqrt().diag() @ axes.T
    spread = torch.linalg.eigvalsh(W @ torch.cov(p.T, correction=0) @ W)
    left = spread[:12 - k].sum()
    lost = form(p - sharp(fit_codes(p, texts, k), p), texts)
    assert (lost - left).abs() <= 1e-3 * left + 1e-9 * spread.sum()
    g = torch.Generator().manual_seed(1)
    away = (p - p.mean(0)) @ W
    for _ in range(100):                            # no other k axes lose less
        Q = torch.linalg.qr(torch.randn(12, k, generator=g, dtype=torch.float64)).Q
        assert (away - away @ Q @ Q.T).square().sum(-1).mean() >= left * (1 - 1e-9)


def test_what_is_lost_falls_with_each_number_and_at_last_is_rounding():
    p, texts = sample()
    lost = []
    for k in range(1, 13):
        codes = fit_codes(p.float(), texts.float(), k)
        lost.append(form(p - codes.decode(codes.code(p)).double(), texts).item())
    assert lost == sorted(lost, reverse=True) and lost[-1] < 1e-3 * lost[0]
    # Each of 12 numbers is off by up to half a step, a 240th of the widest, along an axis of length 1 in W.
    away = (p - p.mean(0)) @ codes.into.double()
    assert away.abs().amax(0).sub(120).abs().max() < 1e-2
    steps = [form(row, texts).item() for row in codes.out.double()]
    assert 0.6 * sum(steps) / 12 < lost[-1] < 1.4 * sum(steps) / 12 <= sum(steps) / 4


def test_texts_of_few_directions_still_make_codes():
    p, texts = sample()
    texts = texts[:2].repeat(5, 1)                  # G has two eigenvalues, all others are the ridge
    codes = fit_codes(p, texts, 2)
    assert form(p - codes.decode(codes.code(p)).double(), texts) < 0.02 * form(p - p.mean(0), texts)
    codes = fit_codes(p, texts, 12)
    assert all(x.isfinite().all() for x in vars(codes).values())
    assert form(p - codes.decode(codes.code(p)).double(), texts) < 1e-3 * form(p - p.mean(0), texts)


def test_the_error_is_that_of_all_relevances_as_a_share_of_v():
    p, texts = sample(n=5 * 31)
    p = p.view(5, 31, 12) + torch.randn(5, 1, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    codes = fit_codes(p.flatten(0, 1), texts, 4)
    relevance = lambda x: torch.stack([torch.stack([x[b, i] @ texts.T for i in range(31)]) for b in range(5)])
    said = codes.decode(codes.code(p)).double()
    lost = (relevance(said) - relevance(p)).square().mean()
    v = (relevance(p) - relevance(p.mean(1, keepdim=True).expand_as(p))).square().mean()
    assert relevance_error(codes, p, texts) == pytest.approx((lost / v).item(), rel=1e-6)
    assert 1e-4 < lost / v < 1


def test_a_guide_in_codes_says_of_tokens_what_they_decode_to():
    p, texts = sample(n=3 * 2 * 5)
    codes = fit_codes(p, texts, 4)
    aligned = codes.code(p).view(3, 2, 5, 4)
    ids = torch.tensor([[9, 0, 0], [3, 4, 5], [1, 8, 2]])
    found = Guide(None, aligned, None, (codes.mean, codes.out)).at(ids)
    expected = torch.stack([codes.decode(aligned[b].flatten(0, 1)[row]) for b, row in enumerate(ids)])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    by_hand = codes.mean.double() + aligned[0, 1, 4].double() @ codes.out.double()
    torch.testing.assert_close(found[0, 0].double(), by_hand, rtol=1e-6, atol=1e-6)
    plain = p.view(3, 2, 5, 12).half()
    assert torch.equal(Guide(None, plain, None).at(ids)[1], plain[1].flatten(0, 1)[[3, 4, 5]].float())


def test_codes_do_not_wrap_past_what_the_sample_had():
    p, texts = sample()
    codes = fit_codes(p, texts, 12)
    inside = codes.code(p)
    assert inside.dtype == torch.int8 and inside.abs().max() == 120
    far = p.mean(0) + 1000 * (p - p.mean(0))
    found, exact = codes.code(far), (far - codes.mean) @ codes.into.double()
    assert found.abs().max() == 127 and (found == -127).any() and not (found == -128).any()
    assert torch.equal(found[exact.abs() > 128].sign(), exact[exact.abs() > 128].sign().to(torch.int8))


@pytest.mark.parametrize("k", [0, -1, 13])
def test_codes_of_no_numbers_or_too_many_are_refused(k):
    with pytest.raises(ValueError, match=rf"^guide_codes {k}: targets have 12 numbers, 1 to 12 can be kept of them$"):
        fit_codes(*sample(), k)


@pytest.mark.parametrize("k", [1, 5, 12])
@pytest.mark.parametrize("constant", [slice(None), slice(3, 7)], ids=["all", "some"])
def test_targets_that_do_not_vary_have_codes_too(k, constant):
    p, texts = sample()
    p[:, constant] = 2.0
    codes = fit_codes(p, texts, k)
    assert all(x.isfinite().all() for x in vars(codes).values())
    found = codes.decode(codes.code(p)).double()
    assert found.isfinite().all()
    if constant == slice(None):
        torch.testing.assert_close(found, p, rtol=1e-6, atol=1e-6)
    else:
        assert form(found - p, texts) <= form(p - p.mean(0), texts)


def test_codes_are_not_made_in_bf16():
    p, texts = sample()
    codes = fit_codes(p, texts, 12)
    mean, into, out = (x.double() for x in (codes.mean, codes.into, codes.out))
    exact = (p - mean) @ into
    with torch.autocast("cpu", torch.bfloat16):     # as a step is on a GPU
        found = codes.code(p.float())
        again = codes.decode(found)
    assert (found - exact).abs().max() < 0.51 and again.dtype == torch.float32
    torch.testing.assert_close(again.double(), mean + found.double() @ out, rtol=1e-5, atol=1e-5)
