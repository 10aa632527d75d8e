"""The quickstart's rows, checked by a reader that was written from the notes and shares no logic with the generator."""

import json
import re
import subprocess
import sys
from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path

import pytest

from spinlm.cli.starter import EXAMPLE_DATA, write_starter

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPT = RECIPES / "quickstart_data.py"
_spec = spec_from_file_location("quickstart_data", SCRIPT)
quickstart = module_from_spec(_spec)
_spec.loader.exec_module(quickstart)

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NUMBER = "|".join(NUMBERS)
SINGULAR = {"knives": "knife", "scarves": "scarf", "shelves": "shelf", "batteries": "battery", "diaries": "diary"}
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
MONTH = f"({'|'.join(MONTHS)})[a-z]*"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return list(islice(quickstart.rows(seed=0), 4096))


def read_contact(note: str) -> dict:
    note = note.replace(" dot ", ".").replace(" [at] ", "@").replace(" at ", "@")
    email = re.search(r"[a-z0-9._]+@(mail\.)?example\.(com|org)", note)
    if email:
        fields = {"email": email[0]}
        note = note.replace(email[0], "")
    else:
        fields = {"phone": re.sub(r"\D", "", note)[-10:]}
    trades = "|".join(quickstart.TRADES).lower()
    last = re.search(
        rf"\b({'|'.join(quickstart.PLACES).lower()})({'|'.join(quickstart.PLACE_ENDINGS)})\b(?! ({trades})\b)", note
    )
    first = re.search(rf"\b({'|'.join(quickstart.FIRST_NAMES).lower()})\b", note)
    return {"name": f"{first[0]} {last[0]}".title(), **fields}


def read_order(note: str) -> dict:
    note = re.sub(r"^quick one - |ref \d+: ", "", note)
    patterns = (r"(\d+) dollars(?: and)? (\d+)(?: cents)?", r"(\d+)\.(\d\d)", r"()(\d+) ?c(?:ents)?\b")
    price = next(filter(None, (re.search(pattern, note) for pattern in patterns)), None)
    if price:
        cents = int(price[1] or 0) * 100 + int(price[2])
    else:
        price = re.search(r"\$(\d+)|(\d+) bucks", note)
        cents = int(price[1] or price[2]) * 100
    note = note.replace(price[0], "", 1)
    dozens = {"half a dozen": 6, "a dozen": 12, "two dozen": 24, "three dozen": 36, "a pair of": 2}
    count = re.search("|".join([*dozens, r"\d+", rf"\b({NUMBER})\b"]), note)[0]
    quantity = dozens.get(count) or (int(count) if count.isdigit() else NUMBERS.index(count))
    look, thing = re.search(rf"\b({'|'.join(quickstart.LOOKS)}) ([a-z]+)", note).groups()
    if thing in SINGULAR:
        thing = SINGULAR[thing]
    elif thing.endswith(("xes", "shes", "ches")):
        thing = thing.removesuffix("es")
    else:
        thing = thing.removesuffix("s")
    return {"item": f"{look} {thing}", "quantity": quantity, "unit_price": cents}


def read_expense(note: str) -> dict:
    note = re.sub(r"receipt no\. \d+", "", note)
    refund = re.search(r"refund|back|returned|credited", note)
    signs = {"USD": r"\$|usd|dollars|bucks", "EUR": "€|eur|euros?", "GBP": "£|gbp|pounds|quid"}
    currency = next(code for code, sign in signs.items() if re.search(sign, note))
    payee = re.search(rf"[a-z]+ ({'|'.join(quickstart.TRADES).lower()})\b", note)[0]
    thousands = re.search(r"(\d)\.(\d)k", note)
    split = re.search(r"(\d+),(\d\d)(?!\d)|(\d+) (?:dollars|euros|pounds) (\d\d)\b", note)
    if thousands:
        cents = int(thousands[1]) * 100_000 + int(thousands[2]) * 10_000
    elif split:
        cents = int(split[1] or split[3]) * 100 + int(split[2] or split[4])
    else:
        cents = round(float(re.search(r"\d[\d,]*(\.\d\d)?", note)[0].replace(",", "")) * 100)
    return {
        "payee": payee.title(),
        "amount": cents,
        "currency": currency,
        "type": "refund" if refund else "expense",
    }


