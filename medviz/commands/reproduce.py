"""`python -m medviz reproduce`: draw a pair again from its manifest and compare every pixel."""

import argparse
from pathlib import Path

from medviz.commands.options import add_folder, check_folder, parser, studio, tell, write_files
from medviz.export.archive import pair_files
from medviz.export.reproduction import Manifest, compared, read_manifest

MAX_THREADS = 1024


def main(argv: list[str]) -> int:
    """Run the command; returns 0 where both images have the recorded pixels, 1 where they differ."""
    command = parser("reproduce", "Draw a pair again from its manifest; where pixels differ, say what else does.")
    command.add_argument("manifest", type=Path, help="manifest.json, or the ZIP archive that holds it")
    add_folder(command, "the pair")
    options = command.parse_args(argv)
    check_folder(options.out)
    recorded = read_manifest(options.manifest)
    _set_up(options, recorded)
    pair = studio(options).compare(**vars(recorded.request))
    files = pair_files(pair)
    written = write_files(options.out, files) if options.out is not None else []
    found = compared(recorded, pair, files)
    lines = ["identical pixels" if found.identical else f"pixels differ: {', '.join(found.pictures)}"]
    if found.maps:
        lines.append(f"attention maps differ: {', '.join(found.maps)}")
    if found.pictures or found.maps:
        lines += [*found.models, *found.sampling, *found.versions]
    tell(options, {"identical": found.identical, **vars(found), "files": written}, [*lines, *written])
    return 0 if found.identical else 1


def _set_up(options: argparse.Namespace, recorded: Manifest) -> None:
    """Compute on as many threads as the manifest names, and on the CPU if it did: both decide how sums are rounded."""
    import torch

    threads = recorded.sampling.get("threads")
    if isinstance(threads, int) and 1 <= threads <= MAX_THREADS:
        torch.set_num_threads(threads)
    if options.device is None and recorded.sampling.get("device") == "cpu":
        options.device = "cpu"
