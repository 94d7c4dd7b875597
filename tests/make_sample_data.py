"""Writes the sample data of `qlora_kit/assets/data`: order notes to JSON, mixed with short general questions.

    python tests/make_sample_data.py            # rewrites both files
    python tests/make_sample_data.py --check    # says whether they are what this script makes

A row of the behaviour turns a sentence into {"name","item","quantity","unit","date"}. Name and item are copied, quantity, unit and date
are derived from words. Held-out rows use names, items, (quantity, unit) pairs and (month, day) pairs that training never shows.
"""
import argparse
import json
import random
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "qlora_kit" / "assets" / "data"
SEED = 7
TRAIN = {"en": 190, "zh": 220}
HELDOUT = {"en": 48, "zh": 24}

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
Aoife Declan Niamh Ciaran Rhys Carys Gareth Bronwen Fergus Isla Hamish Moira""".split(),
    "zh": [s + g for s in "王李张刘陈杨周吴孙马胡何林高罗田方金江白"
           for g in "明 文 平 云 华 军 强 伟 成 东 红 建国 春 天明 青 新 光 小雨 安 大海".split()],
}

# unit -> the items that are counted in it
ITEMS = {
    "en": {
        "kg": """rice flour sugar salt lentils potatoes onions carrots apples grapes cement sand gravel butter walnuts almonds oats barley cherries
plums pears tomatoes cabbage spinach garlic ginger beef lamb salmon shrimp cheese honey wax clay chalk peanuts dates figs mangoes peaches quinoa
turnips beets pumpkin raisins cocoa millet plaster charcoal lemons""",
        "L": """milk water vinegar paint petrol diesel bleach ink varnish lemonade cider wine beer cream yogurt broth syrup shampoo glue juice soup sauce
kerosene turpentine lacquer ethanol acetone coolant antifreeze detergent buttermilk kefir espresso cola rum sake cordial gravy sunscreen lotion
primer resin solvent eggnog smoothie sherry mead whey ghee tonic""",
        "m": """rope cable wire ribbon silk cotton linen lace tape hose pipe chain fabric carpet velvet denim felt canvas string thread wool leather
fencing tubing netting braid cord gauze fleece satin tweed muslin elastic webbing foil gutter conduit trim rail bunting twine burlap calico
chiffon corduroy flannel nylon piping timber skirting""",
        "box": """nails screws candles matches pencils crayons tiles masks tissues stamps envelopes biscuits chocolates cookies teabags bolts staples markers
batteries bulbs forks spoons mugs plates napkins soap pins needles buttons beads magnets hinges washers rivets fuses syringes bandages stickers
postcards badges marbles puzzles folders erasers rulers donuts eggs corks straws dice""",
        "bag": """coal compost mulch pellets popcorn crisps pretzels mortar beans seeds fertilizer kibble hay straw coffee cashews pasta noodles bread bagels
rolls ice leaves bark soil pebbles feathers confetti balloons sawdust licorice granola cereal jellybeans toffee mushrooms sprouts chestnuts
pistachios limes oranges couscous bulgur chickpeas tortillas dumplings croutons marshmallows lavender litter""",
        "pair": """gloves socks boots sandals slippers shoes skates skis earrings mittens jeans trousers shorts leggings pajamas glasses goggles scissors pliers
