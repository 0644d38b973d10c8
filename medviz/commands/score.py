"""`python -m medviz score`: score how well images that are given show a prompt."""

from pathlib import Path

from medviz.commands.options import parser, read_images, score_lines, studio, tell
from medviz.results import single_scores


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    command = parser("score", "Score how well images show a prompt, by the training reward and by the held-out judge.")
    command.add_argument("domain")
    command.add_argument("prompt")
    command.add_argument("images", nargs="+", type=Path, metavar="image")
    options = command.parse_args(argv)
    models, results, lines = studio(options), [], []
    found = read_images(options.images, lambda path: models.score(options.domain, path, options.prompt))
    for path, scores in found:
        results.append({"image": str(path), "scores": single_scores(scores)})
        lines += [str(path), *score_lines(scores)]
    tell(options, {"results": results}, lines)
    return 0
