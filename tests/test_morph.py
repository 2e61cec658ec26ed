"""States between a given pair: the formulas, the ends, the spacing, every switch; and sweeps."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from editing import between
from editing.config import MorphConfig
from model.lora import inject, lora_layers, merge, set_strength
from model.morph import (
    adain,
    fit,
    inverted,
    mixed_attention,
    respace,
    respaced,
    slerp,
    steps_between,
)
from model.objectives import Draws, Knobs, delta_loss, noise_loss, twice
from model.pipeline import load_pipeline
from model.samplers import ddim, ddim_invert
from model.schedule import Schedule
from model.weights import load_scheduler_config, load_unet
from pairing.images import load_image, to_image, to_tensor
from reporting import measures
from tests.pairs import write_pairs
from tests.test_sample import write_lora

S = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the formulas --------------------------------------------------------------------------------


def test_slerp_is_the_arc():
    """Against numpy, on vectors of different length; its ends are the ends."""
    x, y = noise(1, 4, 3, 5), 2 * noise(1, 4, 3, 5, seed=1)
    a, b = x.numpy().ravel(), y.numpy().ravel()
    angle = math.acos(a @ b / math.sqrt((a @ a) * (b @ b)))
    for s, ours in zip(S.tolist(), slerp(x, y, S)):
        arc = (math.sin((1 - s) * angle) * a + math.sin(s * angle) * b) / math.sin(angle)
        assert np.abs(ours.numpy().ravel() - arc).max() < 1e-12
    one, other = (v / v.norm() for v in (x, y))
    norms = slerp(one, other, S).flatten(1).norm(dim=1)
    assert (norms - 1).abs().max() < 1e-12  # a line's middle would be shorter
    assert torch.allclose(slerp(x, 3 * x, S)[1], 1.5 * x[0])  # parallel: no angle to divide by


def test_adain_gives_the_statistics_between_the_ends():
    a, b = 1 + 2 * noise(1, 4, 8, 8), -1 + 0.5 * noise(1, 4, 8, 8, seed=1)
    x = adain(noise(4, 4, 8, 8, seed=2), a, b, S)
    for i, s in enumerate(S.tolist()):
        for statistic in (torch.mean, torch.std):
            got, from_a, from_b = (statistic(v, (1, 2)) for v in (x[i], a[0], b[0]))
            assert torch.allclose(got, (1 - s) * from_a + s * from_b, atol=1e-12)
    assert torch.allclose(adain(a, a, b, S[:1]), a, atol=1e-12)


@pytest.fixture
def unet(sd1):
    return load_unet(sd1, dtype=torch.float64)


def test_mixed_attention_reads_both_ends(unet):
    """One module against the formula; the whole UNet at weights 0 and 1, and after the block."""
    x, t, ctx = noise(3, 4, 8, 8), torch.tensor([500] * 3), noise(1, 7, unet.ctx_dim)
    ctx, s = ctx.expand(3, -1, -1), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    with torch.no_grad():
        alone = unet(x, t, ctx)
        with mixed_attention(unet, s):
            mixed = unet(x, t, ctx)
        with mixed_attention(unet, torch.tensor([0.0, 0.0, 1.0])):
            twice = unet(x[[0, 0, 2]], t, ctx)
        assert torch.equal(unet(x, t, ctx), alone)  # nothing is left behind
        assert torch.allclose(mixed[[0, 2]], alone[[0, 2]], atol=1e-12)
        assert (mixed[1] - alone[1]).abs().max() > 1e-4
        assert torch.allclose(twice[1], alone[0], atol=1e-12)  # weight 0 is the first end

        block = unet.mid_block.attentions[0].transformer_blocks[0]
        h = noise(3, 9, block.attn1.to_q.in_features)
        with mixed_attention(unet, s):
            ours = block.attn1(h)[1]
        k, v = (
            0.7 * layer(h)[0] + 0.3 * layer(h)[2] for layer in (block.attn1.to_k, block.attn1.to_v)
        )
        heads = [y.unflatten(-1, (block.attn1.heads, -1)).transpose(0, 1)
                 for y in (block.attn1.to_q(h)[1], k, v)]  # fmt: skip
        weight = (heads[0] @ heads[1].mT / math.sqrt(heads[0].shape[-1])).softmax(-1)
        expected = block.attn1.to_out[0]((weight @ heads[2]).transpose(0, 1).flatten(1))
        assert torch.allclose(ours, expected, atol=1e-12)


def test_mixed_attention_is_undone_after_an_error(unet):
    with pytest.raises(KeyError), mixed_attention(unet, S):
        raise KeyError
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_refined_inversion_is_the_inverse_of_sampling(sd1, unet, prediction_type):
    config = {**load_scheduler_config(sd1), "prediction_type": prediction_type}
    schedule, z = Schedule.from_config(config), noise(1, 4, 8, 8)
    ctx = noise(1, 7, unet.ctx_dim, seed=1)
    predict = lambda x, t: unet(x, t, ctx)  # noqa: E731
    off = {}
    with torch.no_grad():
        for refine in (0, 2, 30):
            x = ddim_invert(predict, z, schedule, 10, start=2, refine=refine)
            off[refine] = (ddim(predict, x, schedule, 10, start=2) - z).abs().max().item()
    assert off[0] > 1e-3 and off[2] < 0.2 * off[0] and off[30] < 1e-9


def two_adapters(unet):
    for k in range(2):
        inject(unet, "attn", rank=2, generator=torch.Generator().manual_seed(k))
    for k, layer in enumerate(lora_layers(unet).values()):
        layer.lora_B.data = noise(*layer.lora_B.shape, seed=k).to(layer.lora_B)


def test_two_loras_are_interpolated_as_products(unet):
    """Strengths (1−s, s) are W + (1−s) B A + s B' A', and no LoRA of interpolated factors."""
    two_adapters(unet)
    x, t, ctx = noise(1, 4, 8, 8), torch.tensor([500]), noise(1, 7, unet.ctx_dim)
    layer = next(iter(lora_layers(unet).values()))
    A, B, W = layer.lora_A.data, layer.lora_B.data, layer.weight.data
    with torch.no_grad():
        set_strength(unet, torch.tensor([[0.75, 0.25]]))
        together = unet(x, t, ctx)
        h = noise(1, 5, W.shape[1])
        plain = h @ W.T + (layer.bias if layer.bias is not None else 0)
        products = 0.75 * h @ A[:2].T @ B[:, :2].T + 0.25 * h @ A[2:].T @ B[:, 2:].T
        factors = h @ (0.75 * A[:2] + 0.25 * A[2:]).T @ (0.75 * B[:, :2] + 0.25 * B[:, 2:]).T
        assert torch.allclose(layer(h), plain + products, atol=1e-9)
        assert not torch.allclose(layer(h), plain + factors, atol=1e-2)
        merge(unet, torch.tensor([0.75, 0.25]))
        assert torch.allclose(unet(x, t, ctx), together, atol=1e-6)


def test_frames_are_one_batch_or_many(sd1, unet):
    """However many frames go through the UNet at once, with two adapters and every trick."""
    two_adapters(unet)
    schedule = Schedule.from_config(load_scheduler_config(sd1))
    ctx, z = noise(1, 7, unet.ctx_dim), noise(2, 4, 8, 8, seed=1)

    def predict(x, t, m):
        set_strength(unet, 0.1 * m)
        return unet(x, t, ctx.expand(len(x), -1, -1))

    multiplier = lambda s: torch.stack([1 - s, s], dim=1)  # noqa: E731
    with torch.no_grad():
        whole, parts = (
            inverted(predict, unet, schedule, z, multiplier, steps=4, start=1, chunk=chunk)(S)
            for chunk in (8, 1)
        )
    assert torch.allclose(whole, parts, atol=1e-9)


# ---- spacing -------------------------------------------------------------------------------------


def test_respace_by_hand():
    s = torch.tensor([0.0, 0.5, 1.0])
    # three quarters of the way are done by 0.5, so that half of it is done at 1/3
    assert torch.allclose(respace(s, [3.0, 1.0]), torch.tensor([0.0, 1 / 3, 1.0]))
    assert torch.equal(respace(s, [1.0, 1.0]), s)
    assert torch.equal(respace(s, [0.0, 0.0]), s)  # nothing moves


def test_respacing_makes_the_steps_equal():
    """A path that goes slowly and then fast; the ends stay."""
    render = lambda s: (s**4).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)  # noqa: E731
    uneven = {}
    for rounds in (0, 8):
        s, frames = respaced(render, 9, measures.perceived, rounds=rounds)
        gaps = steps_between(frames, measures.perceived)
        uneven[rounds] = measures.path(gaps, 1.0)["unevenness"]
        assert s[0] == 0 and s[-1] == 1 and torch.equal(s, s.sort().values)
    assert uneven[0] > 0.5 and uneven[8] < 0.02


def test_respacing_keeps_the_most_even_round():
    """A jump cannot be spaced away: it is never made worse."""
    render = lambda s: ((s > 0.4).float() + 0.1 * s).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)  # noqa: E731
    values = []
    for rounds in range(5):
        _, frames = respaced(render, 6, measures.perceived, rounds=rounds)
        values.append(np.std(steps_between(frames, measures.perceived)))
    assert max(values) == values[0]


def test_perceived_and_structure_are_distances():
    x, y, z = (noise(3, 20, 16, seed=k).sigmoid() for k in range(3))
    for far in (measures.perceived, measures.structure):
        assert far(x, x) < 1e-7 and far(x, y) == pytest.approx(far(y, x)) and far(x, y) > 0
        assert far(x, z) <= far(x, y) + far(y, z)
    assert measures.structure(x, y) ** 2 == pytest.approx(1 - measures.ssim(x, y))
    shifted = x + 0.1
    assert measures.perceived(x, shifted) == pytest.approx(0.1)  # at every blur
    detail = x + 0.1 * (-1.0) ** torch.arange(16).double()  # stripes: gone in the blurred copies
    assert measures.perceived(x, detail) == pytest.approx(0.1 / 4)
    assert measures.perceived(x[:, :1, :1], x[:, :1, :1] + 0.5) == pytest.approx(0.5)


def test_path_numbers_by_hand():
    assert measures.path([2.0, 6.0], 4.0) == {"ppl": 2.0, "pdv": 4.0, "unevenness": 0.5}
    assert measures.path([0.0, 0.0], 0.0) == {"ppl": None, "pdv": 0.0, "unevenness": None}


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, sd1):
    root = tmp_path_factory.mktemp("morph")
    write_pairs(root, 2, 32)
    write_lora(root / "delta", sd1)
    write_lora(root / "slider", sd1, objective="slider", multiplier=[2.0, -1.0])
    Image.open(root / "before/0.png").crop((0, 0, 29, 21)).save(root / "odd_before.png")
    Image.open(root / "after/0.png").crop((0, 0, 29, 21)).save(root / "odd_after.png")
    return root


def morph(place, out, *more, ends=("before/0.png", "after/0.png")):
    argv = ["morph", "--before", place / ends[0], "--after", place / ends[1], "--out", out]
    flags = ["--frames", "4", "--steps", "3", "--device", "cpu", *more]
    assert sample.main([str(part) for part in argv + flags]) == 0
    frames = [np.array(Image.open(p)).astype(int) for p in sorted(out.glob("[0-9]*.png"))]
    return frames, json.loads((out / "morph.json").read_text())


@pytest.mark.parametrize("method", ["direct", "invert", "blend"])
@pytest.mark.parametrize(
    "ends", [("before/0.png", "after/0.png"), ("odd_before.png", "odd_after.png")]
)
def test_the_end_frames_are_the_given_images(place, tmp_path, method, ends):
    """And what is written is what the documentation lists."""
    flags = ["--lora", place / "slider", "--method", method, "--no-respace"]
    frames, numbers = morph(place, tmp_path, *flags, ends=ends)
    assert {p.name for p in tmp_path.iterdir()} == {
        "000.png", "001.png", "002.png", "003.png", "morph.gif", "strip.png", "morph.json"
    }  # fmt: skip
    for frame, end in zip((frames[0], frames[-1]), ends):
        assert np.array_equal(frame, np.array(Image.open(place / end)))
    assert numbers["psnr"] == {"before": 100.0, "after": 100.0} and numbers["method"] == method
    assert max(numbers["psnr_uncorrected"].values()) < 60
    assert len(numbers["strengths"]) == 4 and Image.open(tmp_path / "morph.gif").n_frames == 4
    for name, far in (("perceived", measures.perceived), ("structure", measures.structure)):
        gaps = steps_between([torch.from_numpy(f / 255).permute(2, 0, 1) for f in frames], far)
        shown = numbers["distances"][name]["morph"]
        assert shown["steps"] == pytest.approx(gaps, rel=1e-5)
        assert shown["unevenness"] == pytest.approx(np.std(gaps) / np.mean(gaps), rel=1e-4)


def test_frames_of_others_stay(place, tmp_path):
    """Of an earlier morph of more frames those are removed, and nothing that it did not make."""
    mine = Image.new("RGB", (8, 8), "red")
    mine.save(tmp_path / "005.png")
    morph(place, tmp_path, "--lora", place / "slider", "--no-respace", "--frames", "5")
    mine.save(tmp_path / "006.png")
    morph(place, tmp_path, "--lora", place / "slider", "--no-respace", "--frames", "3")
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "000.png", "001.png", "002.png", "005.png", "006.png", "strip.png"
    ]  # fmt: skip
    assert Image.open(tmp_path / "005.png").getpixel((0, 0)) == (255, 0, 0)


def test_the_method_follows_from_the_lora(place, tmp_path, sd1):
    for flags, method in ((["--lora", place / "delta"], "direct"), (["--model", sd1], "invert"),
                          (["--lora", place / "slider"], "invert")):  # fmt: skip
        out = tmp_path / flags[-1].name
        assert morph(place, out, *flags, "--no-respace")[1]["method"] == method


@pytest.fixture(scope="module")
def as_it_is(place):
    """The inverted path with every trick but the spacing, which renders many times."""
    return morph(place, place / "as it is", "--lora", place / "slider", "--no-respace")[0]


@pytest.mark.parametrize(
    "flags",
    ["--no-adain", "--no-attention", "--respace", "--noise_level 1", "--steps 4",
     "--lora_after {delta}", "--prompt other", "--resolution 16", "--method blend",
     "--method direct"],
)  # fmt: skip
def test_every_switch_of_the_inverted_path_changes_frames(place, as_it_is, tmp_path, flags):
    flags = ["--no-respace", *flags.format(delta=place / "delta").split()]
    other, _ = morph(place, tmp_path, "--lora", place / "slider", *flags)
    assert not np.array_equal(as_it_is[1], other[1])


def test_what_is_printed_is_how_far_the_path_itself_misses_its_ends(place, tmp_path, capsys):
    """Corrected, they are always the given images."""
    for flag, said in (
        ("--correct", "the ends would be at {before:.1f} and {after:.1f} dB without their correct"),
        ("--no-correct", "the ends are at {before:.1f} and {after:.1f} dB, unevenness"),
    ):
        _, numbers = morph(place, tmp_path, "--lora", place / "delta", "--no-respace", flag)
        assert said.format(**numbers["psnr_uncorrected"]) in capsys.readouterr().out


def test_without_correction_the_ends_are_the_paths_own(place, tmp_path):
    frames, numbers = morph(place, tmp_path, "--lora", place / "delta", "--no-correct")
    assert numbers["psnr"] == numbers["psnr_uncorrected"] and numbers["psnr"]["after"] < 60
    given = np.array(Image.open(place / "after/0.png"))
    assert not np.array_equal(frames[-1], given)


def test_respaced_frames_of_a_real_path_are_more_even(place, tmp_path):
    steps = [
        morph(place, tmp_path / flag[2:], "--lora", place / "delta", flag)[1]["distances"]
        for flag in ("--no-respace", "--respace")
    ]
    one, other = (d["perceived"]["morph"]["unevenness"] for d in steps)
    assert other < 0.5 * one


@pytest.mark.parametrize("delta", [True, False])
def test_the_fit_learns_the_pair(sd1, delta):
    """What each of the two fits minimises falls, on draws that it did not see."""
    z, eps, t = noise(2, 4, 8, 8).float(), noise(1, 4, 8, 8, seed=1).float(), torch.tensor([400])
    pipe = load_pipeline(str(sd1))

    def losses(pipe):
        predict, one = pipe.predictors("x", 1.0)[0], torch.ones(1)
        with torch.no_grad():
            if delta:
                draws = Draws(eps, t)
                return [
                    delta_loss(predict, pipe.schedule, z[:1], z[1:], one, draws, Knobs()).mean()
                ]
            m = torch.eye(2) if hasattr(pipe.unet, "lora_adapters") else torch.zeros(2)
            draws = twice(Draws(eps, t))
            return noise_loss(predict, pipe.schedule, z, m, draws, Knobs()).mean((1, 2, 3))

    before = (z[0] - z[1]).square().mean()[None] if delta else losses(pipe)
    pipe = fit(pipe, "x", z, delta=delta, steps=40, rank=4, lr=1e-2, seed=0)
    for was, now in zip(before, losses(pipe)):
        assert now < 0.7 * was
    assert pipe.unet.lora_adapters.count == (1 if delta else 2)


@pytest.mark.parametrize("lora", ["delta", "slider"])
def test_from_python_as_the_command(place, tmp_path, lora):
    """The same frames and strengths, with a second LoRA or without; morph.json has the config."""
    cfg, files = MorphConfig(frames=4, steps=3), (place / "before/0.png", place / "after/0.png")
    pixels = torch.stack([to_tensor(load_image(file)) for file in files])
    for k, more in enumerate([{}, {"lora_after": place / "delta"}]):
        flags = [part for name, file in more.items() for part in (f"--{name}", file)]
        frames, numbers = morph(place, tmp_path / f"{k}", "--lora", place / lora, *flags)
        made = between.morph(load_pipeline(None, place / lora), pixels, cfg, **more)
        assert made.method == numbers["method"] and made.own.shape == pixels.shape
        assert made.strengths.tolist() == numbers["strengths"]
        assert MorphConfig(**numbers["flags"]) == cfg
        for ours, frame in zip(made.frames, frames, strict=True):
            assert np.array_equal(np.array(to_image(ours)), frame)


def test_mistakes_from_python_are_the_command_s_sentences(place, sd1):
    pipe, pixels = load_pipeline(str(sd1)), torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"--frames must be a whole number, got 2\.5"):
        MorphConfig(frames=2.5)
    with pytest.raises(ValueError, match=r"expected pixels of shape \(2, 3, H, W\), got \(1, 3, "):
        between.morph(pipe, pixels[:1])
    with pytest.raises(ValueError, match="--method direct needs one LoRA"):
        between.morph(pipe, pixels, MorphConfig(method="direct"))
    with pytest.raises(ValueError, match="--lora_after needs the before image's LoRA"):
        between.morph(pipe, pixels, lora_after=place / "delta")
    fitted = MorphConfig(method="direct", fit_steps=1, frames=2)
    between.morph(pipe, pixels, fitted)
    with pytest.raises(ValueError, match="--fit_steps and --lora are mutually exclusive"):
        between.morph(pipe, pixels, fitted)  # the first one's stays


@pytest.mark.parametrize("method", ["direct", "invert"])
def test_fitting_is_part_of_the_command(place, tmp_path, sd1, method):
    """Its steps, its rate and its rank change the frames in between."""
    flags = ["--model", sd1, "--method", method, "--no-respace"]
    shown = [
        morph(place, tmp_path / f"{i}", *flags, *f"--fit_steps {more}".split())[0][1]
        for i, more in enumerate(
            ["2", "3", "2 --learning_rate 1e-2", "2 --lora_rank 2", "2 --seed 1"]
        )
    ]
    assert not any(np.array_equal(shown[0], other) for other in shown[1:])


def test_what_the_path_does_not_read_is_said(place, tmp_path, capsys):
    """One step of `delta`, or DDIM inversion: what both read, and what neither draws."""
    flags = ["--noise_level", "0.9", "--seed", "4", "--prompt", "a town"]
    for lora, unread in (("delta", ["noise_level", "steps", "seed"]), ("slider", ["seed"])):
        morph(place, tmp_path / lora, "--lora", place / lora, *flags)
        said = [w for w in capsys.readouterr().err.splitlines() if w.startswith("warning: ")]
        assert [w.split()[1] for w in said] == [f"--{name}" for name in unread]


def test_a_shorter_morph_leaves_no_frame_of_the_longer_one(place, tmp_path):
    flags = ["--lora", place / "slider", "--method", "blend"]
    morph(place, tmp_path, *flags)
    frames, _ = morph(place, tmp_path, *flags, "--frames", "2")
    assert len(frames) == 2


def test_the_ends_stand_before_the_background_of_the_training(place, tmp_path, sd1):
    Image.new("RGBA", (32, 32), (0, 0, 0, 8)).save(tmp_path / "clear.png")
    lora = write_lora(tmp_path / "run", sd1, background="black")
    flags = ["--lora", lora, "--method", "blend"]
    frames, _ = morph(tmp_path, tmp_path / "out", *flags, ends=("clear.png", "clear.png"))
    assert not frames[0].any()


@pytest.mark.parametrize(
    ("meta", "flags", "side", "warned"),
    [
        ({"resolution": 8}, [], 8, False),  # as an edit does
        ({"resolution": 48}, [], 48, False),
        ({"resolution": 8}, ["--resolution", 32], 32, True),
        ({"resolution": 80}, ["--resolution", 32], 32, True),
        ({"resolution": 16}, ["--resolution", 32], 32, False),  # about what it knows
        ({"resolution": 8}, ["--method", "blend", "--resolution", 32], 32, False),
        ({"resolution": 8, "resized": False}, [], 32, False),
    ],
)
def test_frames_are_of_the_scale_that_the_lora_knows(
    place, tmp_path, sd1, capsys, meta, flags, side, warned
):
    lora = write_lora(tmp_path / "run", sd1, **{"resized": True, **meta})
    frames, _ = morph(place, tmp_path / "out", "--lora", lora, "--no-respace", *flags)
    assert frames[0].shape[:2] == (side, side)
    said = f"was trained at {meta['resolution']} px, where objects have a different size"
    assert (said in capsys.readouterr().err) == warned


def test_flags_of_another_method_are_said_to_do_nothing(place, tmp_path, capsys):
    more = ["--no-adain", "--no-attention", "--noise_level", "0.5", "--lora_rank", "3"]
    morph(place, tmp_path, "--lora", place / "delta", "--method", "blend", *more)
    said = capsys.readouterr().err
    for flag in ("--no-adain", "--no-attention", "--noise_level 0.5", "--lora_rank 3"):
        assert f"warning: {flag} has no effect without" in said


def test_the_objective_can_be_said(place, tmp_path, sd1):
    """A LoRA without a header: as a slider it has a multiplier of its own."""
    write_lora(tmp_path / "mute", sd1, objective=None, multiplier=[1.0, 0.0])
    flags = ["--lora", tmp_path / "mute", "--no-respace"]
    plain, numbers = morph(place, tmp_path / "plain", *flags)
    told, _ = morph(place, tmp_path / "told", *flags, "--objective", "slider")
    assert numbers["method"] == "invert" and not np.array_equal(plain[1], told[1])


def test_equal_ends_stand_still(place, tmp_path):
    ends = ("before/0.png", "before/0.png")
    frames, numbers = morph(
        place, tmp_path, "--lora", place / "slider", "--method", "blend", ends=ends
    )
    assert all(np.array_equal(frame, frames[0]) for frame in frames)
    assert numbers["distances"]["perceived"]["morph"]["ppl"] is None


MISTAKES = {
    "--frames 1": "--frames must be in 2..1000, got 1",
    "--before nowhere.png": "--before nowhere.png does not exist",
    "--after {root}/notes.txt": "notes.txt cannot be read as an image",
    "--after {root}/odd_after.png": "their aspect ratios differ by",
    "--out {root}/after": "is the folder of --after",
    "--out {root}/notes.txt": "is a file; expected a folder",
    "--resolution 4": "--resolution must be at least 8, got 4",
    "--resolution 1000000": "would be 1000000x1000000 at --resolution 1000000, which is",
    "--noise_level 0": "--noise_level must be in (0, 1], got 0.0",
    "--fit_steps=-1": "--fit_steps must be at least 0, got -1",
    "--fit_steps 2": "--fit_steps and --lora are mutually exclusive",
    "--lora_rank 0": "--lora_rank must be at least 1, got 0",
    "--learning_rate nan": "--learning_rate must be a finite number, got nan",
    "--learning_rate 1": "--learning_rate must be in (0, 1), got 1.0",
    "--lora_after nowhere --model nowhere": "--lora_after nowhere does not exist",
    "--lora_after {root}/delta --method direct": "--method direct needs one LoRA",
    "--objective both": "--objective: invalid choice: 'both'",
    "--method fade": "--method: invalid choice: 'fade'",
    "--strength 1": "unrecognized arguments: --strength 1",
    "--guidance 3": "unrecognized arguments: --guidance 3",
}


@pytest.mark.parametrize("asked", MISTAKES)
def test_mistakes_are_one_sentence(place, tmp_path, capsys, asked):
    (place / "notes.txt").write_text("no image")
    good = ["--before", place / "before/0.png", "--after", place / "after/0.png"]
    good += ["--lora", place / "slider", "--out", tmp_path / "new"]
    try:
        code = sample.main(["morph", *map(str, good), *asked.format(root=place).split()])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and MISTAKES[asked] in said
    assert not (tmp_path / "new").exists()


def test_without_a_lora_direct_has_nothing_to_edit_with(place, tmp_path, sd1, capsys):
    argv = ["morph", "--before", place / "before/0.png", "--after", place / "after/0.png", "--out",
            tmp_path / "new", "--model", sd1]  # fmt: skip
    for more, said in (
        (["--method", "direct"], "--method direct needs one LoRA"),
        (["--objective", "delta"], "--objective delta needs one LoRA"),
        (["--lora_after", place / "delta"], "--lora_after needs the before image's LoRA as --lora"),
        (["--fit_steps", 2, "--lora_rank", 999], "--lora_rank 999 does not fit"),
    ):
        assert sample.main([str(part) for part in argv + more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---- strengths and sweeps ------------------------------------------------------------------------


def test_several_strengths_make_a_loop_and_a_strip(place, tmp_path):
    argv = ["edit", "--lora", place / "delta", "--input", place / "before", "--out", tmp_path]
    assert sample.main([*map(str, argv), "--strengths", "0,0.5,1"]) == 0
    names = {f"{i}{end}" for i in range(2) for end in
             ("_s0.png", "_s0.5.png", "_s1.png", ".gif", "_strip.png")}  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == names | {"sheet.png", "sample.json"}
    assert Image.open(tmp_path / "0.gif").n_frames == 3
    wide, sheet = Image.open(tmp_path / "0_strip.png"), Image.open(tmp_path / "sheet.png")
    assert wide.width < sheet.width  # one column fewer: the sheet has the before image too


def sweep(place, out, knob, *more, lora="slider"):
    argv = ["sweep", "--lora", place / lora, "--input", place / "before/0.png", "--out", out]
    argv += ["--sweep", knob, "--steps", "3", "--strengths", "0,1", *more]
    assert sample.main([str(part) for part in argv]) == 0
    return {p.name: np.array(Image.open(p)) for p in out.glob("*.png")}


@pytest.mark.parametrize(
    ("knob", "tags"),
    [("guidance=1,3.5", "1 3.5"), ("noise_level=0.4,1", "0.4 1"), ("steps=2,5", "2 5"),
     ("start=invert,noise", "invert noise"), ("prompt=a farm, green|a town", "0 1")],
)  # fmt: skip
def test_a_sweep_is_a_grid(place, tmp_path, knob, tags):
    """One image for each value and strength, as `edit` makes it; the values make a difference."""
    written = sweep(place, tmp_path / "grid", knob)
    name, (one, other) = knob.partition("=")[0], tags.split()
    assert written.keys() == {f"0_{name}{tag}_s{s}.png" for tag in (one, other) for s in (0, 1)} | {
        "sheet.png"
    }
    assert not np.array_equal(written[f"0_{name}{one}_s1.png"], written[f"0_{name}{other}_s1.png"])
    value = "a town" if name == "prompt" else other
    argv = ["edit", "--lora", place / "slider", "--input", place / "before/0.png", "--steps", "3"]
    argv += ["--out", tmp_path / "one", f"--{name}", value]
    assert sample.main([str(part) for part in argv]) == 0
    alone = np.array(Image.open(tmp_path / "one" / "0.png"))
    assert np.array_equal(alone, written[f"0_{name}{other}_s1.png"])


def test_a_sweep_over_seeds_is_one_over_noise(place, tmp_path):
    written = sweep(place, tmp_path, "seed=1,2", "--start", "noise")
    assert not np.array_equal(written["0_seed1_s1.png"], written["0_seed2_s1.png"])


def test_a_sweep_over_eta_is_one_over_what_img2img_draws(place, tmp_path, sd1):
    write_lora(place / "img2img", sd1, objective="img2img")
    written = sweep(place, tmp_path, "eta=0,1", lora="img2img")
    assert not np.array_equal(written["0_eta0_s1.png"], written["0_eta1_s1.png"])


def test_a_knob_that_does_nothing_is_said_to(place, tmp_path, capsys):
    """`delta` takes no steps."""
    sweep(place, tmp_path, "steps=2,5", lora="delta")
    assert "--sweep steps changes nothing for delta" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--sweep colour=1,2",
            "one of guidance, image_guidance, change_guidance, noise_level, eta, start, steps, "
            "seed, prompt",
        ),
        ("--sweep objective=delta,after", "one of guidance, image_guidance, change_guidance"),
        ("--sweep steps", "such as steps=5,30, got 'steps'"),
        ("--sweep steps=1,b", "got 'steps=1,b'"),
        ("--sweep steps=5,5", "with different values, such as steps=5,30"),
        ("--sweep guidance=1,1.00000001", "with different values, such as steps=5,30"),
        ("--sweep start=invert,middle", "--start must be invert or noise, got 'middle'"),
        ("--sweep steps=5,0", "--steps must be in 1..1000, got 0"),
        ("--sweep guidance=1,nan", "--guidance must be a finite number, got nan"),
        ("--sweep change_guidance=1,inf", "--change_guidance must be a finite number, got inf"),
        ("--strength 1", "the following arguments are required: --sweep"),
    ],
)
def test_mistakes_in_a_sweep(place, tmp_path, capsys, flags, sentence):
    argv = [
        "sweep",
        "--lora",
        place / "slider",
        "--input",
        place / "before",
        "--out",
        tmp_path / "n",
    ]
    try:
        code = sample.main([*map(str, argv), *flags.split()])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and sentence in said and said.count("\n") == 1
    assert not (tmp_path / "n").exists()


def test_a_fit_is_used_as_what_it_is(place, tmp_path, capsys):
    """--fit_steps fits a LoRA of delta for `direct`: another formula would make nothing of it."""
    argv = ["morph", "--model", place, "--before", place / "before/0.png", "--after",
            place / "after/0.png", "--out", tmp_path / "out", "--fit_steps", 2]  # fmt: skip
    for more in (["--objective", "canvas"], ["--objective", "img2img", "--method", "direct"]):
        assert sample.main([str(part) for part in argv + more]) == 2
        said = f"--fit_steps fits a LoRA of delta, and --objective is {more[1]}"
        assert said in capsys.readouterr().err


def test_statistics_of_one_pixel_are_finite():
    x, s = torch.randn(3, 4, 1, 1), torch.linspace(0, 1, 3)
    mixed = adain(x, x[:1], x[2:], s)
    torch.testing.assert_close(mixed[[0, 2]], x[[0, 2]])
