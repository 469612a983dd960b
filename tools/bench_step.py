"""
What a pretraining step takes, where its time goes, and what of the hardware's matrix rate it uses.

    python -m tools.bench step                                  # ViT-B/16, BERT-base, SigLIP-B/16 at batch 64 and 128
    python -m tools.bench step --peer FOLDER                    # beside UMT's stage 2, from a checkout of its code
    python -m tools.bench step --device cpu --profile 15        # small shapes on a CPU, and its dearest operators

Weights and clips are random, shapes the paper's: 4 frames at 224 x 224, 29 of 196 tokens kept, 32 word pieces, none
of them padding. The step is train.py's own: clips to the device, guide, losses, gradients, clipping, AdamW; weights in
fp32, on a GPU products in bf16.

The peer takes its own step on what lies on the device already; ours copies its clips there. A step with the guide
kept runs no teacher, so it has no ratio to one that does.

Time. --steps steps in turn and one wait at their end, so that what runs beside something else counts once; the median
of --rounds, after three steps that warm up. A part is timed alone, with its backward pass; within the step it may cost
less.

Flops. A product of (a, b) and (b, c) matrices is 2abc; a transformer layer on S tokens of C channels 24SC^2 + 4S^2C.
What is trained counts three times: forward, gradient of the inputs, gradient of the weights. The teacher counts once,
what is computed again to save memory not at all; word logits count at the places where they are formed, a tenth of
them spare. Utilisation: flops over time over the rate of a large product,
measured in the same run.
"""

import gc
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch

import data
import train
from guides import Codes, Records, fit_codes
from masking import keep_count
from model import ClusterSTM, most_words, spread
from teacher import SigLIP, SigLIPConfig, TextConfig, choose, guide
from tools.bench import ceilings, heading, line
from tools.peer import umt_step

VARIANTS = {            # what differs from the plain step
    "eager": {},
    "compiled": dict(compile=True),
    "compiled, checkpointing": dict(compile=True, activation_checkpointing=True),
    "compiled, guide kept": dict(compile=True),
    "eager, checkpointing": dict(activation_checkpointing=True),
    "eager, guide kept": {},
}
USUAL = {"cuda": [*VARIANTS][:4], "cpu": ["eager", "eager, checkpointing", "eager, guide kept"]}
CODES = 64              # of --guide-codes, where the guide is kept


# ---------------------------------------------------------------------------------------------------------------------
# Flops

def layer(S: int, C: int, hidden: int = 0) -> int:
    """A transformer layer on S tokens: four C x C products a token, the MLP, attention."""
    return S * (8 * C * C + 4 * C * (hidden or 4 * C)) + 4 * S * S * C


