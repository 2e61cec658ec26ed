"""The judge is judged: known predictions get known scores, and the same command the same bytes."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from pairing.hashes import image_hashes
from pairing.pairs import find_pairs
from reporting import judging, measures
from scenes.render import write_pairs
from tests.test_sample import write_lora


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Six solar pairs with two states in between, six urban ones with three truths."""
    root = tmp_path_factory.mktemp("scenes")
    write_pairs(root / "solar", "solar", 6, size=32, times=(0.25, 0.5))
    write_pairs(root / "urban", "urban", 6, size=32, outcomes=3)
    return root


def flags(lora, folder, out, *more):
    dirs = ["--before_data_dir", folder / "before", "--after_data_dir", folder / "after"]
    dirs += ["--mask_dir", folder / "mask", "--resolution", 32]
    return [str(a) for a in ("--lora", lora, "--out", out, *dirs, *more)]


def score(monkeypatch, tmp_path, sd1, folder, predict, *more, lost=0.02, kept=False):
    """evaluation.json with `predict(before, after, others, strength)` in the LoRA's place.

    The autoencoder is exchanged too, for one that adds the same faint noise to every image: a
    random one shows nothing. What it has `lost` is not in the predictions where that is `kept`.
    """
    lora = tmp_path / "lora"
    if not lora.exists():
        write_lora(lora, sd1)
    pixels = {side: _read(folder / side) for side in ("before", "after")}
    noise = lost * torch.randn((3, 32, 32), generator=torch.Generator().manual_seed(0))

    def edit(pipe, images, strengths, cfg, seeds):
        def one(image, seed, s):
            i = int((pixels["before"] - image).abs().sum((1, 2, 3)).argmin())
            after, others = pixels["after"][i], pixels["after"].roll(1, 0)[i]
            return predict(image, after, others, s, torch.Generator().manual_seed(seed))

        seen = 0 if kept else noise
        both = list(zip(images, seeds, strict=True))
        return [torch.stack([one(*each, s) + seen for each in both]) for s in strengths]

    monkeypatch.setattr(evaluate, "edit_pixels", edit)
    monkeypatch.setattr(
        evaluate, "round_trip", lambda pipe, x, frame: evaluate.eight_bit(x + noise)
    )
    out = tmp_path / "out"
    assert evaluate.main(flags(lora, folder, out, *more)) == 0
    return json.loads((out / "evaluation.json").read_text())


def _read(folder):
    images = [np.asarray(Image.open(p).convert("RGB")) for p in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fade(before, after, others, s, rng):
    return before + s * (after - before)


def test_a_perfect_prediction_closes_the_gap(monkeypatch, tmp_path, sd1, scenes):
    result = score(monkeypatch, tmp_path, sd1, scenes / "solar", fade, "--no-keep_detail")
    assert result["gap_closed"]["whole"]["mean"] == 1.0
    assert result["gap_closed"]["inside"]["mean"] == 1.0
    assert result["outside_over_ceiling"] == 1.0
    assert result["predicted"]["cosine"]["mean"] > 0.97
    assert result["strengths"]["spearman"]["mean"] is None  # a fade has that order by itself
    assert result["strengths"]["identity_psnr"]["mean"] == 100.0
    way = [value["mean"] for value in result["strengths"]["progress"]]
    assert way == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.02)


def test_what_is_judged_is_at_strength_1_whatever_else_is_shown(monkeypatch, tmp_path, sd1, scenes):
    more = ("--no-keep_detail", "--strengths", "0,1,2", "--samples", 2)
    result = score(monkeypatch, tmp_path, sd1, scenes / "solar", fade, *more)
    assert result["gap_closed"]["whole"]["mean"] == 1.0
    assert result["samples"]["spread"]["mean"] == 0.0  # the first draw is at 1 as the others


def test_copying_closes_nothing(monkeypatch, tmp_path, sd1, scenes):
    more = ("--between", "lora")
    result = score(monkeypatch, tmp_path, sd1, scenes / "solar", lambda b, *rest: b, *more)
    assert result["gap_closed"]["whole"]["mean"] == pytest.approx(0, abs=0.05)  # the faint noise
    assert abs(result["predicted"]["cosine"]["mean"]) < 0.1
    assert result["strengths"]["spearman"]["mean"] == 0.0
    assert result["copy"]["mse_outside"]["mean"] == 0.0


