"""Write the sample corpus: short English and Turkish texts about two small, invented coastal towns.

    python data/make_sample_corpus.py
    python data/make_sample_corpus.py --output data/sample_corpus.txt --seed 7

Every text is a template with choices, `{this|that|}`, and slots, `[name]`. A slot has one value within a paragraph, so
the same person keeps the same name, trade and pronouns from the first sentence to the last. Turkish words stand in the
lists with their suffixes already on, because vowel harmony is easier to check by eye than to compute.
"""

import argparse
import random
import re
from collections.abc import Callable
from pathlib import Path

Slots = dict[str, str]
Maker = Callable[[random.Random], str]

MIN_CHARS, MAX_CHARS = 300, 900

CHOICE = re.compile(r"\{([^{}]*)\}")
SLOT = re.compile(r"\[(\w+)\]")
SENTENCE_START = re.compile(r'(^"?|[.!?] "?|\." |[.!?]" ")([a-zçğıöşü])')


def expand(rng: random.Random, template: str, slots: Slots) -> str:
    """Return the template with its choices drawn and its slots filled, innermost choices first."""
    text = template
    while CHOICE.search(text) or SLOT.search(text):
        text = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text)
        text = SLOT.sub(lambda match: slots[match[1]], text)
    text = re.sub(r"\s+", " ", text).strip()
    return SENTENCE_START.sub(lambda match: match[1] + upper(match[2], slots["language"]), text)


def upper(letter: str, language: str) -> str:
    """Return the capital of a letter; in Turkish, i becomes İ."""
    return "İ" if language == "tr" and letter == "i" else letter.upper()


# ---------------------------------------------------------------- English: the town of Saltmere

# first name, pronoun, trade, workplace, a present that this person would give
PEOPLE = [
    ("Nora", "she", "baker", "the bakery in Fish Lane", "a loaf of rye bread, still warm"),
    ("Tobias", "he", "boatbuilder", "the boatyard below the church", "a carved wooden spoon"),
    ("Agnes", "she", "lighthouse keeper", "the lighthouse on Gull Point", "a tin of ginger biscuits"),
    ("Samuel", "he", "fisherman", "the stone quay", "two fat mackerel wrapped in paper"),
    ("Ida", "she", "net mender", "the net loft above the harbour", "a string bag knotted from blue twine"),
    ("Oskar", "he", "ferryman", "the ferry landing", "a free crossing to the island"),
    ("Clara", "she", "schoolteacher", "the little school on the hill", "a pot of raspberry jam"),
    ("Hugo", "he", "blacksmith", "the forge at the crossroads", "a horseshoe for good luck"),
    ("Mabel", "she", "innkeeper", "the Blue Anchor inn", "a bowl of hot fish soup"),
    ("Felix", "he", "postman", "the post office in the square", "a bunch of wild flowers from the cliff path"),
    ("Rosa", "she", "doctor", "the white house by the bridge", "a bottle of elderflower syrup"),
    ("Peter", "he", "clockmaker", "the clock shop in Lantern Street", "a small brass bell"),
    ("Wilma", "she", "beekeeper", "the garden behind the mill", "a jar of heather honey"),
    ("Jonas", "he", "harbour master", "the harbour office", "a packet of good black tea"),
    ("Greta", "she", "weaver", "the long house by the stream", "a pair of grey woollen gloves"),
    ("Bruno", "he", "carpenter", "the workshop beside the mill", "a stool with three legs"),
    ("Edith", "she", "librarian", "the reading room over the bank", "a book of sea stories"),
    ("Anton", "he", "cobbler", "the narrow shop under the stairs", "a leather purse with a button"),
    ("Dora", "she", "sailmaker", "the sail loft on the quay", "a canvas apron with deep pockets"),
    ("Martin", "he", "shepherd", "the pasture above the cliffs", "a round white cheese"),
]
PRONOUNS = {"he": ("he", "him", "his", "himself"), "she": ("she", "her", "her", "herself")}

