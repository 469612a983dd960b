"""
Time a pretraining step: a preset of train.py -> milliseconds, clips/s, the share of the hardware's matrix rate, and the
same for each part of the step.

Weights and clips are random; shapes are the preset's. For `base`: 4 frames at 224 x 224, 29 of 196 tokens visible, 32
text tokens, none of them padding. The step is train.py's: clips to the device, teacher targets, losses, gradients,
clipping, AdamW. Weights are fp32; on a GPU matrices are multiplied in bf16. --changes compares parts of the step with
the slower forms that they replaced.

UMT's step (bench/umt_step.py) works on inputs that are on the device already; ours copies its clips there. A step with
cached targets runs no teacher, so it is not compared with a step that does.

Times are medians of --rounds. A round is --steps steps with one wait for the device at their end, so work that overlaps
counts once. Each part is timed alone, with its backward pass; within the step it may take less.

"GPU busy" is the time in which a kernel or a copy runs on the GPU, of one step that is profiled. If it is far below the
step's time, the GPU waits for the host to launch kernels.

Flops. A product of (a, b) and (b, c) matrices is 2abc; a transformer layer on S tokens of C channels is 24SC^2 + 4S^2C.
Trained modules count three times: forward, gradient of the inputs, gradient of the weights. The teacher counts once.
What activation checkpointing computes again does not count. Word logits count where they are formed: at up to
encoders.max_masked_tokens places. Utilisation is flops / time / the rate of a large product, measured in the same run.
"""

import gc
import gzip
import json
import math
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

import data
import train
from bench.timing import measure_roofline, peak_memory, synchronize, time_interleaved
from bench.umt_step import umt_step
from encoders import max_masked_tokens
from loop import forward_backward, parameter_groups, update_weights
from masking import keep_count
from model import ClusterSTM, target_variance
from products import Matmul, QuadraticForm
from runtime import bf16_autocast, select_device
from siglip_files import SigLIPConfig, TextConfig
from targets import TargetStore, TeacherTargets, compute_targets, select_visible
from teacher import SigLIP
from tokenizer import build_wordpiece, load_tokenizer
from tools.tables import banner, print_header, print_row
from tools.toy_teacher import build_toy_teacher

Variant = Literal["eager", "compiled", "compiled+checkpointing", "compiled+cached", "eager+checkpointing",
                  "eager+cached"]
DEFAULT_VARIANTS = {"cuda": get_args(Variant)[:4], "cpu": ("eager", "eager+checkpointing", "eager+cached")}
TEACHER_PARTS = ("teacher", "bandwidth and mask", "token targets")      # which cached targets replace


