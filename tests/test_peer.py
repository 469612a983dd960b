"""The peer's step: a checkout of the same layout with a few lines of ours, what is left behind, what is refused."""

import os
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from tools import peer

FAKE = {
    "configs/data.py": "",
    "configs/model.py": "TextEncoders = dict(bert=dict(config='configs/config_bert.json', d_model=768))",
    "configs/config_bert.json": '{"hidden_size": 8, "vocab_size": 1200}',
    "exp/pretraining/b16_5m.py": """
from configs.data import *
from configs.model import *
text_enc = "bert"
model = dict(vision_encoder=dict(num_frames="${num_frames}", pretrained="nowhere", use_checkpoint=False),
             text_encoder="${TextEncoders[${text_enc}]}", embed_dim=512)
criterion = dict(loss_weight=dict(vtc=1.0, mlm=1.0, vtm=0.0))
optimizer = dict(lr=0.05, max_grad_norm=-1)
gradient_checkpointing = True
""",
    "utils/easydict.py": """
class EasyDict(dict):
    def __init__(self, given):
        super().__init__((k, EasyDict(v) if isinstance(v, dict) else v) for k, v in given.items())
    __getattr__ = dict.__getitem__
""",
    "utils/optimizer.py": """
import torch
create_optimizer = lambda args, model: torch.optim.AdamW(model.parameters(), lr=args.lr)
""",
    "models/__init__.py": "",
    "models/backbones/vit/__init__.py": "from .clip import clip_b16",
    "models/backbones/vit/clip.py": """
import torch
from timm.models.layers import drop_path, to_2tuple
assert to_2tuple(3) == to_2tuple((3, 3)) == (3, 3)
_MODELS = {"ViT-B/16": "nowhere.pth"}
class VisionTransformer(torch.nn.Module):
    def __init__(self, width, layers, heads, output_dim):
        super().__init__()
        self.positional_embedding = torch.nn.Parameter(torch.zeros(17, width))
def clip_b16():
    model = VisionTransformer(width=768, layers=12, heads=12, output_dim=512)
    model.load_state_dict(torch.load(_MODELS["ViT-B/16"]))
    return model.eval()
""",
    "models/backbones/bert/xbert.py": """
import json
import torch
from transformers.modeling_utils import PreTrainedModel, apply_chunking_to_forward
from transformers.modeling_outputs import MaskedLMOutput
import transformers
transformers.logging.set_verbosity_error()
class BertForMaskedLM(PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.words = torch.nn.Embedding(config["vocab_size"], config["hidden_size"])
    def forward(self, ids):
        scores = lambda x: x @ self.words.weight.T
        return MaskedLMOutput(logits=apply_chunking_to_forward(scores, 0, 1, self.words(ids)))
""",
    "models/umt.py": """
import json
import torch
from einops import rearrange
from .backbones.bert.xbert import BertForMaskedLM
from .backbones.vit import clip_b16
class UMT(torch.nn.Module):
    def __init__(self, config, tokenizer, is_pretrain=True):
        super().__init__()
        assert is_pretrain and config.model.vision_encoder.pretrained is None
        self.config, self.tokenizer = config, tokenizer
        self.clip_teacher = clip_b16()
        with open(config.model.text_encoder.config) as f:
            self.text_encoder, _ = BertForMaskedLM.from_pretrained("nowhere", config=json.load(f))
        self.head = torch.nn.Linear(3, 64)
    def forward(self, image, text, idx):
        assert self.clip_teacher.training and len(idx) == len(image)
        assert text.input_ids.shape == text.attention_mask.shape
        assert (text.input_ids[:, 0] == self.tokenizer.cls_token_id).all()
        N = (image.shape[-1] // 16) ** 2
        self.seen = N - int(N * self.config.model.vision_encoder.video_mask_ratio)
        everyone = [torch.empty_like(idx)]
        torch.distributed.all_gather(everyone, idx)
        text = self.text_encoder(text.input_ids)[0]
        loss = torch.nn.functional.cross_entropy(self.head(image.mean((1, 3, 4))), everyone[0])
        return dict(loss_vtc=loss, loss_mlm=text.square().mean())
""",
}


def write(folder, **changed):
    for path, text in (FAKE | changed).items():
        path = folder / "multi_modality" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def refused(said, folder, **given):
    with pytest.raises(ValueError, match=said) as e:
        peer.umt_step(folder, "cpu", **dict(batch=2, size=64, keep=3) | given)
    assert "\n" not in str(e.value)


@pytest.fixture(autouse=True)
def left_as_found(monkeypatch):
    """No package that has a stand-in can be imported; afterwards each module and path is the one that was there."""
    for name in peer.stand_ins():
        monkeypatch.setitem(sys.modules, name, None)
    theirs = ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", theirs)
    path, had = sys.path[:], dist.is_initialized()
    names = peer.modules_of({*peer.OWN, *peer.stand_ins()})
    state = torch.get_rng_state()
    yield
    assert sys.path == path and peer.modules_of({*peer.OWN, *peer.stand_ins()}) == names
    assert sys.modules["utils"] is theirs and sys.modules["timm"] is None
    if not had and dist.is_initialized():
        dist.destroy_process_group()
    torch.set_rng_state(state)


