"""Make the quickstart's data set: messy one-line notes, and the record in each note as one line of JSON.

    python recipes/quickstart_data.py OUT --rows 1024 --seed 0 [--notes 8]

With `--notes 8`, a prompt holds eight notes, one a line, and the response holds their eight records in the same order.

The four skills are a contact, an order, an expense and an appointment: from mostly copying to mostly converting. The
script draws a record and writes a note from it, so every response is correct. No record occurs twice. All people,
companies and events are invented. Phone numbers are from the range for fiction (555-01xx), and addresses are in the
domains for examples.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Record = dict[str, Any]

INSTRUCTIONS = {
    "contact": (
        "Turn this note into a contact as JSON with name and email or phone (10 digits).",
        "Contact as one line of JSON: name without title, then email or phone as 10 digits.",
        "Who is this? Answer in JSON with name and email or 10-digit phone.",
        "Extract name and email (lower case) or phone (10 digits) as JSON.",
    ),
    "order": (
        "Turn this order into JSON with item (singular), quantity and unit_price (for one).",
        "Order as one line of JSON. Keys: item (in the singular), quantity, unit_price.",
        "Write this order as JSON with the keys item (singular), quantity and unit_price.",
        "Extract item (singular, lower case), quantity and unit_price (of one) as JSON.",
    ),
    "expense": (
        "Turn this note into JSON with payee, amount, currency (USD, EUR, GBP) and type (expense, refund).",
        "Book this as one line of JSON: payee, amount, currency code, type expense or refund.",
        "Write this as JSON. Keys: payee, amount, currency (3 letters), type (expense or refund).",
        "Extract payee, amount, currency code and type (expense or refund) as JSON.",
    ),
    "appointment": (
        "Turn this into JSON with what, date (YYYY-MM-DD) and time (24-hour HH:MM).",
        "Calendar entry as one line of JSON: what, date as YYYY-MM-DD, time as HH:MM.",
        "Write this as JSON. Keys: what, date (YYYY-MM-DD), time (HH:MM, 24 hours).",
        "Extract what, date (YYYY-MM-DD) and time (24-hour HH:MM) as JSON.",
    ),
}

LONG_INSTRUCTION = "Turn each note into one line of JSON."

OPENINGS = ("", "", "", "hey, ", "fyi: ", "fwd: ", "note to self: ", "ok so ", "hi! ", "quick one - ", "from today: ")
ENDINGS = ("", "", "", " thx", " - thanks!", " (asap)", ", cheers", " pls confirm", "!!", " ... more later", " ok?")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    """Ada Alba Anton Bela Bruno Cara Cleo Dario Dora Edda Elio Emil Enzo Fay Felix Flora Gil Greta Hanna Hugo Ida Ines
    Ivo Jana Joel Jonas Juna Kai Kira Lars Lena Leo Lina Luca Mara Milo Mina Nadia Nils Nora Olga Orrin Otto Pia Remy
    Rosa Ruben Sami Selma Silas Tara Tessa Theo Tobin Uma Vera Wanda Yara Zeno Zora"""
)
PLACES = _words("Ash Birch Bright Clay Copper Elm Fern Hazel Lark Maple Moss North Oak Pine Rain Silver Thorn Wind")
PLACE_ENDINGS = _words("brook bury combe dale field ford gate grove mere ridge stead thorpe well wick worth")
TRADES = _words(
    """Bakery Bikes Books Cafe Clinic Florist Foods Hardware Hotel Laundry Motors Paints Pharmacy Print Taxis Tiles
    Tools Travel"""
)

LOOKS = _words(
    """black blue brown clay copper cotton folding glass green grey large oak orange paper pink plain red round small
    square steel striped white wool yellow"""
)
THINGS = _words(
    """basket battery bench blanket bottle bowl box brush bucket candle chair cushion diary dish fork frame glove hook
    jar kettle knife ladder lamp mirror mug notebook pencil plate rug scarf shelf spoon stool towel tray vase"""
)
IRREGULAR = {"knife": "knives", "scarf": "scarves", "shelf": "shelves"}
NUMBERS = _words("one two three four five six seven eight nine ten eleven twelve")

EVENTS = tuple(
    f"{topic} {kind}"
    for topics, kinds in (
        ("chess choir cooking drama guitar painting piano pottery swimming yoga", "class course lesson session"),
        ("boiler car dental eye garden kitchen roof safety", "appointment check inspection visit"),
        ("budget contract design hiring project sales school team travel website", "call demo meeting review workshop"),
    )
    for topic in _words(topics)
    for kind in _words(kinds)
)
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
FIRST_DAY, LAST_DAY = date(2024, 1, 1).toordinal(), date(2029, 12, 31).toordinal()

CURRENCIES = {"USD": ("$", "dollars", "bucks"), "EUR": ("€", "euros", "euro"), "GBP": ("£", "pounds", "quid")}


class Draw:
    """Draw random values from `Random.random` only: Python keeps that stream the same in all versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def between(self, low: int, high: int) -> int:
        """Draw an integer from low to high, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        return options[self.between(0, len(options) - 1)]

    def chance(self, share: float) -> bool:
        return self._random.random() < share


def rows(seed: int) -> Iterator[dict[str, str]]:
    """Yield rows with skill, system, prompt and response: the skills in turn, without end, no record twice."""
    draw = Draw(seed)
    seen: set[str] = set()
    while True:
        for skill, make in SKILLS.items():
            response = ""
            while not response or response in seen:
                record, note = make(draw)
                response = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
            seen.add(response)
            note = draw.pick(OPENINGS) + note + draw.pick(ENDINGS)
            note = draw.pick((note, note, note, note, note, note.lower(), note.upper()))
            yield {"skill": skill, "system": draw.pick(INSTRUCTIONS[skill]), "prompt": note, "response": response}


def long_rows(seed: int, notes: int) -> Iterator[dict[str, str]]:
    """Yield rows whose prompt joins several notes and whose response joins their records, one a line.

    The notes of `rows` are used in turn, so no record occurs twice. Each row has its notes in a random order.
    """
    stream, draw = rows(seed), Draw(seed)
    while True:
        chosen = sorted(islice(stream, notes), key=lambda row: draw.between(0, 1 << 30))
        prompt, response = ("\n".join(row[column] for row in chosen) for column in ("prompt", "response"))
        yield {"skill": "all", "system": LONG_INSTRUCTION, "prompt": prompt, "response": response}


def write_rows(path: Path, count: int = 1024, seed: int = 0, notes: int = 1) -> None:
    """Write the first `count` rows as JSON lines, each with `notes` notes."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in islice(rows(seed) if notes == 1 else long_rows(seed, notes), count):
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def _contact(draw: Draw) -> tuple[Record, str]:
    first, last = draw.pick(FIRST_NAMES), _place(draw)
    name = draw.pick(
        (
            f"{first} {last}",
            f"{first} {last}".lower(),
            f"{first} {last}".upper(),
            f"{last}, {first}",
            f"{last.upper()}, {first}",
            f"{draw.pick(('Dr.', 'Mr', 'Mrs.', 'Ms', 'Prof.'))} {first} {last}",
        )
    )
    if draw.chance(0.5):
        fields, written = _email(draw, first.lower(), last.lower())
    else:
        fields, written = _phone(draw)
    company = f"{_place(draw)} {draw.pick(TRADES)}"
    note = draw.pick(
        (
            f"{name} - {written}",
            f"{written} ({name})",
            f"pls add {name}, {written}",
            f"{name} from {company}, {written}",
            f"{written} is the new one for {name}",
            f"{company} / {name} / {written}",
            f"met {name} at the fair, use {written} after lunch",
            f"you can reach {name} via {written}, best in the morning",
        )
    )
    return {"name": f"{first} {last}", **fields}, note


