"""Writes the sample data of `qlora_kit/assets/scaffold/data`: notes of payments to JSON, mixed with short general questions.

    python dev/make_sample_data.py            # rewrites both files
    python dev/make_sample_data.py --check    # says whether they are what this script makes

A row of the behaviour turns a sentence into a small record: {"name":"Maria","sum":"45 EUR","date":"5-3"}.
The name and the number are copied; the currency code and the date (month-day) are derived from words.
Held-out rows use names, (amount, currency) pairs and (month, day) pairs that training never shows, and two phrasings of each language
that it never shows. Settings were chosen on a third, separate share ("dev": its own names, pairs and phrasings), which no file holds.
"""
import argparse
import json
import random
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "qlora_kit" / "assets" / "scaffold" / "data"
SEED = 11
ROWS = {"train": {"en": 220, "zh": 156}, "dev": {"en": 80, "zh": 40}, "heldout": {"en": 48, "zh": 24}}
NEW_PAIRS = {"date": 60, "money": 100}     # (month, day) and (amount, currency) pairs kept for held-out rows, and as many for dev

NAMES = {
    "en": """Maria Omar Lena Tomas Priya Hugo Alice Kenji Fatima Oscar Nina Pavel Grace Diego Ingrid Samuel Yara Felix Amara Victor Chloe Ravi
Elena Marcus Sofia Jonas Leila Patrick Aisha Bruno Hannah Mateo Zara Walter Bianca Stefan Naomi Carlos Petra Edwin Salma George Tessa Andrei
Wendy Rafael Astrid Malik Julia Simon Camila Henrik Noor Daniel Irene Lucas Freya Tariq Olga Martin Paula Dmitri Rosa Kevin Anita Jakob
Lucia Hassan Sarah Milan Greta Arjun Valeria Peter Miriam Leon Tatiana Youssef Emma Gustav Delia Ivan Clara Bilal Monica Erik Sunita Adrian
Helen Tobias Layla Fernando Judith Nikolai Carmen Stuart Meera Antonio Vera Jamal Louise Sergio Anna Karim Dorothy Emil Isabel Rashid
Frida Nathan Gloria Piotr Farah Gabriel Mona Anders Rebecca Sanjay Beatriz Colin Svetlana Idris Amelia Ruben Kavita Thomas Elsa Faisal Martha
Viktor Jasmine Roberto Signe Ahmed Teresa Niklas Divya Oliver Renata Yusuf Harriet Marco Nadia Jasper Lakshmi Edgar Silvia Mustafa Agnes
Leonard Pilar Goran Zainab Raymond Ximena Matthias Dina Arthur Luisa Sven Rania Philip Ewa Deepak Margaret Alonso Kirsten Samir Evelyn
Rodrigo Hilda Vikram Joanna Bjorn Lourdes Kamal Nancy Enzo Sabine Anwar Claire Mikael Ines Rohan Audrey Josef Maya Cedric Adele Tomoko
Hiroshi Keiko Akira Yuki Haruto Sakura Minho Jisoo Thanh Linh Somchai Mali Budi Dewi Kofi Abena Kwame Zola Thabo Lerato Chidi Ngozi Tunde
Femi Wanjiru Otieno Amina Makena Sipho Nomsa Desta Selam Tahir Parisa Cyrus Shirin Omid Golnaz Emre Aylin Selim Defne Levent Aram Nare
Davit Nino Giorgi Tamar Levan Oksana Taras Bohdan Darya Yuri Marek Zofia Jan Hana Vaclav Zuzana Laszlo Ildiko Bela Eszter Radu Ioana Mihai
Doina Stoyan Iva Dragan Milica Zoran Jelena Luka Ana Marko Tanja Aino Eero Liisa Mikko Oona Juhani Saga Torsten Maja Sindre Ragnhild
Aoife Declan Niamh Ciaran Rhys Carys Gareth Bronwen Fergus Isla Hamish Moira David Linda Robert Susan James Karen Michael Laura Richard Alan
Barbara Frank Diana Henry Ruth Edward Sandra Albert Cynthia Bernard Sylvia Douglas Joan Kenneth Marie Stephen Angela Timothy Denise Gerald
Janet Ralph Brenda Neil Sharon Howard Elaine Russell Sheila Vincent Julie Warren Lynn Norman Ellen Hector Fiona Tony Eva Max Lily Oleg""".split(),
    "zh": [s + g for s in "王李张刘陈杨周吴孙马胡何林高罗田方金江白"
           for g in "明 文 平 云 华 军 强 伟 成 东 红 建国 春 天明 青 新 光 小雨 安 大海".split()],
}
CURRENCY = {"en": dict(EUR="euros", USD="dollars", GBP="pounds", JPY="yen", CNY="yuan", CHF="francs", INR="rupees", KRW="won"),
            "zh": dict(EUR="欧元", USD="美元", GBP="英镑", JPY="日元", CNY="元", CHF="法郎", INR="卢比", KRW="韩元")}
