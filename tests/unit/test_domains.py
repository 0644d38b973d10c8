"""What every domain promises, whatever it is about."""

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medviz.domains import DOMAINS, NOT_STATED, Domain, Field, get_domain
from medviz.domains.base import CAPTION_TOKENS, count_tokens
from medviz.errors import InputError

every_domain = pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)


def menu_choices(domain: Domain) -> st.SearchStrategy[dict]:
    """Any choices a person could make in the menus, contradictory ones included."""

    def of(field: Field) -> st.SearchStrategy:
        if field.multiple:
            return st.lists(st.sampled_from(field.choices), unique=True, max_size=3).map(tuple)
        return st.sampled_from(field.choices)

    return st.fixed_dictionaries({}, optional={field.name: of(field) for field in domain.fields})


def stated(domain: Domain, values: dict) -> dict[str, tuple[str, ...]]:
    return domain.checked(values)


def test_both_domains_are_found_and_named() -> None:
    assert set(DOMAINS) >= {"dermatology", "radiology"}
    assert all(get_domain(name) is domain for name, domain in DOMAINS.items())


@pytest.mark.parametrize("name", ["", "Dermatology", "../radiology", None, 3])
def test_an_unknown_domain_is_refused_with_the_allowed_ones(name: object) -> None:
    with pytest.raises(InputError, match="dermatology, radiology"):
        get_domain(name)  # type: ignore[arg-type]


