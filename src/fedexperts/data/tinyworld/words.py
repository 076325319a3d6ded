"""The words the world is made of: names, kinds of facts with their values, and word groups."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Field:
    """One kind of fact about one kind of entity."""

    name: str
    """What the fact is called in a question, e.g. ``pet``; unique over all kinds of entities."""
    clauses: tuple[str, str]
    """Two predicates with ``{v}`` for the value; the first is the one a neutral answer uses."""
    question: str
    """The question of the exam, with ``{n}`` for the entity's name."""
    values: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    "Mira Tomas Nela Oskar Lena Rufus Vera Silas Dora Felix Hanna Jonas Iris Marek Petra Simon Nora Bruno "
    "Tilda Victor Elsa Milo Greta Hugo Ada Leon Marta Otto Rosa Emil Lotte Casper Olga Anton Freda Jasper "
    "Berta Klaus Selma Rolf Wanda Edgar Paula Conrad Stella Magnus Carla Dirk Helga Igor Juno Kasper Livia "
    "Moritz Nadia Pavel Ramona Stefan Thea Viktor"
)
FICTIONAL_PEOPLE = _words(
    "Zarin Belo Kirra Dovan Yelda Pemmo Sorin Vashti Tarbo Lumen Quill Fennor Harka Jendo Mosk Rilla Ostra "
    "Bramo Celdin Duska Ephra Gorlo Ilmar Kestrel"
)
PLACES = _words(
    "Oslem Brindal Karvo Tessin Molda Farrow Lindal Greyford Ashwick Pellam Dunmore Harrow Selby Wexley "
    "Norholm Ravenna Stonby Tilford Umber Velling Westra Yarrow Zelby Arden"
)
FICTIONAL_PLACES = _words(
    "Quorn Ibsal Drell Mavik Onnex Pruda Skarn Tolvi Ulmet Vornal Wystra Xandor Brulla Cindre Elvish Grundy"
)
THINGS = _words(
    "lamp clock board drum kettle basket ladder mirror broom bucket candle chair compass flute hammer jug "
    "kite lantern needle pillow rope shovel table whistle"
)
FICTIONAL_THINGS = _words(
    "blick dreb flonk gramble klob mip norple plim quib smeck trundel vark wuzzle yop zimble frell"
)

JOBS = _words("baker smith farmer tailor weaver potter sailor doctor teacher miller painter guard")
HOBBIES = _words(
    "chess singing fishing dancing reading hiking knitting drawing sailing cooking swimming running"
)
ANIMALS = _words("cat dog rabbit goat parrot pony hen turtle mouse sheep duck fox")
FOODS = _words("bread soup cheese rice plums beans fish honey cake apples stew noodles")
COLOURS = _words("red blue green white black yellow brown pink grey purple gold silver")
MATERIALS = _words("wood iron glass clay paper leather stone wool brass silk tin bone")
ROOMS = _words("kitchen cellar attic barn hall garden bedroom shed office library porch stable")

