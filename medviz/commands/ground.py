"""`python -m medviz ground`: locate a phrase in images that are given."""

from pathlib import Path

from medviz.commands.options import add_folder, check_folder, parser, read_images, studio, tell, write_files
from medviz.export.archive import grounding_files


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    command = parser("ground", "Locate a phrase in images (PNG, JPEG, WebP, BMP, TIFF or DICOM files).")
    command.add_argument("domain")
    command.add_argument("phrase")
    command.add_argument("images", nargs="+", type=Path, metavar="image")
    command.add_argument("--adapter", default="", help="a name, or none for the baseline (default: the domain's own)")
    add_folder(command, "overlay, map and report of each image, in folders 01, 02, ...,")
    options = command.parse_args(argv)
    check_folder(options.out)
    models, results, lines = studio(options), [], []
    found = read_images(
        options.images, lambda path: models.ground(options.domain, path, options.phrase, adapter=options.adapter)
    )
    for index, (path, grounding) in enumerate(found, start=1):
        written = []
        if options.out is not None:
            written = write_files(options.out / f"{index:02d}", grounding_files(grounding))
        results.append({"image": str(path), **grounding.report(), "files": written})
        lines += [f"{path}: box {grounding.box or 'none'} (x0, y0, x1, y1 px)", *grounding.warnings, *written]
    tell(options, {"results": results}, lines)
    return 0