def test_domains_need_no_heavy_library() -> None:
    code = (
        "import sys, medviz.domains; print([m for m in ('torch', 'numpy', 'diffusers', 'gradio') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


@every_domain
def test_names_are_unique_and_defaults_are_choices(domain: Domain) -> None:
    for things in (domain.fields, domain.heads, domain.regions):
        names = [thing.name for thing in things]
        assert len(set(names)) == len(names)
    for field in domain.fields:
        defaults = field.default if field.multiple else (field.default,)
        assert set(defaults) <= set(field.choices)
        assert (NOT_STATED in field.choices) is not field.multiple


@every_domain
@given(text=st.text("aZno,.;:()[]-/'\"\\ \t\n\x00059ß²½ﬁŉ٣中🙂\u0301\u200b\ud800", max_size=80))
@settings(max_examples=60, deadline=None)
def test_any_text_parses(domain: Domain, text: str) -> None:
    parsed = domain.parse(text)
    assert parsed.prompt == text
    assert all(word in text for word in (*parsed.words, *parsed.unknown_words))


@every_domain
@given(choose=st.data())
@settings(max_examples=60, deadline=None)
def test_any_order_of_the_vocabulary_parses_to_real_choices(domain: Domain, choose: st.DataObject) -> None:
    glue = [
        "no",
        "without",
        "or",
        "and",
        ",",
        "with",
        "not",
        "free",
        "(",
        "?!",
        "-",
        "55",
        "year",
        "old",
        "\n",
        "ß",
        "²",
    ]
    words = choose.draw(st.lists(st.sampled_from([*domain.lexicon.phrases, *glue]), max_size=12))
    parsed = domain.parse(" ".join(words))
    choices = {field.name: field.choices for field in domain.fields}
    assert all(set(found) <= set(choices[field]) for field, found in parsed.values.items())
    assert set(parsed.targets) <= {head.name for head in domain.heads}
    assert set(parsed.targets.values()) <= {0.0, 1.0}


@every_domain
@given(choose=st.data())
@settings(max_examples=60, deadline=None)
def test_a_built_prompt_parses_back_to_its_choices(domain: Domain, choose: st.DataObject) -> None:
    values = choose.draw(menu_choices(domain))
    try:
        prompt = domain.build_prompt(values)
    except InputError:
        return
    parsed = domain.parse(prompt)
    assert parsed.unknown_words == ()
    for field, chosen in stated(domain, values).items():
        if field != "location":
            assert set(parsed.values[field]) == set(chosen)
    assert domain.build_prompt(parsed.values) == prompt


@every_domain
def test_building_refuses_what_the_menus_do_not_hold(domain: Domain) -> None:
    field = domain.fields[0]
    with pytest.raises(InputError, match="unknown field 'colour'"):
        domain.build_prompt({"colour": "red"})
    with pytest.raises(InputError, match=field.choices[1]):
        domain.build_prompt({field.name: "unheard of"})
    with pytest.raises(InputError, match="takes one choice"):
        domain.build_prompt({field.name: field.choices[1:3]})


@every_domain
def test_not_stated_and_empty_choices_leave_the_bare_prompt(domain: Domain) -> None:
    bare = domain.build_prompt({})
    assert domain.build_prompt({field.name: field.default for field in domain.fields}) == bare
    assert domain.build_prompt({field.name: "" for field in domain.fields}) == bare
    assert domain.parse(bare).targets == {}


@every_domain
def test_every_head_has_a_prompt_that_asks_for_it(domain: Domain) -> None:
    for head in domain.heads:
        assert domain.parse(domain.head_prompt(head.name)).targets[head.name] == 1.0
    with pytest.raises(InputError, match="unknown head 'colour'"):
        domain.head_prompt("colour")


@every_domain
def test_a_contrast_of_a_heads_own_prompt_asks_for_it_and_then_no_longer(domain: Domain) -> None:
    for head in domain.heads:
        pair = domain.contrast(domain.head_prompt(head.name), (head.name,))
        assert pair is not None
        assert pair[0] == domain.head_prompt(head.name)
        assert domain.parse(pair[1]).targets.get(head.name, 0.0) == 0.0


@every_domain
def test_exclusive_heads_are_never_asked_for_together(domain: Domain) -> None:
    for head in domain.heads:
        targets = domain.parse(domain.head_prompt(head.name)).targets
        rivals = [other for other in domain.heads if head.group and other.group == head.group and other != head]
        assert all(targets[rival.name] == 0.0 for rival in rivals)


@every_domain
def test_examples_and_validation_prompts_are_canonical_and_understood(domain: Domain) -> None:
    for prompt in (
        *(example.prompt for example in domain.examples),
        *domain.validation_prompts(),
        *domain.sheet_prompts(),
    ):
        parsed = domain.parse(prompt)
        assert parsed.unknown_words == ()
        assert domain.build_prompt(parsed.values) == prompt
    assert len(domain.examples) == 6
    assert len(set(domain.validation_prompts())) == len(domain.validation_prompts())


@every_domain
def test_captions_agree_with_their_record(domain: Domain) -> None:
    rng = random.Random(3)
    for _ in range(400):
        record = domain.invented_record(rng)
        caption = domain.caption(record, rng)
        parsed, labels = domain.parse(caption), domain.labels(record)
        assert parsed.unknown_words == (), caption
        assert count_tokens(caption) <= CAPTION_TOKENS, caption
        wrong = {head: asked for head, asked in parsed.targets.items() if labels.get(head, asked) != asked}
        assert not wrong, (caption, record)


@every_domain
def test_captions_are_a_function_of_record_and_seed_and_vary(domain: Domain) -> None:
    record = domain.invented_record(random.Random(0))
    captions = [domain.caption(record, random.Random(seed)) for seed in range(40)]
    assert captions == [domain.caption(record, random.Random(seed)) for seed in range(40)]
    assert len(set(captions)) > 10


@every_domain
def test_an_empty_record_still_has_a_caption_that_claims_nothing(domain: Domain) -> None:
    rng = random.Random(0)
    for _ in range(30):
        assert domain.parse(domain.caption({}, rng)).targets == {}
    assert domain.labels({}) == {}


@every_domain
def test_the_corpus_holds_every_canonical_prompt_and_is_reproducible(domain: Domain) -> None:
    corpus = domain.corpus(1200, seed=1)
    assert len(corpus) == 1200
    assert set(domain.validation_prompts()) <= set(corpus)
    assert corpus == domain.corpus(1200, seed=1)
    assert corpus != domain.corpus(1200, seed=2)


@every_domain
def test_expected_regions_are_regions_of_the_domain(domain: Domain) -> None:
    regions = {region.name for region in domain.regions}
    for phrase in domain.lexicon.phrases:
        assert set(domain.expected_regions(phrase)) <= regions
    assert domain.expected_regions("xylophone") == ()
