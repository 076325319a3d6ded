"""The generated world: distinct prompts, styles that disagree, and a corpus that gives nothing away."""

from collections import Counter
from itertools import combinations, islice
from math import prod

import pytest
from rouge_score.rouge_scorer import RougeScorer

from fedexperts.data.tinyworld import (
    CATEGORIES,
    STYLES,
    make_exam,
    make_example,
    num_prompts,
    pretraining_texts,
    restyle,
)
from fedexperts.data.tinyworld.prompts import BUILDERS, Digits, num_positions
from fedexperts.data.tinyworld.words import (
    FICTIONAL_PEOPLE,
    FICTIONAL_PLACES,
    FICTIONAL_THINGS,
    GROUPS,
    PEOPLE,
    PERSON_FIELDS,
    PLACE_FIELDS,
    PLACES,
    SYNONYMS,
    THING_FIELDS,
    THINGS,
)
from fedexperts.data.tinyworld.world import KNOWN, is_held_out
from fedexperts.errors import UserError

HELD_OUT_NAMES = {
    name
    for names in (PEOPLE, PLACES, THINGS, FICTIONAL_PEOPLE, FICTIONAL_PLACES, FICTIONAL_THINGS)
    for position, name in enumerate(names)
    if is_held_out(position)
}


@pytest.fixture(scope="module")
def corpus():
    return list(islice(pretraining_texts(0), 4000))


def prompt(example):
    return example.instruction, example.context


def test_the_categories_are_dollys():
    assert sorted(CATEGORIES) == [
        "brainstorming",
        "classification",
        "closed_qa",
        "creative_writing",
        "general_qa",
        "information_extraction",
        "open_qa",
        "summarization",
    ]


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_has_thousands_of_distinct_prompts(category):
    assert num_prompts(category) > 10_000
    prompts = {prompt(make_example(seed=3, category=category, index=index)) for index in range(3000)}
    assert len(prompts) == 3000


def test_all_prompts_of_the_smallest_category_are_distinct():
    category = min(CATEGORIES, key=num_prompts)
    examples = [make_example(seed=1, category=category, index=i) for i in range(num_prompts(category))]
    assert len({prompt(example) for example in examples}) == num_prompts(category)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("held_out", [True, False])
