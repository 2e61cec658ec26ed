"""UNet, VAE and text encoder against diffusers and transformers, float64, random weights."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import get_timestep_embedding
from transformers import CLIPTextModel

from model.layers import GroupNorm, timestep_embedding
from model.weights import load_text, load_unet, load_vae
from tests.checkpoints import IN_CHANNELS, make_checkpoint

F64 = {"dtype": torch.float64}


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_diffusers(ours, x_t, ctx):
    """The arguments for diffusers' UNet that mean the same."""
    if not ours.is_xl:
        return {"encoder_hidden_states": ctx}
    size = [8.0 * side for side in x_t.shape[-2:]]
    added = {
        "text_embeds": ctx[:, -1, : ours.added[0]],
        "time_ids": torch.tensor([[*size, 0, 0, *size]] * len(x_t), dtype=x_t.dtype),
    }
    return {"encoder_hidden_states": ctx[:, :-1], "added_cond_kwargs": added}


@pytest.mark.parametrize("family", IN_CHANNELS)
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_unet(tmp_path, family, size):
    size = "tiny" if family == "xl" else size
    root = make_checkpoint(tmp_path, family, size)
    ours = load_unet(root, **F64)
    theirs, info = UNet2DConditionModel.from_pretrained(
        root, subfolder="unet", torch_dtype=torch.float64, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for h, w in [(16, 16), (8, 24), (11, 6)]:  # square, wide, and sizes that do not halve evenly
        x_t, ctx = draw(3, IN_CHANNELS[family], h, w), draw(3, 77, ours.ctx_dim, seed=1)
        t = torch.tensor([0, 500, 999])
        with torch.no_grad():
            pred = ours(x_t, t, ctx)
            expected = theirs(x_t, t, **of_diffusers(ours, x_t, ctx), return_dict=False)[0]
        assert pred.shape == (3, 4, h, w)
        assert relative(pred, expected) < 1e-9
        assert relative(ours(x_t, torch.tensor(500), ctx)[1:2], expected[1:2]) < 1e-9  # a scalar t


@pytest.mark.parametrize("width", [32, 48, 320, 321])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("flip", [True, False])
def test_timestep_embedding(width, shift, flip):
    """To the last bit at any width: SD's is 320, and its half no power of two."""
    t = torch.arange(1000)
    ours = timestep_embedding(t, width, flip, shift)
    assert torch.equal(ours, get_timestep_embedding(t, width, flip, shift))


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_unet_gradients(request, family):
    root = request.getfixturevalue(family)
    ours = load_unet(root, **F64)
    theirs = UNet2DConditionModel.from_pretrained(root, subfolder="unet", torch_dtype=torch.float64)
    grads, t = [], torch.tensor([3, 800])
    for net in (ours, theirs):
        x_t, ctx = draw(2, 4, 8, 8).requires_grad_(), draw(2, 77, ours.ctx_dim, seed=1)
        ctx.requires_grad_()
        out = ours(x_t, t, ctx) if net is ours else net(x_t, t, **of_diffusers(ours, x_t, ctx))
        (out if torch.is_tensor(out) else out.sample).square().sum().backward()
        grads.append((x_t.grad, ctx.grad))
    for g_ours, g_theirs in zip(*grads):
        assert relative(g_ours, g_theirs) < 1e-9


@pytest.mark.parametrize("channels, groups", [(320, 32), (12, 4), (8, 8), (7, 1)])
@pytest.mark.parametrize(
    "dtype, most",
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)],
)
def test_group_norm_as_a_compiler_gets_it(channels, groups, dtype, most):
    """Answer and gradient beside torch's own, far from 0, as it lay in memory."""
    norm = GroupNorm(groups, channels)
    norm.weight.data, norm.bias.data = draw(channels), draw(channels, seed=1)
    norm.to(dtype)
    x = (20 + 3 * draw(3, channels, 9, 5, seed=2)).to(dtype, memory_format=torch.channels_last)
    answers = []
    for compute in (norm.plain, norm):
        x = x.detach().requires_grad_()
        y = compute(x)
        y.backward(draw(*y.shape, seed=3).to(dtype))
        answers.append((y.double(), x.grad.double()))
    for got, expected in zip(*answers):
        assert relative(got, expected) < most
    assert norm.plain(x).dtype == dtype and norm.plain(x).stride() == x.stride()


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_vae(tmp_path, size):
    root = make_checkpoint(tmp_path, "sd1", size)
    ours = load_vae(root, **F64)
    theirs, info = AutoencoderKL.from_pretrained(
        root, subfolder="vae", torch_dtype=torch.float64, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert ours.scaling_factor == theirs.config.scaling_factor == 0.18215
    for h, w in [(32, 32), (16, 48)]:
        pixels = draw(2, 3, h, w).clamp(-1, 1)
        with torch.no_grad():
            mean, logvar = ours.encode(pixels)
            posterior = theirs.encode(pixels).latent_dist
            assert mean.shape == (2, 4, h // ours.downscale, w // ours.downscale)
            assert relative(mean, posterior.mean) < 1e-9
            assert relative(logvar, posterior.logvar) < 1e-9
            assert relative(ours.decode(mean), theirs.decode(mean).sample) < 1e-9


def test_a_wrong_padding_would_show(sd1):
    """The parity above can fail: padding all sides (a bug of re-implementations) is far off."""
    vae = load_vae(sd1, **F64)
    pixels = draw(1, 3, 32, 32)
    right, _ = vae.encode(pixels)
    for level in vae.encoder.down_blocks:
        if level.resize:
            level.downsamplers[0].asymmetric, level.downsamplers[0].conv.padding = False, (1, 1)
    wrong, _ = vae.encode(pixels)
    assert relative(wrong, right) > 1e-2


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_text(tmp_path, family):
    root = make_checkpoint(tmp_path, family)
    ours = load_text(root, **F64)
    theirs = CLIPTextModel.from_pretrained(root, subfolder="text_encoder", dtype=torch.float64)
    pipe = StableDiffusionPipeline.from_pretrained(root, safety_checker=None)
    prompts = ["", "a photo of a lake, Ünïcode 漢 & 3 emoji 🏠", "long " * 100]
    with pytest.warns(UserWarning, match="is truncated to 77"):
        ids = ours.tokenize(prompts)
    expected = pipe.tokenizer(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    assert torch.equal(ids, expected.input_ids)
    assert torch.equal(ours.mask(ids), expected.attention_mask)
    with torch.no_grad():
        assert relative(ours.encode(ids), theirs(input_ids=ids)[0]) < 1e-9
        masked = theirs(input_ids=ids, attention_mask=expected.attention_mask)[0]
        assert relative(ours.encode(ids, ours.mask(ids)), masked) < 1e-9
        assert relative(masked, theirs(input_ids=ids)[0]) > 1e-3  # the mask does something


def test_text_of_two_encoders(xl):
    """SDXL's: what its pipeline gives the UNet, pooled states at the end of the text included."""
    ours = load_text(xl, **F64)
    pipe = StableDiffusionXLPipeline.from_pretrained(xl, torch_dtype=torch.float64)
    how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    for prompt in ("", "a photo of a lake, Ünïcode 漢 & 3 emoji 🏠!", "x" * 75):
        ctx = ours.context([prompt, "another"])  # (2, 78, 80)
        with torch.no_grad():
            states, none, pooled, none_pooled = pipe.encode_prompt(prompt, **how)
        assert ctx.shape == (2, 78, 80) and pooled.shape == (1, 40)
        assert relative(ctx[:1, :-1], states) < 1e-9 and relative(ctx[:1, -1, :40], pooled) < 1e-9
        assert not ctx[:, -1, 40:].any()
        assert ours.empty_is_zero and not none.any() and not none_pooled.any()
    assert relative(ctx[:1], ctx[1:]) > 0.1
    ours.tokenizer_2 = ours.tokenizer  # the second encoder pads with another token
    assert relative(ours.context(["another"]), ctx[1:]) > 1e-3