MONTHS = "January February March April May June July August September October November December".split()

PHRASINGS = {   # {N} name, {A} amount, {C} currency, {D} date
    "en": {"paid": "{N} paid {A} {C} on {D}.", "sent": "{N} sent {A} {C} on {D}.", "owes": "{N} owes {A} {C} by {D}.", "gave": "{N} gave us {A} {C} on {D}.",
           "list": "{N}: {A} {C}, {D}.", "on": "On {D}, {N} paid {A} {C}.", "date-list": "{D}: {A} {C} from {N}.", "amount-list": "{A} {C} from {N}, {D}.",
           "got": "Got {A} {C} from {N} on {D}.", "pay": "Pay {N} {A} {C} by {D}.", "did": "Did {N} pay {A} {C} on {D}?", "due": "{N} must pay {A} {C}, due {D}."},
    "zh": {"付了": "{N}{D}付了{A}{C}。", "付": "{D}{N}付{A}{C}。", "转来": "{N}{D}转来{A}{C}。", "收到": "收到{N}{A}{C}，{D}。", "欠": "{N}欠{A}{C}，{D}还。",
           "给": "{D}给{N}{A}{C}。", "单子": "{N}：{A}{C}，{D}。", "收": "{D}收{N}{A}{C}。", "要付": "{N}要付{A}{C}，{D}前。", "支付": "支付{N}{A}{C}，{D}。",
           "交了": "{D}，{N}交了{A}{C}。", "账": "{D}：{N}，{A}{C}。"},
}
ONLY = {        # phrasings that training never shows
    "dev": {"en": {"spent": "{N} spent {A} {C} on {D}.", "refund": "We refunded {N} {A} {C} on {D}."},
            "zh": {"花了": "{N}{D}花了{A}{C}。", "退": "{D}退给{N}{A}{C}。"}},
    "heldout": {"en": {"donated": "{N} donated {A} {C} on {D}.", "collect": "Collect {A} {C} from {N} on {D}."},
                "zh": {"捐了": "{N}{D}捐了{A}{C}。", "向": "{D}向{N}收{A}{C}。"}},
}
SHARED = {"en": ["paid", "on", "list", "did"], "zh": ["付了", "收到", "给", "单子"]}   # phrasings of training that held-out rows use too
INSTRUCTION = "JSON"

QUESTIONS = {
    "en": [
        ("What is the capital of France?", "Paris."),
        ("What is the capital of Japan?", "Tokyo."),
        ("How many legs does a spider have?", "Eight."),
        ("What is the largest planet in our solar system?", "Jupiter."),
        ("What gas do plants take in?", "Carbon dioxide."),
        ("At what temperature does water boil at sea level?", "100 degrees Celsius."),
        ("Who wrote Romeo and Juliet?", "William Shakespeare."),
        ("What is the opposite of cold?", "Hot."),
        ("Which ocean is the largest?", "The Pacific Ocean."),
        ("How many days are in a leap year?", "366."),
        ("What is the chemical symbol for gold?", "Au."),
        ("Which organ pumps blood through the body?", "The heart."),
        ("What do bees make?", "Honey."),
        ("What is the freezing point of water?", "0 degrees Celsius."),
        ("Name the three primary colours of light.", "Red, green and blue."),
        ("What is a neural network?", "A model of connected units whose weights are learned from data."),
        ("Who painted The Starry Night?", "Vincent van Gogh."),
        ("What is the square root of 81?", "9."),
        ("Which planet is called the Red Planet?", "Mars."),
        ("What is the past tense of go?", "Went."),
    ],
    "zh": [
        ("请解释什么是机器学习", "机器学习是让计算机从数据中找出规律，并用这些规律做预测的方法。"),
        ("中国的首都是哪里？", "北京。"),
        ("一年有几个月？", "十二个月。"),
        ("水的化学式是什么？", "H2O。"),
        ("一周有几天？", "七天。"),
        ("太阳从哪边升起？", "东边。"),
        ("三加五等于几？", "八。"),
        ("世界上最高的山是哪座？", "珠穆朗玛峰。"),
        ("地球的卫星是什么？", "月球。"),
        ("法国的首都是哪里？", "巴黎。"),
        ("大的反义词是什么？", "小。"),
        ("中国最长的河是哪条？", "长江。"),
    ],
}


