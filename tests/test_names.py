"""pairing/names.py: folders whose names differ by a mark of their own, or by dates."""

import shutil
import unicodedata
from dataclasses import replace

import pytest
from PIL import Image

import check_data
import evaluate
from config import TrainConfig
from pairing.names import Compared, comparable, masks_by_name
from pairing.pairs import find_pairs, find_singles, told_of
from pairing.sequences import find_clips, find_sequences
from reporting.held_out import find_held_out
from tests.small import small
from train import train
from training.inputs import excluded, find_data


def compare(before, after):
    """[(before, after)] of the names that match, and what comparable says."""
    folders = {"before": {n: n for n in before.split()}, "after": {n: n for n in after.split()}}
    found = comparable(folders)
    one, other = found.folders
    return [(one[name], other[name]) for name in one if name in other], found


@pytest.mark.parametrize(
    "before, after, names, without",
    [
        ("P1_pre P2_pre", "P1_post P2_post", "P1 P2", "pre (before) and post (after)"),
        ("pre-1 pre-2", "post-1 post-2", "1 2", "pre (before) and post (after)"),
        ("P1 P2", "P1.after P2.after", "P1 P2", "after (after)"),
        ("P1-(pre) P2-(pre)", "P1-[post] P2-[post]", "P1 P2", "pre (before) and post (after)"),
        ("s_pre_1 s_pre_2", "s_1_post s_2_post", "s_1 s_2", "pre (before) and post (after)"),
        # "a" is a place, as it is on both sides
        ("a_1_pre a_2_pre", "a_1_post a_2_post b_1_post", "a_1 a_2",
         "pre (before) and post (after)"),
        ("1_PRE_x 2_PRE_x", "1_Post_x 2_Post_x", "1_x 2_x", "PRE (before) and Post (after)"),
        ("img_1 img_2", "1_mask 2_mask", "1 2", "img (before) and mask (after)"),
        ("s_1_pre s_2_pre", "s_1_post s_2_post", "s_1 s_2", "pre (before) and post (after)"),
        ("P1_pre", "P1_post", "P1", "pre (before) and post (after)"),  # a single pair
        ("T1_2018", "T1_2020", "T1", "2018 (before) and 2020 (after)"),
        ("a/1_a b/1_a", "a/1_b b/1_b", "a/1 b/1", "a (before) and b (after)"),
        ("a_b/1_a a_b/2_a", "a_b/1_b a_b/2_b", "a_b/1 a_b/2", "a (before) and b (after)"),
        ("1_2018 2_2018", "1_2020 2_2020", "1 2", "2018 (before) and 2020 (after)"),
        (
            "T32_20190601_TCI_1 T32_20190601_TCI_2", "T32_20200910_TCI_1 T32_20200910_TCI_2",
            "T32_TCI_1 T32_TCI_2",
            "dates such as 20190601 (before) and dates such as 20200910 (after)",
        ),
        (
            "20190601T101031_A 2019-06-03_B", "A_20200910 B_20200911", "A B",
            "dates such as 20190601T101031 (before) and dates such as 20200910 (after)",
        ),
        ("A_20190601", "A", "A", "dates such as 20190601 (before)"),
        (
            "A_2018_01_x B_2018_01_x", "A_2019_07_x B_2019_07_x", "A_x B_x",
            "dates such as 2018_01 (before) and dates such as 2019_07 (after)",
        ),
        ("A_2018_01 A_2018_02", "A_2020_01 A_2020_02", "A_01 A_02",  # places, not months
         "2018 (before) and 2020 (after)"),
        (
            "A_20190601_a B_20190602_a", "A_20200601_b B_20200602_b", "A B",
            "a, dates such as 20190601 (before) and b, dates such as 20200601 (after)",
        ),
        # days are what matches: the places are marks of the folders
        ("t1_20190601 t1_20190602", "t2_20190601 t2_20190602", "20190601 20190602",
         "t1 (before) and t2 (after)"),
        # ids of 8 digits, one of which could be a date
        ("20190601_a 44444444_a", "20190601_b 44444444_b", "20190601 44444444",
         "a (before) and b (after)"),
        ("日本_前 東京_前", "日本_後 東京_後", "日本 東京", "前 (before) and 後 (after)"),
    ],
)  # fmt: skip
def test_names_without_their_folders_marks(before, after, names, without):
    matched, found = compare(before, after)
    assert len(matched) == len(before.split()) and found.without == without and not found.doubt
    assert list(found.folders[0]) == names.split() and {*found.folders[1]} >= {*names.split()}
    assert found.lines == (f"names are matched without {without}",)


