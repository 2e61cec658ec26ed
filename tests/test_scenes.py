"""The renderer: determined by its seeds, exact outside the mask, continuous in time."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pairing.pairs import find_pairs
from scenes import random_base, train_base
from scenes.paint import change_mask, render
from scenes.render import main
from scenes.world import (
    CHANGES,
    caption,
    make_scene,
    new_houses,
    surroundings,
)

SEEDS = range(12)
ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows_in_every_scene_and_is_nothing_at_time_0(change):
    for seed in SEEDS:
        scene = make_scene(seed)
        before = render(scene)
        assert (render(scene, {change: 0.0}) == before).all()
        changed = change_mask(before, render(scene, {change: 1.0})).mean()
        assert changed > 0.004, (seed, changed)


@pytest.mark.parametrize("change", sorted(set(CHANGES) - {"snow", "autumn"}))
def test_the_rest_of_the_picture_is_equal_in_every_state(change):
    """Nothing outside the final mask differs in between, and the mask leaves much of the scene."""
    for seed in SEEDS:
        scene, around = make_scene(seed), surroundings(seed, change)
        states = [render(scene, around | {change: t}) for t in (0, 0.3, 0.6, 1.0)]
        # what is built, felled or shaded on the way may be gone at the end: houses only grow,
        # so their shadows do too; a felled tree uncovers what its stump then covers
        ever = np.logical_or.reduce([change_mask(states[0], s) for s in states])
        assert ever.mean() < 0.6
        final = change_mask(states[0], states[-1])
        assert (ever & ~final).mean() < 0.02


@pytest.mark.parametrize("change", CHANGES)
def test_progress_is_steady(change):
    """Each state is nearer to the after than the one before it, and small steps change little."""
    scene = make_scene(3)
    times = np.linspace(0, 1, 21)
    states = [render(scene, {change: t}).astype(float) for t in times]
    left = [np.abs(states[-1] - s).mean() for s in states]
    assert all(b <= a + 0.01 * left[0] for a, b in pairwise(left))  # edges fall on whole pixels
    steps = [np.abs(b - a).mean() for a, b in pairwise(states)]
    assert max(steps) < 0.35 * left[0]


@pytest.mark.parametrize("change", CHANGES)
def test_a_scene_of_larger_extent_has_more_of_what_is_as_large_as_before(change):
    small, large = ([make_scene(seed, extent) for seed in range(6)] for extent in (1, 3))
    for scene in large:
        before, after = render(scene), render(scene, {change: 1.0})
        assert before.shape == (192, 192, 3)
        where = np.argwhere(change_mask(before, after))
        assert len(where) > 0.004 * 192**2
        if change != "flood":  # of its one river or lake
            assert (where.max(0) - where.min(0) > 96).all()  # not in one corner
    for kind, sizes in (("houses", "size"), ("trees", "radius")):
        few, many = (sum(len(getattr(s, kind)) for s in some) for some in (small, large))
        assert 4 * few < many < 14 * few
        mean = [np.mean([getattr(x, sizes) for s in some for x in getattr(s, kind)])
                for some in (small, large)]  # fmt: skip
        assert mean[1] == pytest.approx(mean[0], rel=0.1)


def test_the_scenes_that_the_base_was_trained_on_are_as_they_were():
    """To the bit: its card, and what is logged of it, are about these."""
    digest = hashlib.sha256()
    for seed in (0, 7, 2_000_000_003):
        for change in CHANGES:
            digest.update(render(make_scene(seed), {change: 0.7}, outcome=1).tobytes())
    assert digest.hexdigest()[:16] == "440b53be958190a4"


def test_seeds_decide_everything():
    a, b = make_scene(5), make_scene(5)
    state = {"urban": 0.6, "solar": 0.4, "autumn": 1.0}
    assert (render(a, state) == render(b, state)).all()
    assert (render(a) != render(make_scene(6))).mean() > 0.5


@pytest.mark.parametrize("change", CHANGES)
def test_only_random_changes_have_outcomes(change):
    differ = 0
    for seed in SEEDS:
        scene = make_scene(seed)
        one, two = (render(scene, {change: 1.0}, outcome=k) for k in (0, 1))
        differ += (one != two).any()
    random = change in ("urban", "clearing", "craters")
    assert differ == (len(SEEDS) if random else 0)


def test_new_houses_stand_on_dry_free_ground():
    for seed in SEEDS:
        scene = make_scene(seed)
        houses = [house for _, house in new_houses(scene, outcome=seed)]
        assert len(houses) >= 3
        for house in houses:
            gaps = np.hypot(*(np.array([h.at for h in scene.houses + houses]) - house.at).T)
            assert sorted(gaps)[1] > 0.13 - 1e-9  # [0] is the house itself
            assert np.hypot(*(scene.water - house.at).T).min() > scene.width + 0.075 - 1e-9


@pytest.mark.parametrize("size", [32, 96, 200])
def test_any_size_shows_the_same_scene(size):
    """Drawn larger or smaller, it is the 64-pixel picture up to the resampling of its edges."""
    scene = make_scene(7)
    image = Image.fromarray(render(scene, {"solar": 1.0}, size=size))
    assert image.size == (size, size)
    reduced = np.asarray(image.resize((16, 16), Image.BOX), float)
    plain = np.asarray(Image.fromarray(render(scene, {"solar": 1.0})).resize((16, 16), Image.BOX))
    assert np.abs(reduced - plain).mean() < 3.0


def test_wrong_states_are_named():
    with pytest.raises(ValueError, match="'lava'; there are urban"):
        render(make_scene(0), {"lava": 1.0})
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        render(make_scene(0), {"snow": 1.5})


def test_captions_say_what_is_to_be_seen():
    text = caption(make_scene(0), {"autumn": 1.0, "solar": 0.9, "snow": 0.2})
    assert text.startswith("an aerial view of fields with a ")
    assert text.endswith(", in autumn, with solar farms")


def test_the_command_writes_pairs_masks_states_and_outcomes(tmp_path, capsys):
    out = tmp_path / "pairs"
    arguments = "--change urban --pairs 3 --seed 4 --size 48 --times 0,0.5 --outcomes 2"
    assert main([*arguments.split(), "--out", str(out)]) == 0
    (out / "scenes.json").unlink()
    assert sorted(p.name for p in out.iterdir()) == [
        "after", "before", "mask", "outcome-1", "time-0.00", "time-0.50"
    ]  # fmt: skip
    assert len(find_pairs(out / "before", out / "after")) == 3
    read = {p.name: np.asarray(Image.open(p / "00001.png")) for p in out.iterdir()}
    assert (read["time-0.00"] == read["before"]).all()
    assert ((read["mask"] > 0) == change_mask(read["before"], read["after"])).all()
    assert (read["outcome-1"] != read["after"]).any()
    again = tmp_path / "again"
    main([*arguments.split(), "--out", str(again)])
    for path in out.rglob("*.png"):
        assert path.read_bytes() == (again / path.relative_to(out)).read_bytes()


# ---- mistakes ------------------------------------------------------------------------------------


def refused(program, argv, capsys) -> str:
    """The one sentence of a program that ends with status 2."""
    try:
        status = program(list(map(str, argv)))
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    "flag, value, said",
    [
        *(("--times", t, f"numbers in 0..1 .* got '{t}'") for t in ("foo", "0.25,", "nan", "5")),
        ("--times", "0.251,0.252", "expected times that differ by 0.01, got '0.251,0.252'"),
        *(("--seed", seed, f"--seed must be in 0..1999, got {seed}") for seed in (-1, 2000)),
        *(("--size", size, f"--size must be in 1..2048, got {size}") for size in (0, -5)),
        *(("--pairs", pairs, f"--pairs must be in 1..100000, got {pairs}") for pairs in (0, -2)),
        *(("--outcomes", k, f"--outcomes must be in 1..1000, got {k}") for k in (0, -1)),
    ],
)  # fmt: skip
def test_pairs_that_cannot_be_drawn(tmp_path, capsys, flag, value, said):
    argv = ["--change", "solar", "--pairs", 2, "--out", tmp_path / "out", flag, value]
    assert re.search(said, refused(main, argv, capsys)) and not list(tmp_path.iterdir())


def test_scenes_replace_scenes_and_nothing_else(tmp_path, capsys):
    """Of another change and number; a user's image of the same name stays."""
    (mine := tmp_path / "mine" / "before").mkdir(parents=True)
    (mine / "00000.png").write_text("mine")
    said = refused(main, ["--change", "solar", "--pairs", 1, "--out", mine.parent], capsys)
    assert "holds before, which would be replaced, but no scenes.json" in said
    assert (mine / "00000.png").read_text() == "mine" and len(list(mine.parent.iterdir())) == 1
    out = tmp_path / "out"
    assert main(["--change=urban", "--pairs=3", "--outcomes=2", f"--out={out}"]) == 0
    (out / "after" / "notes.md").write_text("mine")
    assert main(["--change=snow", "--pairs=2", f"--out={out}"]) == 0
    left = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    drawn = [f"{folder}/0000{i}.png" for folder in ("after", "before", "mask") for i in range(2)]
    assert left == sorted([*drawn, "after/notes.md", "scenes.json"])
    assert json.loads((out / "scenes.json").read_text())["change"] == "snow"


