"""report.html: whole, escaped, alone; its slider moves in a real browser."""

import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from PIL import Image

import evaluate
import report
from config import TrainConfig
from tests.pairs import write_pairs
from tests.test_evaluate import flags
from train import train

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
NASTY = "</script><script>window.harm = 1</script><img src=x onerror=\"harm\"> & 'Ünï'"
VALUES = [0.0, 0.5, 1.0, 1.25]


@pytest.fixture
def run(tmp_path):
    """A run's folder whose every text wants to be HTML. The picture at strength s is grey 40 s."""
    folder = tmp_path / "a <i>run"
    for name in ("samples", "strengths"):
        (folder / name).mkdir(parents=True)
    config = {"instance_prompt": NASTY, "pair_objective": "slider", NASTY: [NASTY], "loss": "l1",
              "before_data_dir": NASTY, "learning_rate": 2e-4}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps({"status": NASTY, "steps": 30, "seconds": 4.5}))
    for step in range(1, 21):
        grey(300, 10 * step).save(folder / "samples" / f"{step:06d}.png")
    grey(720, 128).save(folder / "loss.png")
    images = []
    for i in range(2):
        at = [f"{i}-{s:g}.png" for s in VALUES]
        for s, name in zip(VALUES, at):
            grey(32, round(40 * s) + 100 * i).save(folder / "strengths" / name)
        grey(32, 250).save(folder / "strengths" / f"{i}-before.png")
        images.append({"name": NASTY, "before": f"{i}-before.png", "at": at})
    told = {"strengths": VALUES, "images": images}
    (folder / "strengths" / "strengths.json").write_text(json.dumps(told))
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    return folder


def grey(size, level):
    return Image.new("RGB", (size, size), (level,) * 3)


def judge(run, lora=b""):
    """An evaluation of a LoRA file with this content."""
    (run / "evaluation").mkdir()
    one = {"mean": 0.8765, "se": 0.0124, "n": 3}
    kinds = {kind: {"psnr": one, "ssim": one} for kind in ("copy", "predicted", "ceiling")}
    result = {"gap_closed": {"whole": one}, "strengths": {"spearman": one}, "pairs": 3, **kinds}
    result["lora_sha256"] = hashlib.sha256(lora).hexdigest()
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(result))


def sources(page):
    return re.findall(r'<img alt="([^"]*)" src="([^"]*)"( data-at="\d+")?( hidden)?>', page)


def decoded(source):
    head, _, code = source.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(code, validate=True)))


def test_the_page_is_whole_and_alone(run):
    """Every picture is in it and no larger than it is shown; it speaks of no other file or host."""
    page = report.write_report(run).read_text(encoding="utf-8")
    images = sources(page)
    assert len(images) == page.count("<img") == 2 * (len(VALUES) + 1) + 1 + 8
    sizes = {alt.split()[0]: decoded(source).size for alt, source, *_ in images if alt}
    assert sizes["strength"] == sizes["before"] == (32, 32) and sizes["step"] == (300, 300)
    assert [alt for alt, _, _, hidden in images if alt and not hidden] == [
        "before", "strength 1", "before", "strength 1", "step 20"
    ]  # fmt: skip
    at_half = [decoded(src).getpixel((0, 0))[0] for alt, src, *_ in images if alt == "strength 0.5"]
    assert at_half == [20, 120]
    assert not re.findall(r"https?:|[^+/\w]//|@import|url\(|<link|<a |srcset|fetch|XMLHttp", page)
    assert "default-src 'none'" in page and len(page) < 200_000
    assert "Held-out pairs" not in page and "slider" in page


def test_whatever_comes_from_files_is_text(run):
    page = report.write_report(run).read_text(encoding="utf-8")
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<img src=x" not in page and "<i>" not in page
    assert page.count(html.escape(NASTY)) == 3 + 2 + 3  # facts, captions, config
    assert "<title>a &lt;i&gt;run</title>" in page


def test_an_evaluation_of_this_training_is_shown(run):
    judge(run)
    page = report.write_report(run).read_text(encoding="utf-8")
    assert "gap closed (whole)<td>0.876 ± 0.012" in page or "0.877 ± 0.012" in page
    assert "<tr><th>psnr<td>" in page


def test_an_evaluation_of_an_earlier_training_is_not(run):
    judge(run, lora=b"another")
    assert "Held-out pairs" not in report.write_report(run).read_text(encoding="utf-8")


def test_a_run_without_pictures(run):
    for name in ("samples", "strengths"):
        shutil.rmtree(run / name)
    for name in ("loss.png", "summary.json"):
        (run / name).unlink()
    page = report.write_report(run).read_text(encoding="utf-8")
    assert "<img" not in page and "not finished" in page