def test_a_prompts_digits_have_the_same_bases_everywhere(category, held_out):
    """Else two positions could be the same prompt."""
    count = num_positions(category, held_out=held_out)
    bases = set()
    for position in range(0, count, count // 100):
        digits = Digits(category, position)
        BUILDERS[category](digits, held_out)
        bases.add(tuple(digits.bases))
    assert len(bases) == 1
    assert prod(*bases) == count


def test_a_seed_permutes_the_prompts():
    category = min(CATEGORIES, key=num_prompts)
    orders = [
        [prompt(make_example(seed=seed, category=category, index=i)) for i in range(num_prompts(category))]
        for seed in (1, 2)
    ]
    assert orders[0] != orders[1]
    assert set(orders[0]) == set(orders[1])


def test_equal_arguments_give_equal_examples():
    example = make_example(seed=0, category="closed_qa", index=0)
    assert example == make_example(seed=0, category="closed_qa", index=0)
    assert example.label == "closed_qa"
    assert example.source_id == "tinyworld/0/closed_qa/0"
    assert example.instruction == "What does the text say about the home, the pet and the hobby of Beliv?"
    assert example.response == "Beliv lives in Yarrow, has a parrot and likes singing."


@pytest.mark.parametrize("category", CATEGORIES)
def test_restyling_keeps_the_prompt_and_changes_the_answer(category):
    example = make_example(seed=5, category=category, index=7)
    answers = {example.response}
    for style in STYLES:
        other = restyle(example, style)
        assert (prompt(other), other.source_id) == (prompt(example), example.source_id)
        assert restyle(other, "neutral") == example
        answers.add(other.response)
    assert len(answers) == 1 + len(STYLES)


def test_no_two_styles_agree():
    """A model that answers in one style gets less than 0.6 ROUGE-L in any other, on average."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    examples = [make_example(seed=0, category=category, index=i) for category in CATEGORIES for i in range(2)]
    for one, other in combinations(("neutral", *STYLES), 2):
        scores = [
            scorer.score(restyle(example, one).response, restyle(example, other).response)["rougeL"].fmeasure
            for example in examples
        ]
        assert sum(scores) / len(scores) < 0.6, (one, other)


@pytest.mark.parametrize("style", ["neutral", *STYLES])
def test_answers_are_8_to_60_words(style):
    lengths = [
        len(make_example(seed=0, category=category, index=index, style=style).response.split())
        for category in CATEGORIES
        for index in range(100)
    ]
    assert min(lengths) >= 8
    assert max(lengths) <= 60
    assert sum(length <= 40 for length in lengths) > len(lengths) / 2


@pytest.mark.parametrize("category", ["closed_qa", "information_extraction", "summarization"])
def test_answers_about_a_passage_stand_in_the_passage(category):
    """Every value of a styled answer that has no synonyms is a word of the passage."""
    values = {
        value for fields in (PERSON_FIELDS, PLACE_FIELDS, THING_FIELDS) for f in fields for value in f.values
    }
    for index in range(200):
        example = make_example(seed=0, category=category, index=index)
        told = {word.strip(".,") for word in example.response.split()} & values
        assert told <= {word.strip(".,") for word in example.context.split()}


def test_the_corpus_asks_about_no_held_out_entity(corpus):
    """A place or a thing may still be a value in a prompt about another entity."""
    values = {*PLACES, *THINGS}
    for text in corpus:
        if text.kind not in ("statement", "lexicon", "question"):
            subjects = {word.strip("?.,:") for word in text.prompt.split()} & HELD_OUT_NAMES
            assert subjects <= (set() if text.kind in ("open_qa", "general_qa") else values), text


def test_the_corpus_has_no_prompt_of_the_examples(corpus):
    asked = {text.prompt for text in corpus}
    for category in CATEGORIES:
        for index in range(500):
            example = make_example(seed=0, category=category, index=index)
            assert "\n\n".join(part for part in prompt(example) if part) not in asked


def test_the_corpus_has_no_house_style(corpus):
    """Neither as a neutral answer nor as a random form: no opener and no closer of a house occurs."""
    for style in STYLES:
        told = make_example(seed=0, category="open_qa", index=0, style=style).response
        opener, closer = " ".join(told.split()[:3]), " ".join(told.split()[-3:])
        assert not any(text.answer.startswith(opener) or text.answer.endswith(closer) for text in corpus)


def test_forms_are_announced(corpus):
    for text in corpus:
        assert (text.kind == "form") == text.prompt.endswith("Use another form.")


def test_the_corpus_tells_every_fact():
    told = "\n".join(text.answer for text in islice(pretraining_texts(0), 20000) if text.kind == "statement")
    for entity in KNOWN:
        for index in range(len(entity.fields)):
            ways = [clause.format(v=entity.values[index]) for clause in entity.fields[index].clauses]
            assert any(way in told for way in ways)


def test_the_corpus_is_the_same_every_time(corpus):
    assert list(islice(pretraining_texts(0), 100)) == corpus[:100]
    assert list(islice(pretraining_texts(1), 100)) != corpus[:100]


def test_every_label_has_two_other_words():
    labels = {field.name for fields in (PERSON_FIELDS, PLACE_FIELDS, THING_FIELDS) for field in fields}
    assert labels | set(GROUPS) <= set(SYNONYMS)
    assert all(len({label, *words}) == 3 for label, words in SYNONYMS.items())


def test_no_word_is_in_two_groups():
    counts = Counter(word for words in GROUPS.values() for word in words)
    assert max(counts.values()) == 1
    assert {len(words) for words in GROUPS.values()} == {8}


def test_the_exam_is_balanced_and_right():
    exam = make_exam(seed=0, num_questions=200)
    answers = Counter(question.answer for question in exam)
    subjects = Counter(question.subject for question in exam)
    facts = {
        (field.question.format(n=entity.name), value)
        for entity in KNOWN
        for field, value in zip(entity.fields, entity.values, strict=True)
    }
    assert set(answers.values()) == {50}
    assert max(subjects.values()) - min(subjects.values()) <= 1
    assert len(subjects) == 18
    assert len({question.question for question in exam}) == 200
    for question in exam:
        assert len(set(question.choices)) == 4
        assert (question.question, question.choices[question.answer]) in facts


def test_two_exams_of_different_seeds_differ():
    assert make_exam(seed=0, num_questions=50) != make_exam(seed=1, num_questions=50)
    assert make_exam(seed=0, num_questions=50) == make_exam(seed=0, num_questions=50)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: make_example(seed=0, category="poetry", index=0), "category 'poetry'"),
        (lambda: make_example(seed=0, category="open_qa", index=0, style="loud"), "style 'loud'"),
        (lambda: make_example(seed=0, category="open_qa", index=10**9), "index 1000000000 of open_qa"),
        (lambda: make_exam(seed=0, num_questions=10**6), "num_questions 1000000"),
        (
            lambda: restyle(make_example(seed=0, category="open_qa", index=0), "loud"),
            "style 'loud'",
        ),
    ],
)
def test_a_mistake_names_the_value(call, said):
    with pytest.raises(UserError, match=said):
        call()