@pytest.mark.parametrize(
    "program, argv",
    [(main, ["--change", "solar", "--pairs", 1]), (random_base.main, []), (train_base.main, [])],
    ids=["render", "random_base", "train_base"],
)
def test_a_file_is_no_folder(tmp_path, capsys, monkeypatch, program, argv):
    monkeypatch.setattr(train_base, "train_base", None)  # it would take hours
    (file := tmp_path / "file").write_text("mine")
    for out in (file, file / "x"):
        said = refused(program, [*argv, "--out", out], capsys)
        assert f"--out {out}: {file} is a file; expected a folder" in said
    assert file.read_text() == "mine"


@pytest.mark.parametrize("program", [random_base.main, train_base.main])
def test_a_folder_of_other_things_is_not_replaced(tmp_path, capsys, monkeypatch, program):
    monkeypatch.setattr(train_base, "train_base", None)
    (tmp_path / "thesis.txt").write_text("mine")
    said = refused(program, ["--out", tmp_path], capsys)
    assert f"--out {tmp_path} is not empty and has no model_index.json" in said
    assert (tmp_path / "thesis.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_model_is_replaced_but_not_the_one_that_is_copied(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model_index.json").write_text("{}")
    assert random_base.main(["--out", str(out)]) == 0
    assert (out / random_base.WEIGHTS).is_file() and len((out / "model_index.json").read_text()) > 2
    capsys.readouterr()
    for wrong in (random_base.BASE, random_base.BASE / "x"):
        said = refused(random_base.main, ["--out", wrong], capsys)
        assert f"--out {wrong} is in {random_base.BASE}, which is copied" in said


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    "words, has, lacks",
    [
        ("evaluate RUN=r BEFORE=b", "--before_data_dir 'b'", "--after_data_dir"),
        ("evaluate RUN=r BEFORE=b AFTER=a", "--after_data_dir 'a'", "mask"),
        ("evaluate", "--after_data_dir 'data/scenes/solar/test/after'", "--outcome_dirs"),
        ("generate PROMPT=x RUN=runs/typo", "--lora 'runs/typo'", "--model"),
        ("generate PROMPT=x CHANGE=none", "--model 'scenes/base'", "--lora"),
        ("generate PROMPT=x RUN=", "--model 'scenes/base'", "--lora"),
        ("generate PROMPT=x", "--height 64 --width 64", "--lora"),
        ("generate PROMPT=x MODEL=m", "--model 'm'", "--height"),
        ("sample RUN=r INPUT=i MODEL=m", "--model 'm'", "--prompt"),
        ("sample INPUT=i", "--lora 'runs/pairs' --input 'i'", "solar"),
        ("sample INPUT=i CHANGE=snow", "--lora 'runs/snow' --input 'i'", "pairs"),
        ("sample", "--lora 'runs/solar' --input 'data/scenes/solar/test/before'", "pairs"),
        ("evaluate BEFORE=b AFTER=a", "--lora 'runs/pairs'", "solar"),
        ("evaluate RUN=r BEFORE=b AFTER=a PROMPT=p", "--prompt 'p'", "--model"),
        ("check-data BEFORE=b AFTER=a MASK=m", "--mask_dir 'm'", "--out"),
    ],
)
def test_make_names_what_was_given_and_nothing_else(words, has, lacks):
    """Of a folder that was not given the program says so; a run that is not there is asked for."""
    make = ["make", "-n", *words.split(), "PYTHON=python"]
    said = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    program = words.split()[0].replace("generate", "sample").replace("-", "_")
    last = said[said.index(f"{program}.py") :]
    assert has in last and lacks not in last


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_dollar_is_one_for_make(tmp_path):
    """In a prompt, a folder, from the command line or the environment."""
    given = {"PROMPT": "a $5 note, $(HOME) and it's $x", "INPUT": "a$b/c d"}
    for words, env in ([f"{key}={text}" for key, text in given.items()], {}), ([], given):
        make, env = ["make", "-n", "sample", "PYTHON=python", *words], os.environ | env
        said = subprocess.check_output(make, cwd=ROOT, text=True, env=env)
        words = shlex.split(said[said.index("'python'") :].replace("\\\n", " "))
        assert words[words.index("--prompt") + 1] == given["PROMPT"]
        assert words[words.index("--input") + 1] == given["INPUT"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_stops_at_a_variable_that_it_does_not_know():
    """A slip in a name, which make itself lets pass; those of make and of the programs go on."""

    def said(*words):
        make = ["make", "-n", "sample", "PYTHON=python", *words]
        outside = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # of make test
        return subprocess.run(make, cwd=ROOT, env=outside, capture_output=True, text=True)

    for word in ("STRENGHT=0.5", "SCENES=$x", "before=b"):
        done = said(word)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
        assert f"{word}: there is no such variable; those on the command line are " in done.stderr
    known = done.stderr.split(" are ")[1].removesuffix(".  Stop.\n").split()
    assert {"STRENGTH", "CHANGE", "SEEDS", "FUZZ"} < {*known} and known == sorted(known)
    assert said(*(f"{name}=python" for name in known)).returncode == 0
    used = re.findall(r"\b([A-Z]+)=", re.sub(r"(?m)^(?!\t|[a-z-]+:).*$", "", MAKEFILE))
    assert {"BEFORE", "SEEDS"} < {*used} <= {*known}
    free = ("OMP_NUM_THREADS=2", "CUDA_VISIBLE_DEVICES=", "MAKEFLAGS=k", "SHELL=/bin/sh",
            "PYTHONPATH=x", "https_proxy=x", "KILLS=1")  # fmt: skip
    assert said(*free).returncode == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_evaluates_what_it_trained():
    make = ["make", "-n", "train", "ARGS=--output_dir x", "PYTHON=python", "BEFORE=b", "AFTER=a"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "ARGS has --output_dir: the folder of a run is OUT=" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_draws_the_scenes_of_an_ablation_and_no_others(tmp_path):
    """A folder of the user's own may be there too."""
    arms = [f"a{i}: --before_data_dir data/scenes/{name}/train/before" for i, name in
            enumerate((*CHANGES, "mine", "snowy"))]  # fmt: skip
    (tmp_path / "arms.txt").write_text("\n".join(arms))
    make = ["make", "-n", "-B", "ablate", f"F={tmp_path / 'arms.txt'}", "PYTHON=python"]
    said = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {*re.findall(r"--change (\w+)", said)} == {*CHANGES}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_takes_no_environment_with_spaces_in_its_name():
    """It cannot be a target: a part of the name would be made."""
    make = ["make", "-n", "setup", "VENV=a b"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "VENV=a b: a folder without spaces" in done.stderr
