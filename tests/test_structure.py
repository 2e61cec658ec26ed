"""Who may import whom, what an import does, and whether the README's names are real."""

import ast
import contextlib
import io
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import ablate
import bench.__main__
import bench.scale
import check_data
import hub
import sample
import train
from model import lora_convert

ROOT = Path(__file__).parents[1]

# Module -> the modules of this project that it may import. "*": the library.
ARROWS = {
    "knobs": [],
    "config": ["knobs"],
    "config_check": ["config", "knobs"],
    "durable": [],
    "cli": ["config", "config_check", "durable", "knobs"],
    "pairing.values": [],
    "pairing.images": ["pairing.values"],
    "pairing.colours": ["pairing.images"],
    "pairing.darkness": ["pairing.images", "pairing.values"],
    "pairing.on_map": ["pairing.images"],
    "pairing.masks": ["pairing.images", "pairing.values"],
    "pairing.sheet": [],
    "progress": [],
    "pairing.holes": ["pairing.images", "pairing.values"],
    "pairing.warping": [],
    "pairing.registration": ["pairing.warping"],
    "pairing.aligning": ["pairing.holes", "pairing.registration", "pairing.warping"],
    "pairing.names": ["pairing.images"],
    "pairing.folders": ["pairing.images"],
    "pairing.pairs": ["pairing.folders", "pairing.images", "pairing.names"],
    "pairing.hashes": ["durable", "pairing.images", "pairing.pairs"],
    "pairing.sequences": ["pairing.folders", "pairing.images", "pairing.pairs"],
    "pairing.checking": [
        "pairing.darkness", "pairing.folders", "pairing.holes", "pairing.images", "pairing.masks",
        "pairing.names", "pairing.on_map", "pairing.pairs", "pairing.registration",
        "pairing.sequences", "progress",
    ],
    "data": [
        "pairing.aligning", "pairing.colours", "pairing.hashes", "pairing.holes",
        "pairing.images", "pairing.masks", "pairing.pairs", "pairing.registration",
        "pairing.warping",
    ],
    "reporting.md": [],
    "reporting.evaluation": ["durable", "pairing.sheet", "reporting.md"],
    "training.stop": [],
    "training.trackers": ["durable"],
    "revision": [],
    "reporting.curve": [],
    "runs": ["durable", "pairing.images", "revision", "reporting.curve"],
    "model.schedule": [],
    "model.fused_kernel": [],
    "model.fused": ["model.fused_kernel"],
    "model.lora_targets": [],
    "model.lora": ["model.fused", "model.lora_targets"],
    "model.cpu": [],
    "model.layers": ["model.cpu"],
    "model.text": [],
    "model.memory": ["model.layers"],
    "training.ranks": ["durable", "model.memory"],
    "model.graph": ["model.layers", "model.memory"],
    "model.frozen": ["model.cpu"],
    "model.contents": [],
    "model.files": ["durable", "model.contents"],
    "model.detail": [],
    "model.draws": [],
    "reporting.measures": [],
    "reporting.held_out": [
        "durable", "pairing.hashes", "pairing.images", "pairing.pairs", "pairing.registration",
    ],
    "reporting.judging": ["pairing.images", "pairing.registration", "reporting.measures"],
    "model.optim": [],
    "training.rows": ["model.memory", "pairing.images"],
    "training.latents": ["data", "progress", "model.draws", "pairing.images", "training.rows"],
    "report": [
        "cli", "config_check", "durable", "runs", "pairing.images", "reporting.evaluation",
        "reporting.md",
    ],
    "model.unet": ["model.layers"],
    "model.vae": ["model.layers"],
    "model.samplers": ["model.schedule"],
    "model.objectives": ["model.samplers", "model.schedule"],
    "model.lora_algebra": ["model.lora"],
    "model.original": [],
    "model.lora_layouts": ["model.contents", "model.lora", "model.original"],
    "model.lora_files": [
        "durable", "model.contents", "model.lora", "model.lora_layouts", "model.objectives",
        "model.text",
    ],
    "model.single_file": ["durable", "model.contents", "model.original"],
    "model.strict": ["model.contents"],
    "model.text_weights": [
        "durable", "model.contents", "model.files", "model.single_file", "model.strict",
        "model.text",
    ],
    "model.weights": [
        "durable", "model.files", "model.lora_files", "model.single_file", "model.strict",
        "model.text_weights", "model.unet", "model.vae",
    ],
    "model.lora_convert": [
        "cli", "durable", "model.files", "model.lora", "model.lora_algebra",
        "model.lora_files", "model.lora_layouts", "model.objectives", "model.weights",
    ],
    "model.weighting": ["model.objectives"],
    "model.tiles": ["model.objectives"],
    "model.predict": ["model.lora", "model.objectives", "model.text", "model.unet"],
    "model.pipeline": [
        "model.cpu", "model.files", "model.fused", "model.graph", "model.lora_files",
        "model.objectives", "model.predict", "model.samplers", "model.schedule",
        "model.text", "model.tiles", "model.unet", "model.vae", "model.weights",
    ],
    "model.plan": ["model.lora", "model.memory", "model.objectives", "model.weighting"],
    "model.morph": [
        "progress", "model.draws", "model.lora", "model.memory", "model.objectives",
        "model.optim", "model.pipeline", "model.predict", "model.samplers",
        "model.schedule",
    ],
    "training.inputs": [
        "config", "data", "model.memory", "model.vae", "pairing.folders", "pairing.images",
        "pairing.names", "pairing.pairs", "pairing.sequences", "training.latents", "training.rows",
    ],
    "training.doubts": [
        "config", "data", "model.unet", "pairing.darkness", "pairing.folders", "pairing.holes",
        "pairing.images", "pairing.masks", "pairing.pairs", "pairing.registration",
        "pairing.sequences", "training.inputs",
    ],
    "training.class_images": [
        "config", "durable", "progress", "model.memory", "model.pipeline", "pairing.folders",
        "pairing.images", "pairing.pairs",
    ],
    "training.journal": [
        "progress", "runs", "model.draws", "model.memory", "model.objectives", "pairing.images",
        "pairing.pairs", "training.inputs", "training.ranks",
    ],
    "editing.config": ["knobs", "model.objectives", "model.pipeline", "pairing.images"],
    "editing.framing": [
        "data", "editing.config", "model.memory", "model.objectives", "model.pipeline",
        "model.tiles", "pairing.images",
    ],
    "editing.inputs": [
        "pairing.colours", "pairing.darkness", "pairing.folders", "pairing.holes", "pairing.images",
        "pairing.masks", "pairing.pairs", "pairing.registration",
    ],
    "editing.edits": [
        "editing.config", "editing.framing", "model.detail", "model.memory", "model.objectives",
        "model.pipeline", "model.predict", "model.tiles",
    ],
    "editing.flags": [
        "cli", "durable", "editing.config", "knobs", "model.contents", "model.files",
        "model.memory", "model.objectives", "model.pipeline",
    ],
    "editing.ends": [
        "pairing.aligning", "pairing.colours", "pairing.darkness", "pairing.holes",
        "pairing.images", "pairing.registration", "pairing.warping",
    ],
    "editing.between": [
        "durable", "editing.config", "editing.edits", "editing.ends", "editing.flags",
        "editing.framing", "editing.inputs", "knobs", "model.lora_files", "model.morph",
        "model.objectives", "model.pipeline", "model.predict", "model.samplers", "pairing.colours",
        "pairing.holes", "pairing.images", "pairing.sheet", "progress", "reporting.measures",
    ],
    "training.checkpoint": [
        "config", "durable", "model.contents", "model.files", "model.lora", "model.lora_files",
        "model.objectives",
    ],
    "training.adapting": [
        "config", "durable", "model.draws", "model.lora", "model.lora_algebra", "model.lora_files",
        "model.lora_targets", "model.memory", "model.objectives", "model.optim", "model.text",
        "model.unet", "training.checkpoint",
    ],
    "training.prompts": [
        "config", "data", "model.draws", "model.lora", "model.lora_files", "model.pipeline",
        "model.predict", "model.text", "model.weights", "training.adapting",
        "training.latents", "training.rows",
    ],
    "training.session": [
        "config", "durable", "runs", "model.fused", "model.memory", "model.pipeline",
        "pairing.folders", "training.ranks", "training.trackers",
    ],
    "training.gather": [
        "config", "data", "runs", "model.files", "model.objectives", "model.schedule",
        "model.weights", "pairing.hashes", "pairing.pairs", "training.adapting",
        "training.checkpoint", "training.class_images", "training.doubts", "training.inputs",
        "training.prompts", "training.ranks", "training.session",
    ],
    "reporting.hub_card": [
        "knobs", "model.contents", "model.files", "model.lora_files", "model.objectives",
        "reporting.md",
    ],
    "hub": [
        "cli", "config", "durable", "progress", "report", "model.files", "model.lora_files",
        "model.lora_layouts", "reporting.hub_card",
    ],
    "training.watching": [
        "data", "durable", "runs", "model.detail", "model.draws", "model.memory",
        "model.objectives", "model.pipeline", "model.predict", "model.unet", "model.vae",
        "pairing.images", "pairing.pairs", "pairing.sheet", "training.latents",
    ],
    "training.fitting": [
        "config", "model.graph", "model.memory", "model.objectives", "model.optim", "model.plan",
        "model.predict", "model.vae", "training.adapting", "training.inputs",
        "training.prompts", "training.watching",
    ],
    "check_data": [
        "cli", "config", "durable", "knobs", "pairing.checking", "pairing.folders",
        "pairing.images", "pairing.names", "pairing.pairs", "pairing.sequences", "pairing.sheet",
    ],
    "sample": ["*"],
    "train": ["*"],
    "evaluate": ["*"],
    "ablating.comparison": [
        "pairing.sheet", "reporting.judging", "reporting.md", "reporting.measures",
    ],
    "ablating.arms": ["cli", "evaluate"],
    "ablating.jobs": [
        "cli", "config", "data", "durable", "evaluate", "ablating.arms", "ablating.comparison",
        "model.files", "model.lora_files", "model.schedule", "model.weights", "pairing.hashes",
        "pairing.pairs", "reporting.held_out", "reporting.judging", "reporting.measures",
        "revision", "training.inputs", "training.session",
    ],
    "ablate": [
        "cli", "config", "durable", "evaluate", "ablating.arms", "ablating.comparison",
        "ablating.jobs", "pairing.images", "reporting.held_out",
    ],
}  # fmt: skip
ROOTS = ("check_data", "hub", "sample", "train", "evaluate", "ablate")  # what a user starts
FOLDERS = ("scenes", "bench", "docs", "tests")  # on top of all: nothing outside them imports them
LIBRARIES = {  # beyond the standard library
    "knobs": set(),
    "config": set(),
    "config_check": set(),
    "pairing.values": {"numpy", "PIL"},
    "pairing.images": {"torch", "numpy", "PIL"},
    "pairing.names": set(),
    "pairing.pairs": set(),
    "data": {"torch", "numpy", "PIL"},
}
REFERENCES = ("diffusers", "peft", "accelerate")