tweezers curtains crutches stilts oars headphones speakers clogs loafers sneakers tights stockings garters braces cufflinks dumbbells stirrups
binoculars shears tongs chopsticks castanets bookends pillows shutters flippers waders moccasins snowshoes earplugs cymbals""",
    },
    "zh": {
        "kg": "大米 面粉 白糖 土豆 苹果 牛肉 花生 黄豆 白菜 水泥 红枣 玉米 西瓜 香蕉 茶叶 小麦 羊肉 番茄 大蒜 生姜 洋葱 核桃 绿豆 南瓜 橙子 梨子 葡萄 木炭",
        "L": "牛奶 豆浆 白醋 汽油 油漆 啤酒 果汁 酱油 花生油 墨水 米酒 白酒 清水 柴油 可乐 酸奶 糖水 香油 胶水 茶水 汽水 红酒 机油 药水 洗发水 菜油",
        "m": "红布 电线 绳子 丝带 水管 花布 铁丝 棉布 白布 铁链 网线 胶带 地毯 麻绳 皮带 丝绸 木板 布料 毛线 花边 纱布 铜线 钢管 尼龙绳",
        "box": "饼干 月饼 铅笔 蜡笔 口罩 火柴 鸡蛋 巧克力 纸巾 钉子 电池 粉笔 邮票 蛋糕 茶包 灯泡 香皂 名片 画笔 信封 点心 牙签 棋子 积木 感冒药 图钉",
        "bag": "花生米 瓜子 糖果 面包 沙子 化肥 豆子 种子 薯片 冰块 馒头 饺子 木屑 猫粮 狗粮 咖啡 红薯 红豆 面条 石子 泥土 奶粉 洗衣粉 汤圆 橘子 麦片",
        "pair": "手套 袜子 皮鞋 筷子 拖鞋 布鞋 雨鞋 球鞋 凉鞋 棉鞋 冰刀 靴子 草鞋 毛袜 鞋垫 舞鞋 童鞋 跑鞋 丝袜 护膝 高跟鞋 木屐 棉袜 马靴",
    },
}
UNIT_WORDS = {"en": {"kg": "kilos", "L": "litres", "m": "metres", "box": "boxes", "bag": "bags", "pair": "pairs"},
              "zh": {"kg": "公斤", "L": "升", "m": "米", "box": "盒", "bag": "袋", "pair": "双"}}
NUMBERS = {"en": "two three four five six seven eight nine ten eleven twelve".split(),
           "zh": "两 三 四 五 六 七 八 九 十 十一 十二".split()}
MONTHS = "January February March April May June July August September October November December".split()

PHRASINGS = {   # {N} name, {Q} quantity, {U} unit, {I} item, {D} date
    "en": {"ordered": "{N} ordered {Q} {U} of {I} for {D}.", "needs": "{N} needs {Q} {U} of {I} on {D}.",
           "on-wants": "On {D}, {N} wants {Q} {U} of {I}.", "send-by": "Please send {N} {Q} {U} of {I} by {D}.",
           "list": "{Q} {U} of {I} for {N}, {D}.", "by-to": "By {D}: {Q} {U} of {I} to {N}.",
           "gets": "{D}: {N} gets {Q} {U} of {I}.", "can-have": "Can {N} have {Q} {U} of {I} on {D}?",
           "go-to": "{Q} {U} of {I} go to {N} on {D}.", "owe": "We owe {N} {Q} {U} of {I}, due {D}.",
           "deliver": "Deliver {Q} {U} of {I} to {N} on {D}.", "pick-up": "{N} will pick up {Q} {U} of {I} on {D}."},
    "zh": {"订了": "{N}订了{Q}{U}{I}，{D}送。", "给": "{D}给{N}{Q}{U}{I}。", "要": "{N}要{Q}{U}{I}，{D}前到。", "想要": "{D}，{N}想要{Q}{U}{I}。",
           "送到家": "{D}把{Q}{U}{I}送到{N}家。", "单子": "{Q}{U}{I}，{N}，{D}。", "来取": "{N}{D}来取{Q}{U}{I}。", "留": "给{N}留{Q}{U}{I}，{D}用。",
           "下单": "{N}下单{Q}{U}{I}，{D}寄出。", "寄": "{D}要给{N}寄{Q}{U}{I}。", "带": "{D}记得带{Q}{U}{I}给{N}。", "欠": "欠{N}{Q}{U}{I}，{D}前还。",
           "买了": "{N}买了{Q}{U}{I}，{D}发货。", "前送": "{D}前给{N}送{Q}{U}{I}。"},
}
HELDOUT_ONLY = {"en": ["deliver", "pick-up"], "zh": ["买了", "前送"]}
HELDOUT_SHARED = {"en": ["ordered", "on-wants", "list", "can-have"], "zh": ["订了", "给", "想要", "来取"]}
INSTRUCTION = {"en": "To JSON:", "zh": "转为JSON："}

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
        ("What does CPU stand for?", "Central processing unit."),
        ("How many continents are there?", "Seven."),
        ("What is photosynthesis?", "Plants using light to turn water and carbon dioxide into sugar and oxygen."),
        ("Which language is spoken in Brazil?", "Portuguese."),
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
        ("一个小时有多少分钟？", "六十分钟。"),
        ("《西游记》的作者是谁？", "吴承恩。"),
        ("日本的首都是哪里？", "东京。"),
        ("什么是算法？", "算法是解决问题的一组明确步骤。"),
        ("人用什么呼吸？", "肺。"),
        ("彩虹有几种颜色？", "七种。"),
        ("水在几度结冰？", "零摄氏度。"),
        ("什么是数据？", "数据是记录下来的事实和数字。"),
    ],
}


def ordinal(day):
    return f"{day}{'th' if 10 < day < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}"


def date_text(rng, lang, month, day):
    if lang == "zh":
        return f"{month}月{day}{rng.choice('日号')}"
    return rng.choice([f"{MONTHS[month - 1]} {day}", f"{day} {MONTHS[month - 1]}", f"{MONTHS[month - 1]} {ordinal(day)}"])


def order(rng, lang, phrasing, name, unit, item, qty, month, day):
    words = dict(N=name, Q=NUMBERS[lang][qty - 2], U=UNIT_WORDS[lang][unit], I=item, D=date_text(rng, lang, month, day))
    text = PHRASINGS[lang][phrasing].format(**words)
    record = dict(name=name, item=item, quantity=qty, unit=unit, date=f"{month:02d}-{day:02d}")
    return dict(instruction=INSTRUCTION[lang], input=text[0].upper() + text[1:],
                output=json.dumps(record, ensure_ascii=False, separators=(",", ":")), lang=lang, task="order", phrasing=phrasing)


def cycle(rng, values, n):
    """`n` draws that use every value equally often, in random order"""
    out = []
    while len(out) < n:
        out += rng.sample(values, len(values))
    return out[:n]


def take(rng, values, heldout, size):
    """The held-out share (the first `size` of a shuffle) or what it leaves to training"""
    values = rng.sample(values, len(values))
    return values[:size] if heldout else values[size:]


def orders(lang, n, heldout):
    """`n` rows in `lang`; held-out rows and training rows draw from disjoint values, made from one shuffle"""
    shuffle, rng = random.Random(SEED), random.Random(f"{SEED} {lang} {heldout}")
    size, units = HELDOUT[lang], list(UNIT_WORDS["en"])
    quantities = {u: take(shuffle, range(2, 13), heldout, 2) for u in units}
    if lang == "zh" and not heldout:                    # 十, 十一 and 十二 are the hardest to tell apart: twice as many of them
        quantities = {u: q + [n for n in q if n > 9] for u, q in quantities.items()}
    days = take(shuffle, [(m, d) for m in range(1, 13) for d in range(1, 29)], heldout, sum(HELDOUT.values()))
    names = take(shuffle, NAMES[lang], heldout, size)
    items = {u: take(shuffle, ITEMS[lang][u].split(), heldout, size // len(units)) for u in units}
    phrasings = HELDOUT_SHARED[lang] + HELDOUT_ONLY[lang] if heldout else [p for p in PHRASINGS[lang] if p not in HELDOUT_ONLY[lang]]
    some_units = cycle(rng, units, n)
    items, quantities = ({u: cycle(rng, pool[u], n) for u in units} for pool in (items, quantities))
    return [order(rng, lang, phrasing, name, unit, items[unit].pop(0), quantities[unit].pop(0), month, day)
            for phrasing, name, unit, (month, day)
            in zip(cycle(rng, phrasings, n), cycle(rng, names, n), some_units, cycle(rng, days, n))]


def make():
    heldout = [row for lang, n in HELDOUT.items() for row in orders(lang, n, heldout=True)]
    train = [row for lang, n in TRAIN.items() for row in orders(lang, n, heldout=False)]
    train += [dict(instruction=q, input="", output=a, lang=lang, task="question", phrasing="")
              for lang, pairs in QUESTIONS.items() for q, a in pairs]
    return random.Random(SEED).sample(train, len(train)), heldout


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
            raise SystemExit(f"{name} is not what tests/make_sample_data.py makes: run it without --check")
