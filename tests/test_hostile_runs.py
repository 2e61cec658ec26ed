"""Clips, arms files and runs from strangers, results on a full disk: the result or one sentence.

As tests/test_hostile.py has it for weights, configs, images and pairs.
"""

import ast
import contextlib
import html
import io
import json
import os
import re
import resource
import struct
import zlib

import pytest
import torch
from PIL import Image

import ablate
import report
from ablating import comparison
from ablating.jobs import make_jobs
from data import PairDataset
from editing import between
from model.lora import inject
from model.lora_convert import main as convert
from model.lora_files import save_lora
from model.weights import load_unet
from pairing.images import load_image
from pairing.sequences import MAX_FRAMES, find_clips, find_sequences
from tests.pairs import write_pairs
from tests.test_crash import file_limit
from tests.test_hostile import NAMES
from tests.test_structure import LIBRARY, ROOT, SOURCES

# ---- clips ---------------------------------------------------------------------------------------


def clip(frames: int, kind: str = "GIF", size: tuple[int, int] = (16, 16)) -> bytes:
    out = io.BytesIO()
    images = [Image.new("RGB", size, (i % 256, i // 256, 99)) for i in range(frames)]
    images[0].save(out, kind, save_all=True, append_images=images[1:], duration=40)
    return out.getvalue()


def long_gif(frames: int) -> bytes:
    """One frame of a GIF, so many times."""
    one = clip(2)
    start, end = one.index(b"\x21\xf9"), len(one) - 1  # from its first frame's control block on
    return one[:start] + one[start:end] * (frames // 2) + b";"


def promising_png(frames: int) -> bytes:
    """An animated PNG of two frames whose header says so many."""
    whole = clip(2, "PNG")
    at = whole.index(b"acTL")
    body = struct.pack(">II", frames, 0)
    return whole[: at + 4] + body + struct.pack(">I", zlib.crc32(b"acTL" + body)) + whole[at + 16 :]


@pytest.mark.parametrize(
    "name, content",
    [("a.gif", lambda: long_gif(100_000)), ("a.png", lambda: promising_png(2**31 - 1)),
     ("a.png", lambda: promising_png(100_000))],
    ids=["gif", "png of 2**31", "png"],
)  # fmt: skip
def test_clips_of_absurdly_many_frames(tmp_path, name, content):
    """Refused by their count, before a list of them is made."""
    (tmp_path / name).write_bytes(content())
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, hard))
    try:
        with pytest.raises(ValueError, match=rf"{name} (has \d+ frames|cannot be read)") as caught:
            find_clips(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert "\n" not in str(caught.value)


def test_a_clip_of_as_many_frames_as_may_be(tmp_path):
    (tmp_path / "a.gif").write_bytes(long_gif(MAX_FRAMES))
    pairs = find_clips(tmp_path, stride=2000)
    assert [pair.after.number for pair in pairs] == [2000, 4000, 6000, 8000]
    assert PairDataset(pairs, 16)[0]["after"].shape == (3, 16, 16)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_a_clip_that_is_cut(tmp_path, kind):
    """In the middle: what of it is there is read, or the frame that is not is named."""
    path, whole = tmp_path / f"a.{kind.lower()}", clip(8, kind, (64, 64))
    for share in (0.3, 0.5, 0.8, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        try:
            for pair in find_clips(tmp_path):
                assert load_image(pair.after).size == (64, 64)
        except ValueError as error:
            said = str(error)
            assert path.name in said or "'a'" in said or " a has 1 frames" in said
            assert "\n" not in said


def test_a_frame_that_is_not_there_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(promising_png(5))
    last = find_clips(tmp_path)[-1]
    with pytest.raises(ValueError, match=r"a\.png \(frame 4\) cannot be read as an image"):
        load_image(last.after)


def test_links_among_clips(tmp_path):
    """To themselves, to the folder above, to nothing; a pipe; and two clips of one name."""
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "a.gif").write_bytes(clip(3))
    assert len(find_clips(tmp_path)) == 2
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "up").symlink_to(tmp_path / "up")
    with pytest.raises(ValueError, match="up has 0 frames"):
        find_clips(tmp_path)
    (tmp_path / "up" / "up").unlink()
    (tmp_path / "up").rmdir()
    (tmp_path / "gone.webp").symlink_to(tmp_path / "nowhere.webp")
    with pytest.raises(FileNotFoundError, match=r"gone\.webp"):
        find_clips(tmp_path)
    (tmp_path / "gone.webp").unlink()
    os.mkfifo(tmp_path / "pipe.gif")
    with pytest.raises(ValueError, match=r"pipe\.gif cannot be read"):
        find_clips(tmp_path)
    (tmp_path / "pipe.gif").unlink()
    (tmp_path / "a.webp").write_bytes(clip(3, "WEBP"))
    with pytest.raises(ValueError, match="two clips are named a, expected one"):
        find_clips(tmp_path)


@pytest.mark.parametrize(
    "times",
    [[0, float("nan"), 1], [float("nan")] * 3, [0, 1, float("inf")], [float("-inf"), 0, 1],
     [-1.7e308, 0, 1.7e308], [-1e300, 0, 1], [0, 0, 1], [2, 1, 0]],
    ids=str,
)  # fmt: skip
def test_times_that_are_none(tmp_path, times):
    root = write_pairs(tmp_path / "pairs", 1, 16)
    with pytest.raises(ValueError, match="--sequence_times must ascend"):
        find_sequences([root / "before", root / "mask", root / "after"], times)


# ---- arms files and what an ablation leaves ------------------------------------------------------

HEAD = "common: --before_data_dir a --after_data_dir b\nevaluate: --before_data_dir a\n"


@pytest.mark.parametrize("name", ["table.md", "results.json", "plot.png", "sheet.png", "Table.md"])
def test_an_arm_cannot_have_the_name_of_a_result(tmp_path, name):
    """Its folder would be replaced by that file."""
    (tmp_path / "arms.txt").write_text(f"{HEAD}{name}:\n")
    with pytest.raises(ValueError, match=r"arms\.txt:3: .* is the name of a file that the abl"):
        ablate.read_arms(tmp_path / "arms.txt")


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_an_arm_that_asks_for_help(tmp_path, word):
    (tmp_path / "arms.txt").write_text(f"{HEAD}a: {word}\n")
    with pytest.raises(ValueError, match=r"arms\.txt:3: -"):
        ablate.read_arms(tmp_path / "arms.txt")


def test_an_arms_file_of_gigabytes(tmp_path):
    with open(tmp_path / "arms.txt", "wb") as file:
        file.truncate(2**36)
    with pytest.raises(ValueError, match=r"arms\.txt has 68719476736 bytes"):
        ablate.read_arms(tmp_path / "arms.txt")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_odd_texts_in_arms_files(tmp_path, capsys, name):
    """As a prompt: kept as it is, and in the table one cell without tags. As a name: refused, or
    the name of a folder below --out."""
    quoted = "'" + name.replace("'", "'\"'\"'") + "'"
    path = tmp_path / "arms.txt"
    if name.splitlines() == [name] and "\udcff" not in name and name != "-rf":
        path.write_text(f"{HEAD}a: --instance_prompt {quoted}\nb:\n", encoding="utf-8")
        jobs = make_jobs(path, ablate.read_arms(path), [0], tmp_path)
        assert jobs[0].cfg.instance_prompt == name
        shown = ablate.differing(jobs)
        assert shown["a"]["instance_prompt"] == name
        text = comparison.table(name, shown, {"a": {}, "b": {}}, {"a": {}, "b": {}}, [0], [name])
        assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
        rows = [row for row in text.splitlines() if row.startswith("| a |")]
        assert len(rows) == 1 and rows[0].count(" | ") == text.splitlines()[2].count(" | ")
    path.write_text(f"{HEAD}{name}: --lora_rank 4\n", encoding="utf-8", errors="surrogateescape")
    with contextlib.suppress(ValueError):
        for job in make_jobs(path, ablate.read_arms(path), [0], tmp_path / "out"):
            assert job.folder.parent.parent == tmp_path / "out"


# ---- reports -------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for name in ("samples", "strengths"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "strengths" / "0.png")
    (folder / "config.json").write_text('{"instance_prompt": "a"}')
    return folder


def tell(run, **image):
    told = {"strengths": [1.0], "images": [{"name": "a", "at": ["0.png"], **image}]}
    (run / "strengths" / "strengths.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    "text", [*NAMES, "</script><b>", "\ud800", "x" * 100_000], ids=lambda t: ascii(t)[:20]
)
def test_odd_texts_in_a_report(run, text):
    """Names of pairs, prompts, keys: escaped, and the page is UTF-8 whatever they are."""
    tell(run, name=text)
    config = {"instance_prompt": text, text: text, "pair_objective": [text]}
    (run / "config.json").write_text(json.dumps(config))
    (run / "summary.json").write_text(json.dumps({"status": text, "steps": text}))
    page = report.write_report(run).read_text(encoding="utf-8")
    assert page.count("<script>") == page.count("</script>") == page.count("</html>") == 1
    wanted = html.escape(text).encode("utf-8", "backslashreplace").decode()
    assert page.count(wanted) >= 4


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_report_of_a_run_of_any_name(run, name, capsys):
    run = run.rename(run.with_name(name))
    assert report.main([str(run)]) == 0
    assert "<title>" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["../secret.png", "/secret.png", "a/../0.png", "0.txt", "", 3, None]
)
def test_a_report_shows_no_file_from_elsewhere(run, tmp_path, name):
    """strengths.json may come from a stranger, and the page go to one."""
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "run" / "secret.png")
    tell(run, at=[str(tmp_path / "secret.png") if name == "/secret.png" else name])
    with pytest.raises(ValueError, match=r"strengths\.json is damaged") as caught:
        report.write_report(run)
    assert "\n" not in str(caught.value) and not (run / "report.html").exists()


