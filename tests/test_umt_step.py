"""
bench/umt_step.py on a small checkout of the same layout: its step, stubs of packages, what it leaves behind, messages.

If the environment variable UMT names a checkout of unmasked_teacher, that one is run too.
"""

import os
import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from bench import umt_step as umt

CHECKOUT = {
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
    def __init__(self, values):
        super().__init__((k, EasyDict(v) if isinstance(v, dict) else v) for k, v in values.items())
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
        self.num_visible = N - int(N * self.config.model.vision_encoder.video_mask_ratio)
        all_ids = [torch.empty_like(idx)]
        torch.distributed.all_gather(all_ids, idx)
        text = self.text_encoder(text.input_ids)[0]
        loss = torch.nn.functional.cross_entropy(self.head(image.mean((1, 3, 4))), all_ids[0])
        return dict(loss_vtc=loss, loss_mlm=text.square().mean())
""",
}


SMALL = dict(size=64, keep=3, small=True)


def write_checkout(folder, changes=()):
    """Write CHECKOUT, with other contents of some files -> the folder's name."""
    for path, text in (CHECKOUT | dict(changes)).items():
        path = folder / "multi_modality" / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def assert_refused(message, folder, **arguments):
    with pytest.raises(ValueError, match=message) as error:
        umt.umt_step(folder, "cpu", **dict(batch=2, size=64, keep=3) | arguments)
    assert "\n" not in str(error.value)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """No package that has a stub can be imported; after the test each module and path must be the one before it."""
    for name in umt.stubs():
        monkeypatch.setitem(sys.modules, name, None)
    utils = ModuleType("utils")                             # a package of ours with the name of one of UMT's
    monkeypatch.setitem(sys.modules, "utils", utils)
    packages = {*umt.UMT_PACKAGES, *umt.stubs()}
    path, modules = sys.path[:], umt.modules_of(packages)
    had_group, state = dist.is_initialized(), torch.get_rng_state()
    yield
    assert sys.path == path and umt.modules_of(packages) == modules
    assert sys.modules["utils"] is utils and sys.modules["timm"] is None
    if not had_group and dist.is_initialized():
        dist.destroy_process_group()
    torch.set_rng_state(state)


# ---------------------------------------------------------------------------------------------------------------------
# The step

def test_the_step_trains_and_reports_its_facts(tmp_path):
    state = torch.get_rng_state()
    step, facts = umt.umt_step(write_checkout(tmp_path), "cpu", 4, length=7, **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    first, *_, last = [step() for _ in range(8)]
    assert first.shape == () and not first.requires_grad and last < first
    assert sum(step.losses.values()) == last and set(step.losses) == {"loss_vtc", "loss_mlm"}
    assert step.model.num_visible == facts["keep"] == 3 and facts["tokens"] == 16
    assert step.model.clip_teacher.positional_embedding.std() > 0
    assert facts["losses"] == ["vtc", "mlm"] and facts["checkpointed"] == dict(vision=False, text=True)
    words = umt.SMALL_BERT["vocab_size"] * umt.SMALL_BERT["hidden_size"]
    assert facts["parameters"] == dict(clip_teacher=17 * 48, text_encoder=words, head=256, all=17 * 48 + words + 256)
    assert facts["stubs"] == ["einops", "timm", "transformers"] and facts["commit"] == "unknown"
    again, _ = umt.umt_step(str(tmp_path), "cpu", 4, length=7, **SMALL)
    assert again() == first                                                 # the same weights and inputs


@pytest.mark.parametrize("size", [32, 224, 384])
def test_every_number_of_tokens_can_be_visible(tmp_path, size):
    root, N = write_checkout(tmp_path) + "/multi_modality", (size // 16) ** 2
    with umt.imports_of(root):
        for keep in range(1, N + 1, max(1, N // 20)):
            vision = umt.umt_settings(root, 4, size, keep, False)["model"]["vision_encoder"]
            assert N - int(N * vision["video_mask_ratio"]) == keep


@pytest.mark.parametrize("arguments, message", [
    (dict(batch=1), "batch.* 1"), (dict(frames=1), "frames.* 1"), (dict(length=1), "length.* 1"),
    (dict(keep=17), "keep.* 16.* 17"), (dict(keep=0), "keep.* 0"), (dict(size=60), "size.* 60"),
], ids=str)
def test_shapes_without_a_step_are_refused(tmp_path, arguments, message):
    assert_refused(message, write_checkout(tmp_path), **arguments)


@pytest.mark.skipif("UMT" not in os.environ, reason="UMT names no checkout of unmasked_teacher")
def test_the_real_checkout_learns_one_batch():
    step, facts = umt.umt_step(os.environ["UMT"], "cpu", 4, size=64, keep=5, length=16, small=True)
    block, num_tokens = step.model.vision_encoder.encoder.blocks[0], set()
    block.register_forward_hook(lambda block, inputs, out: num_tokens.add(inputs[0].shape[1]))
    for group in step.optimizer.param_groups:
        group["lr"] = 1e-3
    losses = [step() for _ in range(40)]
    assert set(step.losses) == {"loss_uta", "loss_vtc", "loss_vtm", "loss_mlm"}
    assert torch.stack(losses).isfinite().all() and sum(losses[-5:]) < sum(losses[:5]) - 2
    assert num_tokens == {4 * 5} and facts["keep"] == 5
    without_grad = {name.split(".")[0] for name, p in step.model.named_parameters() if p.grad is None}
    assert without_grad == {"clip_teacher"}
    assert facts["losses"] == ["vtc", "mlm", "vtm", "uta"] and facts["checkpointed"] == dict(vision=False, text=True)


# ---------------------------------------------------------------------------------------------------------------------
# Imports and stubs

def test_an_installed_package_is_used(tmp_path, monkeypatch):
    einops = ModuleType("einops")
    einops.rearrange = print
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "einops", einops)
        _, facts = umt.umt_step(write_checkout(tmp_path), "cpu", 2, **SMALL)
        assert facts["stubs"] == ["timm", "transformers"] and sys.modules["einops"] is einops


def test_a_package_that_fails_to_import_is_stubbed(tmp_path, monkeypatch):
    (tmp_path / "site" / "timm").mkdir(parents=True)
    (tmp_path / "site" / "timm" / "__init__.py").write_text("raise RuntimeError('torchvision::nms does not exist')")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "site")
        patch.delitem(sys.modules, "timm")
        _, facts = umt.umt_step(write_checkout(tmp_path), "cpu", 2, **SMALL)
    assert "timm" in facts["stubs"]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    assert_refused("nowhere .*multi_modality/exp", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("line, message", [
    ("import no_such_package", "ModuleNotFoundError: .*no_such_package"),
    ("from transformers.modeling_utils import something_new", "something_new"),
    ("raise OSError('one\\ntwo')", "OSError: one$"),
])
def test_code_that_cannot_be_imported_is_one_line(tmp_path, line, message):
    assert_refused(message, write_checkout(tmp_path, {"models/umt.py": line}))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 2) + 1
    y = umt.drop_path(x, 0.25, True)
    dropped = (y == 0).all((1, 2))
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.75)
    assert abs(dropped.float().mean() - 0.25) < 0.03
    assert umt.drop_path(x, 0.25, False) is x and umt.drop_path(x, 0.0, True) is x


def test_the_model_stub_ties_words_and_masks_padding():
    class Body(umt.PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.words = torch.nn.Embedding(5, 3)

        def get_input_embeddings(self):
            return self.words

    class Head(umt.PreTrainedModel):
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

    model = Head(umt.PretrainedConfig(pad_token_id=0))
    assert model.out.weight is model.body.words.weight and (model.out.weight == 2).all()
    lowest = torch.finfo(torch.float32).min
    torch.testing.assert_close(model.invert_attention_mask(torch.tensor([[1, 0]])), torch.tensor([[[[0.0, lowest]]]]))
    assert model.get_head_mask(None, 2) == [None, None]


def test_output_stubs_count_the_fields_that_are_set():
    output = umt.model_outputs()["MaskedLMOutput"](logits=7)
    assert output[0] == output.logits == 7 and output.loss is None