def read_appointment(note: str) -> dict:
    what = re.search(
        r"[a-z]+ (class|course|lesson|session|appointment|check|inspection|visit|call|demo|meeting|review|workshop)\b",
        note,
    )[0]
    note = re.sub(r"\(not [^)]*\)|room \d", "", note)
    digits = re.search(r"(\d{4})[-/](\d\d)[-/](\d\d)", note)
    dots = re.search(r"(\d+)\.(\d+)\.(\d{4})", note)
    day_first = re.search(rf"(\d+)(?:th|st|nd|rd)?(?: of)? {MONTH} (\d{{4}})", note)
    month_first = re.search(rf"{MONTH} (\d+)(?:th|st|nd|rd)?,? '?(\d+)", note)
    date = digits or dots or day_first or month_first
    year, month, day = {digits: "123", dots: "321", day_first: "321", month_first: "312"}[date]
    month = date[int(month)]
    month_number = MONTHS.index(month) + 1 if month in MONTHS else int(month)
    note = note.replace(date[0], "")
    return {
        "what": what,
        "date": f"20{date[int(year)][-2:]}-{month_number:02}-{int(date[int(day)]):02}",
        "time": read_time(note),
    }


def read_time(note: str) -> str:
    if "noon" in note.replace("afternoon", ""):
        return "12:00"
    if hours := re.search(r"(\d\d)(\d\d) hrs", note):
        return f"{hours[1]}:{hours[2]}"
    if spoken := re.search(rf"(?:(half|quarter) (past|to) )?\b({NUMBER}) in the (morning|afternoon|evening)", note):
        minutes = {"half": 30, "quarter": 15, None: 0}[spoken[1]] * (-1 if spoken[2] == "to" else 1)
        minutes += NUMBERS.index(spoken[3]) % 12 * 60
        minutes %= 12 * 60
        minutes += 0 if spoken[4] == "morning" else 12 * 60
        return f"{minutes // 60:02}:{minutes % 60:02}"
    clock = re.search(r"(\d+)(?:[:.](\d\d))? ?([ap])\.?m|(\d+):(\d\d)", note)
    if clock[4]:
        return f"{int(clock[4]):02}:{clock[5]}"
    return f"{int(clock[1]) % 12 + (12 if clock[3] == 'p' else 0):02}:{clock[2] or '00'}"


READERS = {"contact": read_contact, "order": read_order, "expense": read_expense, "appointment": read_appointment}


def in_cents(record: dict) -> dict:
    return {key: round(value * 100) if key in ("amount", "unit_price") else value for key, value in record.items()}


@pytest.mark.parametrize(
    ("skill", "note", "record"),
    [
        ("contact", "MET PINEGATE, TARA AT THE FAIR, USE <T.PINEGATE@EXAMPLE.ORG> AFTER LUNCH",
         {"name": "Tara Pinegate", "email": "t.pinegate@example.org"}),
        ("contact", "Ashwell Travel / THORNGATE, Vera / 1-225-555-0144",
         {"name": "Vera Thorngate", "phone": "2255550144"}),
        ("contact", "met Ms Dora Elmwick at the fair, use dora dot elmwick at mail dot example dot com after lunch",
         {"name": "Dora Elmwick", "email": "dora.elmwick@mail.example.com"}),
        ("order", "hi! 5.25 dollars each for half a dozen green shelves thx",
         {"item": "green shelf", "quantity": 6, "unit_price": 525}),
        ("order", "quick one - ref 4471: one clay knife, 75c per piece",
         {"item": "clay knife", "quantity": 1, "unit_price": 75}),
        ("expense", "OK SO RECEIPT NO. 137 MAPLERIDGE FOODS: 697,99 EUR (THE NEW DESK)",
         {"payee": "Mapleridge Foods", "amount": 69799, "currency": "EUR", "type": "expense"}),
        ("expense", "got £1.2k back from oakford taxis",
         {"payee": "Oakford Taxis", "amount": 120000, "currency": "GBP", "type": "refund"}),
        ("appointment", "can we do the pottery course on 11.12.2027? 11:00 (not 7.00 am) works",
         {"what": "pottery course", "date": "2027-12-11", "time": "11:00"}),
        ("appointment", "quarter to one in the afternoon, March 3rd '26, eye visit",
         {"what": "eye visit", "date": "2026-03-03", "time": "12:45"}),
    ],
)  # fmt: skip
def test_the_reader_understands_notes_written_by_hand(skill, note, record):
    assert READERS[skill](note.lower()) == record


