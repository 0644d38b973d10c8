"""Preference by a linear mixed model with crossed random effects of reader and case, fitted by REML (statsmodels)."""

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scipy import stats

from medviz.study.mrmc import LEVEL, SHARE, Estimate

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class MixedModel:
    """score = mean + reader + case + residual. The variances are of the three random terms."""

    estimate: Estimate
    reader_variance: float
    case_variance: float
    residual_variance: float
    answers: int


def fit_mean(table: "pd.DataFrame", level: float = LEVEL, limits: tuple[float, float] = SHARE) -> MixedModel | None:
    """Fit the mean of `score`, within `limits`, with crossed effects of `reader` and `case`; readers may have gaps.

    Degrees of freedom are those of `medviz.study.mrmc` written in variance components, so that in a complete study
    the interval is the one of Obuchowski and Rockette. Few readers thus give few degrees of freedom, where the model's
    own normal interval would be too narrow. None with fewer than two readers or cases, or where all scores agree.
    """
    from statsmodels.regression.mixed_linear_model import MixedLM
    from statsmodels.tools.sm_exceptions import ConvergenceWarning, SingularMatrixWarning

    readers, cases = table["reader"].nunique(), table["case"].nunique()
    if readers < 2 or cases < 2 or table["score"].nunique() < 2:
        return None
    model = MixedLM.from_formula(
        "score ~ 1",
        groups=[0] * len(table),
        vc_formula={"case": "0 + C(case)", "reader": "0 + C(reader)"},
        data=table,
    )
    with warnings.catch_warnings():
        # A component of zero lies on the boundary; that is an answer, not a failure.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", SingularMatrixWarning)
        fit = model.fit(reml=True, method="lbfgs")
    component = dict(zip(model.exog_vc.names, map(float, fit.vcomp), strict=True))
    count = len(table)
    of_reader = component["reader"] * float(((table["reader"].value_counts() / count) ** 2).sum())
    of_case = component["case"] * float(((table["case"].value_counts() / count) ** 2).sum())
    of_rest = float(fit.scale) / count
    variance = of_reader + of_case + of_rest
    df = variance**2 / ((of_reader + of_rest) ** 2 / (readers - 1))
    value, error = float(fit.fe_params.iloc[0]), float(fit.bse_fe.iloc[0])
    half = float(stats.t.ppf((1 + level) / 2, df)) * error if error > 0 else math.nan
    return MixedModel(
        Estimate(value, error, df, max(value - half, limits[0]), min(value + half, limits[1]), readers, cases),
        component["reader"],
        component["case"],
        float(fit.scale),
        count,
    )
