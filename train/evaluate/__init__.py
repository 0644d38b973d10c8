"""What the models are worth: fidelity, alignment, diversity, memorisation, each with n and a 95 % interval."""


def main(arguments: list[str]) -> None:
    """`python -m train evaluate RECIPE [overrides]`."""
    # The report stage imports this package and has no need of torch.
    from train.evaluate.stage import main as evaluate

    evaluate(arguments)