def project_files() -> list[Path]:
    """What belongs to the project: what git knows or would take, else all that is not hidden."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode()
        files = [ROOT / name for name in names.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        ignored = ("runs", "data", "samples")
        files = [p for p in ROOT.rglob("*") if p.relative_to(ROOT).parts[0] not in ignored]
        files = [p for p in files if not any(x[0] == "." for x in p.relative_to(ROOT).parts)]
    return sorted(p for p in files if p.is_file())


FILES = project_files()
SOURCES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in FILES
    if p.suffix == ".py"
}
LIBRARY = [
    name
    for name, path in SOURCES.items()
    if path.name != "__init__.py" and name.split(".")[0] not in FOLDERS
]


def imports(path: Path) -> set[str]:
    """Every module that a file imports at any place, names of packages' modules spelled out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys()
            found |= inside or {node.module}
    return found


def siblings(name: str) -> set[str]:
    tops = {module.split(".")[0] for module in SOURCES}
    return {module for module in imports(SOURCES[name]) if module.split(".")[0] in tops}


def test_imports_go_along_the_arrows():
    """Every module stands in the table, and imports what the table lets it."""
    assert set(LIBRARY) <= ARROWS.keys()
    order = list(ARROWS)
    for name in LIBRARY:
        above = [m for m in order[: order.index(name)] if m not in ("check_data", "train")]
        allowed = above if ARROWS[name] == ["*"] else ARROWS[name]
        assert siblings(name) <= set(allowed), name