def test_the_after_of_another_pair_is_worse_than_copying(monkeypatch, tmp_path, sd1, scenes):
    result = score(monkeypatch, tmp_path, sd1, scenes / "solar", lambda b, a, others, *rest: others)
    assert result["gap_closed"]["whole"]["mean"] < -0.2
    assert result["outside_over_ceiling"] > 10


def test_half_of_the_change_closes_three_quarters(monkeypatch, tmp_path, sd1, scenes):
    """Squared error at half way is a quarter of the copy's; backwards is worse than copying."""
    half = score(monkeypatch, tmp_path, sd1, scenes / "solar", lambda b, a, *rest: (a + b) / 2)
    assert half["gap_closed"]["whole"]["mean"] == pytest.approx(0.75, abs=0.02)
    removed = half["error_removed"]["whole"]["mean"], half["error_removed"]["inside"]["mean"]
    assert removed == pytest.approx((0.75, 0.75), abs=0.03)
    backwards, more = lambda b, a, o, s, rng: b + s * (b - a), ("--between", "lora")
    back = score(monkeypatch, tmp_path, sd1, scenes / "solar", backwards, *more)
    assert back["strengths"]["spearman"]["mean"] < -0.9
    assert back["predicted"]["cosine"]["mean"] < -0.5


@pytest.mark.parametrize("native", [True, False])
def test_a_truth_of_other_ground_is_refused(tmp_path, sd1, scenes, capsys, native):
    """At native scale, one of another size is cropped to less of it; else one of another shape."""
    folder = shutil.copytree(scenes / "solar", tmp_path / "solar")
    path = sorted((folder / "time-0.50").glob("*.png"))[0]
    with Image.open(path) as image:
        image.resize((image.width * 2, image.height * (1 + native))).save(path)
    meta = {"objective": "after", "resolution": 32, "native_scale": native, "resized": not native}
    lora = write_lora(tmp_path / "run", sd1, **meta)
    argv = ["--lora", lora, "--before_data_dir", folder / "before", "--after_data_dir",
            folder / "after", "--between_dirs", folder / "time-0.50", "--between_times", 0.5,
            "--out", tmp_path / "out", "--device", "cpu"]  # fmt: skip
    assert evaluate.main(list(map(str, argv))) == 2
    side = image.width
    assert f"is {2 * side}x{(1 + native) * side}, but " in capsys.readouterr().err