def test_a_report_follows_no_link(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (run / "samples" / "000001.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=r"000001\.png is a symlink"):
        report.write_report(run)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "1", "[]", '{"a": ' + "9" * 10_000 + "}", "\0", '{"strengths": 3}',
                '{"strengths": ["x"], "images": [{"at": ["0.png"], "name": 1}]}',
                '{"strengths": [1], "images": {"a": 1}}'],
    ids=lambda content: content[:20],
)  # fmt: skip
def test_damaged_strengths(run, capsys, content):
    (run / "strengths" / "strengths.json").write_text(content)
    assert report.main([str(run)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(r"strengths\.json (is not JSON|should hold a JSON object|is damaged)", said)


# ---- results on a full disk ----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["convert", "concat", "merge"])
def test_a_disk_full_for_a_lora(sd1, tmp_path, capsys, command):
    """Exit status 1, a sentence, nothing left; with room again it works."""
    unet, lora, out = load_unet(sd1), str(tmp_path / "a.safetensors"), tmp_path / "to" / "out"
    inject(unet, "attn", rank=2, generator=torch.Generator())
    save_lora(lora, unet=unet)
    out = out if command == "merge" else out.with_suffix(".safetensors")
    argv = {
        "convert": [lora],
        "concat": [lora, lora],
        "merge": ["--model", str(sd1), "--lora", lora],
    }
    argv = [command, *argv[command], str(out)]
    with file_limit(3000):
        assert convert(argv) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert not list((tmp_path / "to").iterdir())
    assert convert(argv) == 0 and out.exists()


def test_a_disk_full_for_an_animation(tmp_path):
    """What was there before is there still."""
    images = [Image.effect_noise((64, 64), 90).convert("RGB") for _ in range(3)]
    between.save_gif(images, tmp_path / "a.gif")
    was = (tmp_path / "a.gif").read_bytes()
    with file_limit(3000), pytest.raises(OSError, match=r"a\.gif"):
        between.save_gif([*images, *images], tmp_path / "a.gif")
    assert (tmp_path / "a.gif").read_bytes() == was and len(list(tmp_path.iterdir())) == 1


# What writes by itself: into what its caller has aside, into memory, line by line, or nowhere.
WRITERS = {
    "ablate.py": {"call"}, "training/checkpoint.py": {"save_state"},
    "durable.py": {"seal", "lock", "save_image"}, "report.py": {"picture"},
    "training/rows.py": {"save_shard"}, "runs.py": {"start"}, "train.py": {"main"},
    "training/watching.py": {"strengths"}, "model/lora_convert.py": {"write"},
    "model/lora_files.py": {"write_lora"}, "pairing/checking.py": {"write_lists"},
}  # fmt: skip


def writers(node: ast.AST, inside: str = "") -> set[str]:
    """Functions that write a file, but for lambdas of `aside`, which `write_aside` is given."""
    if isinstance(node, ast.Lambda) and [arg.arg for arg in node.args.args] == ["aside"]:
        return set()
    found = set()
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        name = "" if ast.unparse(node.func) == "write_text" else name  # durable's, which does
        mode = [word for word in ("'w", "'a", "'x", "+") if word in ast.unparse(node)]
        if name in ("write_text", "write_bytes", "save_file") or (name == "open" and mode):
            found.add(inside)
        if name == "save" and ast.unparse(node.func) not in ("save", "safetensors.torch.save"):
            found.add(inside)
    inside = getattr(node, "name", inside) if isinstance(node, ast.FunctionDef) else inside
    return found.union(*(writers(child, inside) for child in ast.iter_child_nodes(node)))


def test_all_results_are_written_aside():
    paths = [SOURCES[name] for name in LIBRARY]
    found = {str(p.relative_to(ROOT)): writers(ast.parse(p.read_text("utf-8"))) for p in paths}
    assert {name: names for name, names in found.items() if names} == WRITERS