def test_every_record_can_be_read_from_its_note(rows):
    for row in rows:
        note = row["prompt"].lower()
        assert READERS[row["skill"]](note) == in_cents(json.loads(row["response"])), row


def test_responses_are_one_line_of_compact_json_in_a_fixed_layout(rows):
    layouts = {
        "contact": [["name", "email"], ["name", "phone"]],
        "order": [["item", "quantity", "unit_price"]],
        "expense": [["payee", "amount", "currency", "type"]],
        "appointment": [["what", "date", "time"]],
    }
    for row in rows:
        record = json.loads(row["response"])
        assert row["response"] == json.dumps(record, separators=(",", ":"))
        assert list(record) in layouts[row["skill"]]
        assert "\n" not in row["prompt"]


def test_skills_take_turns(rows):
    assert Counter(row["skill"] for row in rows) == dict.fromkeys(quickstart.SKILLS, 1024)
    assert [row["skill"] for row in rows[:5]] == ["contact", "order", "expense", "appointment", "contact"]


def test_no_prompt_and_no_record_comes_twice(rows):
    assert len({row["prompt"].lower() for row in rows}) == len(rows)
    assert len({row["response"] for row in rows}) == len(rows)


def test_both_kinds_and_all_instructions_are_used_evenly(rows):
    responses = Counter(key for row in rows for key in ("email", "phone", "refund") if f'"{key}"' in row["response"])
    assert 450 < responses["email"] < 575
    assert 450 < responses["phone"] < 575
    assert 350 < responses["refund"] < 470
    instructions = Counter(row["system"] for row in rows)
    assert len(instructions) == 16
    assert min(instructions.values()) > 200


def test_another_seed_gives_other_records(rows):
    other = {row["response"] for row in islice(quickstart.rows(seed=1), 1024)}
    assert len(other & {row["response"] for row in rows}) < 5


def test_the_script_writes_the_committed_file(tmp_path):
    out = tmp_path / "quickstart.jsonl"
    subprocess.run([sys.executable, SCRIPT, out, "--rows", "1024", "--seed", "0"], check=True)
    assert out.read_bytes() == (RECIPES / "quickstart.jsonl").read_bytes()
    assert out.stat().st_size < 400_000


def test_init_writes_the_first_rows(tmp_path):
    quickstart.write_rows(tmp_path / "expected.jsonl", count=256)
    data = write_starter(tmp_path / "recipe.yaml")
    assert data == tmp_path / EXAMPLE_DATA
    assert data.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


def test_rows_and_seed_choose_the_start_of_a_stream(tmp_path):
    quickstart.write_rows(tmp_path / "some.jsonl", count=7, seed=3)
    written = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == list(islice(quickstart.rows(seed=3), 7))


def test_long_rows_join_notes_and_their_records_in_the_same_order():
    """Eight rows of eight notes hold the first 64 notes once, and line n of a response is the record of note n."""
    short = {row["prompt"]: row for row in islice(quickstart.rows(seed=2), 64)}
    long = list(islice(quickstart.long_rows(seed=2, notes=8), 8))
    notes, records = ([line for row in long for line in row[key].split("\n")] for key in ("prompt", "response"))
    assert [len(row["prompt"].split("\n")) for row in long] == [8] * 8
    assert sorted(notes) == sorted(short)
    assert records == [short[note]["response"] for note in notes]
    assert notes[:8] != list(short)[:8]  # in a random order, so that the skill does not follow from the place


def test_4096_long_rows_share_no_record():
    records = [
        line for row in islice(quickstart.long_rows(seed=0, notes=8), 512) for line in row["response"].split("\n")
    ]
    assert len(set(records)) == len(records) == 4096