def test_the_arrows_have_no_circle():
    """The table only points upwards, so that no chain of imports comes back."""
    for i, (name, allowed) in enumerate(ARROWS.items()):
        assert set(allowed) - {"*"} <= set(list(ARROWS)[:i]), name


def test_only_roots_import_the_config():
    """Library code takes plain arguments; the others are parts of train."""
    parts = {"inputs", "doubts", "class_images", "gather", "checkpoint", "adapting", "prompts",
             "fitting", "session"}  # fmt: skip
    parts = {f"training.{name}" for name in parts}
    assert {name for name in LIBRARY if "config" in siblings(name)} <= {
        *ROOTS, *parts, "cli", "config_check", "ablating.jobs",
    }  # fmt: skip


def test_libraries():
    """The config needs nothing, data no more than arrays and pictures, and no file a reference."""
    for name in LIBRARY:
        outside = {m.split(".")[0] for m in imports(SOURCES[name]) - siblings(name)}
        outside -= set(sys.stdlib_module_names)
        assert outside <= LIBRARIES.get(name, outside), name
    for name, path in SOURCES.items():
        used = {module.split(".")[0] for module in imports(path)}
        assert name.split(".")[0] in ("tests", "bench") or not used & set(REFERENCES), name


IMPORTING = """
import importlib, os, sys
sys.dont_write_bytecode = True
sys.modules |= dict.fromkeys(sys.argv[2].split(","))
import torch
from torch._functorch import config as functorch
torch.manual_seed(7)

def state():
    return (torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
            torch.cuda.is_initialized(), torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(), functorch.get_config_copy(), os.getcwd(), sorted(os.listdir()),
            {k: v for k, v in os.environ.items() if not k.startswith("TORCH")})

for name in sys.argv[1].split(","):
    before = state()
    importlib.import_module(name)
    for was, now in zip(before, state()):
        assert was == now, (name, was, now)
    # takes a second or two, before --help and a mistake too
    if not name.startswith("scenes"):
        assert not {"torch._dynamo", "transformers"} & sys.modules.keys(), name
"""


