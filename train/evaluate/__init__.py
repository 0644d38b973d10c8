"""What the models are worth: fidelity, alignment, diversity, memorisation, each with n and a 95 % interval.

And, as `evaluate grounding`, where phrases look in real images; as `evaluate placement`, whether a finding is drawn
where the prompt puts it; as `evaluate audit`, what the instruments that judge all this answer to.
"""


def main(arguments: list[str]) -> None:
    """`python -m train evaluate [grounding | placement | audit] RECIPE [overrides]`."""
    # The report stage imports this package and has no need of torch.
    if arguments and arguments[0] == "grounding":
        from train.evaluate.grounding.stage import main as evaluate_grounding

        evaluate_grounding(arguments[1:])
        return
    if arguments and arguments[0] == "placement":
        from train.evaluate.placement import main as evaluate_placement

        evaluate_placement(arguments[1:])
        return
    if arguments and arguments[0] == "audit":
        from train.evaluate.audit.stage import main as evaluate_audit

        evaluate_audit(arguments[1:])
        return
    from train.evaluate.stage import main as evaluate

    evaluate(arguments)
