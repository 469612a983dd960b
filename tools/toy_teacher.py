"""
A small SigLIP teacher for runs without a checkpoint: clips -> single frames and captions -> a trained SigLIP.

train.py's stage "teacher" trains it (`SigLIPTrainer` on the arguments that `sample_single_frames` makes) before the
student; its stage "text" trains the text encoder by MLM with the text_ fields of ToyConfig. The result shows that
everything works; for results, give train.py a real checkpoint.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from data import Batch
from runtime import all_gather, all_gather_with_grad
from siglip_files import SigLIPConfig, TextConfig, VisionConfig
from teacher import SigLIP


@dataclass(frozen=True)
class ToyConfig:
    """The toy models trained first if no weights are given: a SigLIP on single frames, a text encoder by MLM."""
    width: int = 96               # teacher: channels, also the width of its joint space (E)
    depth: int = 1                # teacher: vision layers; more layers mix the tokens of a frame more
    text_depth: int = 2           # teacher: text layers
    heads: int = 12               # teacher: attention heads
    batch: int = 64               # teacher: frames per step, one from each clip
    steps: int = 800              # teacher: training steps
    lr: float = 2e-3              # teacher: peak learning rate
    frame_caption_prob: float = 0.5     # teacher: probability of training on a clip's frame caption, if it has one
    text_steps: int = 300         # text encoder: training steps
    text_batch: int = 128         # text encoder: captions per step
    text_lr: float = 1e-3         # text encoder: peak learning rate


def build_toy_teacher(cfg, tokenizer) -> SigLIP:
    """Return a SigLIP with new weights that two CPU cores can train; cfg: train.Config, whose patch size it shares."""
    toy = cfg.toy
    torch.manual_seed(cfg.seed)
    layers = dict(hidden_size=toy.width, intermediate_size=4 * toy.width, num_attention_heads=toy.heads,
                  hidden_act="relu")
    vision = VisionConfig(num_hidden_layers=toy.depth, image_size=cfg.data.image_size, patch_size=cfg.vit.patch_size,
                          **layers)
    text = TextConfig(num_hidden_layers=toy.text_depth, vocab_size=tokenizer.get_vocab_size(),
                      max_position_embeddings=cfg.text.max_length, pad_token_id=0, **layers)
    siglip = SigLIP(SigLIPConfig(vision, text), tokenizer)
    # Objects are 6 % of the tokens. A MAP head whose attention starts uniform sees none of them for hundreds of steps,
    # and a tower that mixes tokens writes the whole frame into each. So the attention starts sharp, the mixing at zero.
    nn.init.normal_(siglip.vision_model.head.probe, std=3.0)
    for layer in siglip.vision_model.encoder.layers:
        nn.init.zeros_(layer.self_attn.out_proj.weight)
    return siglip


def sample_single_frames(siglip: SigLIP, batches: list[Batch], frame_caption_prob: float,
                         seed: int) -> list[tuple[Tensor, Tensor]]:
    """
    Draw one frame of each clip -> for each micro-batch the arguments of SigLIPTrainer: frames (B, 3, H, W), ids (B, L).

    A clip that has a caption true of single frames gets it with probability frame_caption_prob. The draw depends on the
    sample only, not on the micro-batch, so the result does not depend on the number of ranks.
    """
    inputs = []
    for batch in batches:
        T = batch.video.shape[1]
        draws = [np.random.default_rng((seed, batch.first_sample + i, 4)).random(2) for i in range(len(batch.captions))]
        frames = torch.stack([video[int(t * T)] for video, (t, _) in zip(batch.video, draws, strict=True)])
        captions = [frame_caption if frame_caption and p < frame_caption_prob else caption for
                    frame_caption, caption, (_, p) in zip(batch.frame_captions, batch.captions, draws, strict=True)]
        inputs.append((frames, siglip.tokenize(captions)))
    return inputs


class SigLIPTrainer(nn.Module):
    """A SigLIP with its training loss, which runs over the captions of all ranks."""

    def __init__(self, siglip: SigLIP):
        super().__init__()
        self.siglip = siglip

    def forward(self, frames: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """
        uint8 frames (B, 3, H, W) and the ids (B, L) of their captions -> {"sigmoid": loss}.

        The loss compares this rank's frames with the captions of all ranks. Its mean over ranks is the loss of the
        whole batch, and the mean of the gradients is its gradient.
        """
        m = self.siglip
        _, image = m.encode_image(m.normalize(frames))
        text, all_ids = all_gather_with_grad(m.encode_text(ids)), all_gather(ids).flatten(0, 1)
        same = (ids[:, None] == all_ids[None]).all(-1)
        return {"sigmoid": sigmoid_loss(image, text, same, m.logit_scale, m.logit_bias)}


def sigmoid_loss(image: Tensor, text: Tensor, same: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """
    SigLIP's loss (Zhai et al., 2023) of unit vectors image (B, E), text (M, E); same (B, M) bool marks matching pairs.

    L = -1/B sum_ij log sigmoid(z_ij (t <image_i, text_j> + b)), z = 1 for matching pairs and -1 otherwise; scale is
    log t. Both scale and bias are learned.
    """
    with torch.autocast(image.device.type, enabled=False):
        logits = scale.exp() * image.float() @ text.float().T + bias
        return -nnf.logsigmoid(torch.where(same, logits, -logits)).sum() / len(image)