def test_importing_does_nothing(tmp_path):
    """No output, no seeding, no setting, no device, no file; the references are not there. What is
    slow to import is left to those who use it."""
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    names = [*LIBRARY, *(name for name in SOURCES if name.startswith("scenes"))]
    if not find_spec("triton"):  # torch for a CPU lacks it
        names.remove("model.fused_kernel")
    argv = [sys.executable, "-c", IMPORTING, ",".join(names), ",".join(REFERENCES)]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---- text ----------------------------------------------------------------------------------------


def texts() -> dict[str, str]:
    """The project's text files by relative path."""
    found = {}
    for path in FILES:
        with contextlib.suppress(UnicodeDecodeError):
            found[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    return found


def test_no_line_of_code_over_100_columns():
    """A word to the linter at its end is not counted."""
    long = [
        f"{name}:{i}"
        for name, text in texts().items()
        if name.endswith(".py")
        for i, line in enumerate(text.splitlines(), 1)
        if len(re.sub(r" *# (noqa|fmt):.*$", "", line)) > 100
    ]
    assert not long


def test_no_path_of_one_machine():
    """Outside the tests, where such paths are data."""
    pattern = re.compile(r"(?<![\w.~*}/-])/(?:work|tmp|root|home|mnt|Users)\b")
    assert pattern.search("in /tmp/x") and not pattern.search("https://x.org/work and a/tmp")
    said = {name: pattern.findall(text) for name, text in texts().items() if name[:6] != "tests/"}
    assert {name for name, found in said.items() if found} == set()


GUIDES = [page for page in (ROOT / "docs").glob("*[!N].md") if page.name != "flags.md"]  # English
README = "\n".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *GUIDES])
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
VERBS = re.search(r"^\.PHONY: (.+)$", MAKEFILE, re.M)[1].split()