@pytest.mark.parametrize(
    "before, after",
    [
        # marks that say nothing: cameras number their photographs
        ("IMG_1 IMG_2", "DSC_1 DSC_2"),
        ("1_x 2_x", "1_y 2_y"),
        ("tile_5_10 tile_5_11", "tile_6_10 tile_6_11"),  # rows of a grid
        ("a P1_pre P2_pre", "a P1_post P2_post"),  # some match as they are
        ("P1_pre P2_pre", "P1_pre P2_post"),
        ("P1_pre P2_pre x", "P1_post P2_post"),  # not a mark of all
        ("P1pre P2pre", "P1post P2post"),  # no separator
        ("P1_pre", "P2_post"),
        ("s_P1_pre", "s_P2_post"),
        ("T_1", "T_2"),
        ("pre_a", "post_b"),
        ("12345678 23456789", "12345679 23456788"),  # no dates: ids
        ("A_20191301 B_20191301_x", "A_20191402 B_20191402_y"),  # month 13
        ("A_20190600 B_20190632_x", "A_20200700 B_20200732_y"),
        ("A_18990101 B_18990101_x", "A_21010101 B_21010101_y"),
        ("A_20190601 A_44444444", "A_20190602 A_55555555"),  # a date among ids is an id
        ("x20190601 y20190601", "x20200601 y20200601"),
        ("A_201906011 B_201906012", "A_202006011 B_202006012"),
        ("A_٢٠١٩٠٦٠١ B_٢٠١٩٠٦٠١_x", "A_٢٠٢٠٠٦٠١ B_٢٠٢٠٠٦٠١_y"),  # digits, but not of a date
        ("20190601", "20200601"),  # nothing would be left
        ("pre_1/a pre_1/b", "post_1/c post_1/d"),  # folders count as they are
        ("pre/a pre/b", "post/a post/b"),
        ("", "a"),
    ],
)
def test_names_that_stay_as_they_are(before, after):
    _, found = compare(before, after)
    folders = [dict(zip(some.split(), some.split())) for some in (before, after)]
    assert found == Compared(folders) and not found.lines and not found.hint


def test_names_that_would_be_alike_are_not_matched():
    days = "T1_20190601 T1_20190611", "T1_20200601 T1_20200611"
    matched, found = compare(*days)
    assert not matched and found.hint == (
        "; without dates such as 20190601 (before) and dates such as 20200601 (after) names would "
        "match, but T1_20190601 and T1_20190611 would then be named alike"
    )


def test_masks_go_by_the_names_of_their_images():
    """Those without an image keep their own."""
    found = masks_by_name(["img_1", "img_2"], {"mask_1": "a", "mask_2": "b", "mask_3": "c"})
    assert found.folders == [{"img_1": "a", "img_2": "b", "mask_3": "c"}]
    assert found.without == "img (images) and mask (masks)"
    found = masks_by_name(["1_A", "2_A"], {"1_A_seg": 1, "2_A_seg": 2, "3_B_seg": 3})
    assert found.folders == [{"1_A": 1, "2_A": 2, "3_B_seg": 3}] and found.without == "seg (masks)"
    xbd = masks_by_name(["a_disaster", "b_disaster"], {"a_post_disaster_target": 1,
                                                       "b_post_disaster_target": 2})  # fmt: skip
    assert xbd.folders == [{"a_disaster": 1, "b_disaster": 2}]
    assert masks_by_name(["1", "2"], {"1": 1, "2_seg": 2}) == Compared([{"1": 1, "2_seg": 2}])


# ---- in the programs -----------------------------------------------------------------------------


def fill(root, **folders):
    """Small pictures of these names, all different."""
    for k, (folder, names) in enumerate(folders.items()):
        for i, name in enumerate(names.split()):
            path = root / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (40 * k, 20 * i, 99)).save(path)
    return [root / folder for folder in folders]


