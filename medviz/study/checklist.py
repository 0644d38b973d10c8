"""The items of CLAIM, and what the study itself answers of them.

CLAIM 2024 update: Tejani et al. 2024, Radiology: Artificial Intelligence 6, e240300. Items are given in short.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AUTHORS = "To be stated by the authors."


@dataclass(frozen=True)
class ChecklistItem:
    """number: of CLAIM 2024. answered: whether the study's own files say it."""

    number: int
    section: str
    item: str
    answer: str
    answered: bool


_ITEMS: tuple[tuple[str, str], ...] = (
    ("Title and abstract", "Identified as a study of AI methodology, with the category of technology"),
    ("Title and abstract", "Summary of design, methods, results and conclusions"),
    ("Introduction", "Scientific and clinical background, intended use and role of the AI"),
    ("Introduction", "Aims, objectives and hypotheses"),
    ("Study design", "Prospective or retrospective"),
    ("Study design", "Study goal"),
    ("Data", "Data sources"),
    ("Data", "Inclusion and exclusion criteria"),
    ("Data", "Data pre-processing"),
    ("Data", "Selection of data subsets"),
    ("Data", "De-identification methods"),
    ("Data", "How missing data were handled"),
    ("Data", "Image acquisition protocol"),
    ("Reference standard", "Definition of the methods used to obtain the reference standard"),
    ("Reference standard", "Rationale for choosing the reference standard"),
    ("Reference standard", "Source of the reference standard annotations"),
    ("Reference standard", "Annotation of the test set"),
    ("Reference standard", "Inter- and intra-rater variability of the annotators"),
    ("Data partitions", "How data were assigned to partitions"),
    ("Data partitions", "Level at which partitions are disjoint"),
    ("Testing data", "Intended sample size"),
    ("Model", "Detailed description of the model"),
    ("Model", "Software libraries, frameworks and packages"),
    ("Model", "Initialization of model parameters"),
    ("Training", "Details of the training approach"),
    ("Training", "Method of selecting the final model"),
    ("Training", "Ensembling techniques"),
    ("Evaluation", "Metrics of model performance"),
    ("Evaluation", "Statistical measures of significance and uncertainty"),
    ("Evaluation", "Robustness or sensitivity analysis"),
    ("Evaluation", "Methods for explainability or interpretability"),
    ("Evaluation", "Evaluation on internal data"),
    ("Evaluation", "Testing on external data"),
    ("Evaluation", "Clinical trial registration"),
    ("Results: data", "Numbers of cases included and excluded"),
    ("Results: data", "Demographic and clinical characteristics of cases in each partition"),
    ("Results: model performance", "Performance metrics and measures of statistical uncertainty"),
    ("Results: model performance", "Estimates of diagnostic performance and their precision"),
    ("Results: model performance", "Failure analysis of incorrect results"),
    ("Discussion", "Study limitations"),
    ("Discussion", "Implications for practice, including intended use or clinical role"),
    ("Other information", "Reference to the full study protocol"),
    ("Other information", "Availability of software, trained model and data"),
    ("Other information", "Sources of funding and other support; role of funders"),
)


def claim_checklist(result: Mapping[str, Any]) -> list[ChecklistItem]:
    """The 44 items with what an analysis (see `medviz.study.statistics.analyse`) answers of them."""
    study, packages = result["study"], result["packages"]
    strata = ", ".join(f"{name} ({count})" for name, count in study["strata"].items())
    software = ", ".join([f"medviz {result['medviz']}", *(f"{name} {number}" for name, number in packages.items())])
    readers = ", ".join(
        f"{name}: {reader['specialty']}, {reader['years']:g} years" for name, reader in result["readers"].items()
    )
    answers = {
        1: "Reader study of images synthesized by text-conditioned latent diffusion models.",
        4: "Whether the aligned model's images match their prompts better than the baseline's, whether readers tell "
        "either from real images, and whether rated quality is equivalent.",
        5: "Prospective reading of synthetic images under a protocol that was frozen before the first reader.",
        6: "Comparison of two models by blinded readers.",
        9: f"Every image is shown as an RGB PNG of {study['size_px']} px without metadata; real images are cut to "
        "their central square.",
        10: f"Prompts balanced over {len(study['strata'])} strata: {strata}.",
        12: "Figures by the method of Obuchowski and Rockette rest on readers who completed a phase; the mixed model "
        "takes every answer. Practice is left out.",
        14: "Real or synthetic: known by construction. Match to the prompt and quality: the readers' own judgement.",
        17: f"Readers: {readers}.",
        18: "Weighted kappa of hidden repeats; Krippendorff's alpha, Fleiss' kappa and intraclass correlation between "
        "readers. See Agreement.",
        21: f"{study['cases']} cases and {study['real_images']} real images; power by `python -m medviz study plan`.",
        23: software + ".",
        28: "Preference score; AUC, sensitivity, specificity and balanced accuracy of detection; mean quality rating.",
        29: "95 % intervals with readers and cases random; two one-sided tests for equivalence. See Methods.",
        35: f"{study['cases']} cases, {study['real_images']} real images, {study['practice_cases']} practice cases "
        f"left out, {len(result['readers'])} readers.",
        37: "See Results.",
        40: "See Limits.",
        42: f"Protocol with sha256 {study['protocol_sha256']}.",
    }
    return [
        ChecklistItem(number, section, item, answers.get(number, AUTHORS), number in answers)
        for number, (section, item) in enumerate(_ITEMS, 1)
    ]