@pytest.mark.parametrize("size", [16, 32])
def test_an_evaluation_says_how_much_of_the_images_it_judges(tmp_path, sd1, scenes, size):
    meta = {"objective": "delta", "resolution": size, "native_scale": True, "resized": False}
    lora, solar = write_lora(tmp_path / "run", sd1, **meta), scenes / "solar"
    argv = ["--lora", lora, "--before_data_dir", solar / "before", "--after_data_dir",
            solar / "after", "--strengths", "0,1", "--out", tmp_path / "out"]  # fmt: skip
    assert evaluate.main(list(map(str, argv))) == 0
    said = (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8")
    part = {16: "16 px, of the middle 25% of the images. ", 32: "32 px. "}[size]
    assert f", {part}Means ± standard errors" in said


def test_states_in_between_are_judged_beside_the_fade(monkeypatch, tmp_path, sd1, scenes):
    """The fade itself scores as the fade; the true states score higher."""
    folder = scenes / "solar"
    more = ["--between_dirs", folder / "time-0.25", folder / "time-0.50"]
    more += ["--between_times", 0.25, 0.5]
    same = score(monkeypatch, tmp_path, sd1, folder, fade, *more)["between"]
    assert same.keys() == {"0.25", "0.5"}
    for values in same.values():
        assert values["predicted"]["mean"] == pytest.approx(values["fade"]["mean"], abs=0.1)
    states = {0.25: _read(folder / "time-0.25"), 0.5: _read(folder / "time-0.50")}
    before_images = _read(folder / "before")

    def truth(before, after, others, s, rng):
        i = int((before_images - before).abs().sum((1, 2, 3)).argmin())
        return states[s][i] if s in states else fade(before, after, others, s, rng)

    right = score(monkeypatch, tmp_path, sd1, folder, truth, *more)["between"]
    assert all(v["predicted"]["mean"] > v["fade"]["mean"] + 3 for v in right.values())


def test_random_changes_are_judged_by_their_distribution(monkeypatch, tmp_path, sd1, scenes):
    """Samples of the truth are near it in every statistic; a blur has no spread and is far off."""
    folder = scenes / "urban"
    truths = [folder / "outcome-1", folder / "outcome-2"]
    more = ["--outcome_dirs", *truths, "--samples", 3]
    stacks = [_read(t) for t in (folder / "after", *truths)]
    before_images = _read(folder / "before")

    def one_of(before, after, others, s, rng):
        i = int((before_images - before).abs().sum((1, 2, 3)).argmin())
        return stacks[int(torch.randint(3, (), generator=rng))][i]

    def blur(before, after, others, s, rng):
        i = int((before_images - before).abs().sum((1, 2, 3)).argmin())
        return torch.stack([stack[i] for stack in stacks]).mean(0)

    drawn = score(monkeypatch, tmp_path, sd1, folder, one_of, *more)["samples"]
    blurred = score(monkeypatch, tmp_path, sd1, folder, blur, *more)["samples"]
    assert blurred["spread"]["mean"] == 0 and drawn["spread"]["mean"] > 0.02
    assert drawn["spread_of_truth"]["mean"] > 0.02
    assert drawn["best_psnr"]["mean"] > blurred["best_psnr"]["mean"]
    for key in ("green", "texture"):
        assert drawn[key]["distance"] < 0.6 < blurred[key]["distance"]
        assert 0 < drawn[key]["distance_of_truth"] < 0.6


@pytest.mark.parametrize("kept", [True, False])
def test_what_the_autoencoder_loses_is_no_change(monkeypatch, tmp_path, sd1, scenes, kept):
    """True outcomes in the draws' place are the truths that they are judged by, with the detail
    that it loses or without."""
    folder, judged = scenes / "urban", []
    befores, truths = _read(folder / "before"), _read(folder / "outcome-1")
    noise = 0.2 * torch.randn((3, 32, 32), generator=torch.Generator().manual_seed(0))

    def truth(before, after, others, s, rng):
        true = truths[int((befores - before).abs().sum((1, 2, 3)).argmin())]
        images = map(evaluate.eight_bit, (before, before + noise, true + noise))
        return 2 * evaluate.as_edited(*images).float() - 1 if kept else true

    def judge(before, draws, truths):
        judged.append((draws[0] - truths[1]).abs().max())
        return judging.judge_samples(before, draws, truths)

    monkeypatch.setattr(evaluate, "judge_samples", judge)
    more = ["--outcome_dirs", folder / "outcome-1", "--samples", 2]
    more += [] if kept else ["--no-keep_detail"]
    found = score(monkeypatch, tmp_path, sd1, folder, truth, *more, lost=0.2, kept=kept)
    area = found["samples"]["area"]
    assert area["distance"] < 0.6 and area["mean"] == pytest.approx(area["truth"], abs=0.03)
    assert len(judged) == 6 and max(judged) < 1.01 / 255


def test_draws_and_truths_are_judged_in_equal_numbers():
    """In σ of all truths: 0 where all are alike, and None beside one truth.

    What is drawn like the truth is as far from it as truths are from others, on average, however
    many of it there are: with all 8 draws and 4 truths it would seem nearer.
    """
    alike = judging.distances(np.array([[1.0], [3.0]]), np.array([[1.0, 1.0], [3.0, 3.0]]))
    assert alike == {"distance": 0, "distance_of_truth": 0}
    shifted = judging.distances(np.array([[3.0], [5.0]]), np.array([[1.0, 1.0], [3.0, 3.0]]))
    assert shifted == {"distance": 2, "distance_of_truth": 0}
    alone = judging.distances(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0], [3.0]]))
    assert alone == {"distance": 0.5, "distance_of_truth": None}
    equal = judging.distances(np.array([[0.1, 0.2]]), np.array([[0.15, 0.15]]))
    assert equal == {"distance": None, "distance_of_truth": None}
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        scene = rng.standard_normal((16, 1))
        draw = lambda k: scene + rng.standard_normal((16, k))  # noqa: B023, E731
        found.append([*judging.distances(draw(8), draw(4)).values()])
    ours, truths = np.array(found).T
    assert abs(ours.mean() / truths.mean() - 1) < 0.05 and truths.mean() > 0.15

    nearest = [judging.best(rng.random((8, 4)), rng.random((4, 4))) for _ in range(300)]
    ours, truths = np.array([[*one.values()] for one in nearest]).mean(0)
    assert ours == pytest.approx(truths, abs=0.01) and ours == pytest.approx(4 / 5, abs=0.01)