@dataclass
class Config:
    """Time a pretraining step with random weights and clips, and its parts."""
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: cuda if there is a GPU
    preset: Literal["auto", "sprites", "base"] = "auto"     # preset of train.py; auto: base on a GPU, else sprites
    batch: tuple[int, ...] = ()     # clips of a step, a table each; empty: 64 and 256, on a CPU 64
    frames: int = 0             # frames of a clip; 0: the preset's
    size: int = 0               # pixels per side of a frame; 0: the preset's
    ratio: float = 0.0          # share of the tokens that the mask hides; 0: the preset's
    # ways to run the step: eager or compiled layers, also with activation checkpointing or with cached teacher targets;
    # empty: eager and the compiled ones, on a CPU the eager ones
    variants: tuple[Variant, ...] = ()
    steps: int = 0              # steps between two waits for the device; 0: 20, on a CPU 2
    rounds: int = 5             # rounds of that many steps; the median is printed
    umt: str = ""               # folder with a checkout of OpenGVLab/unmasked_teacher, to time its step beside ours
    profile: int = 0            # number of operators to print, those that take most time in a step; 0: none
    trace: str = ""             # file for a Chrome trace of one step, NAME.json or NAME.json.gz; of the first variant
    changes: bool = False       # also time parts of the step beside the slower forms that they replaced
    commit: str = ""            # commit to print above the tables; empty: ask git

    def __post_init__(self):
        for name, least in (("frames", 0), ("size", 0), ("steps", 0), ("rounds", 1), ("profile", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.trace and not self.trace.endswith((".json", ".json.gz")):
            raise ValueError(f"--trace must end in .json or .json.gz, got {self.trace!r}")
        if any(B < 1 for B in self.batch):
            raise ValueError(f"--batch must be at least 1, got {min(self.batch)}")


def fill_defaults(cfg: Config) -> Config:
    """Resolve the device, and the settings that depend on it."""
    device = select_device(cfg.device).type
    on_cpu = device == "cpu"
    return replace(
        cfg, device=device, preset=cfg.preset if cfg.preset != "auto" else "sprites" if on_cpu else "base",
        batch=cfg.batch or ((64,) if on_cpu else (64, 256)), steps=cfg.steps or (2 if on_cpu else 20),
        variants=cfg.variants or DEFAULT_VARIANTS[device])


# ---------------------------------------------------------------------------------------------------------------------
# Flops

def layer_flops(S: int, C: int, hidden: int = 0) -> int:
    """A transformer layer on S tokens: four C x C products per token, an MLP (4C wide by default), attention."""
    return S * (8 * C * C + 4 * C * (hidden or 4 * C)) + 4 * S * S * C


def flops(cfg: train.Config, teacher: SigLIPConfig, B: int) -> dict[str, int]:
    """Flops of a step of B clips, by part. cfg must have text.vocab_size and model.target_dim."""
    vit, text, model, v, t = cfg.vit, cfg.text, cfg.model, teacher.vision_config, teacher.text_config
    T, L, D, p = cfg.data.num_frames, text.max_length, text.width, vit.patch_size
    N = data.count_tokens(1, cfg.data.image_size, p)
    K = keep_count(N, cfg.mask.ratio)
    F, S, E, C = B * T, T * K, model.target_dim, v.hidden_size
    masked = T * N - S
    queries = model.decoder_queries or max(2, round(masked * model.decoder_query_ratio))
    Q = min(masked, queries) if model.decoder == "cross" else masked
    image_tower = F * (6 * N * p * p * C + v.num_hidden_layers * layer_flops(N, C, v.intermediate_size))
    text_tower = B * (t.num_hidden_layers * layer_flops(t.max_position_embeddings, C, t.intermediate_size) + 2 * C * C)
    token_targets = F * N * (2 * C * v.num_attention_heads + 4 * C * C + 4 * C * v.intermediate_size)
    student = B * (2 * 6 * S * p * p * vit.width + 3 * vit.depth * layer_flops(S, vit.width)
                   + 3 * 2 * T * vit.width * model.embed_dim)
    W = model.decoder_width
    if model.decoder == "cross":
        block = 20 * Q * W * W + 4 * S * W * W + 4 * Q * S * W
    else:
        block = layer_flops(S + Q, W)
    decoder = 3 * B * (2 * S * vit.width * W + model.decoder_depth * block + 2 * Q * W * E)
    # The form of v and of q - p, and of the latter the gradient, unless it reuses the product.
    form = {"batch": 2 * 2 * Q * E * E, "own": 3 * 2 * Q * E, "none": 0}[model.mrm_texts]
    mrm = B * (2 * E * E + form)                                # G, then the forms
    logits = max_masked_tokens(B * L)
    fusion = layer_flops(L, D) + 4 * L * D * D + 4 * L * S * D  # of a text in a fusion layer, cross-attention included
    video_kv = 4 * S * vit.width * D                            # keys and values of a clip's tokens
    # The last layer has the state of [CLS] alone for all four texts of a clip, and all states of the masked one.
    fusion_cls = 4 * L * D * D + 24 * D * D + 4 * (L + S) * D
    bert = B * (2 * (text.depth - text.fusion_layers) * layer_flops(L, D)
                + (text.fusion_layers - 1) * (4 * fusion + video_kv) + 4 * fusion_cls + fusion + 2 * video_kv)
    heads = logits * (2 * D * D + 2 * D * text.vocab_size) + 2 * B * D * model.embed_dim + 2 * B * B * model.embed_dim \
        + 12 * B * D
    return {
        "teacher": image_tower + text_tower,
        "bandwidth and mask": 2 * B * T * (T - 1) * N * N * C + 2 * F * N * C * (N + v.num_attention_heads),
        "token targets": token_targets,
        "student ViT": student,
        "decoder and MRM": decoder + mrm,
        "text, fusion, VTC, VTM, MLM": 3 * (bert + heads) + 2 * B * B * model.embed_dim,
    }


# ---------------------------------------------------------------------------------------------------------------------
# A step

@dataclass
class TrainStep:
    """A pretraining step on the same B random clips at each call."""
    cfg: train.Config
    teacher: SigLIP
    model: ClusterSTM
    host_batch: data.Batch              # in host memory, pinned on a GPU
    device: torch.device
    store: TargetStore | None = None    # cached targets; None: the teacher computes them in each step
    batch: data.Batch = field(init=False)       # host_batch on the device, for the parts
    grid: tuple[int, int] = field(init=False)   # (h, w) of the student's patches in a frame

    def __post_init__(self):
        groups = parameter_groups(self.model, self.cfg.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, self.cfg.lr, (0.9, 0.999), fused=True)
        self.batch = self.host_batch.to(self.device)
        self.grid = self.model.vit.grid_size(self.batch.video)[1:]

    def targets(self, batch: data.Batch) -> TeacherTargets:
        """The teacher targets of the batch, read from the store if there is one."""
        if self.store:
            return self.store.read(batch.clip_ids.tolist(), self.device)
        return compute_targets(self.teacher, batch, self.cfg.mask, self.cfg.mask.ratio, check=False, grid=self.grid)

    def make_inputs(self, batches: list[data.Batch]) -> list[tuple]:
        return train.attach_batch_stats(self.model, batches, [self.targets(b) for b in batches])

    def __call__(self):
        batch = self.host_batch.to(self.device, non_blocking=True)
        forward_backward(self.model, [batch], self.make_inputs, train.loss_weights(self.cfg.model))
        self.update()

    def update(self):
        """Clip the gradients and let AdamW update the weights."""
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        update_weights(self.optimizer, norm, self.cfg.max_grad_norm, (~norm.isfinite()).float())

    def cache_targets(self):
        """From now on read the targets from a file, which is in memory, as train.py does in later passes."""
        with torch.no_grad(), bf16_autocast(self.device):
            targets = self.targets(self.batch)
        B, T, N, E = targets.token_targets.shape
        with tempfile.NamedTemporaryFile() as file:         # the store keeps it open
            store = TargetStore(file.name, T, N, targets.visible_ids.shape[1], E)
        store.write(range(B), store.to_host(store.quantize(targets)))
        self.store = store


class StepParts:
    """The parts of a step, each to be run alone on what the other parts would give it."""

    def __init__(self, step: TrainStep):
        self.step, self.model, self.teacher, self.batch = step, step.model, step.teacher, step.batch
        self.frames = self.batch.video.flatten(0, 1)
        with torch.no_grad():                   # without autocast, as in compute_targets: it makes the tokens fp32
            self.targets = step.targets(self.batch)
            self.tokens = self.teacher.forward_features(self.teacher.normalize(self.frames, step.grid))
        with torch.no_grad(), bf16_autocast(step.device):
            self.stats, = self.model.batch_stats([self.batch], [self.targets])
            features = self.model.encode_video(self.batch.video, self.targets.visible_ids)
            self.visible, self.video = (x.detach().requires_grad_() for x in features)
            self.token_targets = self.targets.gather(self.stats.query_ids)
        with bf16_autocast(step.device):
            self.run_vit(), self.run_decoder(), self.run_losses()
        self.grads = {p: p.grad for p in self.model.parameters()}

    def functions(self) -> dict[str, Callable]:
        """Each part as a function that leaves no gradients."""
        step = self.step
        frozen = {"teacher": self.run_teacher, "bandwidth and mask": self.run_mask,
                  "token targets": lambda: self.teacher.token_embeddings(self.tokens, step.grid)}
        if step.store:
            frozen = {"reading the targets": lambda: step.targets(self.batch)}
        trained = {"student ViT": self.run_vit, "decoder and MRM": self.run_decoder,
                   "text, fusion, VTC, VTM, MLM": self.run_losses}
        return {
            "clips to the device": lambda: step.host_batch.to(step.device),
            **{name: torch.no_grad()(function) for name, function in frozen.items()},
            **{name: partial(self.with_grad, function) for name, function in trained.items()},
            "clipping and AdamW": self.run_update,
        }

    def with_grad(self, function: Callable):
        with bf16_autocast(self.step.device):
            function()
        self.step.optimizer.zero_grad(set_to_none=True)
        self.visible.grad = self.video.grad = None

    def run_teacher(self):
        self.teacher.forward_features(self.teacher.normalize(self.frames, self.step.grid))
        self.teacher.encode_text(self.teacher.tokenize(self.batch.captions))

    def run_mask(self):
        cfg, tokens = self.step.cfg, self.tokens.unflatten(0, self.batch.video.shape[:2])
        select_visible(self.teacher, tokens, cfg.mask, cfg.mask.ratio, self.batch.seed, self.step.grid, check=False)

    def run_vit(self):
        out, feature = self.model.encode_video(self.batch.video, self.targets.visible_ids)
        torch.autograd.backward((out, feature), (torch.ones_like(out), torch.ones_like(feature)))

    def run_decoder(self):
        """The decoder, and MRM with its statistics of the batch."""
        model, targets, query_ids = self.model, self.targets, self.stats.query_ids
        no_autocast = lambda: torch.autocast(self.step.device.type, enabled=False)
        with torch.no_grad(), no_autocast():
            text = targets.text_embeds.float()
            form = model.relevance_form(targets, text.T @ text / len(text))
            target_variance(targets.gather(query_ids), form)
        grid = model.vit.grid_size(self.batch.video)
        predictions = model.decoder(self.visible, targets.visible_ids, query_ids, grid)
        with no_autocast():
            form(predictions - self.token_targets).mean().backward()

    def run_losses(self):
        """All that follows the ViT, but the decoder."""
        self.model.encode_video = lambda *_: (self.visible, self.video)
        try:
            stats = replace(self.stats, mlm_inputs=self.model.mask_text(self.batch), query_ids=None)
            sum(self.model(self.batch, None, stats).values()).backward()
        finally:
            del self.model.encode_video

    def run_update(self):
        for p in self.model.parameters():
            p.grad = self.grads[p]
        self.step.update()


def make_config(cfg: Config, B: int, variant: str) -> train.Config:
    """The config of the preset with the changes of command line and variant."""
    preset = train.PRESETS[cfg.preset]
    return replace(
        preset, batch=B, compile="compiled" in variant, activation_checkpointing="checkpointing" in variant,
        data=replace(preset.data, num_frames=cfg.frames or preset.data.num_frames,
                     image_size=cfg.size or preset.data.image_size),
        mask=replace(preset.mask, ratio=cfg.ratio or preset.mask.ratio))


def make_step(cfg: Config, B: int, variant: str) -> TrainStep:
    """Build models with random weights, and a batch of random clips and texts."""
    device, run_cfg = torch.device(cfg.device), make_config(cfg, B, variant)
    torch.manual_seed(0)
    T, size, L = run_cfg.data.num_frames, run_cfg.data.image_size, run_cfg.text.max_length
    captions = [" ".join(f"word{int(w)}" for w in torch.randint(500, (12,))) for _ in range(B)]
    with tempfile.TemporaryDirectory() as folder:
        build_wordpiece(captions, f"{folder}/tokenizer.json")
        tokenizer = load_tokenizer(f"{folder}/tokenizer.json")
    if cfg.preset == "sprites":
        vocab_size, mask_token_id = tokenizer.get_vocab_size(), tokenizer.token_to_id("[MASK]")
        teacher = build_toy_teacher(run_cfg, tokenizer)
    else:
        vocab_size, mask_token_id = 30522, 103                              # of bert-base-uncased
        teacher = SigLIP(SigLIPConfig(text_config=TextConfig(pad_token_id=0)), tokenizer)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = train.wrap_layers(teacher.to(device, dtype).eval().requires_grad_(False), run_cfg)
    run_cfg = replace(
        run_cfg, text=replace(run_cfg.text, vocab_size=vocab_size, mask_token_id=mask_token_id),
        model=replace(run_cfg.model, target_dim=teacher.cfg.vision_config.hidden_size))
    model = ClusterSTM(run_cfg.vit, run_cfg.text, run_cfg.model).to(device).train()
    model = train.wrap_layers(model, run_cfg)
    ids = torch.randint(mask_token_id + 1, vocab_size, (B, L))
    ids[:, 0] = 2
    index = torch.arange(B)
    batch = data.Batch(torch.randint(256, (B, T, 3, size, size), dtype=torch.uint8), ids, captions, captions, index,
                       index, torch.zeros_like(index), seed=0)
    step = TrainStep(run_cfg, teacher, model, batch.pin_memory() if device.type == "cuda" else batch, device)
    if "cached" in variant:
        step.cache_targets()
    return step


# ---------------------------------------------------------------------------------------------------------------------
# Measuring

def allocated_bytes() -> int:
    """Bytes of GPU memory that are in use, after a garbage collection: compiled layers are in reference cycles."""
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


def peak_gib(function: Callable, device: str, baseline: int) -> float:
    """GiB at the peak: on a GPU of function() above `baseline`, weights included; on a CPU of the process so far."""
    if device != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    return peak_memory(function, baseline) / 2 ** 30


def matmul_rate(device: str) -> tuple[float, str]:
    """Flops per second of a large product, and which: in bf16 on a GPU, in fp32 on a CPU."""
    if device == "cuda":
        return measure_roofline("cuda")[0], "8192^3 in bf16"
    a = torch.randn(2048, 2048)
    ms, = time_interleaved([lambda: a @ a], rounds=3, calls=3, warmup=3)
    return 2e3 * 2048 ** 3 / ms, "2048^3 in fp32"


def profile_step(step: TrainStep, rows: int) -> str:
    """The operators that take most time in three steps, by their own time; on a GPU also what the host waited for."""
    on_gpu = step.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    step()
    synchronize()
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(3):
            step()
    events = profile.key_averages()
    table = events.table(sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total", row_limit=rows,
                         max_name_column_width=48)
    waits = {e.key: e.count for e in events if "Synchronize" in e.key or "DtoH (Device -> Pageable)" in e.key}
    return table + f"\nThe host waited, in three steps and once as the profiler ended, for: {waits}" * on_gpu


def trace_step(step: Callable, path: str, on_gpu: bool) -> float | None:
    """Write a Chrome trace of one step to `path` -> milliseconds in which the GPU was busy, None without a GPU."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    step()
    synchronize()
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        synchronize()
    profile.export_chrome_trace(path)
    return busy_ms(path) if on_gpu else None


def busy_ms(path: str) -> float:
    """Milliseconds of a Chrome trace in which at least one kernel, copy or memset runs on the GPU."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt") as f:
        events = json.load(f)["traceEvents"]
    spans = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events
                   if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))
    busy, end = 0.0, -math.inf
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e3