def test_it_builds_and_steps(tmp_path):
    state = torch.get_rng_state()
    step, facts = peer.umt_step(write(tmp_path), "cpu", 4, size=64, keep=3, length=7, small=True)
    assert torch.equal(torch.get_rng_state(), state)
    first, *_, last = [step() for _ in range(8)]
    assert first.shape == () and not first.requires_grad and last < first
    assert sum(step.losses.values()) == last and set(step.losses) == {"loss_vtc", "loss_mlm"}
    assert step.model.seen == facts["keep"] == 3 and facts["tokens"] == 16
    assert step.model.clip_teacher.positional_embedding.std() > 0
    assert facts["losses"] == ["vtc", "mlm"] and facts["checkpointed"] == dict(vision=False, text=True)
    words = peer.SMALL_BERT["vocab_size"] * peer.SMALL_BERT["hidden_size"]
    assert facts["parameters"] == dict(clip_teacher=17 * 48, text_encoder=words, head=256, all=17 * 48 + words + 256)
    assert facts["stand_ins"] == ["einops", "timm", "transformers"] and facts["commit"] == "unknown"
    again, _ = peer.umt_step(str(tmp_path), "cpu", 4, size=64, keep=3, length=7, small=True)
    assert again() == first                                                 # the same weights and inputs


@pytest.mark.parametrize("size", [32, 64, 224, 384])
def test_every_number_of_tokens_can_be_kept(tmp_path, size):
    root, N = write(tmp_path) + "/multi_modality", (size // 16) ** 2
    with peer.imports_of(root):
        for keep in range(1, N + 1, max(1, N // 50)):
            vision = peer.published(root, 4, size, keep, False)["model"]["vision_encoder"]
            assert N - int(N * vision["video_mask_ratio"]) == keep


def test_a_package_that_is_there_is_used(tmp_path, monkeypatch):
    real = ModuleType("einops")
    real.rearrange = print
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "einops", real)
        _, facts = peer.umt_step(write(tmp_path), "cpu", 2, size=64, keep=3, small=True)
        assert facts["stand_ins"] == ["timm", "transformers"] and sys.modules["einops"] is real


def test_a_package_that_cannot_be_read_is_stood_in_for(tmp_path, monkeypatch):
    (tmp_path / "site" / "timm").mkdir(parents=True)
    (tmp_path / "site" / "timm" / "__init__.py").write_text("raise RuntimeError('torchvision::nms does not exist')")
    with monkeypatch.context() as m:
        m.syspath_prepend(tmp_path / "site")
        m.delitem(sys.modules, "timm")
        _, facts = peer.umt_step(write(tmp_path), "cpu", 2, size=64, keep=3, small=True)
    assert "timm" in facts["stand_ins"]


@pytest.mark.parametrize("given, said", [
    (dict(batch=1), "batch 1"), (dict(frames=1), "frames 1"), (dict(keep=17), "keep 17: wanted"),
    (dict(keep=0), "1 to 16"), (dict(size=60), "size 60"),
], ids=str)
def test_settings_that_it_has_no_step_for(tmp_path, given, said):
    refused(said, write(tmp_path), **given)


def test_no_checkout_and_a_missing_package_read_well(tmp_path):
    refused("nowhere is no checkout of .*: wanted multi_modality/exp", str(tmp_path / "nowhere"))
    for line, said in (("import no_such_package", "got ModuleNotFoundError: No module named 'no_such_package'"),
                       ("from transformers.modeling_utils import something_new", "something_new"),
                       ("raise OSError('one\\ntwo')", "got OSError: one$")):
        refused(said, write(tmp_path, **{"models/umt.py": line}))


def test_drop_path_keeps_whole_samples_and_their_mean():
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 2) + 1
    y = peer.drop_path(x, 0.25, True)
    gone = (y == 0).all((1, 2))
    torch.testing.assert_close(y[~gone], x[~gone] / 0.75)
    assert abs(gone.float().mean() - 0.25) < 0.03
    assert peer.drop_path(x, 0.25, False) is x and peer.drop_path(x, 0.0, True) is x


def test_the_base_model_ties_words_and_masks_what_is_padding():
    class Body(peer.PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.words = torch.nn.Embedding(5, 3)

        def get_input_embeddings(self):
            return self.words

    class Head(peer.PreTrainedModel):
        base_model_prefix = "body"

        def __init__(self, config):
            super().__init__(config)
            self.body, self.out = Body(config), torch.nn.Linear(3, 5)
            self.init_weights()

        def _init_weights(self, module):
            if isinstance(module, torch.nn.Embedding):
                module.weight.data.fill_(2)

        def get_output_embeddings(self):
            return self.out

    model = Head(peer.PretrainedConfig(pad_token_id=0))
    assert model.out.weight is model.body.words.weight and (model.out.weight == 2).all()
    low = torch.finfo(torch.float32).min
    torch.testing.assert_close(model.invert_attention_mask(torch.tensor([[1, 0]])), torch.tensor([[[[0.0, low]]]]))
    assert model.get_head_mask(None, 2) == [None, None]
    found = peer.outputs()["MaskedLMOutput"](logits=7)
    assert found[0] == found.logits == 7 and found.loss is None


@pytest.mark.skipif("UMT" not in os.environ, reason="UMT names no checkout of unmasked_teacher")
def test_the_checkout_learns_one_batch():
    step, facts = peer.umt_step(os.environ["UMT"], "cpu", 4, size=64, keep=5, length=16, small=True)
    inner, seen = step.model.vision_encoder.encoder.blocks[0], []
    inner.register_forward_hook(lambda block, given, out: seen.append(given[0].shape[1]))
    for group in step.optimizer.param_groups:
        group["lr"] = 1e-3
    losses = [step() for _ in range(40)]
    assert set(step.losses) == {"loss_uta", "loss_vtc", "loss_vtm", "loss_mlm"}
    assert torch.stack(losses).isfinite().all() and sum(losses[-5:]) < sum(losses[:5]) - 2
    assert set(seen) == {4 * 5} and facts["keep"] == 5
    idle = {name.split(".")[0] for name, p in step.model.named_parameters() if p.grad is None}
    assert idle == {"clip_teacher"}
    assert facts["losses"] == ["vtc", "mlm", "vtm", "uta"] and facts["checkpointed"] == dict(vision=False, text=True)