MARKED = {"before": "P1_pre P2_pre", "after": "P1_post P2_post", "mask": "P1_seg P2_seg"}
LINES = [
    "names are matched without pre (before) and post (after)",
    "names are matched without seg (masks)",
]


def test_pairs_their_masks_and_captions(tmp_path):
    before, after, mask = fill(tmp_path, **MARKED)
    (after / "P1_post.txt").write_text("a house")
    pairs = find_pairs(before, after, mask_dir=mask)
    assert [(p.name, p.before.name, p.after.name, p.mask.name, p.caption) for p in pairs] == [
        ("P1", "P1_pre.png", "P1_post.png", "P1_seg.png", "a house"),
        ("P2", "P2_pre.png", "P2_post.png", "P2_seg.png", None),
    ]
    assert told_of(pairs) == LINES
    assert [p.mask.name for p in find_singles(before, mask_dir=mask)] == [
        "P1_seg.png", "P2_seg.png"
    ]  # fmt: skip


def test_accents_and_captions_of_names_without_marks(tmp_path):
    composed, apart = "caf\u00e9_pre x_pre", unicodedata.normalize("NFD", "caf\u00e9_post x_post")
    pairs = find_pairs(*fill(tmp_path, before=composed, after=apart))
    assert [pair.name for pair in pairs] == ["caf\u00e9", "x"]


def test_what_lacks_a_partner_is_named_and_can_be_skipped(tmp_path):
    before, after = fill(tmp_path, before="P1_pre P2_pre P3_pre", after="P1_post P2_post")
    with pytest.raises(ValueError) as error:
        find_pairs(before, after)
    assert str(error.value) == (
        f"1 of 3 images of --before_data_dir {before} has no partner in {after}: P3; "
        f"{LINES[0]}; --allow_unmatched skips them"
    )
    pairs = find_pairs(before, after, allow_unmatched=True)
    skipped = "--allow_unmatched: skipping 1 images without a partner"
    assert len(pairs) == 2 and told_of(pairs) == [LINES[0], skipped]
    fill(tmp_path, mask="P1_seg P2_seg", other="T1_20190601 T1_20190602", later="T1_20200601")
    with pytest.raises(ValueError, match=r"1 of 3 .* no mask .*: P3_pre; names are matched with"):
        find_singles(before, mask_dir=tmp_path / "mask")
    with pytest.raises(ValueError, match=r"^No matching.*but T1_20190601 and T1_20190602 would"):
        find_pairs(tmp_path / "other", tmp_path / "later")


def test_states_are_matched_all_at_once(tmp_path):
    """The first two share more of their names than the last has."""
    years = {"one": "A_x_2018 B_x_2018", "two": "A_x_2020 B_x_2020", "three": "A_x B_x C_y"}
    dirs = fill(tmp_path, **years)
    with pytest.raises(ValueError, match=r"1 of 3 .* C_y; names are matched without 2018 \(state"):
        find_sequences(dirs)
    pairs = find_sequences(dirs, allow_unmatched=True)
    assert [pair.name for pair in pairs] == ["A_x at 0.5", "A_x", "B_x at 0.5", "B_x"]
    assert [pair.after.name for pair in pairs[:2]] == ["A_x_2020.png", "A_x.png"]
    assert told_of(pairs) == [
        "names are matched without 2018 (state 0) and 2020 (state 1)",
        "--allow_unmatched: skipping 1 places that lack a state",
    ]
    for i in range(2):
        fill(tmp_path / "clips", a=f"{i}_0 {i}_1", b=f"{i}_0 {i}_1")
    (mask,) = fill(tmp_path, mask="mask_a mask_b")
    clips = find_clips(tmp_path / "clips", mask_dir=mask)
    assert {pair.mask.name for pair in clips} == {"mask_a.png", "mask_b.png"}
    assert told_of(clips) == ["names are matched without mask (masks)"]


