"""`python -m medviz compare`: draw a prompt with the baseline and with the aligned model, and measure both."""

from tqdm import tqdm

from medviz.commands.options import add_folder, check_folder, number, parser, score_lines, studio, tell, write_files
from medviz.export.archive import pair_files
from medviz.limits import DEFAULT_STEPS
from medviz.results import Preview


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    command = parser("compare", "Draw a prompt with the baseline and with the aligned model from the same noise.")
    command.add_argument("domain")
    command.add_argument("prompt")
    command.add_argument("--seed", type=number, default=1)
    command.add_argument("--steps", type=number, default=DEFAULT_STEPS)
    command.add_argument("--guidance-scale", type=number, help="default: the one that the models are meant for")
    command.add_argument("--adapter", default="", help="a name, or none for the baseline (default: the domain's own)")
    command.add_argument("--dicom", action="store_true", help="also write DICOM files, to the folder dicom in --out")
    add_folder(command, "images, maps, scores and manifest.json")
    options = command.parse_args(argv)
    if options.dicom and options.out is None:
        command.error("--dicom needs --out")
    check_folder(options.out)
    with tqdm(unit="step", disable=None) as bar:

        def advance(preview: Preview) -> None:
            bar.total = preview.steps
            bar.update(preview.step - bar.n)

        pair = studio(options).compare(
            options.domain,
            options.prompt,
            options.seed,
            options.steps,
            options.guidance_scale,
            options.adapter,
            on_preview=advance,
        )
    written = []
    if options.out is not None:
        written += write_files(options.out, pair_files(pair))
    if options.dicom:
        from medviz.export.dicom_objects import dicom_files

        written += write_files(options.out / "dicom", dicom_files(pair))
    heading = f"{pair.prompt} (seed {pair.seed}, adapter {pair.adapter or 'none'}); scores: baseline, aligned"
    tell(
        options,
        {**pair.report(), "files": written},
        [heading, *score_lines(pair.scores), *pair.warnings, *written],
    )
    return 0