SEASONS = {
    "spring": (
        ("March", "April", "May"),
        ("bright", "windy", "mild", "showery"),
        ("the swallows had come back", "the plum trees were in flower", "the first lambs were out on the hill"),
    ),
    "summer": (
        ("June", "July", "August"),
        ("hot", "clear", "golden", "still"),
        ("the whole town smelled of seaweed and roses", "the children swam from the steps", "the hay was nearly in"),
    ),
    "autumn": (
        ("September", "October", "November"),
        ("foggy", "grey", "windy", "wet"),
        ("the apples were being picked", "brown leaves blew across the quay", "the evenings were drawing in"),
    ),
    "winter": (
        ("December", "January", "February"),
        ("cold", "frosty", "dark", "snowy"),
        ("ice lay on the puddles", "smoke rose from every chimney", "snow lay on the upturned boats"),
    ),
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
UNITS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")
TEENS = ("tenth", "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth")
ORDINALS = (*UNITS, *TEENS, "eighteenth", "nineteenth", "twentieth", *(f"twenty-{unit}" for unit in UNITS[:8]))
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
BOATS = ("Heron", "Marigold", "Grey Goose", "Patience", "Swallow", "Kittiwake", "Morning Star", "Good Hope", "Juniper")


def english(rng: random.Random, num_people: int = 2, absent: tuple[str, ...] = ()) -> Slots:
    """Return the slots that all English texts share; the second person's end in 2, the third's in 3."""
    season = rng.choice(list(SEASONS))
    months, skies, signs = SEASONS[season]
    slots = {
        "language": "en",
        "season": season,
        "month": rng.choice(months),
        "sky": rng.choice(skies),
        "sign": rng.choice(signs),
        "day": rng.choice(DAYS),
        "date": rng.choice(ORDINALS),
        "boat": rng.choice(BOATS),
        "when": "{one [sky] {morning|afternoon} in [month]|on a [sky] {day|morning} in [month]|one [day] in [month]}",
        "one_day": "{one [sky] day in [month]|on a [sky] [day] in [month]|one [day] in [month]}",
    }
    cast = rng.sample([person for person in PEOPLE if person[0] not in absent], num_people)
    for index, person in enumerate(cast):
        slots.update(person_slots(person, "" if index == 0 else str(index + 1)))
    for key, number in zip(("n", "n2", "n3"), rng.sample(NUMBERS, 3), strict=True):
        slots[key] = number
    return slots


def person_slots(person: tuple[str, str, str, str, str], suffix: str) -> Slots:
    """Return the slots of one person, each key with the suffix."""
    name, pronoun, trade, work, gift = person
    values = dict(zip(("he", "him", "his", "himself"), PRONOUNS[pronoun], strict=True))
    values.update(name=name, trade=trade, work=work, gift=gift)
    return {key + suffix: value for key, value in values.items()}


def find_person(name: str) -> tuple[str, str, str, str, str]:
    """Return the row of PEOPLE with this first name."""
    return next(person for person in PEOPLE if person[0] == name)


# mender, thing, what happened, what it led to, how it got there, the cause, the cure, the result, the lesson
REPAIRS = [
    (
        "Peter",
        "kitchen clock",
        "had stopped at ten past four",
        "without it the day had no shape, and [name] came late to everything",
        "wrapped the clock in a towel and carried it to Lantern Street",
        "fine sand had crept in between the wheels",
        "took the clock apart and brushed every wheel clean",
        "it ticked so loudly that the cat hid under the stove",
        "[name] has kept the window shut whenever the wind blows from the beach",
    ),
    (
        "Peter",
        "reading glasses",
        "were bent like an old fork",
        "without them [name] could not tell a bill from a love letter",
        "put the glasses into a matchbox and took them to Lantern Street",
        "somebody heavy must have sat down on them",
        "straightened the frame with a pair of tiny pliers",
        "the letters stood on the page as sharp as pins",
        "[name] has looked at every chair before sitting down on it",
    ),
    (
        "Bruno",
        "garden gate",
        "had blown off in the night",
        "the goats of the neighbour walked in and ate a whole row of cabbages",
        "went straight to the workshop beside the mill",
        "the old post had rotted under the ground",
        "cut a new post of oak and hung the gate on it",
        "it closed with a soft click, and the goats stayed outside",
        "[name] has painted the post with tar each autumn",
    ),
    (
        "Bruno",
        "wheelbarrow",
        "had lost its wheel on the steep part of the hill",
        "a whole load of potatoes rolled down to the harbour, and the children cheered",
        "dragged the wheelbarrow to the workshop beside the mill",
        "the wooden axle was worn as thin as a pencil",
        "turned a new axle from a piece of ash",
        "the wheel ran as quietly as a cat",
        "[name] has greased the axle on the first day of every month",
    ),
    (
        "Hugo",
        "water pump",
        "gave nothing but a long sigh",
        "every bucket had to be carried up from the well in the square",
        "walked down to the forge",
        "the frost had cracked the iron handle inside",
        "heated the iron until it was yellow and hammered the crack shut",
        "cold, clear water ran out at the first stroke",
        "[name] has wrapped the pump in straw before the first frost",
    ),
    (
        "Hugo",
        "copper kettle",
        "dripped onto the stove",
        "the fire hissed all day and the tea was never hot",
        "hung the kettle on a stick and took it to the forge",
        "the bottom had been scrubbed too often and had worn through",
        "soldered a round patch over the hole",
        "it sang as merrily as a robin",
        "[name] has cleaned it with vinegar and a soft cloth",
    ),
    (
        "Hugo",
        "cellar door",
        "would not open any more",
        "the apples and the cheese were locked in, and supper was only dry bread",
        "knocked at the forge before breakfast",
        "the salt air had eaten into the lock",
        "filed the lock clean and filled it with oil",
        "the key turned with one finger",
        "[name] has kept a small can of oil beside the door",
    ),
    (
        "Tobias",
        "rowing boat",
        "was full of water up to the bench",
        "there was no other way to reach the lobster pots, and the lobsters had to wait",
        "bailed out the boat and rowed it slowly to the boatyard",
        "a plank had split on a hidden rock",
        "fitted a new plank and sealed the seams with tar",
        "the boat stayed as dry as a cupboard",
        "[name] has kept well away from the rocks at low tide",
    ),
    (
        "Ida",
        "best net",
        "had a hole as wide as a door",
        "the herring swam in at one end and out at the other",
        "rolled up the net and carried it to the loft above the harbour",
        "a seal had torn it while stealing fish",
        "knotted new meshes from strong twine, one after another",
        "not one herring found the way out",
        "[name] has looked over the net every evening",
    ),
    (
        "Dora",
        "brown sail",
        "had ripped from top to bottom",
        "the boat lay idle although the wind was good",
        "folded the sail and took it to the loft on the quay",
        "the old thread had gone weak in the sun",
        "sewed the long seam twice with waxed thread",
        "the sail filled with wind and did not even creak",
        "[name] has never left it lying in the sun again",
    ),
    (
        "Anton",
        "left boot",
        "had lost its sole in the mud",
        "[name] hopped home on one foot, and the neighbours laughed kindly",
        "tied the boot together with string and limped to the narrow shop under the stairs",
        "sea water had spoiled the stitches",
        "sewed on a new sole of thick leather",
        "both boots squeaked in the same tone",
        "[name] has dried [his] boots beside the fire, but never too close",
    ),
    (
        "Anton",
        "old accordion",
        "only wheezed when it should have sung",
        "the dance on Saturday was in danger",
        "laid the accordion in a basket and carried it to the narrow shop under the stairs",
        "the damp had split the bellows",
        "glued a patch of soft leather over the split",
        "the music could be heard as far as the lighthouse",
        "[name] has kept the accordion in a dry chest",
    ),
    (
        "Greta",
        "woollen blanket",
        "was full of small holes",
        "the nights were long, and the wind found every hole",
        "took the blanket to the long house by the stream",
        "moths had lived in the cupboard all summer",
        "wove new threads into the old pattern",
        "nobody could find the places where the holes had been",
        "[name] has put lavender between the sheets",
    ),
    (
        "Edith",
        "old cookery book",
        "had fallen to pieces",
        "page twelve was missing, and so the plum cake came out as flat as a plate",
        "gathered the pages and took them to the reading room over the bank",
        "the glue in the spine had dried out",
        "sewed the pages together and gave the book a new green cover",
        "every page was in its place again",
        "[name] has never again propped up a window with it",
    ),
]

REPAIR_STORY = """
{[when], [name] the [trade] {found|saw|noticed} that [his] [thing] [broke]. |[name] the [trade] came {home|back from
[work]} [when] and {found|saw} that [his] [thing] [broke].} {This was {a nuisance|no small matter|bad luck}, for
[trouble].|It could not have come at a worse time: [trouble].} {[name] tried {a bent nail|a piece of string|a drop
of glue|some candle wax}, but that {only made things worse|did not help at all}.|"{Well, well|Dear me|Oh no}," said
[name], "this is work for {[name2]|somebody with clever hands}."|} So [he] [bring], where [name2] the [trade2] was
{just sweeping the floor|drinking tea|singing at work|sharpening a knife|hard at work}. [name2] {looked at {the
damage|it all} from every side|listened, nodded and thought for a while|put down the cup, asked {two|three} short
questions} and {said|explained} that [cause]. {Before evening|The next morning|Within two hours|Before the church
bell struck six}, [he2] [cure]. {After that|When the work was done}, [result]. {[name2] would not take any money, so
[name] {came back with|brought [him2]} [gift].|[name] paid [n] coins and added [gift], because good work should be
thanked twice.|"What do I owe you?" asked [name]. "Just tell people who did it," said [name2], but [he2] was {glad
to accept|very pleased with} [gift].} {Ever since, [lesson].|Since that day, [lesson].|}
"""


SEA_THINGS = ("rowing boat", "best net", "brown sail")
LANDSMEN = tuple(person[0] for person in PEOPLE if person[0] not in ("Samuel", "Oskar", "Jonas", "Agnes"))


def repair_story(rng: random.Random) -> str:
    """Return a story of a thing that breaks and a neighbour who mends it."""
    mender, thing, broke, trouble, bring, cause, cure, result, lesson = rng.choice(REPAIRS)
    absent = LANDSMEN if thing in SEA_THINGS else (mender,)
    slots = english(rng, 1, absent) | person_slots(find_person(mender), "2")
    slots |= {"thing": thing, "broke": broke, "trouble": trouble, "bring": bring, "cause": cause}
    slots |= {"cure": cure, "result": result, "lesson": lesson}
    return expand(rng, REPAIR_STORY, slots)


SMALL_THINGS = [
    ("silver ring", "it had belonged to [his] grandmother"),
    ("brass key", "it was the only key to the {cellar|garden shed|tool chest}"),
    ("pocket watch", "it had never been a minute late in thirty years"),
    ("lucky coin", "it had crossed the sea twice in [his] father's shoe"),
    ("little compass", "an old sailor had given it to [him]"),
    ("pearl button", "it was the last of a set of twelve"),
    ("tin whistle", "[he] played it every evening on the sea wall"),
]
SMALL_PLACES = [
    ("in a magpie's nest on the church roof, while [he2] was {freeing a kite|looking for a lost ball}", "bird"),
    ("in the belly of a large cod, while [he2] was {cooking supper|cleaning fish}", "fish"),
    ("between two stones of the quay, where it {shone|glittered} in the {evening|morning} sun", "tide"),
    ("in a sack of flour from the mill, when it {clinked|fell} into the bowl", "miller"),
    ("in the dog's basket, under {a chewed shoe|an old bone}", "dog"),
    ("at the bottom of a bucket of mussels", "tide"),
]
LIGHT_THINGS = [
    ("red scarf", "[his] aunt had knitted it in one long winter"),
    ("straw hat", "it kept off the sun on the {beach|long walk home}"),
    ("black umbrella", "the sky over Saltmere is not to be trusted"),
]
LIGHT_PLACES = [
    ("on the head of the snowman in the square", "children"),
    ("in the bell tower, where the wind had carried it", "wind"),
    ("hanging from the mast of the [boat]", "wind"),
]
HEAVY_THINGS = [
    ("blue notebook", "everything that [he] had to remember was in it"),
    ("lunch basket", "there was a whole plum pie in it"),
    ("brown satchel", "it held {a week's letters|all [his] papers}"),
]
HEAVY_PLACES = [
    ("under a bench on the ferry, where somebody had pushed it out of the rain", "ferry"),
    ("behind the counter of the bakery, between two trays of buns", "shop"),
    ("at the end of the jetty, guarded by an angry gull", "gull"),
]
CULPRITS = {
    "bird": "It seems that magpies have a better eye for treasure than most people.",
    "fish": "How it got there, only the sea knows.",
    "tide": "The tide takes many things in Saltmere, but it gives most of them back.",
    "miller": "The miller swore that he knew nothing about it, and he was probably right.",
    "dog": "The dog looked at the ceiling and pretended to be asleep.",
    "ferry": "It had gone to the island and back {four|five|six} times without paying.",
    "children": "The children said that he had looked cold.",
    "wind": "The wind had simply wanted it for a while.",
    "shop": "It had been there all the time, and nobody had thought of looking.",
    "gull": "The gull gave it up only in exchange for a herring.",
}

LOST_STORY = """
{[name] the [trade] had lost [his] [thing], and that was {a sad thing|a serious matter}, because [worth].|[when],
[name] the [trade] {reached|looked} for [his] [thing] and it was gone. {[he] was very unhappy|[he] turned quite
pale}, for [worth].} {[he] searched {the kitchen|the bedroom|the attic}, the {garden|yard} and every pocket, but
found only {a candle stump|an old nail|three buttons|a dried fig}.|[he] walked the whole way to [work] and back
again with [his] eyes on the ground.|[he] looked under the bed, behind the stove and even in the {teapot|bread
bin}.} {[he] asked everyone {in the market|on the quay|at the inn}, but people only {shook their
heads|shrugged}.|Then [he] wrote a notice and pinned it to the door of the {harbour office|post office}: "Lost,
[thingart]. The finder shall have a reward."|} {Two days later|After a week|On the third day|When [name] had almost
given up hope}, [name2] the [trade2] {found|came upon} it [place]. {[he2] {washed|wiped} off the dirt and|Without
even finishing [his2] tea, [he2] {ran|hurried} up the street and} {knocked at [name]'s door|took it to [name] at
once}. {"I thought I would never see it again," said [name], and {laughed|cried a little|hugged [name2]}.|[name] was
so happy that [he] {danced|sang} in the middle of the street.} {As a reward [name2] got [gift].|[name] gave [name2]
[gift] and a {long hug|kiss on both cheeks}.} {[culprit]|[culprit]|From then on [name] never let it out of [his]
sight.}
"""


def lost_story(rng: random.Random) -> str:
    """Return a story of a thing lost by one person and found by another."""
    sizes = [
        (SMALL_THINGS, SMALL_PLACES),
        (LIGHT_THINGS, LIGHT_PLACES + HEAVY_PLACES),
        (HEAVY_THINGS, HEAVY_PLACES),
    ]
    things, places = rng.choice(sizes)
    thing, worth = rng.choice(things)
    place, culprit = rng.choice(places)
    slots = english(rng)
    if culprit == "children":
        slots |= {"season": "winter", "month": rng.choice(SEASONS["winter"][0]), "sky": "snowy"}
    slots |= {"thing": thing, "thingart": f"a {thing}", "worth": worth, "place": place, "culprit": CULPRITS[culprit]}
    return expand(rng, LOST_STORY, slots)


# trouble at sea, what the crew does about it, how it ends
TROUBLES = [
    (
        "a thick fog rolled in from the west, and the land disappeared",
        "lowered the sail and listened, until the bell of the lighthouse could be heard on the left",
        "steering by the bell, the boat crept home along the cliff",
        "{fog is only dangerous for people in a hurry|ears are as good as eyes at sea}",
    ),
    (
        "the wind turned to the north, and the waves grew as high as the cabin",
        "took in the sail, tied down the barrels and turned the bow into the waves",
        "after two hard hours the boat slipped in behind the harbour wall",
        "{a small sail is better than no sail|a careful sailor grows old}",
    ),
    (
        "the rudder broke with a loud crack",
        "tied an oar to the stern and used it to steer",
        "slowly and in a great curve the boat came back to the quay",
        "{an oar more is never too much|there is always another way to steer}",
    ),
    (
        "water came in through a loose plank",
        "stuffed a woollen jacket into the gap and bailed with the soup pot",
        "with wet feet and in good spirits everybody reached the shore",
        "{a jacket can be worn in more than one way|a soup pot belongs on every boat}",
    ),
    (
        "the wind died, and the boat lay on the water as if on a table",
        "took the oars and rowed, singing all the songs that came to mind",
        "long after dark the boat reached the harbour, where lamps stood in the windows",
        "{the longest way is shorter with a song|patience is also a kind of wind}",
    ),
    (
        "the net caught on something heavy and would not move",
        "waited for the tide to turn and then pulled with all hands",
        "up came an old anchor, green with weed, and under it the fullest net of the year",
        "{the sea pays those who wait|one should not cut a net too soon}",
    ),
]

SEA_STORY = """
{[one_day], [name] the [trade] {put to sea|sailed out|left the harbour} in the [boat] {before sunrise|with the early
tide|at first light}. |The [boat] is {an old boat|a small boat}, but [name] the [trade] would not change her for any
other. [one_day], [he] sailed her out {past Gull Point|beyond the island|to the herring grounds}. } {[he] had taken
[name2] the [trade2] along, {who wanted to see the seals|who had never been so far out|because an extra pair of
hands was needed}.|With [him] was [name2] the [trade2], who {was a little afraid of deep water|talked the whole
way|had brought bread and cold sausage}.} {At first all went well: the {sea was calm|gulls followed them} and {[n]
baskets of {herring|mackerel|whiting} were soon full|the lines were hardly in the water before the fish bit}.|For an
hour or two it was a fine trip, and they {caught [n] baskets of {herring|mackerel|sprats}|ate and told stories}.}
{Then|Suddenly|But towards noon} [trouble]. {"{Are we lost|What shall we do now|Is this the end of us}?" asked
[name2]. "{Not today|Not while I am aboard|Only hold on tight}," said [name].|[name2] turned as white as flour, but
[name] {stayed calm|only whistled}.|} {[name]|the captain} [action]. {[ending].|It took a long time, but [ending].}
{On the quay [name3] was waiting with {hot tea|dry blankets|a lantern}.|That evening they sat {in the Blue Anchor|by
the fire} and {ate fried fish|drank hot cider}.|} "[moral]," said [name], {and nobody {disagreed|argued}|and [name2]
nodded}.
"""


def sea_story(rng: random.Random) -> str:
    """Return a story of a trip by boat that goes wrong and ends well."""
    slots = english(rng, 2, absent=("Samuel", "Oskar", "Tobias", "Mabel"))
    captain = person_slots(find_person(rng.choice(("Samuel", "Oskar", "Tobias"))), "")
    mates = {key + "2": slots[key] for key in captain} | {"name3": slots["name2"]}
    trouble, action, ending, moral = rng.choice(TROUBLES)
    slots |= mates | captain | {"trouble": trouble, "action": action, "ending": ending, "moral": moral}
    return expand(rng, SEA_STORY, slots)


# animal, pronoun, name, owner, what it did, how it was found out, what was done, what came of it
ANIMALS = [
    (
        "cat",
        "Pepper",
        "slept every night in {the warm oven|a fish crate|the mailbag}",
        "stole a {smoked eel|whole flounder|string of sausages} from the table",
        "a trail of {bones|greasy paw prints} led straight to the woodshed",
        "gave the cat a dish of its own, filled at the same hour each day",
        "nothing goes missing from the table, or at least nothing large",
    ),
    (
        "dog",
        "Biscuit",
        "barked at {the tide|every umbrella|the church bell}",
        "ran off with one of [name2]'s shoes",
        "there was a row of fresh holes in the flower bed",
        "dug for an hour and found the shoe, and four others besides",
        "Biscuit carries the newspaper instead and is very proud of it",
    ),
    (
        "goat",
        "Duchess",
        "could open any gate in Saltmere",
        "ate the {washing|tablecloth|straw hat} that [name2] had hung out to dry",
        "a corner of blue cloth was still hanging from its mouth",
        "put a bell on the goat and a second bolt on the gate",
        "everyone hears Duchess coming and takes in the washing in time",
    ),
    (
        "donkey",
        "Barnaby",
        "carried {barrels|firewood|sand} up the hill",
        "stopped in the middle of the bridge and would not move",
        "behind it stood [n] carts, and all the drivers were shouting",
        "held out a carrot and spoke softly, while [name2] pushed from behind",
        "there is always a carrot in the pocket of whoever leads Barnaby",
    ),
    (
        "gull",
        "Admiral",
        "sat on the harbour office with one leg drawn up",
        "flew in through [name2]'s window and took {a pancake|a slice of cake} off the plate",
        "there were crumbs and one white feather on the sill",
        "hung a shiny tin lid in the window to frighten the bird away",
        "Admiral admires himself in the lid every morning and leaves the cake alone",
    ),
    (
        "hen",
        "Mrs Pim",
        "walked through the town as if the streets were its own",
        "stopped laying eggs in the henhouse",
        "soft clucking came from {the old rowing boat|the choir stalls|[name2]'s wardrobe}",
        "moved the bird and its [n] eggs to a quiet box with fresh straw",
        "the chicks follow Mrs Pim down the street in single file",
    ),
]

ANIMAL_STORY = """
{[name] the [trade] {had|kept} a [animal] called [pet], which [habit].|Everybody in Saltmere knew [pet], the
[animal] of [name] the [trade], which [habit].} [when], [pet] [deed]. {"{That animal|That [animal]} will be the ruin
of us all!" cried [name2] the [trade2]. |[name2] the [trade2] was {not amused|furious} and came to [work] to
complain. |[name2] the [trade2] laughed at first, but soon {grew worried|wanted something done about it}. } {[name]
could not believe it|"Surely not," said [name]}, {but|and yet} [proof]. {[he] thought about it for a {while|long
while}. Then [he]|So [he] sighed, rolled up [his] sleeves and} [remedy]. {To make up for the trouble, [he] also
{brought|gave} [name2] [gift].|[name2] was given [gift] and {was soon in a better mood|forgave everybody}.}
{Now|These days} [result]. {"You cannot be angry with [pet] for long," says [name2]{, who should know|}.|The two
neighbours are better friends than before.|[name] says that a [animal] without faults would be {very dull|no company
at all}.}
"""


def animal_story(rng: random.Random) -> str:
    """Return a story of an animal that gets into mischief."""
    keys = ("animal", "pet", "habit", "deed", "proof", "remedy", "result")
    slots = english(rng) | dict(zip(keys, rng.choice(ANIMALS), strict=True))
    return expand(rng, ANIMAL_STORY, slots)


CONTESTS = [
    (
        "the rowing race",
        "round the island and back",
        "rowed with short, quick strokes and saved [his] strength",
        "started like a cannonball and was out of breath by the buoy",
    ),
    (
        "the pie contest",
        "before three stern judges",
        "baked a simple apple pie with butter and a little lemon",
        "put eleven spices into one pie, so that it tasted of soap",
    ),
    (
        "the sack race",
        "across the meadow behind the mill",
        "took small hops and looked straight ahead",
        "looked back to see who was behind, and fell into the nettles",
    ),
    (
        "the kite contest",
        "on the windy side of Gull Point",
        "built a light kite of paper and willow",
        "built a kite so big that it pulled [him2] into a hedge",
    ),
    (
        "the knot contest",
        "on the steps of the harbour office",
        "tied eight knots without once looking down",
        "tied [his2] own sleeve to the railing",
    ),
    (
        "the singing contest",
        "in the hall of the Blue Anchor",
        "sang an old lullaby, quite softly",
        "sang so loudly that a window cracked and the dogs joined in",
    ),
    (
        "the sandcastle contest",
        "on the long beach",
        "built a low, broad castle well above the tide line",
        "built the highest tower of all, and the tide took it at four o'clock",
    ),
]

CONTEST_STORY = """
{Every year in [month]|On the [date] of [month]|At the [season] fair} the people of Saltmere hold [contest] [where].
{This time|This year} {a dozen people|more people than ever|half the street} {took part|put down their names}, among
them [name] the [trade] and [name2] the [trade2]. {[name2] had won {twice|three times} before and {was sure of the
prize|spoke of nothing else}.|Everyone thought that [name2] would win, and so did [name2].|[name2] had practised
{for weeks|every evening}, and the whole town knew it.} [name], on the other hand, {had only come for the cake|was
so nervous that [he] could not eat|had never won anything in [his] life}. {The weather was [sky], and the crowd
stood close together.|It was a [sky] day, and [sign].|The band played, and [name3] the [trade3] rang a bell {to
begin|at noon to begin}.} [name] [good]. [name2] [bad]. {In the end|When it was over|To the surprise of all} [name]
{was the winner|had won}, and [name3] {handed [him] the prize, |hung a wreath round [his] neck and gave [him] the
prize, }{[gift3]|a ham with a ribbon round it|a silver cup}. {"{Next year it will be my turn|You were better, and
that is that}," said [name2] and shook [name]'s hand.|[name2] {sulked until supper|was cross for an hour}, then came
over and {laughed about it|asked for advice}.|[name] shared the glory with [name2], and they walked home {arm in
arm|singing}.}
"""


def contest_story(rng: random.Random) -> str:
    """Return a story of a contest that a modest person wins."""
    contest, where, good, bad = rng.choice(CONTESTS)
    slots = english(rng, 3) | {"contest": contest, "where": where, "good": good, "bad": bad}
    if contest == "the sandcastle contest" or slots["season"] == "winter":
        slots |= {"season": "summer", "month": "July", "sky": "hot", "sign": SEASONS["summer"][2][1]}
    return expand(rng, CONTEST_STORY, slots)


# master, what is learnt, first attempt, the advice, the practice, the success
LESSONS = [
    (
        "Nora",
        "to bake bread",
        "the first loaf was as hard as a brick",
        "Give the dough time, and do not look at it",
        "kneaded, waited and baked",
        "the crust crackled and the crumb was soft",
    ),
    (
        "Ida",
        "to mend nets",
        "the first knot came undone at once",
        "Pull towards you, never away",
        "tied knots until [his] fingers were sore",
        "the net held a whole shoal of herring",
    ),
    (
        "Peter",
        "to clean clocks",
        "there were three wheels left over at the end",
        "Lay out the parts in a row, as you find them",
        "took the same old clock apart and put it together again",
        "the clock struck twelve at twelve",
    ),
    (
        "Tobias",
        "to plane a plank",
        "the plank was wavy like the sea",
        "Let the tool do the work",
        "planed one board after another",
        "you could have slid a feather along the wood",
    ),
    (
        "Agnes",
        "to light the great lamp",
        "the lamp smoked and the glass went black",
        "Trim the wick first, and never hurry a flame",
        "climbed all ninety steps of the tower",
        "the beam reached the ships far out at sea",
    ),
    (
        "Wilma",
        "to keep bees",
        "there were five stings on one nose",
        "Move slowly, and hum if you are afraid",
        "sat beside the hives and watched",
        "the bees walked over [his] hand as if it were a flower",
    ),
    (
        "Greta",
        "to weave",
        "the cloth was wide at one end and narrow at the other",
        "Listen to the loom, it keeps the time",
        "threw the shuttle from left to right and back",
        "the cloth was straight and even",
    ),
    (
        "Hugo",
        "to forge a nail",
        "the nail looked like a worm",
        "Strike while it is yellow, and stop when it is red",
        "hammered nails until the fire went out",
        "the nail was so straight that Hugo hung his hat on it",
    ),
    (
        "Dora",
        "to sew canvas",
        "the needle went into the thumb",
        "Small stitches hold in a big storm",
        "sewed seam after seam",
        "the sail came through a gale without losing a stitch",
    ),
    (
        "Oskar",
        "to steer the ferry",
        "the ferry bumped into the landing",
        "Look at the far shore, not at the water",
        "crossed to the island and back",
        "the ferry touched the landing as gently as a leaf",
    ),
]
APPRENTICES = [("Leo", "he"), ("Minna", "she"), ("Karl", "he"), ("Lotte", "she"), ("Simon", "he"), ("Vera", "she")]

LESSON_STORY = """
{[when], [kid] {knocked at|came to} [work] and asked [name] the [trade] to teach [him2] [skill].|[kid] was
{ten|eleven| twelve|thirteen} years old and wanted {more than anything|with all [his2] heart} to learn how [skill].
So, [when], [he2] went to [name] the [trade].} {[name] {smiled|laughed} and {handed [him2] an apron|cleared a place
on the bench}.|"It will take {a whole [season]|a long time}," said [name]. "I have time," said [kid].|[name], who
{had no children|could use some help}, {agreed at once|said yes}.} {It did not begin well:|The first day was a
failure:|At first it seemed hopeless:} [failure]. {[kid] {was close to tears|wanted to give up}.|[kid] blushed to
the ears.|[kid] stared at the floor.} "{That happens to everyone|I was no better at your age|Never mind}," said
[name]. "[advice]." {After that|So} [kid] came back {day after day|every afternoon|whenever there was time} and
[practice]. {By the end of [month]|After [n] weeks|When {the moon had changed twice|another month had passed}} it
worked: [success]. {[name] said nothing at all, but {nodded|smiled}, and that was {the highest praise|worth more
than a medal}.|"Now you know {almost everything|as much as I do}," said [name], and gave [kid] [gift].} {[kid] ran
home to tell {[his2] mother|the whole street}.|That night [kid] was too happy to sleep.|[kid] still {laughs
about|likes to tell of} that first day.}
"""


def lesson_story(rng: random.Random) -> str:
    """Return a story of a child who learns a trade."""
    master, skill, failure, advice, practice, success = rng.choice(LESSONS)
    kid, pronoun = rng.choice(APPRENTICES)
    slots = english(rng, 1) | person_slots(find_person(master), "")
    slots |= {key + "2": value for key, value in zip(("he", "him", "his"), PRONOUNS[pronoun], strict=False)}
    slots |= {"kid": kid, "skill": skill, "failure": failure, "advice": advice}
    slots |= {"practice": practice.replace("[his]", "[his2]"), "success": success.replace("[his]", "[his2]")}
    return expand(rng, LESSON_STORY, slots)


PARCELS = [
    (
        "a music box that played a tune nobody knew",
        "turned the handle",
        "an old sailor stopped at the window and began to sing along, for it was a song of his childhood",
    ),
    (
        "seven flower bulbs, each wrapped in silk",
        "planted them by the wall",
        "they came up as blue as the sea, and bees came from three valleys",
    ),
    (
        "a map of the coast with one red cross",
        "followed it to a cave below the cliffs",
        "there was no gold in it, but a spring of the sweetest water in the county",
    ),
    (
        "a ship in a bottle",
        "held it up to the light",
        "on its stern, in tiny letters, stood the name of a boat that had sailed from Saltmere fifty years ago",
    ),
    (
        "a large key without any label",
        "tried it in every door in town",
        "at last it opened the old tower, and from the top one could see all the islands",
    ),
    (
        "a lamp of green glass",
        "lit it and set it in the window",
        "that night a lost boat saw the green light and found the harbour mouth",
    ),
    (
        "a bag of foreign coffee and a note with the word thanks",
        "brewed a pot for the whole street",
        "the smell brought out neighbours who had not spoken to each other in years",
    ),
]

PARCEL_STORY = """
{[when], [name2] the [trade2] brought [name] the [trade] a parcel.|A parcel came for [name] the [trade] [when].
[name2] the [trade2] {brought it up from the harbour|had found it on the ferry}.} {There was no sender on it, only
{a foreign stamp|a stamp with a palm tree|a drop of red wax}.|It was {tied with tarred string|wrapped in sailcloth}
and smelled of {pepper|oranges|the sea}.} {[name], who {never got any post|was a curious person}, put down [his]
work at once.|"{Open it|Go on}!" said [name2], who {could hardly wait|was even more curious than [name]}.} {In it
they found|Inside, under a layer of {straw|newspaper}, they found} [content]. {{For a while|For a long moment} they
just looked and {said nothing|wondered}.|"Who in the world would send me this?" asked [name]. [name2] {had no
idea|could only shrug}.|} Then [name] [deed], and [effect]. {To this day nobody knows who sent it.|Only much later
did [name] learn that it came from a {traveller|stranger} whom [he] had once {given a bed for the night|helped in a
storm}.|[name] thinks it came from [his] brother, who went to sea {at sixteen|many years ago}.} {Every [season]
[name] and [name2] {drink a glass|light a candle} to the sender.|The paper and the string were kept, too, for one
never knows.|"Kindness," says [name2], "travels slowly, but it {arrives|knows the way}."}
"""


def parcel_story(rng: random.Random) -> str:
    """Return a story of a mysterious parcel and what was in it."""
    content, deed, effect = rng.choice(PARCELS)
    return expand(rng, PARCEL_STORY, english(rng) | {"content": content, "deed": deed, "effect": effect})


NEWS = [
    ("Nora", "Nora has {built|bought} a new oven, and the whole street smells of {cinnamon|fresh bread} before dawn."),
    ("Tobias", "Tobias has launched a new boat, painted {green|red|white}, and she floats as straight as a duck."),
    ("Agnes", "Agnes saw {[n] whales|a great ship with four masts} from the lighthouse {last week|on [day]}."),
    ("Samuel", "Samuel caught a fish so big that it {hung over both ends of the table|had to be carried by two men}."),
    ("Ida", "Ida has mended [n] nets in one week and says that she never wants to see {twine|a knot} again."),
    ("Oskar", "Oskar has {painted the ferry yellow|given up smoking}, and everybody has something to say about it."),
    ("Clara", "Clara took the children to the rock pools, and they came back with [n] crabs and wet socks."),
    ("Hugo", "Hugo made a new weathercock for the church, and it {looks just like him|crows when the wind turns}."),
    ("Mabel", "Mabel has put {mussels|plum dumplings|pea soup} on the menu at the Blue Anchor, and one has to queue."),
    ("Felix", "Felix fell off his bicycle, but only the {eggs|letters} were hurt."),
    ("Rosa", "Rosa says that nobody has time to be ill, because {the harvest is so good|the weather is so fine}."),
    ("Peter", "Peter has finally mended the church clock, so that we all have to be on time {now|again}."),
    (
        "Wilma",
        "Wilma's bees swarmed onto the {mayor's hat|school bell}, and she brought them home in a {basket|sack}.",
    ),
    ("Jonas", "Jonas has forbidden {shouting|card games} in the harbour office, and now it is very quiet there."),
    ("Greta", "Greta is weaving {a curtain|a carpet} for the town hall with [n] boats and a lighthouse on it."),
    (
        "Bruno",
        "Bruno is {mending the roof of the school|building a stage for the fair} and hammers from morning till night.",
    ),
    ("Edith", "Edith reads aloud in the reading room every [day], and even the fishermen come."),
    (
        "Anton",
        "Anton has made a pair of boots for a {giant|sailor with very large feet}, and they stand in his window.",
    ),
    ("Dora", "Dora sewed a sail for the [boat] with a {sun|swan} on it, and everyone waves when it passes."),
    ("Martin", "Martin lost [n] sheep in the fog and found [n2], so that nobody understands his counting any more."),
]
REQUESTS = [
    "If you come in [month], please bring {some yellow wool|a pound of good coffee|your fiddle}.",
    "Could you send me {the recipe for your plum cake|a few of your rose cuttings|that book about stars}?",
    "Do come and stay for {a week|a few days}, for the spare room is {warm and dry|full of sunshine}.",
    "Please write soon and tell me how {your knee|the baby|the new roof|your garden} is.",
    "I need your advice: should I {sell the old boat|plant beans or potatoes|buy a second goat}?",
]

# presents that would not survive the post are replaced
LETTER_GIFTS = {
    "Nora": "a box of almond biscuits",
    "Samuel": "two smoked mackerel wrapped in paper",
    "Oskar": "a drawing of the ferry",
    "Mabel": "my recipe for fish soup",
    "Felix": "a bunch of dried flowers from the cliff path",
    "Bruno": "a small carved bird",
}

LETTER = """
Dear {[friend]|cousin [friend]|[friend]}, {thank you for your {long|kind|cheerful} letter, which came on [day]|I
have not written for {weeks|a long time}, and I am sorry for it|I hope that you are well and that {your cough is
better|the move was not too hard}}. {It is [month] now, and when I walked to {church|the harbour} on Sunday,
[sign].|We have had a [sky] [month], and on my last walk [sign].} {I am {well|very well}, though there is
{much|plenty} to do.|All is well here, only that I need {a holiday| more sleep|a second pair of hands}.} {You ask
for news of the town, so here it is.|Now for the news.|There is a lot to tell.} [news1] [news2] {[news3]|} {As for
me, I {have learnt to swim|have started to keep hens|dream of a journey to the south}, {at my age|believe it or
not}.|My own news is small: I {found an old photograph of us two on the pier|have a new stove|can whistle again
since the tooth is out}.|} [request] {With this letter you will find [gift].|I am sending you [gift] with it.|}
{Your old friend, [name].|With love from Saltmere, [name].|Yours as ever, [name].|Many greetings, also to the
family, from your [name].}
"""


def letter(rng: random.Random) -> str:
    """Return a letter from somebody in Saltmere to a friend elsewhere."""
    slots = english(rng, 1)
    news = rng.sample([text for name, text in NEWS if name != slots["name"]], 3)
    slots |= {"news1": news[0], "news2": news[1], "news3": news[2], "request": rng.choice(REQUESTS)}
    slots["friend"] = rng.choice(("Helen", "Walter", "Josephine", "Arthur", "Lydia", "Conrad", "Beatrice", "Theodore"))
    slots["gift"] = LETTER_GIFTS.get(slots["name"], slots["gift"])
    return expand(rng, LETTER, slots)


WORK_DAYS = {
    "Nora": "Baked [n] trays of rolls before sunrise. "
    "The new yeast is lively, and the dough nearly climbed out of the tub.",
    "Tobias": "Bent the last plank for the [boat]. "
    "Steamed it for [n] hours, and it went round the frame like a ribbon.",
    "Agnes": "Cleaned the great lens until I could see my own eyelashes in it. "
    "Counted [n] ships, all of them far out.",
    "Samuel": "Out with the early tide. [n] baskets of herring, and a crab that would not let go of my sleeve.",
    "Ida": "Mended nets until the light went. A dogfish had bitten through [n] ropes, the greedy thing.",
    "Oskar": "[n] crossings, most of them with sheep. The sheep were quieter than the passengers.",
    "Clara": "Taught the little ones the names of the winds. "
    "One of them thinks that the north wind is a man with a beard.",
    "Hugo": "Shod [n] horses. The last one leaned on me as if I were a fence.",
    "Mabel": "The inn was full. [n] plates of soup were eaten, and one plate was broken, so I cannot complain.",
    "Felix": "Carried [n] parcels up the hill and one cheerful letter down again. "
    "My legs know every stone of the way.",
    "Rosa": "[n] patients, and nothing worse than a fish hook in a thumb. I do like such days.",
    "Peter": "Set the tower clock forward by [n] minutes. Half the town was late at once, and blamed me.",
    "Wilma": "Mended [n] old hives and painted them white. The bees hummed inside like people at church.",
    "Jonas": "Wrote [n] boats into the big book. The ink froze once, and so did the clerk, who had fallen asleep.",
    "Greta": "Wove [n] feet of grey cloth with a white border. The loom creaks on the left, I must grease it.",
    "Bruno": "Finished [n] chairs for the school. They are small and strong, like those who will sit on them.",
    "Edith": "Lent out [n] books, and got one back with a pressed flower in it. I left the flower where it was.",
    "Anton": "Put new soles on [n] pairs of boots. One can read people's lives from their heels.",
    "Dora": "Cut the cloth for a new sail. It covered the whole floor, and I worked in my socks.",
    "Martin": "Counted the sheep and got [n] too many. Counted again, and fell asleep at the gate.",
}

DIARY = """
[day], the [date] of [month]. {Woke early because {of the gulls|the wind shook the shutters|the moon was so
bright}.|Slept badly, got up late.|Slept like a stone.} {A [sky] day, and [sign].|The weather was [sky], and
[sign].} [workday] {At noon [name2] came by {with news|to borrow a ladder|to talk}. {[he2] told me that {the mayor
wants to paint the bridge blue|there is to be a dance on Saturday|a stranger has taken a room at the inn}. {We shall
see.|I do not believe a word of it.|That will give people something to talk about.}|We sat on the wall and shared
{an apple|a pipe|a piece of cheese}, and {said little|laughed about old times}.}|Met [name2] in the square. [he2]
{looked tired, so I carried [his2] basket|was in good spirits and talked me into a game of cards, which I lost}.}
{In the afternoon {it rained for an hour, and I read by the window|I repaired the fence, at least the worst part of
it|I wrote to my sister and told her only the good things}.|Spent the afternoon {looking for my spectacles, which
were on my nose|splitting wood|asleep in a chair, I admit it}.} {Supper: {soup and bread|fried herring and
potatoes|pancakes|a boiled egg}. {It was enough.|I ate too much.|The cat had half of it.}} {Must not forget to {buy
lamp oil|pay [name3]|return the ladder|air the blankets} tomorrow.|A good day, all in all.|Tomorrow I will {get up
earlier|begin the big work at last}. I say so every evening.|Now the lamp is low, and the sea is {quiet|loud}. Good
night.}
"""


def diary(rng: random.Random) -> str:
    """Return a day's entry in the diary of one of the townspeople."""
    slots = english(rng, 3)
    return expand(rng, DIARY, slots | {"workday": WORK_DAYS[slots["name"]]})


# goods, price, the doubt, the answer
BARGAINS = [
    (
        "Nora",
        "a loaf of rye bread",
        "{two|three} coins",
        "It was bigger last week, I am sure of it.",
        "It is the same loaf, only you are hungrier",
    ),
    (
        "Samuel",
        "a pound of herring",
        "{two|three|four} coins",
        "Are they fresh?",
        "An hour ago they still had plans for the evening",
    ),
    (
        "Wilma",
        "a jar of honey",
        "{four|five} coins",
        "Why is it so dark?",
        "The bees were on the heather, and heather makes it dark",
    ),
    (
        "Anton",
        "a pair of boots",
        "{twenty|thirty} coins",
        "Will they keep out the water?",
        "Longer than you can stand in it",
    ),
    ("Greta", "a woollen blanket", "{twelve|fifteen} coins", "Does it scratch?", "Only for the first winter"),
    ("Martin", "a round cheese", "{five|six} coins", "Is it strong?", "It walked here by itself"),
    (
        "Bruno",
        "a kitchen stool",
        "{eight|nine} coins",
        "Why has it only three legs?",
        "Because three legs never wobble",
    ),
    ("Peter", "an alarm clock", "{ten|eleven} coins", "Is it loud?", "It wakes me, and I live next door"),
]

BARGAIN = """
"Good {morning|day}, [name]," said [name2] the [trade2]. "{How much is|What do you ask for} [goods]?" "[price],"
said [name] the [trade], "{and it is worth every one of them|because it is you}." "Hm," said [name2]. "[doubt]"
"[answer]," said [name]. {[name2] laughed {out loud|in spite of [himself2]}.|[name2] {scratched [his2]
chin|pretended to walk away}.} "{I will give you half of that|Would you take a little less}," [he2] said, "{and|if I
add} [gift2]?" [name] {thought for a moment|looked up at the [sky] sky|counted on [his] fingers}. "{Agreed|Done|Why
not}," [he] said {at last|then}, and they shook hands. {[name3], who had {watched it all|been waiting behind them},
said, "{You two do this every [day]|I have seen quicker weddings}."|"Same time next week?" asked [name2]. "Of
course," said [name], "{I would miss it|but next week it will cost more}."} {So both went away {content|happy}, each
sure of having made the better bargain.|In Saltmere nobody buys anything without a little talk, for the talk is
{free|half the pleasure}.|}
"""


def bargain(rng: random.Random) -> str:
    """Return a dialogue between a seller and a buyer."""
    seller, goods, price, doubt, answer = rng.choice(BARGAINS)
    slots = english(rng, 2, absent=(seller,))
    buyer = {key + "2": slots[key] for key in ("name", "he", "him", "his", "himself", "trade", "gift")}
    slots |= buyer | {"name3": slots["name2"]} | person_slots(find_person(seller), "")
    slots |= {"goods": goods, "price": price, "doubt": doubt, "answer": answer}
    return expand(rng, BARGAIN, slots)


QUESTIONS = [
    (
        "Will it rain tomorrow",
        "The swallows are flying low, and my {left knee|big toe} hurts",
        "hang up the washing today",
        "it rained all the next day",
    ),
    (
        "Is it safe to sail to the island",
        "There is a ring round the moon, and the gulls have all come in",
        "wait until [day]",
        "a gale came up in the night",
    ),
    (
        "When do you think the herring will come",
        "The water is still too cold, but the seals are getting restless",
        "mend your nets and be ready",
        "the bay was silver with fish within a week",
    ),
    (
        "What can I do about the slugs in my lettuce",
        "I put a dish of beer between the rows, and they come to it from all sides",
        "try it with the cheapest beer you can find",
        "the lettuces grew as big as hats",
    ),
    (
        "How do I get my bread to rise",
        "It wants a warm place, and nobody should slam the door",
        "set it beside the stove under a cloth",
        "the next loaf was as round as a cheek",
    ),
    (
        "Why does my chimney smoke",
        "I had the same trouble, and it was a jackdaw's nest",
        "look up with a lantern before you light the fire",
        "there was indeed a nest in it, and an old teaspoon",
    ),
    (
        "How shall I keep the moths away",
        "They cannot bear lavender, and cedar wood even less",
        "put a bunch of lavender into every drawer",
        "the cupboard smelled like a garden, and the moths moved out",
    ),
]

ADVICE = """
{[when], [name] the [trade] met [name2] the [trade2] {on the sea wall|near [work2]|at the pump in the
square}.|[name] the [trade] and [name2] the [trade2] were sitting {on the harbour steps|on a bench in the sun|over a
pot of tea}.} "{Tell me|You know about such things}, [name2]," said [name]. "[question]?" [name2] {took [his2]
time|looked out over the bay|put down [his2] basket}. "[sign_]," [he2] said. "{Are you certain?" asked [name].|And
what does that mean?" asked [name].|So?" asked [name].} "{I have lived here {forty|fifty} years," said [name2], "and
I have been wrong {only twice|no more than once}|My mother taught me that," said [name2], "and her mother taught
her}. {If I were you, I would|You should} [advice]." {[name] thanked [him2] and {did so|went home to do just
that}.|[name] {doubted it|was not quite convinced}, but did as [he] was told.} And [outcome]. {The next time they
met, [name] brought [gift].|"{You see|I told you so}," said [name2] {afterwards|when they met again}, {not without
pride|smiling}.|Since then [name] asks [name2] about everything, even about {love|politics|hats}.}
"""


def advice(rng: random.Random) -> str:
    """Return a dialogue in which one neighbour asks and the other knows."""
    question, sign, counsel, outcome = rng.choice(QUESTIONS)
    slots = english(rng) | {"question": question, "sign_": sign, "advice": counsel, "outcome": outcome}
    return expand(rng, ADVICE, slots)


# dish, cook, the ingredients, the steps in their order, how it is served
RECIPES = [
    (
        "fish soup",
        "Mabel",
        "a pound of white fish, two onions, three potatoes, a carrot and a cup of cream",
        "chop the onions and fry them gently in butter",
        "add the potatoes and the carrot in small cubes and cover with water",
        "when they are soft, lay in the fish and let it cook for {five|six} minutes",
        "stir in the cream and {a little dill|some parsley}",
        "with rye bread",
    ),
    (
        "honey cake",
        "Wilma",
        "two cups of flour, a cup of honey, three eggs, a little ginger and a spoon of baking soda",
        "warm the honey until it runs",
        "beat in the eggs one after another",
        "sift the flour with the soda and the ginger and fold it in",
        "bake it in a {slow|gentle} oven for {forty|fifty} minutes",
        "with cold milk",
    ),
    (
        "apple pancakes",
        "Clara",
        "a cup of flour, a cup of milk, two eggs, two sour apples and a pinch of salt",
        "whisk the flour with the milk, the eggs and the salt",
        "let the batter rest while you peel and slice the apples",
        "melt butter in a pan, pour in a ladle of batter and lay the apples on top",
        "turn the pancake when the edge is brown",
        "with sugar and cinnamon",
    ),
    (
        "potato dumplings",
        "Nora",
        "two pounds of boiled potatoes, a cup of flour, one egg and some nutmeg",
        "mash the potatoes while they are hot",
        "work in the flour, the egg and the nutmeg with cool hands",
        "shape dumplings as big as {a plum|an egg}",
        "slide them into boiling water and wait until they float",
        "with brown butter",
    ),
    (
        "pickled herring",
        "Ida",
        "eight herring, two onions, a cup of vinegar, a spoon of sugar and some peppercorns",
        "clean the fish and take out the bones",
        "boil the vinegar with the sugar and the pepper and let it cool",
        "lay fish and onion rings in a jar by turns",
        "pour the vinegar over them and leave the jar in the cellar for {three|four} days",
        "with hot potatoes",
    ),
    (
        "plum jam",
        "Greta",
        "four pounds of ripe plums, two pounds of sugar and one stick of cinnamon",
        "halve the plums and take out the stones",
        "cover them with the sugar and leave them overnight",
        "cook them slowly with the cinnamon and stir without stopping",
        "when a drop stays firm on a cold plate, fill the jam into clean jars",
        "on warm toast",
    ),
    (
        "onion pie",
        "Edith",
        "a pound of onions, three eggs, a cup of cream, some bacon and a sheet of short pastry",
        "line a round tin with the pastry",
        "fry the onions with the bacon until they are golden",
        "mix the eggs with the cream and stir in the onions",
        "fill the tin and bake it for {half an hour|forty minutes}",
        "with a green salad",
    ),
    (
        "mussels in cider",
        "Samuel",
        "two pounds of mussels, a bottle of dry cider, two cloves of garlic and a bunch of parsley",
        "scrub the mussels and throw away any that stay open",
        "heat the cider with the chopped garlic",
        "tip in the mussels, put on the lid and shake the pot now and then",
        "after {five|six} minutes, when all have opened, scatter the parsley over them",
        "with plenty of bread",
    ),
    (
        "ginger biscuits",
        "Agnes",
        "two cups of flour, a cup of sugar, half a cup of butter, two spoons of ginger and one egg",
        "rub the butter into the flour",
        "add the sugar, the ginger and the egg and knead a firm dough",
        "roll it out thinly and cut out {stars|fish|little boats}",
        "bake them for {ten|twelve} minutes, until the edges are brown",
        "with black tea",
    ),
]

RECIPE = """
[items]. {First|To begin with,} [step1]. {Then|Next,} [step2]. {After that,|Now} [step3]. {Finally,|At the end,}
[step4]. {[serveit]|[best]} [serve]{, and do not expect any leftovers|, on a plate that you have warmed|}. {[name]
learnt it from {[his] mother|an old cook on the ferry|[his] aunt on the island}, {who never wrote anything down|who
made it every [day]}.|On a [sky] {day|evening} in [month] there is nothing better.|There is enough for {four
guests|six people}, or for [name2] alone.} {"{The secret is patience|Do not hurry it}," says [name], "{and good
butter|and the rest comes by itself|and never count the spoons}."|[name2] once {forgot half of it|read the recipe
upside down|mixed up salt and sugar}, and {people still talk about it|even the dog would not touch the result}.|If
you have no time, {invite a friend to help|ask [name2], who always has some left|do it tomorrow}.}
"""
PLURAL_DISHES = ("apple pancakes", "potato dumplings", "mussels in cider", "ginger biscuits")
RECIPE_OPENINGS = (
    "This is how [name] the [trade] makes [dish]. You need",
    "For [dish] as [name] the [trade] makes it, you need",
    "When [name] the [trade] makes [dish], the whole street comes to the window. [he] takes",
    "[name2] the [trade2] asked for the recipe for [dish], and [name] the [trade] wrote it down. Take",
)


def recipe(rng: random.Random) -> str:
    """Return a recipe with its steps in order."""
    dish, cook, items, step1, step2, step3, step4, serve = rng.choice(RECIPES)
    slots = english(rng, 1, absent=(cook,))
    slots |= {key + "2": slots[key] for key in ("name", "trade")} | person_slots(find_person(cook), "")
    slots |= {"dish": dish, "items": items, "serve": serve}
    slots |= {"step1": step1, "step2": step2, "step3": step3, "step4": step4}
    many = dish in PLURAL_DISHES
    slots |= {"serveit": "serve them" if many else "serve it", "best": "they are best" if many else "it is best"}
    return expand(rng, rng.choice(RECIPE_OPENINGS) + RECIPE, slots)


# wind, morning, afternoon, sea, what people should do
FORECASTS = [
    (
        "a light wind from the south",
        "the morning begins with some mist over the bay",
        "by noon the sun breaks through and it turns mild",
        "the sea is calm",
        "a good day for {washing|painting boats|a trip to the island}",
    ),
    (
        "a fresh wind from the west",
        "the morning is cloudy with a few showers",
        "in the afternoon it clears from the sea",
        "the waves are moderate",
        "small boats should stay inside {the bay|Gull Point}",
    ),
    (
        "a strong wind from the north-west",
        "rain sets in before dawn",
        "it rains until evening, with heavy gusts",
        "the sea is rough",
        "all boats should stay in harbour, and loose things should be tied down",
    ),
    (
        "a cold wind from the east",
        "the morning is clear and there is frost in the hollows",
        "the sky stays blue, but it does not get warm",
        "the sea is choppy",
        "gardeners should cover their {leeks|young plants}",
    ),
    (
        "hardly any wind",
        "thick fog lies over the harbour",
        "the fog lifts for an hour or two and then comes back",
        "the sea is flat",
        "the ferry will ring its bell and go at half speed",
    ),
    (
        "a changeable wind",
        "sun and clouds take turns",
        "there may be thunder towards evening",
        "the sea is quiet at first",
        "{kites|umbrellas|sunshades} should be taken in before {four|five} o'clock",
    ),
]

WEATHER = """
{The weather for [day], the [date] of [month].|Weather report for Saltmere, [day], the [date] of [month].} {We
expect [wind] today|There will be [wind]}: [morning], and [afternoon]. {[sea]|For sailors: [sea]}, and high tide is
at {half past|a quarter past|a quarter to} [hour] {in the morning|in the evening}. {That means: [tip].|Our advice:
[tip].} {[name] the [trade], who {has an eye for the sky|trusts [his] old barometer}, adds that {the gulls are
{flying high|walking on the beach}|the smoke from the chimneys is {rising straight up|creeping along the
ground}|[his] cat has {washed behind its ears|slept all day}}, and so {the weather will hold|a change is
near}.|[name2] the [trade2] {says|believes} that it will be {better|worse} than that, but [he2] {always says so|was
wrong last week}.} {The glass stands at {thirty|twenty-nine} inches and is {rising|falling slowly|steady}.|Last
night the lamp on Gull Point was lit at {six|seven|eight} o'clock.|} {The outlook for [day2]: {much the same|a
little colder|a little warmer|drier, with some sun|wet at first, then bright}.|Tomorrow will be {much the same|a
little warmer|a little colder}.}
"""


def weather(rng: random.Random) -> str:
    """Return a weather report that is one kind of weather throughout."""
    slots = english(rng)

    keys = ("wind", "morning", "afternoon", "sea", "tip")
    choices = [row for row in FORECASTS if slots["season"] != "summer" or "frost" not in row[1]]
    slots |= dict(zip(keys, rng.choice(choices), strict=True))
    slots["hour"] = rng.choice(("five", "six", "seven", "eight", "nine", "ten"))
    slots["day2"] = DAYS[(DAYS.index(slots["day"]) + 1) % 7]
    return expand(rng, WEATHER, slots)


CATCHES = ("herring", "mackerel", "cod", "plaice", "sprats", "crabs", "lobsters", "whiting")
CARGOES = [
    ("timber from the north", "the boatyard"),
    ("salt and coffee", "the shops in the square"),
    ("coal", "the forge"),
    ("wool from the islands", "the weavers"),
    ("flour and sugar", "the bakery"),
    ("[n3] crates of books", "the reading room"),
    ("bricks and lime", "the new sea wall"),
    ("wine and oranges", "the Blue Anchor"),
]
INCIDENTS = [
    "A rope was found in the harbour mouth and taken out before it could do any harm.",
    "The crane stood still for an hour because a gull had nested in the wheel.",
    "[name] the [trade] fell into the water while waving to a friend and was pulled out with a boat hook.",
    "The lamp at the end of the jetty went out at midnight, and [name] lit it again.",
    "Two crews quarrelled about a mooring and made peace over {soup|cider}.",
    "[name] the [trade] reported a seal asleep in a rowing boat, and it was left in peace.",
    "A barrel of pickled cabbage rolled off the quay, and it is still floating.",
]

HARBOUR = """
{Harbour report for [day], the [date] of [month].|From the book of the harbour master, [day], the [date] of
[month].} {[n] boats went out {with the morning tide|before dawn}, and {all of them came back|all are safely
back}.|{High water was early, and|The weather was [sky], and} [n] boats put to sea.} The [boat1] {brought in|landed}
[n2] baskets of [catch1], {the best catch of the week|as on the day before|which were sold at once}. The [boat2]
{came home with|had} [n3] baskets of [catch2]{| and a torn net|, but also much weed}. {The [boat3] stayed in port
because {her sail is being mended|her skipper has a cold|her mast is being painted}.|The [boat3] came in late,
{towed by the [boat1]|with a broken oar}, but nobody was hurt.|The [boat3] had no luck and {will try again
tomorrow|caught only an old boot}.} {In the afternoon|At noon} a {brig| schooner|steamer} from {the mainland|the
islands|the south} {unloaded|brought} [cargo] for [receiver]. {[incident]| [incident]|} {Harbour dues: [n] coins{,
all paid|, two of them owing|}.|The ferry made [n2] crossings.} {Water at the quay at low tide: [n3] feet.|The tide
will be high at [n2] tomorrow.} {Signed, Jonas, harbour master.|}
"""


def harbour(rng: random.Random) -> str:
    """Return a day's report from the harbour office."""
    slots = english(rng, 1, absent=("Jonas",))
    boats, catches = rng.sample(BOATS, 3), rng.sample(CATCHES, 2)
    cargo, receiver = rng.choice(CARGOES)
    slots |= {f"boat{index + 1}": boat for index, boat in enumerate(boats)}
    slots |= {"catch1": catches[0], "catch2": catches[1], "cargo": cargo, "receiver": receiver}
    return expand(rng, HARBOUR, slots | {"incident": rng.choice(INCIDENTS)})


# goods, was or were, the reason, the seasons in which it makes sense
RISES = [
    ("eggs", "were", "the hens are moulting", "autumn winter"),
    ("herring", "were", "the boats could not go out for three days", "spring summer autumn winter"),
    ("firewood", "was", "a cold spell is coming", "autumn winter"),
    ("honey", "was", "the bees had a wet summer", "autumn winter"),
    ("butter", "was", "the cows are still on dry hay", "winter spring"),
    ("onions", "were", "the frost spoiled many of them", "winter spring"),
    ("candles", "were", "the evenings are getting longer", "autumn"),
    ("lamp oil", "was", "the steamer from the mainland is late", "spring summer autumn winter"),
    ("flour", "was", "the miller is mending his wheel", "spring summer autumn winter"),
    ("lettuces", "were", "the slugs got to them first", "spring summer"),
    ("strawberries", "were", "it rained on them all week", "summer"),
]
FALLS = [
    ("cabbages", "were", "every garden is full of them", "autumn winter"),
    ("leeks", "were", "nobody can look at them any more", "winter spring"),
    ("mackerel", "were", "the bay is full of fish", "summer autumn"),
    ("cod", "was", "all the boats came home full", "winter spring"),
    ("apples", "were", "the trees are breaking under them", "autumn"),
    ("potatoes", "were", "two new fields were dug this week", "summer autumn"),
    ("wool", "was", "the shearing is over", "summer"),
    ("mussels", "were", "the spring tide laid bare the whole bank", "spring autumn winter"),
    ("plums", "were", "they will not keep until next week", "autumn"),
    ("cheese", "was", "there is more milk than anyone can drink", "spring summer"),
]

MARKET = """
{Market report for [day].|The market on [day], the [date] of [month].} {It was a [sky] day in [month], and {the
square was full by eight|[n] stalls were set up around the pump}.|[n] stalls stood in the square{, and the band
played|}, although the morning was [sky].} {The price of [up1] went up|[up1] cost more than last week}, because
[why1]: people {paid|had to pay} [n] coins for what cost [less] {a week ago|the week before}. [up2] {[up2were]
dearer|rose in price}, too, since [why2]. [down1], on the other hand, {could be had for next to nothing|[down1were]
cheap}, for [why3]. {The longest queue was at the stall of [name] the [trade], who {was giving away|had also
brought} [gift].|[name] the [trade] {sold out before noon|had a new sign painted} and {went home singing|gave
everyone a smile}.|[name] the [trade] had set up a table next to [name2] the [trade2], and the two {sang in
harmony|argued about the shade all day}.} {A {goat|dog|goose} {overturned a basket of eggs|ran off with a cabbage},
which {pleased the children|cost its owner [n2] coins}.|A man from the mainland sold {ribbons|pots|a syrup against
everything}, and {few people bought any|many people bought some}.|Nobody was cheated, as far as is known.} {At four
the bell was rung, and the square was swept.|The next market is on [day2].|By evening only {straw|cabbage leaves}
and sparrows were left in the square.}
"""


def market(rng: random.Random) -> str:
    """Return a report of prices in which every change has its reason."""
    slots = english(rng)
    up1, up2 = rng.sample([row for row in RISES if slots["season"] in row[3]], 2)
    down1 = rng.choice([row for row in FALLS if slots["season"] in row[3]])
    low = rng.randrange(2, 6)
    slots |= {"up1": up1[0], "why1": up1[2], "up2": up2[0], "up2were": up2[1], "why2": up2[2]}
    slots |= {"down1": down1[0], "down1were": down1[1], "why3": down1[2]}
    slots |= {"n": NUMBERS[low + rng.randrange(1, 4)], "less": NUMBERS[low]}
    slots["day2"] = rng.choice([day for day in DAYS if day != slots["day"]])
    return expand(rng, MARKET, slots)


# ---------------------------------------------------------------- Turkish: the town of Tuzlubük

# name: bare, of, to, accusative, from, with; then trade and present
KISILER = [
    ("Elif", "Elif'in", "Elif'e", "Elif'i", "Elif'ten", "Elif'le", "fırıncı", "sıcak bir somun ekmek"),
    ("Hasan", "Hasan'ın", "Hasan'a", "Hasan'ı", "Hasan'dan", "Hasan'la", "saatçi", "küçük bir pirinç çan"),
    ("Kerem", "Kerem'in", "Kerem'e", "Kerem'i", "Kerem'den", "Kerem'le", "marangoz", "üç ayaklı bir tabure"),
    ("Nuri", "Nuri'nin", "Nuri'ye", "Nuri'yi", "Nuri'den", "Nuri'yle", "tekne ustası", "oyma bir tahta kaşık"),
    ("Şükran", "Şükran'ın", "Şükran'a", "Şükran'ı", "Şükran'dan", "Şükran'la", "ağcı", "mavi ipten örülmüş bir file"),
    ("İbrahim", "İbrahim'in", "İbrahim'e", "İbrahim'i", "İbrahim'den", "İbrahim'le", "demirci", "uğurlu bir nal"),
    ("Ömer", "Ömer'in", "Ömer'e", "Ömer'i", "Ömer'den", "Ömer'le", "ayakkabıcı", "düğmeli bir deri kese"),
    ("Çiğdem", "Çiğdem'in", "Çiğdem'e", "Çiğdem'i", "Çiğdem'den", "Çiğdem'le", "dokumacı", "bir çift yün eldiven"),
    ("Murat", "Murat'ın", "Murat'a", "Murat'ı", "Murat'tan", "Murat'la", "balıkçı", "iki iri palamut"),
    ("Ayşe", "Ayşe'nin", "Ayşe'ye", "Ayşe'yi", "Ayşe'den", "Ayşe'yle", "öğretmen", "bir kavanoz vişne reçeli"),
    ("Güler", "Güler'in", "Güler'e", "Güler'i", "Güler'den", "Güler'le", "arıcı", "bir kavanoz çam balı"),
    ("Zeynep", "Zeynep'in", "Zeynep'e", "Zeynep'i", "Zeynep'ten", "Zeynep'le", "doktor", "bir şişe nar şerbeti"),
    ("Ilgın", "Ilgın'ın", "Ilgın'a", "Ilgın'ı", "Ilgın'dan", "Ilgın'la", "bahçıvan", "bir sepet incir"),
    ("Osman", "Osman'ın", "Osman'a", "Osman'ı", "Osman'dan", "Osman'la", "fenerci", "bir kutu zencefilli kurabiye"),
]
KISI_KEYS = ("ad", "adin", "ada", "adi", "addan", "adla", "meslek", "hediye")
# a time of year, a time of day with it, a sign of it, a month in it
MEVSIMLER = [
    ("kış", "soğuk bir kış", "bacalardan duman yükseliyordu", "Ocak"),
    ("kış", "karlı bir şubat", "sokaklar bembeyazdı", "Şubat"),
    ("ilkbahar", "yağmurlu bir nisan", "erik ağaçları çiçek açmıştı", "Nisan"),
    ("ilkbahar", "güneşli bir mayıs", "kırlangıçlar geri dönmüştü", "Mayıs"),
    ("yaz", "sıcak bir temmuz", "çocuklar iskeleden denize atlıyordu", "Temmuz"),
    ("yaz", "durgun bir ağustos", "bütün kasaba gül ve yosun kokuyordu", "Ağustos"),
    ("sonbahar", "sisli bir ekim", "bahçelerde elma toplanıyordu", "Ekim"),
    ("sonbahar", "rüzgârlı bir kasım", "rıhtımda kuru yapraklar uçuşuyordu", "Kasım"),
]
GUNLER = ("Pazartesi", "Salı", "Çarşamba", "Perşembe", "Cuma", "Cumartesi", "Pazar")
SAYILAR = ("iki", "üç", "dört", "beş", "altı", "yedi", "sekiz", "dokuz", "on")
TEKNELER = ("Martı", "Yıldız", "Kısmet", "Sabır", "Umut", "Yunus", "Ilgaz", "Deniz Kızı")


def turkish(rng: random.Random, num_people: int = 2, absent: tuple[str, ...] = ()) -> Slots:
    """Return the slots that all Turkish texts share; the second person's end in 2, the third's in 3."""
    mevsim, gun, isaret, ay = rng.choice(MEVSIMLER)
    slots = {"language": "tr", "mevsim": mevsim, "zaman": f"{gun} {{sabahı|günü}}", "isaret": isaret, "ay": ay}
    slots |= {"tarih": str(rng.randrange(1, 29)), "tekne": rng.choice(TEKNELER)}
    slots["gun"] = rng.choice(GUNLER)
    slots["gun_k"] = slots["gun"].lower()
    cast = rng.sample([kisi for kisi in KISILER if kisi[0] not in absent], num_people)
    for index, kisi in enumerate(cast):
        slots |= kisi_slots(kisi, "" if index == 0 else str(index + 1))
    for key, sayi in zip(("n", "n2", "n3"), rng.sample(SAYILAR, 3), strict=True):
        slots[key] = sayi
    return slots


def kisi_slots(kisi: tuple[str, ...], suffix: str) -> Slots:
    """Return the slots of one Turkish person, each key with the suffix."""
    return {key + suffix: value for key, value in zip(KISI_KEYS, kisi, strict=True)}


def find_kisi(name: str) -> tuple[str, ...]:
    """Return the row of KISILER with this name."""
    return next(kisi for kisi in KISILER if kisi[0] == name)


# mender, what was seen, what it led to, how it got there, the cause, the cure, the result
TAMIRLER = [
    (
        "Hasan",
        "mutfak saatinin durduğunu",
        "saat olmayınca her işe geç kalıyordu",
        "saati bir havluya sarıp saatçi Hasan'ın dükkânına götürdü",
        "Çarkların arasına kum girmiş",
        "bütün çarkları tek tek temizledi",
        "saat öyle güzel çalıştı ki sesi bütün evi doldurdu",
    ),
    (
        "Kerem",
        "bahçe kapısının kırıldığını",
        "komşunun keçileri içeri girip lahanaları yiyordu",
        "marangoz Kerem'in atölyesine gitti",
        "Kapının direği çürümüş",
        "meşeden yeni bir direk yaptı",
        "kapı yavaşça kapandı ve keçiler dışarıda kaldı",
    ),
    (
        "Nuri",
        "kayığının su aldığını",
        "kayık olmadan karşı kıyıya geçemiyordu",
        "kayığı ağır ağır tekne ustası Nuri'nin tersanesine kadar çekti",
        "Tahtalardan biri kayaya çarpıp yarılmış",
        "yeni bir tahta takıp aralarını ziftledi",
        "kayığın içine bir damla su bile girmedi",
    ),
    (
        "Şükran",
        "en iyi ağının yırtıldığını",
        "balıklar ağın bir yanından girip öbür yanından çıkıyordu",
        "ağı omzuna alıp ağcı Şükran'ın kulübesine götürdü",
        "Bunu bir fok yırtmış",
        "gözleri sağlam bir iple yeniden ördü",
        "ağdan tek bir balık bile kaçamadı",
    ),
    (
        "İbrahim",
        "kilerin kilidinin açılmadığını",
        "peynir de elmalar da içeride kalmıştı",
        "demirci İbrahim'in kapısını çaldı",
        "Tuzlu hava kilidi paslandırmış",
        "kilidi söküp temizledi ve güzelce yağladı",
        "anahtar tek parmakla döndü",
    ),
    (
        "Ömer",
        "çizmesinin tabanının ayrıldığını",
        "yağmurda ayakları hep ıslanıyordu",
        "çizmeyi bir iple bağlayıp ayakkabıcı Ömer'in dükkânına kadar yürüdü",
        "Deniz suyu dikişleri çürütmüş",
        "kalın deriden yeni bir taban dikti",
        "çizme yenisinden bile sağlam oldu",
    ),
    (
        "Çiğdem",
        "yün battaniyesinin delik deşik olduğunu",
        "geceleri rüzgâr her delikten içeri giriyordu",
        "battaniyeyi katlayıp dokumacı Çiğdem'in evine götürdü",
        "Bunu güveler yemiş",
        "eski desene yeni ipler ekledi",
        "deliklerin yerini kimse bulamadı",
    ),
]

TAMIR = """
{[zaman] [meslek] [ad], [bozuk] {gördü|fark etti}.|[meslek] [ad], [zaman] eve dönünce [bozuk] {gördü|fark etti}.}
{Buna çok {üzüldü|canı sıkıldı}, çünkü [sorun].|Bu hiç iyi olmadı, çünkü [sorun].} {Önce {bir çiviyle|biraz
tutkalla|bir parça iple} kendisi uğraştı ama {işi daha da bozdu|bir türlü beceremedi}.|"Bu iş bir ustanın işi," dedi
kendi kendine.|} {Sonunda|Ertesi gün|Öğleden sonra} [gotur]. [ad2] {uzun uzun baktı|çayını bir kenara
koydu|gözlüğünü taktı}, {başını salladı|biraz düşündü} ve "[neden]," dedi. {Akşama kadar|İki saat içinde|Akşam
ezanından önce} [tamir]. {İş bitince|Gerçekten de|Bu sefer} [son]. {[ad2] para istemeyince [ad] ona [hediye]
getirdi.|[ad] ona hem [n] lira hem de [hediye] verdi.|"Borcum ne kadar?" diye sordu [ad]. "Bir çayını içerim," dedi
[ad2].} {O günden sonra ikisi {iyi dost oldu|her hafta birlikte çay içti}.|"İyi komşu, iyi ustadır," derler
Tuzlubük'te.|[ad] o gün bu gündür [adi2] herkese över.}
"""


def tamir(rng: random.Random) -> str:
    """Return a Turkish story of a broken thing and the neighbour who mends it."""
    row = rng.choice(TAMIRLER)
    slots = turkish(rng, 1, absent=(row[0],)) | kisi_slots(find_kisi(row[0]), "2")
    if row[0] in ("Şükran", "Nuri"):
        slots |= kisi_slots(find_kisi("Murat"), "")
    slots |= dict(zip(("bozuk", "sorun", "gotur", "neden", "tamir", "son"), row[1:], strict=True))
    return expand(rng, TAMIR, slots)


# thing with my-his-her suffix in the accusative, bare, why it mattered
ESYALAR = [
    ("gümüş yüzüğünü", "yüzük", "yüzüğü", "yüzük ona ninesinden kalmıştı"),
    ("pirinç anahtarını", "anahtar", "anahtarı", "kilerin başka anahtarı yoktu"),
    ("cep saatini", "saat", "saati", "saat otuz yıldır bir dakika bile şaşmamıştı"),
    ("küçük pusulasını", "pusula", "pusulayı", "onu yaşlı bir denizci vermişti"),
    ("sedef düğmesini", "düğme", "düğmeyi", "on iki düğmeden sonuncusu oydu"),
    ("uğurlu parasını", "para", "parayı", "o para babasının cebinde iki kez denizleri aşmıştı"),
]
YERLER = [
    ("saat kulesindeki saksağan yuvasında", "saksağanlar parlak şeyleri çok sever"),
    ("iri bir levreğin karnında", "oraya nasıl girdiğini yalnız deniz bilir"),
    ("rıhtımın iki taşı arasında", "deniz aldığını çoğu zaman geri verir"),
    ("değirmenden gelen un çuvalında", "değirmenci hiçbir şey bilmediğine yemin etti"),
    ("köpeğin minderinin altında", "köpek ise tavana bakıp uyuyormuş gibi yaptı"),
    ("bir kova midyenin dibinde", "midyeler bu konuda tek söz etmedi"),
]

KAYIP = """
{[zaman] [meslek] [ad] [esyayi] kaybetti.|[meslek] [ad], [zaman] [esyayi] bulamadı.} {Çok üzüldü, çünkü [deger].|Bu
onun için büyük bir dertti, çünkü [deger].} {Evin her köşesini, {bahçeyi|avluyu} ve bütün ceplerini aradı ama
yalnızca {bir mum parçası|paslı bir çivi|üç ceviz} buldu.|Yatağın altına, sobanın arkasına, hatta çaydanlığın içine
bile baktı.} {Komşularına sordu, kimse görmemişti.|Sonra iskelenin kapısına bir kâğıt astı: "Kayıp [yalin]. Bulana
ödül verilecek."|} {İki gün sonra|Bir hafta sonra|Tam umudunu kesmişken} [meslek2] [ad2] {[esya_i] [yer] buldu|[yer]
bir şeyin parladığını gördü: kayıp [yalin] oradaydı}. {Hemen|Çayını bile bitirmeden} {koşup|sokağı tırmanıp} [adin]
kapısını çaldı. {"Onu bir daha göremem sanıyordum," dedi [ad] {ve güldü|ve gözleri doldu|ve [adi2] kucakladı}.|[ad]
sevincinden sokağın ortasında {şarkı söyledi|oynamaya başladı}.} {Ödül olarak ona [hediye] verdi.|Teşekkür etmek
için [ada2] [hediye] verdi.} {Doğrusu,|Ne diyelim,|} [soz].
"""


def kayip(rng: random.Random) -> str:
    """Return a Turkish story of a thing lost and found."""
    esyayi, yalin, esya_i, deger = rng.choice(ESYALAR)
    yer, soz = rng.choice(YERLER)
    slots = turkish(rng) | {"esyayi": esyayi, "yalin": yalin, "esya_i": esya_i, "deger": deger, "yer": yer, "soz": soz}
    return expand(rng, KAYIP, slots)


FIRTINALAR = [
    (
        "batıdan koyu bir sis geldi ve kıyı gözden kayboldu",
        "yelkeni indirip fenerin çanını dinledi",
        "çanın sesini izleyerek ağır ağır limana döndüler",
        "denizde kulak da göz kadar işe yarar",
    ),
    (
        "rüzgâr poyraza döndü ve dalgalar büyüdü",
        "yelkeni küçülttü ve burnu dalgalara çevirdi",
        "iki zor saatten sonra mendireğin arkasına sığındılar",
        "dikkatli denizci uzun yaşar",
    ),
    (
        "dümen büyük bir gürültüyle kırıldı",
        "kıça bir kürek bağladı ve tekneyi onunla yönetti",
        "geniş bir yay çizip rıhtıma yanaştılar",
        "fazla kürek göz çıkarmaz",
    ),
    (
        "gevşek bir tahtadan içeri su girmeye başladı",
        "deliğe yün ceketini tıkadı ve çorba tenceresiyle suyu boşalttı",
        "ayakları ıslak ama keyifleri yerinde kıyıya çıktılar",
        "her teknede bir tencere bulunmalı",
    ),
    (
        "rüzgâr kesildi ve deniz çarşaf gibi oldu",
        "küreklere asıldı ve bildiği bütün şarkıları söyledi",
        "hava karardıktan sonra pencereleri ışıl ışıl olan limana vardılar",
        "şarkı yolu kısaltır",
    ),
    (
        "ağ ağır bir şeye takıldı",
        "akıntının dönmesini bekledi ve sonra bütün gücüyle çekti",
        "yosunlu eski bir çapa ve yılın en dolu ağıyla döndüler",
        "deniz bekleyene cömert davranır",
    ),
]

DENIZ = """
{[gunu] balıkçı Murat, [tekne] adlı teknesiyle {gün doğmadan|şafakta} denize açıldı.|[tekne] eski bir teknedir ama
balıkçı Murat onu hiçbir tekneye değişmez. [gunu] onunla {burnun ötesine|adanın arkasına} kadar gitti.} Yanında
[meslek] [ad] vardı; {daha önce bu kadar açılmamıştı|derin sudan biraz korkuyordu|yol boyunca durmadan konuştu}.
{Başta her şey yolundaydı: {deniz sakindi, martılar peşlerinden geliyordu|kısa sürede [n] kasa
{istavrit|uskumru|hamsi} tuttular}.|Bir iki saat ekmek, peynir ve zeytin yiyip {balık tuttular|hikâyeler
anlattılar}.} {Derken|Birden|Öğleye doğru} [bela]. {"Şimdi ne yapacağız?" diye sordu [ad]. "{Korkma|Sıkı tutun},"
dedi Murat.|[adin] yüzü bembeyaz oldu ama Murat {sakindi|yalnızca ıslık çaldı}.|} {Murat|Kaptan} [care]. {Uzun sürdü
ama [son].|Böylece [son].} {Rıhtımda [ad2] onları {sıcak çayla|kuru battaniyelerle|elinde bir fenerle} bekliyordu.|O
akşam {kahvede|ateşin başında} {balık yiyip|çay içip} {olanları anlattılar|güldüler}.} "[soz]," dedi Murat{, kimse
karşı çıkmadı| ve [ad] başını salladı}.
"""


def deniz(rng: random.Random) -> str:
    """Return a Turkish story of a boat trip that goes wrong and ends well."""
    slots = turkish(rng, 2, absent=("Murat",))
    slots["gunu"] = slots["zaman"].replace("{sabahı|günü}", "günü")
    slots |= dict(zip(("bela", "care", "son", "soz"), rng.choice(FIRTINALAR), strict=True))
    return expand(rng, DENIZ, slots)


# animal, its name, the name in the accusative, habit, deed, proof, remedy, result
HAYVANLAR = [
    (
        "kedisi",
        "Biber",
        "Biber'i",
        "her gece balık kasasında uyurdu",
        "sofradan koca bir {lüfer|palamut} çaldı",
        "yerdeki kılçıklar odunluğa kadar gidiyordu",
        "kediye ayrı bir tabak alıp her gün aynı saatte doldurdu",
        "sofradan bir şey eksilmiyor, en azından büyük bir şey eksilmiyor",
    ),
    (
        "köpeği",
        "Fındık",
        "Fındık'ı",
        "gördüğü her şemsiyeye havlardı",
        "[adin2] ayakkabısının tekini kaçırdı",
        "çiçeklerin arasında taze çukurlar vardı",
        "bir saat toprağı kazıp ayakkabıyı buldu, yanında da dört tane daha",
        "Fındık ayakkabı yerine gazete taşıyor ve bununla çok övünüyor",
    ),
    (
        "keçisi",
        "Düşes",
        "Düşes'i",
        "kasabadaki bütün kapıları açabilirdi",
        "[adin2] ipe astığı {çarşafı|masa örtüsünü} yedi",
        "ağzının kenarında hâlâ mavi bir bez sallanıyordu",
        "keçinin boynuna bir çan, kapıya da ikinci bir sürgü taktı",
        "herkes çanı duyunca çamaşırını içeri alıyor",
    ),
    (
        "eşeği",
        "Paşa",
        "Paşa'yı",
        "her gün yokuş yukarı odun taşırdı",
        "köprünün ortasında durdu ve bir adım bile atmadı",
        "arkasında [n] araba sıraya girmişti",
        "ona bir havuç uzatıp kulağına tatlı sözler söyledi",
        "onu gezdiren herkesin cebinde bir havuç bulunuyor",
    ),
    (
        "tavuğu",
        "Pamuk",
        "Pamuk'u",
        "çarşıda kendi eviymiş gibi gezerdi",
        "kümeste yumurtlamayı bıraktı",
        "[adin2] dolabından yavaş yavaş gıdaklama sesleri geliyordu",
        "tavuğu [n] yumurtasıyla birlikte samanlı bir kutuya taşıdı",
        "civcivler onun arkasında tek sıra yürüyor",
    ),
]

HAYVAN = """
{[meslek] [adin] Tuzlubük'te herkesin tanıdığı [hayvan] [isim], [huy].|[meslek] [adin] [hayvan] [isim], [huy].}
[zaman] [isim] [suc]. {"Bu hayvan bizi bir gün çıldırtacak!" diye bağırdı [meslek2] [ad2].|[meslek2] [ad2] buna hiç
gülmedi ve [ada] şikâyete geldi.|[meslek2] [ad2] önce güldü ama sonra bir çare aranmasını istedi.} {[ad] önce
inanmadı|"Olamaz," dedi [ad]}, ama [kanit]. {Biraz düşündü, sonra|İçini çekti, kollarını sıvadı ve} [care]. {Gönlünü
almak için [ada2] [hediye] götürdü.|üstelik [ada2] [hediye] verdi, böylece barıştılar.} {Şimdi|Artık} [son].
{"[isim_i] görünce insan uzun süre kızgın kalamıyor," diyor [ad2].|İki komşu eskisinden de iyi dost oldu.|[ada]
sorarsanız, kusursuz hayvan {can sıkıcı olurmuş|dünyada yokmuş}.}
"""


def hayvan(rng: random.Random) -> str:
    """Return a Turkish story of an animal's mischief."""
    keys = ("hayvan", "isim", "isim_i", "huy", "suc", "kanit", "care", "son")
    return expand(rng, HAYVAN, turkish(rng) | dict(zip(keys, rng.choice(HAYVANLAR), strict=True)))


HABERLER = [
    ("Elif", "Elif yeni bir fırın yaptırdı; sabahları bütün sokak {tarçın|taze ekmek} kokuyor."),
    ("Hasan", "Hasan sonunda kulenin saatini onardı, artık hepimiz vaktinde gelmek zorundayız."),
    ("Kerem", "Kerem okulun çatısını onarıyor, sabahtan akşama kadar çekiç sesi duyuyoruz."),
    ("Nuri", "Nuri {yeşil|kırmızı|mavi} bir tekne indirdi, suda ördek gibi duruyor."),
    ("Şükran", "Şükran bir haftada [n] ağ onardı, artık ip görmek istemiyormuş."),
    ("İbrahim", "İbrahim belediyeye yeni bir rüzgâr gülü yaptı, {tıpkı kendisine benziyor|herkes çok beğendi}."),
    ("Ömer", "Ömer'in vitrininde kocaman bir çift çizme duruyor, kimin olduğunu kimse bilmiyor."),
    ("Çiğdem", "Çiğdem, üzerinde [n] tekne ve bir fener olan büyük bir halı dokuyor."),
    ("Murat", "Murat öyle büyük bir balık tuttu ki {onu iki kişi taşıdı|masaya sığmadı}."),
    ("Ayşe", "Ayşe çocukları kayalıklara götürdü, [n] yengeç ve ıslak çoraplarla döndüler."),
    ("Güler", "Güler'in arıları muhtarın şapkasına kondu, o da hepsini sepetle eve taşıdı."),
    ("Zeynep", "Zeynep, hava güzel olduğu için kimsenin hasta olmaya vakit bulamadığını söylüyor."),
    ("Ilgın", "Ilgın'ın bahçesinde bu yıl [n] kiloluk bir kabak yetişti."),
    ("Osman", "Osman geçen gece fenerden [n] yunus saymış."),
]
RICALAR = [
    "Gelirken {biraz sarı yün|iyi bir kahve|kemanını} getirmeyi unutma.",
    "Bana {erik keki tarifini|gül fidanlarından birkaçını|yıldızlarla ilgili o kitabı} gönderir misin?",
    "Ne olur bir haftalığına bize gel, küçük oda {sıcak ve kuru|güneş içinde}.",
    "Çabuk yaz, {dizinin|bebeğin|yeni evin|bahçenin} nasıl olduğunu merak ediyorum.",
]

MEKTUP = """
Sevgili [dost], {güzel mektubun [gun_k] günü elime geçti, çok sevindim|uzun zamandır yazamadım, kusura bakma|umarım
iyisindir ve öksürüğün geçmiştir}. {Burada [mevsim] geldi; geçen gün baktım, [isaret].|Tuzlubük'te yine [mevsim];
dün sabah çarşıya çıktığımda [isaret].} {Ben iyiyim, yalnız {işler çok|biraz uykusuzum}.|Bende her şey yolunda.}
{Kasabadan haber soruyorsun, anlatayım.|Sana birkaç haberim var.|Şimdi gelelim haberlere.} [haber1] [haber2]
{[haber3]|} {Ben ise {yüzmeyi öğrendim|tavuk beslemeye başladım|yine keman çalıyorum}, {bu yaşta|inanmazsın
ama}.|Geçen gün {iskelede çekilmiş eski bir fotoğrafımızı|senin eski mektuplarını} buldum ve uzun uzun baktım.|}
[rica] {Bu mektupla birlikte sana küçük bir paket de gönderiyorum.|} {Seni özleyen arkadaşın, [ad].|Gözlerinden
öperim, [ad].|Tuzlubük'ten sevgiler, [ad].|Evdekilere de çok selam, [ad].}
"""


def mektup(rng: random.Random) -> str:
    """Return a Turkish letter to a friend elsewhere."""
    slots = turkish(rng, 1)
    haberler = rng.sample([text for name, text in HABERLER if name != slots["ad"]], 3)
    slots |= {"haber1": haberler[0], "haber2": haberler[1], "haber3": haberler[2], "rica": rng.choice(RICALAR)}
    slots["dost"] = rng.choice(("Leyla", "Cemal", "Işıl", "Selim", "Nermin", "Yusuf", "Gülizar", "İsmail"))
    return expand(rng, MEKTUP, slots)


ISLER = {
    "Elif": "Gün doğmadan [n] tepsi poğaça pişirdim. Maya çok canlıydı, hamur neredeyse tekneden taşıyordu.",
    "Hasan": "Kulenin saatini [n] dakika ileri aldım. Kasabanın yarısı geç kaldı ve bana kızdı.",
    "Kerem": "Okul için [n] sandalye bitirdim. Küçük ama sağlamlar, tıpkı üzerinde oturacak çocuklar gibi.",
    "Nuri": "Yeni teknenin son tahtasını büktüm. Buharda [n] saat durunca kurdele gibi kıvrıldı.",
    "Şükran": "Hava kararana kadar ağ ördüm. Köpekbalığı [n] ipi koparmış, ne açgözlü bir hayvan.",
    "İbrahim": "[n] at nalladım. Sonuncusu bana çit gibi yaslandı.",
    "Ömer": "[n] çift çizmeye yeni taban diktim. İnsanın hayatı topuğundan okunur.",
    "Çiğdem": "Beyaz kenarlı gri kumaştan [n] arşın dokudum. Tezgâhın sol yanı gıcırdıyor, yağlamam gerek.",
    "Murat": "Erkenden denize çıktım. [n] kasa istavrit ve kolumu bırakmayan bir yengeç tuttum.",
    "Ayşe": "Küçüklere rüzgârların adlarını öğrettim. Biri poyrazı sakallı bir adam sanıyormuş.",
    "Güler": "[n] eski kovanı onarıp beyaza boyadım. Arılar içeride alçak sesle vızıldıyordu.",
    "Zeynep": "[n] hasta geldi, en kötüsü parmağa batan bir oltaydı. Böyle günleri severim.",
    "Ilgın": "Serada [n] saksının toprağını değiştirdim. Toprağın kokusu bana iyi geliyor.",
    "Osman": "Büyük merceği, içinde kirpiklerimi görene kadar sildim. Uzaktan [n] gemi geçti.",
}

GUNLUK = """
[tarih] [ay], [gun]. {Martılar yüzünden erken uyandım.|Kötü uyudum, geç kalktım.|Deliksiz bir uyku uyudum.}
{Pencereden baktım, [isaret].|Dışarı çıktığımda [isaret].} [is] {Öğleyin [ad2] uğradı; {merdivenimi istedi|biraz
konuşmak istedi}. {Bana, {cumartesi günü eğlence olacağını|muhtarın köprüyü maviye boyatacağını|hana bir yabancının
geldiğini} anlattı. {Bakalım.|Hiç inanmadım.|İnsanlara konuşacak konu çıktı.}|Duvarın üstüne oturup bir elmayı
paylaştık ve eski günlere güldük.}|Çarşıda [adi2] gördüm. {Yorgundu, sepetini ben taşıdım.|Keyfi yerindeydi; beni
tavlaya oturttu ve yendi.}} {Öğleden sonra {bahçenin çitini onardım, hiç değilse en kötü yerini|ablama mektup yazıp
yalnız iyi şeyleri anlattım|bir saat yağmur yağdı, ben de pencerenin önünde kitap okudum}.|Öğleden sonra gözlüğümü
aradım, meğer burnumun üstündeymiş.} {Akşam yemeği: {çorba ve ekmek|kızarmış balık|mercimek ve pilav}. {Yetti de
arttı.|Çok yedim.|Yarısını kedi yedi.}} {Yarın {lamba yağı almayı|[ada3] borcumu ödemeyi|merdiveni geri götürmeyi}
unutmamalıyım.|Aslında güzel bir gündü.|Yarın daha erken kalkacağım; bunu her akşam söylüyorum.|Lambanın ışığı
azaldı, deniz {sakin|gürültülü}. İyi geceler.}
"""


def gunluk(rng: random.Random) -> str:
    """Return a Turkish diary entry."""
    slots = turkish(rng, 3)
    return expand(rng, GUNLUK, slots | {"is": ISLER[slots["ad"]]})


PAZARLIKLAR = [
    ("Elif", "Bir somun ekmek", "Bu ekmek geçen hafta daha büyüktü.", "Ekmek aynı ekmek, sen daha açsın"),
    ("Murat", "Bir kilo hamsi", "Taze mi?", "Bir saat önce akşam için planları vardı"),
    ("Güler", "Bir kavanoz bal", "Rengi niye bu kadar koyu?", "Arılar çamdaydı, çam balı koyu olur"),
    ("Ömer", "Bir çift çizme", "Su geçirir mi?", "Sen içinde durdukça geçirmez"),
    ("Çiğdem", "Bir yün battaniye", "İnsanı kaşındırır mı?", "Yalnız ilk kış kaşındırır"),
    ("Kerem", "Bir tabure", "Niye yalnız üç ayağı var?", "Çünkü üç ayak hiç sallanmaz"),
    ("Hasan", "Bir çalar saat", "Sesi yüksek mi?", "Ben yan evde oturuyorum, beni bile uyandırıyor"),
    ("Ilgın", "Bir sepet incir", "Bunlar tatlı mı?", "Arılar benden önce baktı, beğendiler"),
]

PAZARLIK = """
{"Günaydın|"Kolay gelsin|"Hayırlı işler}, [ad]," dedi [meslek2] [ad2]. "[mal] kaç lira?" "{Yirmi|Otuz|Kırk|Elli}
lira," dedi [meslek] [ad], "{her kuruşuna değer|sana özel fiyat|daha aşağısı olmaz}." [ad2] {dudağını büktü|çenesini
kaşıdı|gidiyormuş gibi yaptı}. "[kusku]" "[cevap]," dedi [ad]. {[ad2] gülmemek için kendini zor tuttu.|[ad2] yüksek
sesle güldü.} "{Yarısını versem, üstüne de|Biraz aşağı insen, ben de} [hediye2] {eklesem|versem} olur mu?" diye
sordu. [ad] {biraz düşündü|gökyüzüne baktı|parmaklarıyla hesap yaptı}. "{Olsun bakalım|Anlaştık|Hadi olsun}," dedi
{sonunda|gülerek} ve el sıkıştılar. {Sırada bekleyen [ad3], "{Siz bunu her hafta yapıyorsunuz|Sizi beklerken öğlen
oldu}," dedi.|"Haftaya yine gelirim," dedi [ad2]. "Gelmezsen {özlerim|fiyatı artırırım}," dedi [ad].} {Böylece ikisi
de kârlı çıktığına inanarak evine gitti.|Tuzlubük'te kimse iki laf etmeden alışveriş yapmaz.|}
"""


def pazarlik(rng: random.Random) -> str:
    """Return a Turkish dialogue between a seller and a buyer."""
    satici, mal, kusku, cevap = rng.choice(PAZARLIKLAR)
    slots = turkish(rng, 3, absent=(satici,))
    slots |= kisi_slots(find_kisi(satici), "") | {"mal": mal, "kusku": kusku, "cevap": cevap}
    return expand(rng, PAZARLIK, slots)


TARIFLER = [
    (
        "balık çorbası",
        "yarım kilo beyaz balık, iki soğan, üç patates, bir havuç ve yarım limon",
        "soğanları doğrayıp tereyağında kavurun",
        "küp küp doğranmış patatesi ve havucu ekleyip üzerini suyla örtün",
        "sebzeler yumuşayınca balığı koyup beş dakika pişirin",
        "limonu sıkıp biraz maydanoz serpin",
        "sıcak ekmekle",
    ),
    (
        "mercimek çorbası",
        "iki bardak kırmızı mercimek, bir soğan, bir havuç, biraz nane ve tereyağı",
        "soğanı ve havucu yağda çevirin",
        "yıkanmış mercimeği ve altı bardak suyu ekleyin",
        "mercimek dağılınca çorbayı süzgeçten geçirin",
        "naneyi tereyağında kızdırıp üzerine gezdirin",
        "limonla",
    ),
    (
        "ballı kek",
        "iki bardak un, bir bardak bal, üç yumurta, biraz zencefil ve karbonat",
        "balı hafifçe ısıtın",
        "yumurtaları teker teker ekleyip çırpın",
        "unu, karbonatı ve zencefili eleyip karışıma katın",
        "orta sıcaklıktaki fırında kırk dakika pişirin",
        "soğuk sütle",
    ),
    (
        "erik reçeli",
        "iki kilo olgun erik, bir kilo şeker ve bir çubuk tarçın",
        "erikleri yıkayıp çekirdeklerini çıkarın",
        "üzerine şekeri döküp bir gece bekletin",
        "tarçını ekleyip ağır ateşte karıştırarak pişirin",
        "koyulaşınca temiz kavanozlara doldurun",
        "kızarmış ekmekle",
    ),
    (
        "midye pilavı",
        "iki bardak pirinç, otuz midye, bir soğan, kuş üzümü ve biraz tarçın",
        "midyeleri güzelce yıkayıp buharda açın",
        "soğanı yağda pembeleşene kadar kavurun",
        "pirinci, üzümü ve midyenin suyunu ekleyip kısık ateşte pişirin",
        "midyeleri üzerine dizip tencereyi on dakika dinlendirin",
        "ayranla",
    ),
    (
        "soğanlı börek",
        "dört yufka, beş soğan, iki yumurta, bir bardak süt ve biraz peynir",
        "soğanları ince ince doğrayıp kavurun",
        "yumurtayı sütle çırpıp yufkaların arasına sürün",
        "soğanı ve peyniri yayıp yufkaları rulo yapın",
        "üzeri kızarana kadar fırında pişirin",
        "çayla",
    ),
]

TARIF = """
{[meslek] [ad] [yemek] yapınca bütün sokak pencereye koşar. Malzemeler şunlar:|[meslek2] [ad2], [addan] [yemek]
tarifini istedi, o da yazıp verdi. Gerekenler:|[ad] usulü [yemek] için gerekenler:} [malzeme]. {Önce|İlk olarak}
[adim1]. {Sonra|Ardından} [adim2]. {Bundan sonra|Daha sonra} [adim3]. {En sonunda|Son olarak} [adim4]. {En iyisi
[servis] yenir.|Sofraya [servis] getirin{, ama artmasını beklemeyin|}.} {[ad] bunu {annesinden|adadaki
teyzesinden|yaşlı bir gemi aşçısından} öğrenmiş; {o da hiçbir şeyi yazmazmış|o da bunu her {cuma|pazar}
yaparmış}.|Bu kadarı {dört misafire|altı kişiye} ya da tek başına [ada2] yeter.} {"{İşin sırrı sabır|Acele
etmeyin}," der [ad], "{gerisi kendiliğinden gelir|bir de iyi tereyağı}."|[ad2] bir keresinde {tuzla şekeri
karıştırdı|tarifi ters okudu}, {kasabada hâlâ konuşulur|köpek bile yemedi}.|Vaktiniz yoksa {yarın yapın|[ada2]
uğrayın, onda hep bulunur}.}
"""


def tarif(rng: random.Random) -> str:
    """Return a Turkish recipe."""
    keys = ("yemek", "malzeme", "adim1", "adim2", "adim3", "adim4", "servis")
    return expand(rng, TARIF, turkish(rng) | dict(zip(keys, rng.choice(TARIFLER), strict=True)))


HAVALAR = [
    (
        "lodos hafif esecek",
        "sabah körfezde biraz pus olacak",
        "öğleden sonra güneş açacak",
        "deniz sakin",
        "{çamaşır asmak|tekne boyamak|adaya gitmek} için güzel bir gün",
    ),
    (
        "poyraz sert esecek",
        "sabaha karşı yağmur başlayacak",
        "yağmur akşama kadar sürecek",
        "deniz dalgalı",
        "tekneler limanda kalmalı, uçabilecek eşyalar bağlanmalı",
    ),
    (
        "rüzgâr batıdan orta kuvvette esecek",
        "sabah bulutlu ve yer yer sağanak yağışlı geçecek",
        "öğleden sonra hava açacak",
        "deniz biraz çalkantılı",
        "küçük tekneler körfezden çıkmamalı",
    ),
    (
        "rüzgâr neredeyse hiç esmeyecek",
        "sabah limanı yoğun bir sis kaplayacak",
        "sis öğleyin dağılıp akşam geri gelecek",
        "deniz çarşaf gibi",
        "vapur çan çalarak yarı hızla gidecek",
    ),
    (
        "rüzgâr sık sık yön değiştirecek",
        "güneşle bulutlar nöbetleşecek",
        "akşama doğru gök gürleyebilir",
        "deniz şimdilik durgun",
        "{çamaşırları|uçurtmaları} saat dörtten önce içeri almak iyi olur",
    ),
]

HAVA = """
{[tarih] [ay] [gun] günü için hava raporu.|Tuzlubük hava raporu, [tarih] [ay], [gun].} Bugün [ruzgar]. {[sabah],
[ogle].|Tahmine göre [sabah], [ogle].} [denizhali]; bu yüzden [oneri]. {[meslek] [ad], {martıların {alçaktan
uçtuğunu|kumsalda yürüdüğünü}|kedisinin {bütün gün uyuduğunu|kulağının arkasını yaladığını}|bacalardan çıkan dumanın
{dimdik yükseldiğini|yere çöktüğünü}} söylüyor; ona göre {hava böyle sürecek|hava yakında değişecek}.|[meslek2]
[ad2] havanın bundan {daha iyi|daha kötü} olacağına inanıyor, ama {o hep böyle der|geçen hafta da yanılmıştı}.}
{Fener dün gece saat {altıda|yedide|sekizde} yakıldı.|Barometre {yükseliyor|yavaş yavaş düşüyor|değişmedi}.|} {Yarın
için beklenen: {aşağı yukarı aynı hava|biraz daha soğuk bir gün|biraz daha ılık bir gün|önce yağmur, sonra
güneş}.|Yarın hava {biraz ısınacak|biraz soğuyacak|pek değişmeyecek}.}
"""


def hava(rng: random.Random) -> str:
    """Return a Turkish weather report."""
    keys = ("ruzgar", "sabah", "ogle", "denizhali", "oneri")
    return expand(rng, HAVA, turkish(rng) | dict(zip(keys, rng.choice(HAVALAR), strict=True)))


BALIKLAR = ("istavrit", "uskumru", "hamsi", "lüfer", "palamut", "barbun", "mezgit")
YUKLER = ("kereste", "tuz ve kahve", "kömür", "un ve şeker", "tuğla ve kireç", "portakal ve limon", "kitap ve defter")
OLAYLAR = [
    "Liman ağzında yüzen bir halat bulundu ve zarar vermeden çıkarıldı.",
    "Bir martı vincin tekerine yuva yaptığı için vinç bir saat çalışmadı.",
    "[meslek] [ad], arkadaşına el sallarken suya düştü ve kancayla çıkarıldı.",
    "İskelenin ucundaki lamba gece yarısı söndü, [ad] onu yeniden yaktı.",
    "İki tayfa bağlama yeri yüzünden tartıştı, sonra çay içip barıştı.",
    "[meslek] [ad] bir sandalda uyuyan bir fok gördü; ona dokunulmadı.",
    "Rıhtımdan bir fıçı turşu yuvarlandı ve hâlâ yüzüyor.",
]

LIMAN = """
{[tarih] [ay] [gun], liman raporu.|Liman defterinden, [tarih] [ay], [gun].} {Şafakta [n] tekne denize açıldı ve
hepsi {sağ salim|akşamdan önce} döndü.|Hava uygun olduğu için [n] tekne balığa çıktı.} [tekne1] [n2] kasa [balik1]
getirdi; {bu, haftanın en iyi avıydı|hepsi hemen satıldı}. [tekne2] ise [n3] kasa [balik2] {tuttu|ile döndü}{, ama
ağı yırtıldı|}. {[tekne3], {yelkeni dikildiği|kaptanı hasta olduğu|direği boyandığı} için limanda kaldı.|[tekne3]
{kırık bir kürekle|bir başka teknenin yardımıyla} geç döndü, ama kimseye bir şey olmadı.|[tekne3] adlı teknenin
{şansı yoktu, yarın yeniden deneyecek|ağından yalnız eski bir çizme çıktı}.} {Öğleden sonra|Öğleyin}
{adalardan|karşı kıyıdan|güneyden} gelen bir {yelkenli|vapur} [yuk] indirdi. {[olay]|[olay]|} {Liman parası: [n2]
lira{, hepsi ödendi|}.|Vapur [n2] sefer yaptı.} {Yarın sular saat [n3] civarında yükselecek.|Gece rıhtımda {her şey
sakindi|yalnız martıların sesi vardı}.} {İmza: liman başkanı Cevdet.|}
"""


def liman(rng: random.Random) -> str:
    """Return a Turkish day's report from the harbour."""
    slots = turkish(rng, 1)
    tekneler, baliklar = rng.sample(TEKNELER, 3), rng.sample(BALIKLAR, 2)
    slots |= {f"tekne{index + 1}": tekne for index, tekne in enumerate(tekneler)}
    slots |= {"balik1": baliklar[0], "balik2": baliklar[1], "yuk": rng.choice(YUKLER), "olay": rng.choice(OLAYLAR)}
    return expand(rng, LIMAN, slots)


# ---------------------------------------------------------------- the file

ENGLISH: list[Maker] = [
    repair_story,
    lost_story,
    sea_story,
    animal_story,
    contest_story,
    lesson_story,
    parcel_story,
    letter,
    diary,
    bargain,
    advice,
    recipe,
    weather,
    harbour,
    market,
]
TURKISH: list[Maker] = [tamir, kayip, deniz, hayvan, mektup, gunluk, pazarlik, tarif, hava, liman]


def make_paragraphs(rng: random.Random, makers: list[Maker], num_chars: int) -> list[str]:
    """Return different paragraphs of MIN_CHARS to MAX_CHARS, the makers by turns, of num_chars characters in all."""
    paragraphs: dict[str, None] = {}
    total = turn = 0
    while total < num_chars:
        text = makers[turn % len(makers)](rng)
        if text not in paragraphs and MIN_CHARS <= len(text) <= MAX_CHARS:
            paragraphs[text] = None
            total += len(text)
            turn += 1
    return list(paragraphs)


def make_corpus(seed: int, english_chars: int = 620_000, turkish_chars: int = 155_000) -> str:
    """Return the whole corpus, one paragraph per document, a blank line between them, languages mixed."""
    rng = random.Random(seed)
    paragraphs = make_paragraphs(rng, ENGLISH, english_chars) + make_paragraphs(rng, TURKISH, turkish_chars)
    rng.shuffle(paragraphs)
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    """Write the corpus and print its size."""
    parser = argparse.ArgumentParser(description="Write the English and Turkish sample corpus.")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("sample_corpus.txt"), help="text file")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other texts of the same kinds")
    args = parser.parse_args()
    corpus = make_corpus(args.seed)
    args.output.write_text(corpus, encoding="utf-8", newline="\n")
    num_paragraphs = corpus.count("\n\n") + 1
    print(f"{args.output}: {num_paragraphs} paragraphs, {len(corpus)} characters, {len(corpus.encode())} bytes")


if __name__ == "__main__":
    main()