def test_no_more_pictures_are_held_than_are_shown(tmp_path, sd1, scenes, monkeypatch):
    """However many pairs there are."""
    lora = write_lora(tmp_path / "lora", sd1)
    monkeypatch.setattr(evaluate, "SHEET", 1)
    for more, held in (((), 1), (("--pictures", 3), 3)):
        asked = flags(lora, scenes / "solar", tmp_path / "out", "--strengths", "0,1", *more)
        result, pictures = evaluate.evaluate(evaluate.make_parser().parse_args(asked))
        assert (result["pairs"], len(pictures)) == (6, held)


def test_the_same_command_gives_the_same_bytes(tmp_path, sd1, scenes):
    """With a real LoRA and autoencoder, from the command line's entry."""
    lora, files = write_lora(tmp_path / "lora", sd1), []
    for name in ("one", "two"):
        out = tmp_path / name
        more = ("--strengths", "0,1", "--samples", 2)
        assert evaluate.main(flags(lora, scenes / "solar", out, *more)) == 0
        files.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert files[0] == files[1]
    assert files[0].keys() == {"evaluation.json", "evaluation.md", "sheet.png"}
    more = ("--strengths", "0,1", "--pictures", 2)
    assert evaluate.main(flags(lora, scenes / "solar", tmp_path / "pictures", *more)) == 0
    kept = sorted((tmp_path / "pictures" / "pictures").iterdir())
    kinds = ("after", "before", "predicted")
    assert [p.name for p in kept] == [f"{i:03d}-{kind}.png" for i in (0, 1) for kind in kinds]
    truth = Image.open(scenes / "solar" / "after" / "00001.png").convert("RGB")
    assert Image.open(kept[3]).tobytes() == truth.tobytes()
    mine = kept[0].with_name("001-mine.png")
    mine.write_bytes(b"of the user")
    more = ("--strengths", "0,1", "--pictures", 1)
    assert evaluate.main(flags(lora, scenes / "solar", tmp_path / "pictures", *more)) == 0
    assert sorted((tmp_path / "pictures" / "pictures").iterdir()) == [*kept[:3], mine]
    result = json.loads(files[0]["evaluation.json"])
    assert result["pairs"] == 6 and len(result["per_pair"]) == 6
    assert result["strengths"]["identity_psnr"]["mean"] == 100.0  # delta at 0 is the identity
    assert "* gap closed (whole): **" in files[0]["evaluation.md"].decode()
    more = ("--strengths", "0,1", "--samples", 2, "--batch_size", 1)  # each pair by itself
    assert evaluate.main(flags(lora, scenes / "solar", tmp_path / "alone", *more)) == 0
    alone = json.loads((tmp_path / "alone" / "evaluation.json").read_text())
    for one, other in zip(alone["per_pair"], result["per_pair"], strict=True):
        assert one["name"] == other["name"]
        assert abs(one["predicted"]["psnr"] - other["predicted"]["psnr"]) < 0.01
        assert abs(one["samples"]["best_psnr"] - other["samples"]["best_psnr"]) < 0.01