# ---------------------------------------------------------------------------------------------------------------------
# Changes

class StepChanges:
    """Parts of the step and the slower forms that they replaced. On a CPU the forms of the teacher's MLP and of VTC are
    alike: both changes are for a GPU."""

    def __init__(self, step: TrainStep, clips: int):
        """clips: of the global batch, for VTC."""
        self.step, self.parts = step, StepParts(step)
        self.cross_attention = step.model.bert.bert.encoder.layer[-1].crossattention
        B, L = step.batch.text_ids.shape
        self.texts = torch.randn(4 * B, L, step.cfg.text.width, device=step.device, requires_grad=True)
        features = torch.randn(2, clips, step.cfg.model.embed_dim, device=step.device)
        self.features = nn.functional.normalize(features, dim=-1).requires_grad_()

    def functions(self) -> dict[str, tuple[Callable, Callable]]:
        """Name of a change -> the form before and the form now, as functions."""
        mlp, pool_attention = self.step.teacher.vision_model.encoder.layers[0].mlp, self.step.teacher.pool_attention
        index = torch.arange(len(self.texts) // 4, device=self.step.device)
        both = lambda function, before, now: (partial(function, before), partial(function, now))
        return {
            "the MLP of a teacher layer: GELU in a kernel of its own, or in the product's":
                both(self.run_frozen, lambda x: mlp.fc2(mlp.act(mlp.fc1(x))), mlp),
            "MRM's forms: e G e by autograd, or QuadraticForm":
                both(self.run_forms, lambda e, gram: ((e @ gram) * e).sum(-1), QuadraticForm.apply),
            f"VTC's product of {self.features.shape[1]} clips: in fp32, or in bf16x3 by Matmul":
                both(self.run_vtc_product, torch.matmul, Matmul.apply),
            "cross-attention of a layer: keys by index for all texts, or for a quarter":
                both(self.run_cross_attention, torch.cat([index.repeat_interleave(3), index.flip(0)]), index.flip(0)),
            "clipping and AdamW: in two passes, or in one": (self.clip_first, self.parts.run_update),
            "the teacher's attention for the mask: computed, or not":
                both(self.run_frozen, pool_attention, lambda tokens: None),
        }

    @torch.no_grad()
    def run_frozen(self, function: Callable):
        return function(self.parts.tokens)

    def run_forms(self, form: Callable):
        """MRM's form of the targets' variance, and that of the predictions' errors with its gradient."""
        e, gram = self.parts.token_targets.detach().requires_grad_(), self.parts.stats.text_gram
        with torch.no_grad():
            variance = form(e, gram)
        return variance, *torch.autograd.grad(form(e, gram).sum(), e)

    def run_vtc_product(self, product: Callable):
        logits = product(self.features[0], self.features[1].T)
        return torch.autograd.grad(logits, self.features, logits.detach())

    def run_cross_attention(self, index: Tensor):
        with bf16_autocast(self.step.device):
            y = self.cross_attention(self.texts, self.parts.visible, None, index)
        return y, *torch.autograd.grad(y, (self.texts, self.parts.visible), torch.ones_like(y))

    def clip_first(self):
        step = self.step
        for p in step.model.parameters():
            p.grad = self.parts.grads[p]
        norm = nn.utils.clip_grad_norm_(step.model.parameters(), step.cfg.max_grad_norm)
        update_weights(step.optimizer, norm, 0, (~norm.isfinite()).float())


# ---------------------------------------------------------------------------------------------------------------------
# Tables

@dataclass
class Times:
    """What was measured of a variant."""
    flops: dict[str, int]               # by part
    step_ms: float
    parts_ms: dict[str, float]          # empty if its parts were not timed
    umt_ms: float | None                # UMT's step, in turn with this one
    peak_gib: float
    busy_ms: float | None               # None on a CPU
    changes_ms: dict[str, list[float]]  # name -> before and now; empty if not timed


def measure_variant(cfg: Config, B: int, variant: str, umt: Callable | None) -> tuple[Times, str]:
    """Time a variant, in turn with UMT's step if there is one -> times, profile (of the first variant, if asked)."""
    baseline = allocated_bytes()
    step = make_step(cfg, B, variant)
    ms = time_interleaved([step] + [umt] * bool(umt), cfg.rounds, cfg.steps, warmup=3)
    part_flops = flops(step.cfg, step.teacher.cfg, B)
    if step.store:
        part_flops = {name: n for name, n in part_flops.items() if name not in TEACHER_PARTS}
    peak, busy, parts_ms, changes_ms, profile = peak_gib(step, cfg.device, baseline), None, {}, {}, ""
    first = variant == cfg.variants[0]
    trace = cfg.trace if first and B == cfg.batch[0] else ""
    if trace or cfg.device == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            busy = trace_step(step, trace or f"{folder}/trace.json", cfg.device == "cuda")
    if first or variant == cfg.variants[-1] or step.store:
        parts = StepParts(step).functions()
        parts_ms = time_interleaved([*parts.values()], cfg.rounds, cfg.steps, warmup=3)
        parts_ms = dict(zip(parts, parts_ms, strict=True))
    if cfg.changes and first:
        changes = StepChanges(step, train.PRESETS[cfg.preset].batch).functions()
        ms_of_forms = time_interleaved([form for pair in changes.values() for form in pair], cfg.rounds, cfg.steps, 3)
        changes_ms = dict(zip(changes, zip(ms_of_forms[::2], ms_of_forms[1::2], strict=True), strict=True))
    if cfg.profile and first:
        profile = profile_step(step, cfg.profile)
    return Times(part_flops, ms[0], parts_ms, ms[1] if umt else None, peak, busy, changes_ms), profile


def batch_tables(cfg: Config, B: int, rate: float):
    """Print the tables of steps of B clips; rate: flops per second of a large product."""
    print_header(f"{cfg.preset}, batch {B}", "step", "ms", "GPU busy ms", "clips/s", "Tflop a step", "utilisation",
                 "GiB at most", "times UMT")
    umt, variants, profiles = None, {}, []
    if cfg.umt:
        run_cfg, baseline = make_config(cfg, B, "eager"), allocated_bytes()
        visible = keep_count(data.count_tokens(1, run_cfg.data.image_size, run_cfg.vit.patch_size), run_cfg.mask.ratio)
        umt, facts = umt_step(cfg.umt, cfg.device, B, run_cfg.data.num_frames, run_cfg.data.image_size, visible,
                              run_cfg.text.max_length, small=cfg.preset == "sprites")
        umt()                                               # the first step allocates the state of its optimizer
        umt_peak = peak_gib(umt, cfg.device, baseline)
    for variant in cfg.variants:
        times, profile = measure_variant(cfg, B, variant, umt)
        total = sum(times.flops.values())
        comparable = umt and cfg.preset != "sprites" and "cached" not in variant
        print_row(variant, times.step_ms, times.busy_ms, 1e3 * B / times.step_ms, total / 1e12,
                  f"{1e5 * total / times.step_ms / rate:.1f} %", times.peak_gib,
                  times.umt_ms / times.step_ms if comparable else None)
        variants[variant] = times
        profiles += [profile] if profile else []
    if umt:
        name = "UMT's stage 2" + ", with widths of its own" * (cfg.preset == "sprites")
        ms = times.umt_ms                                   # in turn with the last variant
        print_row(name, ms, None, 1e3 * B / ms, None, None, umt_peak, None)
        print("\nUMT: " + "; ".join(f"{name} {fact}" for name, fact in facts.items()), flush=True)
    for variant, times in variants.items():
        if times.parts_ms:
            parts_table(f"{variant}, batch {B}: its parts, each alone", times, rate)
        if times.changes_ms:
            print_header(f"batch {B}: parts before and after a change, each alone", "part", "before ms", "now ms",
                         "before - now")
            for change, (before, now) in times.changes_ms.items():
                print_row(change, before, now, before - now)
    for profile in profiles:
        print(f"\n```\n{profile}\n```", flush=True)


def parts_table(title: str, times: Times, rate: float):
    """Print the parts of a step, and what the step takes beyond their sum."""
    print_header(title, "part", "ms", "share of the step", "Tflop", "utilisation")
    for name, ms in times.parts_ms.items():
        n = times.flops.get(name)
        print_row(name, ms, f"{100 * ms / times.step_ms:.1f} %", n and n / 1e12, n and f"{1e5 * n / ms / rate:.1f} %")
    print_row("the step, less these", times.step_ms - sum(times.parts_ms.values()), None, None, None)


def step_tables(cfg: Config):
    """Print every table of a config whose defaults are filled in."""
    rate, product = matmul_rate(cfg.device)
    print(f"\n{rate / 1e12:.4g} Tflop/s: a product of {product}", flush=True)
    for B in cfg.batch:
        batch_tables(cfg, B, rate)


def main(cfg: Config):
    cfg = fill_defaults(cfg)
    banner(cfg.device, cfg.commit, "bench")
    step_tables(cfg)