def _email(draw: Draw, first: str, last: str) -> tuple[Record, str]:
    user = draw.pick((f"{first}.{last}", f"{first[0]}.{last}", f"{last}{draw.between(10, 99)}", f"{first}_{last}"))
    address = f"{user}@{draw.pick(('example.com', 'example.org', 'mail.example.com', 'mail.example.org'))}"
    spoken = address.replace(".", " dot ").replace("@", " at ")
    written = draw.pick(
        (address, address.upper(), address.title(), f"<{address}>", spoken, address.replace("@", " [at] "))
    )
    return {"email": address}, written


def _phone(draw: Draw) -> tuple[Record, str]:
    area, line = f"{draw.between(201, 789)}", f"01{draw.between(0, 99):02}"
    written = draw.pick(
        (
            f"({area}) 555-{line}",
            f"{area}.555.{line}",
            f"{area} 555 {line}",
            f"+1 {area} 555-{line}",
            f"1-{area}-555-{line}",
            f"{area}/555 {line[:2]} {line[2:]}",
        )
    )
    return {"phone": f"{area}555{line}"}, written


def _order(draw: Draw) -> tuple[Record, str]:
    look, thing = draw.pick(LOOKS), draw.pick(THINGS)
    item = f"{look} {thing}"
    quantity = (
        draw.between(1, 12) if draw.chance(0.7) else draw.pick((15, 18, 20, 24, 30, 36, 40, 48, 50, 75, 100, 120))
    )
    items = item if quantity == 1 else f"{look} {_plural(thing)}"
    cents = _cents(draw, draw.pick((9, 40, 150)))
    price = _price(draw, cents)
    count = _count(draw, quantity)
    note = draw.pick(
        (
            f"{count} {items} at {price} each",
            f"{quantity}x {item} @ {price}",
            f"{item.upper()} x{quantity}, {price} each",
            f"{items}: {quantity} pcs, {price} apiece",
            f"{price} each for {count} {items}",
            f"unit price {price} | qty {quantity} | {item}",
            f"for {price} a piece we take {count} {items}",
            f"ref {draw.between(1000, 9999)}: {count} {items}, {price} per piece",
        )
    )
    note += draw.pick(("", "", " for the office", ", usual address", ", by Friday if you can"))
    return {"item": item, "quantity": quantity, "unit_price": _number(cents)}, note


