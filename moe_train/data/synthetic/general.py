"""Domain general: stories, letters and recipes of everyday life, in which people keep their names and belongings."""

from __future__ import annotations

from moe_train.data.synthetic.draw import Draw
from moe_train.data.synthetic.grammar import Writer
from moe_train.data.synthetic.people import WORDS as PEOPLE
from moe_train.data.synthetic.people import fix_people

WORDS = PEOPLE | {
    "thing": (
        "umbrella bicycle lantern violin kettle map basket camera blanket notebook clock kite compass scarf suitcase"
    ).split(),
    "animal": ("dog", "cat", "goat", "heron", "donkey", "parrot", "hedgehog", "rabbit"),
    "spot": (
        "bakery",
        "harbour",
        "library",
        "orchard",
        "bridge",
        "attic",
        "railway station",
        "village square",
        "meadow",
    ),
    "weather": ("rain", "fog", "sunshine", "snow", "thunder", "a cold wind", "drizzle"),
    "feeling": ("happy", "tired", "curious", "homesick", "cheerful", "lonely", "surprised", "proud"),
    "color": ("red", "yellow", "grey", "violet", "turquoise", "brown", "pale green"),
    "when": ("in the morning", "after lunch", "at dusk", "before dawn", "on Sunday", "last winter", "around midnight"),
    "walked": ("walked", "hurried", "wandered", "cycled", "strolled", "tiptoed"),
    "food": ("soup", "plum cake", "porridge", "dumplings", "lentil stew", "pancakes", "roast chestnuts"),
    "ingredient": ("flour", "butter", "onions", "carrots", "honey", "walnuts", "milk", "parsley", "plums", "lentils"),
    "unit": ("cups", "spoons", "handfuls", "grams"),
    "stir": ("stir", "knead", "whisk", "simmer", "fold", "season"),
    "relative": ("grandmother", "uncle", "neighbour", "cousin", "little sister", "old teacher"),
}

_EVENTS = (
    "{when} {hero_first} {walked} to the {spot} with {hero_their} {thing}.",
    "there was {weather}, and {hero_first} felt {feeling}.",
    "{friend_first} had borrowed the {color} {thing} and could not find it.",
    "near the {spot} {hero_they} met a(n) {color} {animal} that followed {hero_their} {relative}.",
    "{friend_first} laughed and said that {friend_they} had never been so {feeling}.",
    "{hero_their} {relative} used to cook {food} {when}.",
    "the {animal} slept under the {thing} while {weather} came over {home}.",
    '"Did you leave your {thing} at the {spot}?" asked {friend_first}.',
    "{hero_first} and {friend_first} shared {food} and talked about {city}.",
    "{friend_their} {relative} lived in {city} and kept a(n) {animal}.",
)
_NEWS = (
    "my {relative} and I {walked} to the {spot} {when}, and we saw a(n) {animal}.",
    "there was {weather} {when}, so I stayed in the {spot} with a(n) {color} {thing}.",
    "I was {feeling} when I heard that you had moved to {city}.",
    "yesterday the {animal} ate the {food} that my {relative} had made for you.",
    "somebody left a(n) {color} {thing} at the {spot}; is it yours?",
    "your {relative} was here {when} and looked {feeling}.",
    "I learned to cook {food}, though we had no {ingredient}.",
)
_STEPS = (
    "{stir} the {first} until it is {color}.",
    "add the {second} and {stir} for {minutes} minutes.",
    "{stir} gently; {weather} outside makes the kitchen feel warm.",
    "let the {first} and the {second} rest for {minutes} minutes.",
    "taste, {stir} again, and keep the {animal} away from the bowl.",
)


def document(draw: Draw) -> str:
    writer = Writer(WORDS, draw)
    fix_people(writer, "hero", "friend")
    writer.fix(home="{city}", thing="{thing}", animal="{animal}")
    return draw.pick((_story, _letter, _recipe))(writer)


def _story(writer: Writer) -> str:
    draw = writer.draw
    opening = "{hero_first} lived near the {spot} of {home} with a(n) {animal} and a(n) {color} {thing}."
    middle = [writer.paragraph(_EVENTS, draw.between(4, 7)) for _ in range(draw.between(1, 3))]
    ending = "{when}, {hero_first} carried the {thing} home, and {friend_first} was {feeling} again."
    return "\n\n".join([writer.sentence(opening), *middle, writer.sentence(ending)]) + "\n"


def _letter(writer: Writer) -> str:
    news = writer.paragraph(_NEWS, writer.draw.between(3, 6))
    return (
        "\n\n".join(
            [
                writer.fill("Dear {friend_first},"),
                writer.fill("I am writing from {home}, where {weather} has kept us indoors. ")
                + writer.fill("Your {relative} asked about the {thing}, and the {animal} is {feeling}. ")
                + writer.fill("Do you remember the {spot}? We ate {food} there {when}."),
                news,
                writer.sentence("next week I shall travel to {city}, and I will bring the {color} {thing}."),
                writer.fill("Yours, {hero_first}"),
            ]
        )
        + "\n"
    )


def _recipe(writer: Writer) -> str:
    draw = writer.draw
    writer.fix(food="{food}")
    writer.fix_different("ingredient", "first", "second", "third")
    writer.facts["minutes"] = str(draw.between(3, 90))
    listed = "\n".join(
        writer.fill(f"- {draw.between(2, 9)} {{unit}} of {{{name}}}") for name in ("first", "second", "third")
    )
    steps = draw.some(_STEPS, draw.between(3, len(_STEPS)))
    numbered = "\n".join(f"{index}. {writer.sentence(step)}" for index, step in enumerate(steps, start=1))
    ending = writer.sentence(
        "serve the {food} with the {third}, as {hero_first} and {hero_their} {relative} do in {home}."
    )
    title = writer.fill("How {hero_first} makes {food}")
    story = writer.paragraph(_EVENTS, draw.between(1, 3))
    return f"{title}\n\n{story}\n\n{listed}\n\n{numbered}\n\n{ending}\n"