def test_mistakes_are_one_sentence(tmp_path, run, capsys):
    (network := tmp_path / "unet").mkdir()
    (network / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    for folder, wrong in {
        tmp_path / "none": f"{tmp_path / 'none'} has no config.json",
        network / "config.json": "config.json has no config.json",
        network: f"{network / 'config.json'} is not a training config",
    }.items():
        assert report.main([str(folder)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{wrong}; expected a run's folder" in said
    assert len(list(network.iterdir())) == 1
    (run / "strengths" / "strengths.json").write_text("[1")
    assert report.main([str(run)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "strengths.json is not JSON" in said
    assert not (run / "report.html").exists()


def test_the_command_writes_it(run, capsys):
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


# ---- in a browser --------------------------------------------------------------------------------

PROBE = """<script>
const seen = {errors: [], states: []};
window.addEventListener("error", event => seen.errors.push(event.message));
document.addEventListener("securitypolicyviolation", event => seen.errors.push(event.blockedURI));
</script>"""
MOVE = """<script>
window.addEventListener("load", () => {
  const level = image => {
    const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0);
    return pen.getImageData(1, 1, 1, 1).data[0];
  };
  for (const box of document.querySelectorAll(".slider")) {
    const range = box.querySelector("input"), states = [];
    for (const value of [range.value, ...Array(Number(range.max) + 1).keys()]) {
      range.value = value;
      range.dispatchEvent(new Event("input"));
      const shown = [...box.querySelectorAll("img[data-at]")].filter(i => i.offsetWidth > 0);
      states.push([box.querySelector("output").textContent, shown.map(level)]);
    }
    seen.states.push(states);
  }
  seen.loaded = performance.getEntriesByType("resource").map(e => e.name)
    .filter(name => !name.startsWith("data:"));
  seen.harm = window.harm;
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
});
</script>"""


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs a headless browser: apt-get install chromium (Debian's package)"
)


def look(page, tmp_path, add=""):
    """What the probe saw of the page with `add` in it, and what the browser's console said."""
    assert page.count('<meta charset="utf-8">') == page.count("</html>") == 1
    page = page.replace('<meta charset="utf-8">', '<meta charset="utf-8">' + PROBE)
    probe = tmp_path / "probe.html"
    probe.write_text(page.replace("</html>", add + MOVE + "</html>"), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--disable-background-networking", "--no-first-run", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1]
    return json.loads(html.unescape(seen)), done.stderr


@needs_browser
def test_the_slider_moves_in_a_browser(run, tmp_path):
    """Each value of the slider shows other pixels, those of its strength; no error, no request."""
    seen, console = look(report.write_report(run).read_text(encoding="utf-8"), tmp_path)
    assert seen["errors"] == [] and seen["loaded"] == [] and seen.get("harm") is None
    assert "CONSOLE" not in console
    strength, steps = seen["states"]
    at = [[f"strength {s:g}", [round(40 * s), round(40 * s) + 100]] for s in VALUES]
    assert strength == [at[VALUES.index(1.0)], *at]
    assert [said for said, _ in steps[1:]] == [f"step {k}" for k in (2, 5, 7, 10, 12, 15, 17, 20)]
    assert [levels[0] for _, levels in steps[1:]] == pytest.approx(
        [20, 50, 70, 100, 120, 150, 170, 200], abs=2
    )


@needs_browser
def test_the_page_may_load_nothing(run, tmp_path):
    """An image from elsewhere in it would be stopped by its policy, and seen by the test above."""
    page, elsewhere = report.write_report(run).read_text(encoding="utf-8"), "http://127.0.0.1:9/x"
    seen, console = look(page, tmp_path, f'<img src="{elsewhere}">')
    assert seen["errors"] == [elsewhere] and "CONSOLE" in console


# ---- of a real run -------------------------------------------------------------------------------


def test_evaluate_puts_its_figures_into_the_page(tmp_path, sd1):
    """train.py leaves the page, with pictures at the strengths; evaluate.py writes it again."""
    pairs = write_pairs(tmp_path / "pairs", 4, 32)
    cfg = TrainConfig(
        pretrained_model_name_or_path=str(sd1), before_data_dir=str(pairs / "before"),
        after_data_dir=str(pairs / "after"), instance_prompt="a square", resolution=32,
        lora_rank=2, max_train_steps=2, learning_rate=1e-1, log_every=1, num_validation_images=2,
        output_dir=str(tmp_path / "run"), device="cpu",
    )  # fmt: skip
    folder = train(cfg)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<tr><th>objective<td>delta<tr>" in page  # the default, which config.json leaves open
    images = sources(page)
    values = ["0", "0.25", "0.5", "0.75", "1", "1.25"]
    shown = [alt for alt, *_ in images if alt.startswith("strength")]
    assert shown == 2 * [f"strength {s}" for s in values]
    different = {source for alt, source, *_ in images if alt.startswith("strength")}
    assert len(different) == 12
    truth = Image.open(pairs / "after" / "0.png").convert("RGB").tobytes()
    assert next(decoded(s) for alt, s, *_ in images if alt == "after").tobytes() == truth
    # strength 1 is what the last sheet shows, too
    sheet = Image.open(folder / "samples" / "000002.png")
    cell = sheet.crop((6 + 38, 16, 6 + 38 + 32, 16 + 32))
    assert cell.tobytes() == Image.open(folder / "strengths" / "0-1.png").tobytes()
    assert "Held-out pairs" not in page
    out = folder / "evaluation"
    assert evaluate.main(flags(folder, pairs, out, "--strengths", "0,1")) == 0
    assert "Held-out pairs" in (folder / "report.html").read_text(encoding="utf-8")
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)  # and not the times
    assert "Held-out pairs" in report.write_report(tmp_path / "copy").read_text(encoding="utf-8")

    # another training in the same folder: what was seen and judged of the first is not its own
    train(replace(cfg, overwrite=True, num_validation_images=0, max_train_steps=1))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Held-out pairs" not in page and "strength 1" not in page
    assert not (folder / "strengths").exists()