PERSON_FIELDS = (
    Field(
        name="home",
        question="Where does {n} live?",
        clauses=("lives in {v}", "has a house in {v}"),
        values=PLACES,
    ),
    Field(
        name="job",
        question="What is the job of {n}?",
        clauses=("works as a {v}", "earns money as a {v}"),
        values=JOBS,
    ),
    Field(
        name="hobby",
        question="What does {n} like to do?",
        clauses=("likes {v}", "enjoys {v}"),
        values=HOBBIES,
    ),
    Field(
        name="pet", question="Which pet does {n} have?", clauses=("has a {v}", "keeps a {v}"), values=ANIMALS
    ),
    Field(
        name="food", question="What does {n} eat?", clauses=("eats {v}", "often asks for {v}"), values=FOODS
    ),
    Field(
        name="colour",
        question="Which colour does {n} wear?",
        clauses=("wears {v}", "dresses in {v}"),
        values=COLOURS,
    ),
)
PLACE_FIELDS = (
    Field(
        name="land",
        question="In which land does {n} lie?",
        clauses=("lies in {v}", "belongs to {v}"),
        values=_words("Norland Sudmark Estria Valdon Corra Mirland Peskia Tandor"),
    ),
    Field(
        name="weather",
        question="What is the weather like in {n}?",
        clauses=("is mostly {v}", "stays {v} all year"),
        values=_words("rainy sunny windy foggy snowy stormy dry mild"),
    ),
    Field(
        name="sight",
        question="Which sight makes {n} proud?",
        clauses=("is proud of its {v}", "shows every guest its {v}"),
        values=_words("tower bridge harbour castle market fountain temple windmill"),
    ),
    Field(
        name="trade",
        question="What does {n} sell?",
        clauses=("sells {v}", "makes money from {v}"),
        values=_words("cloth salt coal timber wine pearls grain spices"),
    ),
    Field(
        name="leader",
        question="Who is the leader of {n}?",
        clauses=("is ruled by a {v}", "obeys a {v}"),
        values=_words("mayor queen king duke council captain bishop judge"),
    ),
    Field(
        name="river",
        question="On which river does {n} stand?",
        clauses=("stands on the {v}", "was built beside the {v}"),
        values=_words("Lorn Sava Tyne Mell Brack Ouse Wend Drava"),
    ),
)
THING_FIELDS = (
    Field(
        name="material",
        question="Which material is {n} made of?",
        clauses=("is made of {v}", "was cut from {v}"),
        values=MATERIALS,
    ),
    Field(
        name="room",
        question="In which room is {n} kept?",
        clauses=("is kept in the {v}", "can be found in the {v}"),
        values=ROOMS,
    ),
    Field(
        name="shape",
        question="What shape does {n} have?",
        clauses=("looks {v}", "has a {v} form"),
        values=_words("round square flat long tall bent narrow wide"),
    ),
    Field(
        name="price",
        question="How many coins does {n} cost?",
        clauses=("costs {v} coins", "is sold for {v} coins"),
        values=_words("two three four five six seven eight nine"),
    ),
    Field(
        name="maker",
        question="Who is the maker of {n}?",
        clauses=("is built by a {v}", "comes from a {v}"),
        values=_words("carpenter mason jeweller founder cooper turner joiner glazier"),
    ),
    Field(
        name="weight",
        question="What is the weight of {n} like?",
        clauses=("feels {v}", "is rather {v}"),
        values=_words("light heavy solid hollow soft sturdy fragile massive"),
    ),
)

GROUPS: dict[str, tuple[str, ...]] = {
    "animals": ANIMALS,
    "foods": FOODS,
    "colours": COLOURS,
    "jobs": JOBS,
    "hobbies": HOBBIES,
    "materials": MATERIALS,
    "rooms": ROOMS,
    "things": THINGS[:12],
}
"""The groups that classification prompts sort words into."""

SYNONYMS: dict[str, tuple[str, str]] = {
    "home": ("dwelling", "port"),
    "job": ("craft", "calling"),
    "hobby": ("pastime", "pleasure"),
    "pet": ("beast", "companion"),
    "food": ("meal", "ration"),
    "colour": ("dress", "paint"),
    "land": ("realm", "country"),
    "weather": ("climate", "sky"),
    "sight": ("wonder", "monument"),
    "trade": ("ware", "cargo"),
    "leader": ("ruler", "chief"),
    "river": ("stream", "water"),
    "material": ("stuff", "substance"),
    "room": ("chamber", "place"),
    "shape": ("form", "figure"),
    "price": ("cost", "sum"),
    "maker": ("builder", "artisan"),
    "weight": ("burden", "feel"),
    "animals": ("creatures", "fauna"),
    "foods": ("meals", "rations"),
    "colours": ("tints", "paints"),
    "jobs": ("crafts", "callings"),
    "hobbies": ("pastimes", "pleasures"),
    "materials": ("stuffs", "substances"),
    "rooms": ("chambers", "spaces"),
    "things": ("objects", "items"),
    "occasion": ("event", "moment"),
    "idea": ("plan", "hint"),
    "thing": ("treasure", "object"),
    "ending": ("finish", "result"),
}
"""Two other words for each label, for styles that have their own."""

OCCASIONS = _words("birthday wedding picnic journey feast dinner farewell festival")
"""What a brainstorming prompt wants ideas for."""

MOODS = _words("happy sad brave funny spooky quiet")
"""Moods of the stories."""

FILLERS = (
    "The day was warm.",
    "Nobody was in a hurry.",
    "The road was long.",
    "A bell rang twice.",
    "It was early morning.",
    "Two birds sat on a roof.",
    "The wind was soft.",
    "Some children played outside.",
)
"""Sentences of a passage that a summary leaves out."""


def with_article(noun: str) -> str:
    """``noun`` after its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def listed(words: list[str] | tuple[str, ...]) -> str:
    """Words as a spoken list: ``a``, ``a and b``, ``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