def test_make_alone_lists_every_verb():
    """Each .PHONY verb with a line of its own, and nothing is made."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    done = subprocess.run([make], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"^  make ([a-z-]+) +\S", done.stdout, re.M)[: len(VERBS)] == VERBS


def test_the_readmes_make_verbs_and_variables_exist():
    spoken = re.findall(r"(?:^    |`)make ([a-z-]+)(.*)$", README, re.M)
    assert len(spoken) > 3 and {verb for verb, _ in spoken} <= set(VERBS)
    variables = {name for _, rest in spoken for name in re.findall(r"\b([A-Z]+)=", rest)}
    variables |= set(re.findall(r"`([A-Z]+)=", README))
    assert {
        v for v in variables if not re.search(rf"\$[({{]?{v}\b|^{v}\b", MAKEFILE, re.M)
    } == set()


def test_the_readmes_files_exist():
    """Names in the text; what a run leaves is no file of the project."""
    named = set(re.findall(r"`((?:\w+/)*\w+\.(?:py|toml|md))`", README))
    assert named and [name for name in named if not (ROOT / name).exists()] == []
    modules = {f"{path}" for path in re.findall(r"python ((?:\w+/)*\w+\.py)", README)}
    assert modules and [name for name in modules if not (ROOT / name).exists()] == []


def flags(main, *command: str) -> set[str]:
    """What a program's --help lists."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    return set(re.findall(r"--[a-zA-Z]\w*(?:-\w+)*", out.getvalue()))


def test_the_readmes_flags_exist():
    """Those of a command are flags of its program; those in the text are flags of some program."""
    known = {
        "train.py": flags(train.main),
        "sample.py generate": flags(sample.main, "generate"),
        **{f"sample.py {name}": flags(sample.main, name) for name in ("edit", "sweep", "morph")},
        "check_data.py": flags(check_data.main),
        "ablate.py": flags(ablate.main),
        "hub.py": flags(hub.main),
        "-m bench.scale": flags(bench.scale.main),
        "-m bench": flags(bench.__main__.main),
        **{f"-m model.weights {one}": flags(lora_convert.main, one)
            for one in ("convert", "concat", "merge")},
        "torchrun": {name for act in get_args_parser()._actions for name in act.option_strings},
    }  # fmt: skip
    seen = set()
    commands = re.findall(
        r"python (-m model\.weights[^\n`]*|\w+\.py[^\n`]*)", README.replace("\\\n", " ")
    )
    for line in commands:
        name = next((name for name in known if line.startswith(name)), None)
        if name is None:
            continue
        seen.add(name)
        assert set(re.findall(r"(?<!\S)--\w+", line)) <= known[name], line
    assert {"train.py", "sample.py edit"} <= seen
    spoken = set(re.findall(r"(?<![\w-])--[a-z]\w+(?:-\w+)*", README))
    assert spoken - set().union(*known.values()) == set()