def flops(cfg, teacher, B: int) -> dict[str, int]:
    """Of a step of B clips, by part. cfg: train.Config with model.vocab and model.target; teacher: its SigLIPConfig."""
    m, v, t = cfg.model, teacher.vision_config, teacher.text_config
    T, L, p, D = cfg.data.frames, m.text_length, m.patch, m.text_width
    N = (cfg.data.size // p) ** 2
    K = keep_count(N, cfg.mask.ratio)
    F, S, E, C = B * T, T * K, m.target, v.hidden_size
    hidden = T * N - S
    Q = min(hidden, max(1, round(hidden * m.decoder_share))) if m.decoder == "cross" else hidden
    image = F * (6 * N * p * p * C + v.num_hidden_layers * layer(N, C, v.intermediate_size))
    text = B * (t.num_hidden_layers * layer(t.max_position_embeddings, C, t.intermediate_size) + 2 * C * C)
    align = F * N * (2 * C * v.num_attention_heads + 4 * C * C + 4 * C * v.intermediate_size)
    vit = B * (2 * 6 * S * p * p * m.width + 3 * m.depth * layer(S, m.width) + 3 * 2 * T * m.width * m.embed)
    W = m.decoder_width
    if m.decoder == "cross":
        block = 20 * Q * W * W + 4 * S * W * W + 4 * Q * S * W
    else:
        block = layer(S + Q, W)
    decoder = 3 * B * (2 * S * m.width * W + m.decoder_depth * block + 2 * Q * W * E)
    form = {"batch": 2 * Q * E * E, "own": 2 * Q * E, "none": 0}[m.relevance]
    relevance = B * (2 * E * E + 3 * form)                      # G; then of v, and of q - p with its gradient
    places = most_words(B * L)
    read = layer(L, D) + 4 * L * D * D + 4 * L * S * D          # a text in a fusion layer, with the video it reads
    words = 2 * B * (m.text_depth - m.fusion) * layer(L, D) + m.fusion * (4 * B * read + 4 * B * S * m.width * D)
    heads = places * (2 * D * D + 2 * D * m.vocab) + 2 * B * D * m.embed + 2 * B * B * m.embed + 12 * B * D
    return {
        "teacher": image + text,
        "bandwidth and mask": 2 * B * T * (T - 1) * N * N * C + 2 * F * N * C * (N + v.num_attention_heads),
        "relevance target": align,
        "student ViT": vit,
        "decoder and MRM": decoder + relevance,
        "text, fusion, VTC, VTM, MLM": 3 * (words + heads) + 2 * B * B * m.embed,
    }


# ---------------------------------------------------------------------------------------------------------------------
# A step

@dataclass
class Step:
    """Everything that a step of B random clips wants."""
    cfg: object
    teacher: torch.nn.Module
    model: torch.nn.Module
    host: object                # data.Batch in (pinned) host memory
    device: torch.device
    records: Records | None = None      # of a kept guide

    def __post_init__(self):
        groups = train.parameter_groups(self.model, self.cfg.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, self.cfg.lr, (0.9, 0.999), fused=True)
        self.grid = (self.cfg.data.size // self.cfg.model.patch,) * 2
        self.batch = self.host.to(self.device)

    def guide(self, batch):
        if self.records:
            return self.records.read(batch.clip.tolist(), self.device)
        return guide(self.teacher, batch, self.cfg.mask, self.cfg.mask.ratio, check=False, grid=self.grid)

    def calls(self, batches):
        return train.with_whole(self.model, batches, [self.guide(b) for b in batches])

    def __call__(self):
        batch = self.host.to(self.device, non_blocking=True)
        train.backward(self.model, [batch], self.calls, {})
        self.update()

    def update(self):
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.clip_grad)
        self.optimizer.found_inf = (~norm.isfinite()).float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def keep_guide(self):
        """From here on the guide is read from a file, which is in memory."""
        with torch.no_grad(), self.autocast():
            told = self.guide(self.batch)
        p, text = told.aligned.flatten(0, 2), told.text.float().cpu()
        p = p[::max(1, len(p) // 8192)].float().cpu()
        codes = Codes(*(x.to(self.device) for x in vars(fit_codes(p, text, min(CODES, p.shape[1]))).values()))
        B, T, N, E = told.aligned.shape
        with tempfile.NamedTemporaryFile() as f:            # open here, it stays until the records are gone
            self.records = Records(f.name, T, N, told.keep.shape[1] // T, E, codes)
        self.records.write(range(B), self.records.words(self.records.in_numbers(told)))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def parts(self) -> dict[str, Callable]:
        """The parts of a step, each to be run alone."""
        cfg, model, teacher, b = self.cfg, self.model, self.teacher, self.batch
        shape = b.video.shape[:2]
        with torch.no_grad(), self.autocast():
            told = self.guide(b)
            pixels = teacher.pixels(b.video.flatten(0, 1), self.grid)
            tokens = teacher.tokens(pixels)
            whole, = model.whole([b], [told])
            visible, video = (x.detach().requires_grad_() for x in model.encode_video(b.video, told.keep))
            p = told.at(whole.wanted)

        def asked():
            teacher.tokens(teacher.pixels(b.video.flatten(0, 1), self.grid))
            teacher.encode_text(teacher.tokenize(b.captions))

        def vit():
            out, feature = model.encode_video(b.video, told.keep)
            torch.autograd.backward((out, feature), (torch.ones_like(out), torch.ones_like(feature)))

        def decoder():
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                text = told.text.float()
                gram = text.T @ text / len(text)
                spread(told.at(whole.wanted), model.relevance(told, gram))
            q = model.decoder(visible, told.keep, whole.wanted, model.vit.grid(b.video))
            with torch.autocast(self.device.type, enabled=False):
                model.relevance(told, gram)(q - p).mean().backward()

        def rest():
            model.encode_video = lambda *_: (visible, video)
            try:
                corrupted = model.corrupt(b)
                sum(model(b, None, replace(whole, corrupted=corrupted, wanted=None)).values()).backward()
            finally:
                del model.encode_video

        def frozen(run):
            def quiet():
                with torch.no_grad(), self.autocast():
                    run()
            return quiet

        def trained(run):
            def loud():
                with self.autocast():
                    run()
                self.optimizer.zero_grad(set_to_none=True)
                visible.grad = video.grad = None
            return loud

        def update():
            for p in model.parameters():
                p.grad = grads[p]
            self.update()

        vit(), decoder(), rest()
        grads = {p: p.grad for p in model.parameters()}
        asks = {
            "teacher": frozen(asked),
            "bandwidth and mask": frozen(lambda: choose(teacher, tokens.unflatten(0, shape), cfg.mask, cfg.mask.ratio,
                                                        b.seed, self.grid, check=False)),
            "relevance target": frozen(lambda: teacher.align(tokens, self.grid)),
        } if not self.records else {"reading the guide": frozen(lambda: self.guide(b))}
        return {
            "clips to the device": lambda: self.host.to(self.device),
            **asks,
            "student ViT": trained(vit),
            "decoder and MRM": trained(decoder),
            "text, fusion, VTC, VTM, MLM": trained(rest),
            "clipping and AdamW": update,
        }


def settings(args, B: int, variant: str = "eager") -> train.Config:
    """The preset, with what command line and variant change."""
    how = dict(compile=False, activation_checkpointing=False) | VARIANTS[variant]       # not the preset's
    cfg = replace(deepcopy(train.PRESETS["sprites" if args.small else "base"]), batch=B, **how)
    cfg.data = replace(cfg.data, frames=args.frames or cfg.data.frames, size=args.size or cfg.data.size)
    cfg.mask = replace(cfg.mask, ratio=args.ratio or cfg.mask.ratio)
    return cfg


def make_step(args, B: int, variant: str) -> Step:
    device, cfg = torch.device(args.device), settings(args, B, variant)
    torch.manual_seed(0)
    T, S, L = cfg.data.frames, cfg.data.size, cfg.model.text_length
    captions = [" ".join(f"word{int(w)}" for w in torch.randint(500, (12,))) for _ in range(B)]
    with tempfile.TemporaryDirectory() as folder:
        data.train_tokenizer(captions, f"{folder}/tokenizer.json")
        tokenizer = data.load_tokenizer(f"{folder}/tokenizer.json")
    cfg.model = replace(cfg.model, vocab=tokenizer.get_vocab_size() if args.small else 30522, mask_id=103)
    if args.small:
        cfg.model = replace(cfg.model, mask_id=tokenizer.token_to_id("[MASK]"))
        teacher = train.small_teacher(cfg, tokenizer)
    else:
        teacher = SigLIP(SigLIPConfig(text_config=TextConfig(pad_token_id=0)), tokenizer)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = train.prepare(teacher.to(device, dtype).eval().requires_grad_(False), cfg)
    cfg.model = replace(cfg.model, target=teacher.cfg.vision_config.hidden_size)
    model = train.prepare(ClusterSTM(cfg.model).to(device).train(), cfg)
    ids = torch.randint(cfg.model.mask_id + 1, cfg.model.vocab, (B, L))
    ids[:, 0] = 2
    index = torch.arange(B)
    host = data.Batch(torch.randint(256, (B, T, 3, S, S), dtype=torch.uint8), ids, captions, captions, index, index,
                      torch.zeros_like(index), seed=0)
    step = Step(cfg, teacher, model, host.pin_memory() if device.type == "cuda" else host, device)
    if "kept" in variant:
        step.keep_guide()
    return step


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def wait(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable, device: torch.device, steps: int) -> float:
    """A run's, of `steps` in turn."""
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        run()
    wait(device)
    return (time.perf_counter() - start) / steps


def in_turn(runs: dict[str, Callable], device: torch.device, steps: int, rounds: int) -> dict[str, float]:
    """Median seconds of each; they run in turn, so that what disturbs one disturbs all."""
    for run in runs.values():
        seconds(run, device, 3)
    took = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            took[name].append(seconds(run, device, steps))
    return {name: statistics.median(some) for name, some in took.items()}


def held(device: torch.device) -> int:
    """Bytes of the GPU's memory, once what nobody holds is given back: compiled layers are garbage in a circle."""
    gc.collect()
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def peak(run: Callable, device: torch.device, before: int) -> float:
    """GiB: on a GPU of a step, weights and all, past those held before; on a CPU of the process so far."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    run()
    wait(device)
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 30


def rate_of(device: torch.device) -> tuple[float, str]:
    """Flops a second of a large product in the type of the step's."""
    if device.type == "cuda":
        return ceilings("cuda")[0], "8192^3 in bf16"
    a = torch.randn(2048, 2048)
    return 2 * 2048 ** 3 / in_turn({"": lambda: a @ a}, device, 3, 3)[""], "2048^3 in fp32"


def step_tables(args):
    device, small = torch.device(args.device), args.small
    rate, product = rate_of(device)
    print(f"\n{rate / 1e12:.4g} Tflop/s: a product of {product}", flush=True)
    for B in args.batch:
        heading(f"{'small shapes, ' if small else ''}batch {B}", "step", "ms", "clips/s", "Tflop a step",
                "utilisation", "GiB at most", "times the peer")
        peer, steps = None, {}
        if args.peer:
            cfg = settings(args, B)
            keep = keep_count((cfg.data.size // cfg.model.patch) ** 2, cfg.mask.ratio)
            before = held(device)
            peer, facts = umt_step(args.peer, args.device, B, cfg.data.frames, cfg.data.size, keep,
                                   cfg.model.text_length, small)
            peer()                                          # its first step makes the state of its optimizer
            peer_peak = peak(peer, device, before)
        for variant in args.variants:
            before = held(device)
            step = make_step(args, B, variant)
            runs = {"ours": step} | ({"peer": peer} if peer else {})
            took = in_turn(runs, device, args.steps, args.rounds)
            each = flops(step.cfg, step.teacher.cfg, B)
            if step.records:
                each = {k: v for k, v in each.items() if k not in ("teacher", "bandwidth and mask", "relevance target")}
            total, s = sum(each.values()), took["ours"]
            line(variant, 1e3 * s, B / s, total / 1e12, f"{100 * total / s / rate:.1f} %",
                 peak(step, device, before), took["peer"] / s if peer and not small and not step.records else None)
            steps[variant] = each, s
            if variant in (args.variants[0], args.variants[-1]) or "kept" in variant:
                steps[variant] = each, s, in_turn(step.parts(), device, args.steps, args.rounds)
            if args.profile and variant == args.variants[0]:
                profile = profiled(step, args.profile)
            del step, runs
        if peer:
            s = took["peer"]
            name = "UMT's stage 2" + ", at widths of its own" * small
            line(name, 1e3 * s, B / s, None, None, peer_peak, None)
            print("\nThe peer: " + "; ".join(f"{k} {v}" for k, v in facts.items()), flush=True)
        for variant, (each, s, *parts) in steps.items():
            if not parts:
                continue
            heading(f"{variant}, batch {B}: its parts, each alone", "part", "ms", "share of the step", "Tflop",
                    "utilisation")
            for name, alone in parts[0].items():
                work = each.get(name)
                line(name, 1e3 * alone, f"{100 * alone / s:.1f} %", work and work / 1e12,
                     work and f"{100 * work / alone / rate:.1f} %")
            line("the step, less these", 1e3 * (s - sum(parts[0].values())), None, None, None)
        if args.profile:
            print(f"\n```\n{profile}\n```", flush=True)


def profiled(step: Step, rows: int) -> str:
    """The operators that take most of a step, by their own time; on a GPU also what the host waited for."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (step.device.type == "cuda")
    step()
    wait(step.device)
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(3):
            step()
    by = "self_cuda_time_total" if step.device.type == "cuda" else "self_cpu_time_total"
    found = profile.key_averages()
    table = found.table(sort_by=by, row_limit=rows, max_name_column_width=48)
    waits = {e.key: e.count for e in found if "Synchronize" in e.key or "DtoH (Device -> Pageable)" in e.key}
    said = f"\nThe host waited in three steps, and once at the profiler's end: {waits}"
    return table + said * (step.device.type == "cuda")


def complete(args, error: Callable):
    """The defaults that depend on the device; `error` tells what is wrong."""
    if unknown := [name for name in args.variants or () if name not in VARIANTS]:
        error(f"--variants {unknown[0]!r}: there are {', '.join(map(repr, VARIANTS))}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cpu = args.device == "cpu"
    args.small = cpu if args.small is None else args.small
    args.batch, args.steps = args.batch or ([64] if cpu else [64, 128]), args.steps or (2 if cpu else 20)
    args.variants = args.variants or USUAL[args.device]
    if min(*args.batch, args.steps, args.rounds) < 1:
        error(f"--batch {args.batch}, --steps {args.steps} and --rounds {args.rounds} want to be positive")