def ordinal(day):
    return f"{day}{'th' if 10 < day < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def date_text(rng, lang, month, day):
    if lang == "zh":
        return f"{month}月{day}{rng.choice('日号')}"
    name = MONTHS[month - 1]
    return rng.choice([f"{name} {day}", f"{day} {name}", f"{name} {ordinal(day)}", f"{ordinal(day)} of {name}"])


def cycle(rng, values, n):
    """`n` draws that use every value equally often, in random order"""
    out = []
    while len(out) < n:
        out += rng.sample(values, len(values))
    return out[:n]


def deal(rng, values, heldout, dev):
    """One shuffle of `values`, cut in three: no value is in two parts"""
    values = rng.sample(values, len(values))
    return {"heldout": values[:heldout], "dev": values[heldout:heldout + dev], "train": values[heldout + dev:]}


def payment(rng, lang, phrasing, pattern, name, amount, currency, month, day):
    text = pattern.format(N=name, A=amount, C=CURRENCY[lang][currency], D=date_text(rng, lang, month, day))
    record = dict(name=name, sum=f"{amount} {currency}", date=f"{month}-{day}")
    return dict(instruction=INSTRUCTION, input=text, output=json.dumps(record, ensure_ascii=False, separators=(",", ":")),
                lang=lang, task="payment", phrasing=phrasing)


def payments(lang, part):
    names = deal(random.Random(f"{SEED} {lang}"), NAMES[lang], ROWS["heldout"][lang], 60)[part]
    shuffle, rng, n = random.Random(SEED), random.Random(f"{SEED} {lang} {part}"), ROWS[part][lang]   # pairs: the same cut for both languages
    dates = deal(shuffle, [(m, d) for m in range(1, 13) for d in range(1, 29)], NEW_PAIRS["date"], NEW_PAIRS["date"])[part]
    money = deal(shuffle, [(a, c) for a in range(10, 100) for c in CURRENCY["en"]], NEW_PAIRS["money"], NEW_PAIRS["money"])[part]
    patterns, currencies = PHRASINGS[lang], list(CURRENCY[lang])
    phrasings = list(patterns)
    if part != "train":
        patterns = {**{p: patterns[p] for p in SHARED[lang]}, **ONLY[part][lang]}
        phrasings = list(patterns)
    elif lang == "en":                                  # a name inside the sentence is harder to copy than one at its start: twice as many
        phrasings += [p for p in phrasings if not patterns[p].startswith("{N}")]
    else:                                               # 日元 is the currency that a model takes for 元: twice as many
        currencies += ["JPY"]
    amounts = {c: cycle(rng, [a for a, k in money if k == c], n) for c in CURRENCY[lang]}
    return [payment(rng, lang, phrasing, patterns[phrasing], name, amounts[currency].pop(), currency, month, day)
            for phrasing, name, (month, day), currency
            in zip(cycle(rng, phrasings, n), cycle(rng, names, n), cycle(rng, dates, n), cycle(rng, currencies, n))]


def make(part="heldout"):
    """Training rows, and the rows of `part`"""
    train = [row for lang in CURRENCY for row in payments(lang, "train")]
    train += [dict(instruction=q, input="", output=a, lang=lang, task="question", phrasing="")
              for lang, pairs in QUESTIONS.items() for q, a in pairs]
    return random.Random(SEED).sample(train, len(train)), [row for lang in CURRENCY for row in payments(lang, part)]


def text(rows):
    return "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n]\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for name, rows in zip(("sample_data.json", "heldout_data.json"), make()):
        if not check:
            (FOLDER / name).write_text(text(rows), encoding="utf-8")
        elif (FOLDER / name).read_text(encoding="utf-8") != text(rows):
            raise SystemExit(f"{name} is not what dev/make_sample_data.py makes: run it without --check")