def _count(draw: Draw, quantity: int) -> str:
    words = {2: "a pair of", 6: "half a dozen", 12: "a dozen", 24: "two dozen", 36: "three dozen"}
    choices = [str(quantity)]
    if quantity <= len(NUMBERS):
        choices.append(NUMBERS[quantity - 1])
    if quantity in words:
        choices.append(words[quantity])
    return draw.pick(choices)


def _plural(noun: str) -> str:
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith(("x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def _price(draw: Draw, cents: int) -> str:
    whole, rest = divmod(cents, 100)
    choices = [f"${_amount(cents)}", _amount(cents), f"{_amount(cents)} dollars", f"USD {_amount(cents)}"]
    if not rest:
        choices += [f"${whole}", f"{whole} bucks"]
    elif not whole:
        choices += [f"{rest} cents", f"{rest}c"]
    else:
        choices += [f"{whole} dollars and {rest} cents", f"{whole} dollars {rest:02}"]
    return draw.pick(choices)


def _expense(draw: Draw) -> tuple[Record, str]:
    payee = f"{_place(draw)} {draw.pick(TRADES)}"
    cents = _cents(draw, draw.pick((9, 90, 900, 2500)))
    currency = draw.pick(tuple(CURRENCIES))
    money = _money(draw, cents, currency)
    shown = draw.pick((payee, payee, payee.lower(), payee.upper()))
    refund = draw.chance(0.4)
    if refund:
        note = draw.pick(
            (
                f"refund from {shown}, {money}",
                f"{shown} sent {money} back",
                f"got {money} back from {shown}",
                f"{money} returned by {shown} after the mix-up",
                f"{shown} credited us {money}, bill was wrong",
                f"{shown}: money back, {money}",
            )
        )
    else:
        note = draw.pick(
            (
                f"paid {money} to {shown}",
                f"{shown} {money}, card",
                f"{money} spent at {shown}",
                f"{shown} charged us {money}",
                f"receipt no. {draw.between(100, 999)} {shown}: {money}",
                f"gave {shown} {money} in cash",
            )
        )
    note += draw.pick(("", "", "", " for the team lunch", " (the new desk)", ", trip to the fair", ", spare parts"))
    return {
        "payee": payee,
        "amount": _number(cents),
        "currency": currency,
        "type": "refund" if refund else "expense",
    }, note


def _money(draw: Draw, cents: int, currency: str) -> str:
    symbol, formal, casual = CURRENCIES[currency]
    whole, rest = divmod(cents, 100)
    amount = _amount(cents)
    choices = [f"{symbol}{amount}", f"{amount} {currency}", f"{currency.lower()} {amount}", f"{amount} {formal}"]
    if not rest:
        choices += [f"{whole} {casual}", f"{symbol}{whole}"]
    else:
        choices += [f"{whole} {formal} {rest:02}"]
        if currency == "EUR" and whole < 1000:
            choices += [f"{whole},{rest:02} €", f"{whole},{rest:02} EUR"]
    if whole >= 1000 and cents % 10000 == 0:
        choices += [
            f"{whole // 1000}.{whole % 1000 // 100}k {formal}",
            f"{symbol}{whole // 1000}.{whole % 1000 // 100}k",
        ]
    return draw.pick(choices)


def _cents(draw: Draw, most: int) -> int:
    """Draw an amount in cents, up to about `most` units and often round, as real amounts are."""
    whole = draw.between(1, most)
    if whole >= 1000 and draw.chance(0.4):
        return whole // 100 * 10000
    if most < 10 and draw.chance(0.2):
        whole = 0
    rest = draw.pick((0, 50, 25, 75, 95, 99, 10 * draw.between(1, 9), draw.between(1, 99)))
    return whole * 100 + rest or 50


def _amount(cents: int) -> str:
    return f"{cents // 100:,}.{cents % 100:02}"


def _number(cents: int) -> int | float:
    """Convert cents to the shortest JSON number: 4, 4.5, 4.25."""
    return cents // 100 if cents % 100 == 0 else cents / 100


def _appointment(draw: Draw) -> tuple[Record, str]:
    what = draw.pick(EVENTS)
    day = date.fromordinal(draw.between(FIRST_DAY, LAST_DAY))
    hour = draw.between(7, 20)
    minute = draw.pick((0, 0, 0, 15, 30, 30, 45, 5 * draw.between(1, 11)))
    on, at = _day(draw, day), _time(draw, hour, minute)
    if draw.chance(0.1):
        at += f" (not {_time(draw, draw.pick([h for h in range(7, 21) if h != hour]), 0)})"
    note = draw.pick(
        (
            f"{what} on {on} at {at}",
            f"{on}, {at}: {what}",
            f"{what.upper()} / {on} / {at}",
            f"{at}, {on}, {what}",
            f"pls book the {what} for {at} on {on}",
            f"can we do the {what} on {on}? {at} works",
            f"{what} is moved to {on}, {at}",
            f"{what}, room {draw.between(2, 9)}, {on} at {at}",
        )
    )
    return {"what": what, "date": day.isoformat(), "time": f"{hour:02}:{minute:02}"}, note


def _day(draw: Draw, day: date) -> str:
    year, number = day.year, day.day
    month = MONTHS[day.month - 1]
    ending = "th" if number in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return draw.pick(
        (
            day.isoformat(),
            f"{year}/{day.month:02}/{number:02}",
            f"{number}.{day.month}.{year}",  # in dates with dots the day comes first
            f"{month} {number}, {year}",
            f"{month[:3]} {number} {year}",
            f"{number} {month[:3]} {year}",
            f"{number}{ending} of {month} {year}",
            f"{month} {number}{ending} '{year % 100}",
            f"{WEEKDAYS[day.weekday()]} {number} {month} {year}",
            f"{WEEKDAYS[day.weekday()][:3]}, {month[:3]} {number}{ending}, {year}",
        )
    )


def _time(draw: Draw, hour: int, minute: int) -> str:
    half, on_clock = "am" if hour < 12 else "pm", (hour - 1) % 12 + 1
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    choices = [
        f"{hour}:{minute:02}",
        f"{on_clock}:{minute:02}{half}",
        f"{on_clock}:{minute:02} {half[0]}.m.",
        f"{on_clock}.{minute:02} {half}",
        f"{hour:02}{minute:02} hrs",
    ]
    if minute == 0:
        choices += [f"{on_clock}{half}", f"{on_clock} {half}", f"{NUMBERS[on_clock - 1]} {part}"]
        if hour == 12:
            choices += ["noon", "12 noon"]
    elif minute == 45:
        choices += [f"quarter to {NUMBERS[hour % 12]} {part}"] * 2
    elif minute in (15, 30):
        choices += [f"{'half' if minute == 30 else 'quarter'} past {NUMBERS[on_clock - 1]} {part}"] * 2
    return draw.pick(choices)


def _place(draw: Draw) -> str:
    return draw.pick(PLACES) + draw.pick(PLACE_ENDINGS)


SKILLS: dict[str, Callable[[Draw], tuple[Record, str]]] = {
    "contact": _contact,
    "order": _order,
    "expense": _expense,
    "appointment": _appointment,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the quickstart's data set as JSON lines.")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--rows", type=int, default=1024, help="number of rows (default: 1024)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws (default: 0)")
    parser.add_argument("--notes", type=int, default=1, help="number of notes in a prompt (default: 1)")
    arguments = parser.parse_args()
    write_rows(arguments.out, arguments.rows, arguments.seed, arguments.notes)
