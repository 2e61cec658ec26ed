"""The held-out pairs that a LoRA is judged by: which images, and whether they are fit for it."""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

from durable import read_or_empty
from pairing.hashes import fingerprint
from pairing.images import by, image_size
from pairing.pairs import SIDES, Pair, find_pairs
from pairing.registration import MAX_ASPECT, aspect_gap


class HeldOut(NamedTuple):
    pairs: list[Pair]
    between: list[list[Pair]]  # for each of --between_times
    outcomes: list[list[Pair]]  # for each of --outcome_dirs

    def fingerprint(self) -> str:
        """One hash of all images that the LoRA is judged by."""
        return fingerprint([pair for some in (self.pairs, *self.between, *self.outcomes)
                            for pair in some])  # fmt: skip


def find_held_out(args: argparse.Namespace) -> HeldOut:
    """Errors as in `find_pairs`; ValueError too for one folder given twice."""
    for flags, some in (
        ("--after_data_dir and --outcome_dirs", [args.after_data_dir, *args.outcome_dirs]),
        ("--between_dirs", args.between_dirs),
    ):
        if len({os.path.realpath(folder) for folder in some}) < len(some):
            raise ValueError(f"two folders of {flags} are the same; expected one for each truth")

    def found(flag: str, folder: str, mask_dir: str | None = None) -> list[Pair]:
        flags = SIDES[0], flag
        return find_pairs(
            args.before_data_dir, folder, mask_dir=mask_dir, allow_unmatched=None, flags=flags
        )

    return HeldOut(
        found(SIDES[1], args.after_data_dir, args.mask_dir),
        [found("--between_dirs", folder) for folder in args.between_dirs],
        [found("--outcome_dirs", folder) for folder in args.outcome_dirs],
    )


def training_images(lora: str) -> set[str]:
    """The `image_hashes` of the pairs this LoRA was trained on, if its run's folder has them."""
    folder = Path(lora) if Path(lora).is_dir() else Path(lora).parent
    if not (folder / "revision.json").exists():
        folder = folder.parent  # of a checkpoint
    hashes = read_or_empty(folder / "revision.json").get("images")
    return {one for one in hashes if isinstance(one, str)} if isinstance(hashes, list) else set()


def same_ground(pairs: list[Pair], others: list[Pair], native_scale: bool) -> None:
    """ValueError if a truth, cropped for itself, would not show what the after image shows."""
    for pair, other in zip(pairs, others):
        own, its = image_size(pair.after), image_size(other.after)
        if (native_scale and own != its) or aspect_gap(own, its) > MAX_ASPECT:
            raise ValueError(f"{other.after} is {by(its)}, but {pair.after} is {by(own)}")