def test_a_name_to_leave_out_may_be_a_file_s_or_a_pair_s(tmp_path):
    """Of any of its files; also one that has no mark, which hinders those that have."""
    dirs = fill(tmp_path, before="P1_pre P2_pre P3_pre", after="P1_post P2_post P3_post",
                mask="P1_seg P2_seg P3_seg")  # fmt: skip
    cfg = TrainConfig(
        **dict(zip(("before_data_dir", "after_data_dir", "mask_dir"), map(str, dirs)))
    )
    file = tmp_path / "names.txt"
    cfg = replace(cfg, exclude_from=(str(file),))
    for name in ("P2", "P2_pre", "P2_post.png", "P2_seg"):
        file.write_text(name)
        assert excluded(cfg) == {"P2"}
        assert [pair.name for pair in find_data(cfg).train] == ["P1", "P3"]
    fill(tmp_path, before="thumbnail")
    file.write_text("thumbnail")
    assert [pair.name for pair in find_data(cfg).train] == ["P1", "P2", "P3"]
    file.write_text("P2")
    with pytest.raises(ValueError, match="1 of 1 names are of no image in the data folders: P2"):
        find_data(cfg)


def test_a_check_says_what_a_training_says(tmp_path, capsys):
    before, after, mask = fill(tmp_path, **MARKED | {"after": "P1_post P2_post P3_post"})
    flags = ["--before", before, "--after", after, "--mask_dir", mask, "--out", tmp_path / "out"]
    assert check_data.main([*map(str, flags), "--resolution", "8"]) == 1
    said = capsys.readouterr().out
    for line in LINES:
        assert said.count(line.replace("names are", "names       ")) == 1
    assert f"PROBLEM      after images without a partner: 1\n{'':13}P3\n" in said
    assert "pairs        2 of 2 usable" in said and "without a mask" not in said
    dirs = fill(tmp_path, y18="A_2018 B_2018", y20="A_2020 B_2020", y23="A_2023 B_2023")
    check = ["--sequence_dirs", *map(str, dirs), "--out", str(tmp_path / "out")]
    assert check_data.main([*check, "--resolution", "8"]) == 0
    said = capsys.readouterr().out
    assert "names        matched without 2018 (state 0) and 2020 (state 1) and 2023" in said
    other = fill(tmp_path, one="T1_20190601 T1_20190602", two="T1_20200601 T1_20200602")
    check = ["--before", other[0], "--after", other[1], "--out", tmp_path / "out"]
    assert check_data.main([str(flag) for flag in check]) == 2
    assert "would then be named alike" in capsys.readouterr().err


def test_held_out_pairs(tmp_path):
    before, after, mask = fill(tmp_path, **MARKED)
    between, outcome = fill(tmp_path, between="P1_mid P2_mid", outcome="P1_pre P2_pre")
    flags = ["--before_data_dir", before, "--after_data_dir", after, "--mask_dir", mask,
             "--between_dirs", between, "--outcome_dirs", outcome, "--lora", "x"]  # fmt: skip
    args = evaluate.make_parser().parse_args([*map(str, flags), "--out", "y"])
    found = find_held_out(args)
    assert [pair.name for pair in found.pairs + found.between[0]] == ["P1", "P2"] * 2
    assert told_of(found.pairs) == LINES
    assert told_of(found.between[0]) == [
        "names are matched without pre (before) and mid (--between_dirs)"
    ]
    assert [pair.name for pair in found.outcomes[0]] == ["P1_pre", "P2_pre"]
    assert not told_of(found.outcomes[0])


def test_a_run_tells_it_once(tmp_path, sd1, pairs, capsys):
    for side, mark in (("before", "_pre"), ("after", "_post"), ("mask", "_seg")):
        (tmp_path / side).mkdir()
        for file in (pairs / side).iterdir():
            shutil.copy(file, tmp_path / side / f"{file.stem}{mark}.png")
    fields = {"mask_dir": str(tmp_path / "mask"), "max_train_steps": 1}
    run = train(small(sd1, tmp_path, tmp_path / "run", **fields))
    said = capsys.readouterr().out
    assert [said.count(line) for line in LINES] == [1, 1]
    dirs = [f"--{side}_data_dir={tmp_path / side}" for side in ("before", "after")]
    flags = [f"--lora={run}", f"--out={tmp_path / 'out'}", *dirs, "--strengths=0,1", "--steps=1"]
    assert evaluate.main([*flags, f"--mask_dir={tmp_path / 'mask'}"]) == 0
    said = capsys.readouterr().out
    assert [said.count(line) for line in LINES] == [1, 1]