def test_images_smaller_than_the_window(tmp_path, sd1, scenes):
    """At 8 pixels: the largest odd window that fits, and the number is not beside the point."""
    lora = write_lora(tmp_path / "lora", sd1)
    more = ("--strengths", "0,1", "--resolution", 8)
    assert evaluate.main(flags(lora, scenes / "solar", tmp_path / "out", *more)) == 0
    x = torch.rand((3, 4, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert measures.ssim(x, x) == pytest.approx(1) and measures.ssim(x, 1 - x) < 0
    assert measures.ssim(x[:, :1, :1], x[:, :1, :1]) == pytest.approx(1)


def test_ssim_is_its_definition():
    """Against sums over every window, written out; 1 for equal images, less for noisier ones."""
    rng = np.random.default_rng(0)
    x = rng.random((3, 14, 13))
    y = np.clip(x + 0.1 * rng.standard_normal(x.shape), 0, 1)
    grey = [(image * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(0) for image in (x, y)]
    bell = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(bell, bell) / np.outer(bell, bell).sum()
    values = []
    for i in range(4):
        for j in range(3):
            a, b = (g[i : i + 11, j : j + 11] for g in grey)
            mu_a, mu_b = (w * a).sum(), (w * b).sum()
            var_a, var_b = (w * (a - mu_a) ** 2).sum(), (w * (b - mu_b) ** 2).sum()
            cov = (w * (a - mu_a) * (b - mu_b)).sum()
            top = (2 * mu_a * mu_b + 1e-4) * (2 * cov + 9e-4)
            values.append(top / ((mu_a**2 + mu_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert measures.ssim(x, y) == pytest.approx(np.mean(values), abs=1e-9)
    assert measures.ssim(x, x) == pytest.approx(1)
    assert measures.ssim(x, 1 - x) < 0


def test_rank_correlation():
    assert measures.spearman([0, 0.5, 1], [-3, 7, 7.5]) == 1
    assert measures.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert measures.spearman([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826817)
    assert measures.spearman([1, 2, 3], [1, 1, 1]) == 0
    assert math.isnan(measures.spearman([1, 2], [math.nan, 1]))


def test_pairs_without_change_have_no_direction(monkeypatch, tmp_path, sd1, scenes, capsys):
    """Nor have those that differ by noise: with them, the figures of the others are as without."""
    folder = shutil.copytree(scenes / "solar", tmp_path / "some")
    alone = score(monkeypatch, tmp_path, sd1, folder, fade)
    assert "do not change" not in capsys.readouterr().err
    for path in [*(folder / "before").iterdir()][:2]:
        noisy = np.asarray(Image.open(path)).copy()
        noisy[0, 0] ^= 1
        Image.open(path).save(folder / "before" / f"still-{path.name}")
        Image.fromarray(noisy).save(folder / "after" / f"still-{path.name}")
        shutil.copy(folder / "mask" / path.name, folder / "mask" / f"still-{path.name}")
    more = score(monkeypatch, tmp_path, sd1, folder, fade)
    assert "2 of 8 pairs do not change and are not counted" in capsys.readouterr().err
    assert more["pairs"] == alone["pairs"] + 2
    for found in (alone, more):
        assert found["predicted"]["cosine"]["n"] == alone["pairs"]
    for one, other in zip(alone["strengths"]["progress"], more["strengths"]["progress"]):
        assert other == pytest.approx(one, abs=1e-6)
    assert more["predicted"]["cosine"] == pytest.approx(alone["predicted"]["cosine"], abs=1e-6)


def test_pairs_without_a_masked_pixel_say_nothing():
    """They were enough to make the whole NaN."""
    gap = measures.gap_closed([4.0, math.nan, 6.0], [2.0, math.nan, 4.0], [0.0, math.nan, 2.0])
    assert gap == measures.gap_closed([4.0, 6.0], [2.0, 4.0], [0.0, 2.0]) and gap["n"] == 2
    assert measures.gap_closed([math.nan], [math.nan], [math.nan])["n"] == 0


def test_an_empty_mask_among_others(monkeypatch, tmp_path, sd1, scenes, capsys):
    folder = tmp_path / "solar"
    shutil.copytree(scenes / "solar", folder)
    Image.new("L", (32, 32)).save(sorted((folder / "mask").iterdir())[0])
    result = score(monkeypatch, tmp_path, sd1, folder, fade, "--no-keep_detail")
    assert result["gap_closed"]["inside"]["mean"] == 1.0
    assert {place: gap["n"] for place, gap in result["gap_closed"].items()} == {
        "whole": 6,
        "inside": 5,
    }
    said = capsys.readouterr().err
    assert "warning: 1 of 6 pairs have no pixels inside their mask" in said
    assert "autoencoder's error" not in said


def test_a_pairs_caption_is_its_prompt(monkeypatch, tmp_path, sd1, scenes, capsys):
    """Unless --prompt is given; each picture has noise of its own."""
    folder, calls = tmp_path / "solar", []
    shutil.copytree(scenes / "solar", folder)
    (folder / "after" / "00001.txt").write_text("a caption")
    lora = write_lora(tmp_path / "lora", sd1, prompt="what was trained", captions=True)

    def edit(pipe, images, strengths, cfg, seeds):
        calls.append((cfg.prompt, seeds))
        return [images for _ in strengths]

    monkeypatch.setattr(evaluate, "edit_pixels", edit)
    assert evaluate.main(flags(lora, folder, tmp_path / "out")) == 0
    assert [prompt for prompt, _ in calls] == ["what was trained", "a caption", "what was trained"]
    seeds = [seed for _, some in calls for seed in some]
    assert len(set(seeds)) == len(seeds) == 6
    calls.clear()
    assert evaluate.main(flags(lora, folder, tmp_path / "out", "--prompt", "")) == 0
    assert {prompt for prompt, _ in calls} == {""}
    assert [seed for _, some in calls for seed in some] == seeds  # whatever the batches are
    calls.clear()
    assert evaluate.main(flags(lora, folder, tmp_path / "out", "--seed", 1)) == 0
    assert not {seed for _, some in calls for seed in some} & set(seeds)
    assert "with a caption per image but is used without" in capsys.readouterr().err


def test_the_gap_and_its_error():
    gap = measures.gap_closed([4.0, 6.0], [2.0, 4.0], [0.0, 2.0])
    assert gap["mean"] == pytest.approx(0.5) and gap["n"] == 2
    # jackknife of the two leave-one-out values 0.5 and 0.5: no spread
    assert gap["se"] == pytest.approx(0, abs=1e-12)
    uneven = measures.gap_closed([4.0, 4.0, 4.0], [0.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    left_out = np.array([0.25, 0.5, 0.75])
    expected = math.sqrt(2 / 3 * ((left_out - 0.5) ** 2).sum())
    assert (uneven["mean"], uneven["se"]) == pytest.approx((0.5, expected))


def test_no_gap_closes_where_the_autoencoder_loses_more_than_the_change():
    """There a prediction that is far worse than copying would have come out far above 1."""
    none = {"mean": None, "se": None, "n": 2}
    assert measures.gap_closed([1.0, 1.0], [9.0, 9.0], [2.0, 2.0]) == none
    some = measures.gap_closed([1.0, 9.0], [1.0, 5.0], [2.0, 2.0])  # one of the two has no room
    assert some == {"mean": pytest.approx(2 / 3), "se": None, "n": 2}


def test_where_the_gap_says_little_the_error_removed_is_named():
    """Small changes, or a base that cannot draw such images: the gap may even be undefined."""
    one = lambda mse: dict.fromkeys(("mse", "mse_inside", "mse_outside"), mse)  # noqa: E731
    rows = [
        {"copy": one(copied), "predicted": one(copied / 4), "ceiling": one(0.02),
         "progress": [0.0], "spearman": 1.0, "identity_psnr": 100.0}
        for copied in (0.01, 0.02)
    ]  # fmt: skip
    result = judging.collect(rows, [1.0]) | {"pairs": 2}
    assert result["gap_closed"]["whole"]["mean"] is None
    assert result["error_removed"]["whole"] == {"mean": 0.75, "se": pytest.approx(0), "n": 2}
    with pytest.warns(UserWarning) as said:
        evaluate.warn_of_gaps(result, masked=False)
    whole, inside = (str(one.message) for one in said)
    assert whole.startswith("the autoencoder's own error is 133% of the change")
    assert "or pass --mask_dir" in whole and inside.startswith("inside the mask, the auto")


def test_numbers_of_a_picture_by_hand():
    assert [measures.psnr(error) for error in (0.0, 1e-12, 0.01)] == [100.0, 100.0, 20.0]
    zeros, one = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    one[0, 1:3, 1:3] = 0.24  # a red square: one channel is enough
    found = measures.statistics(zeros, one)
    assert found == pytest.approx(
        {"area": 4 / 16, "red": 0.24, "green": 0.0, "blue": 0.0, "texture": 0.08}
    )
    assert measures.spread([zeros[:1], 8 * one[:1]]) == pytest.approx((1.92**2 / 2 / 4) ** 0.5)
    start = zeros + 0.3  # the way is counted from here
    assert judging.progress([start, start + one / 2], start, zeros, one) == pytest.approx([0, 0.5])


def test_a_mean_has_the_error_of_what_is_a_number():
    found = measures.summary([1.0, 2.0, math.nan, 6.0])
    assert found == {"mean": 3.0, "se": pytest.approx(math.sqrt(7 / 3)), "n": 3}
    assert measures.summary([math.nan]) == {"mean": None, "se": None, "n": 0}
    assert measures.summary([2.0]) == {"mean": 2.0, "se": None, "n": 1}


def test_distance_between_samples():
    assert measures.distance([1, 2, 3], [1, 2, 3]) == 0
    assert measures.distance([2, 4], [1, 3]) == pytest.approx(1.0)  # shifted by 1, σ = 1


@pytest.mark.parametrize(
    "more, said",
    [
        (["--strengths", "0.5,1"], "--strengths must include 0 and 1"),
        (["--between_times", "0.5"], "--between_dirs has 0 folders"),
        (["--between_dirs", "nowhere", "--between_times", "0.5"], "nowhere"),
        (["--outcome_dirs", "nowhere"], "--samples must be at least 2"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--outcome_dirs", "{root}/after", "--samples", "2"],
         "two folders of --after_data_dir and --outcome_dirs are the same"),
        (["--between_dirs", *2 * ["{root}/time-0.50"], "--between_times", "0.5", "0.7"],
         "two folders of --between_dirs are the same"),
        (["--out", ""], "--out: expected a path, got ''"),
        (["--out", "{root}/after"], "is among the images of --after_data_dir"),
        (["--out", "{root}/mask/deep"], "is among the images of --mask_dir"),
        (["--outcome_dirs", "{root}/time-0.50", "--samples", "2", "--out", "{root}/time-0.50"],
         "is among the images of --outcome_dirs"),
        (["--between_dirs", "{root}/before", "--between_times", "0.5"],
         "--before_data_dir and --between_dirs are the same folder"),
        (["--between_dirs", "{root}/after", "--between_times", "nan"],
         "--between_times must be distinct strengths, from 0 (before) to 1 (after), got nan"),
        (["--between_dirs", "{root}/after", "--between_times", "2019"], "got 2019"),
        (["--between_dirs", "{root}/after", "{root}/time-0.50", "--between_times", "0.5", "0.5"],
         "--between_times must be distinct strengths, from 0 (before) to 1 (after), got 0.5 0.5"),
        (["--strengths", "0,1,1e39"], "distinct numbers within ±1000000"),
        (["--resolution", "63"], "--resolution must be a multiple of 2 for this autoencoder"),
        (["--resolution", "0"], "--resolution must be at least 8, got 0"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path, sd1, scenes, capsys, more, said):
    lora, folder = write_lora(tmp_path / "lora", sd1), scenes / "solar"
    known = sorted(folder.rglob("*"))
    more = [part.format(root=folder) for part in more]
    try:
        code = evaluate.main(flags(lora, folder, tmp_path / "out", *more))
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "out").exists() and sorted(folder.rglob("*")) == known


@pytest.mark.parametrize("gone", ["after", "mask"])
def test_no_flag_is_recommended_that_is_not_there(tmp_path, sd1, scenes, capsys, gone):
    shutil.copytree(scenes / "solar", tmp_path / "some")
    (tmp_path / "some" / gone / "00001.png").unlink()
    assert evaluate.main(flags("x", tmp_path / "some", tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "00001" in said and "--allow_unmatched" not in said


def test_folders_that_do_not_match_are_named(tmp_path, sd1, scenes, capsys):
    for side in ("before", "after", "mask"):
        shutil.copytree(scenes / "solar" / side, tmp_path / "few" / side)
        (tmp_path / "few" / side / "00001.png").unlink()
    between = scenes / "solar" / "time-0.50"
    more = ("--between_dirs", between, "--between_times", 0.5)
    lora = write_lora(tmp_path / "lora", sd1)
    assert evaluate.main(flags(lora, tmp_path / "few", tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    assert f"1 of 6 images of --between_dirs {between} has no partner in" in said


def test_pairs_that_were_trained_on_are_counted(tmp_path, sd1, scenes, capsys):
    """By the bytes of their images, whatever else is judged with them; beside a file, too."""
    held_out = scenes / "solar"
    pairs = find_pairs(held_out / "before", held_out / "after")
    lora = write_lora(tmp_path / "run", sd1, resolution=16)
    (lora / "revision.json").write_text(json.dumps({"images": image_hashes(pairs[1:])}))
    checkpoint = shutil.copytree(lora, lora / "checkpoint-2")
    (checkpoint / "revision.json").unlink()
    for given in (lora, lora / "pytorch_lora_weights.safetensors", checkpoint):
        argv = flags(given, held_out, tmp_path / "out", "--strengths", "0,1")
        assert evaluate.main(argv) == 0
        said = f"{len(pairs) - 1} of these {len(pairs)} pairs are among those {given} was trained"
        assert said in capsys.readouterr().err
    for other in (None, [["a"], 1], "x"):
        (lora / "revision.json").write_text(json.dumps({"images": other}))
        assert evaluate.main(flags(lora, held_out, tmp_path / "out", "--strengths", "0,1")) == 0
        assert "trained on" not in capsys.readouterr().err
