"""What a chest X-ray may show: the words of each finding and the head that is read for it."""

NO_FINDING = "no finding"

# choice: (head, synonyms)
FINDINGS: dict[str, tuple[str, str]] = {
    NO_FINDING: (
        "normal",
        "normal;normal lungs;normal chest;clear lung;lungs are clear;healthy;unremarkable;no acute finding;"
        "no abnormal finding;no abnormality;no pathology;no acute disease;no acute cardiopulmonary disease;"
        "no acute cardiopulmonary abnormality;without finding;without abnormality;no disease;no significant finding",
    ),
    "pneumonia": ("pneumonia", "pneumonic;pneumonitis;lung infection;chest infection"),
    "bacterial pneumonia": ("bacterial_pneumonia", "bacterial;bacteria;bacterial lung infection"),
    "viral pneumonia": ("viral_pneumonia", "viral;virus;viral lung infection"),
    "COVID-19": ("covid_19", "covid;covid 19 pneumonia;covid pneumonia;sars cov 2;coronavirus;corona virus"),
    "edema": ("edema", "oedema;pulmonary edema;pulmonary oedema;lung edema"),
    "cardiomegaly": ("cardiomegaly", "enlarged heart;large heart;enlarged cardiac silhouette"),
    "atelectasis": ("atelectasis", "atelectatic;atelectases;collapse;lung collapse"),
    "pleural effusion": ("effusion", "effusion;pleural fluid"),
    "lung opacity": (
        "opacity",
        "opacity;infiltration;infiltrate;consolidation;opacification;airspace opacity;airspace disease;"
        "ground glass opacity;ground glass;shadowing;patchy opacity",
    ),
}
# Findings of the whole image; the others may be given a place in a lung and come last in a prompt, beside it.
UNPLACED = (NO_FINDING, "edema", "cardiomegaly")
CAUSES = ("bacterial pneumonia", "viral pneumonia")
