"""The words that the synthetic corpus and the sample data are made of. Pure: lists, and random-syllable words."""

# ruff: noqa: SIM905 (a text that is split reads better than a hundred quoted words)

from random import Random

NAMES = """
Ada Adam Aisha Alan Alba Amara Amir Anita Anna Anton Ava Bela Ben Bianca Boris Bruno Carla Carlos Cecilia Clara
Dana Daniel Daria David Diego Dina Dora Eden Elena Elias Elif Emil Emma Erik Esther Eva Farid Felix Fiona Flora
Frida Gabriel Gina Greta Hana Hans Hector Helen Hugo Ida Igor Ines Ingrid Irene Isaac Ivan Jana Jasper Joan Jonas
Julia Kai Karim Kira Klara Lana Lars Laura Leila Leo Lina Lucas Luna Magda Maria Marco Maya Mila Milan Mina Mona
Nadia Nela Nico Nina Noah Nora Olga Oscar Otto Pablo Paula Pedro Petra Priya Quinn Rafael Rita Robin Rosa Ruben
Sami Sara Selma Silvia Simon Sofia Stella Tara Tessa Theo Tomas Uma Vera Victor Yara Yusuf Zara Zoe
""".split()

CITIES = """
Accra Amman Ankara Athens Austin Baku Bergen Berlin Bern Bogota Boston Bristol Cairo Cardiff Chicago Cork Cusco Dakar
Dallas Delhi Denver Dublin Florence Geneva Genoa Ghent Graz Hamburg Hanoi Havana Helsinki Jaipur Kampala Kyoto Lagos
Leeds Lima Lisbon London Lyon Madrid Malmo Manila Milan Montreal Mumbai Munich Nairobi Naples Nice Osaka Oslo Ottawa
Palermo Paris Porto Prague Quito Riga Rome Seoul Seville Sofia Split Sydney Tampa Tbilisi Tokyo Toronto Tunis Turin
Utrecht Valencia Vienna Warsaw York Zagreb Zurich
""".split()

JOBS = """
actor architect artist baker barber brewer builder butcher carpenter chemist clerk coach cook dancer dentist designer
diver doctor driver editor engineer farmer firefighter fisher florist gardener geologist guard guide jeweller
journalist judge lawyer librarian mechanic miner musician nurse optician painter pharmacist photographer pilot plumber
poet porter potter printer sailor sculptor singer surgeon tailor teacher translator vet waiter weaver welder writer
""".split()

PETS = "cat dog parrot rabbit hamster goldfish turtle pony goat duck lizard snake ferret mouse canary hen frog".split()
COLOURS = "red blue green yellow black white orange purple brown pink grey gold silver teal violet".split()
FOODS = "rice bread soup pasta cheese fish salad noodles beans pizza pancakes dumplings stew olives figs plums".split()
HOBBIES = "chess reading painting hiking swimming cycling dancing fishing knitting cooking singing rowing".split()
DRINKS = "tea coffee milk water juice cocoa cider lemonade".split()
MATERIALS = "wood steel glass stone paper cotton wool leather clay plastic copper silk".split()
THINGS = """
box chair table lamp book cup clock coat bag boat bottle brush button candle drum fork hat key kite knife mirror
pencil plate ring rope shoe spoon tent ticket tool towel toy umbrella vase wheel
""".split()
# Keys of the generic JSON snippets. A person's name, age, city and job are kept out: see data/sample_data.json.
JSON_KEYS = """
size price shape code level weight colour height width depth speed count total owner label title type unit status
group model brand route gate seat floor room shelf page line zone port host path mode theme user tag rank score
""".split()
WORDS = THINGS + MATERIALS + COLOURS + FOODS + PETS + HOBBIES + DRINKS

ZH_SURNAMES = list("王李张刘陈杨黄赵周吴徐孙马朱胡林何高郭罗")
ZH_GIVEN = list("伟芳娜敏静丽强军杰勇艳涛明超霞平刚玲桂英华玉兰红建文云飞雪梅春晓东海峰宇佳欣雨晨")
ZH_CITIES = "北京 上海 广州 深圳 成都 杭州 南京 武汉 西安 重庆 天津 苏州 长沙 青岛 大连 厦门 昆明".split()
ZH_JOBS = "教师 医生 护士 厨师 司机 律师 记者 画家 歌手 农民 木工 会计 警察 作家 演员 导游 园丁 店员 编辑 裁缝".split()
ZH_PETS = "猫 狗 兔子 鹦鹉 乌龟 金鱼 小马 山羊 鸭子 仓鼠".split()
ZH_COLOURS = "红 蓝 绿 黄 黑 白 紫 灰 粉 金".split()
ZH_FOODS = "米饭 面条 饺子 包子 豆腐 鱼 牛肉 面包 青菜 粥".split()
ZH_HOBBIES = "读书 画画 游泳 下棋 跑步 唱歌 跳舞 钓鱼 爬山 摄影".split()
ZH_DRINKS = "茶 咖啡 牛奶 水 果汁 豆浆".split()
ZH_WORDS = ZH_PETS + ZH_FOODS + ZH_HOBBIES + ZH_CITIES + ZH_JOBS
ZH_CHARS = sorted(set("".join(ZH_GIVEN + ZH_WORDS + ZH_SURNAMES)))

_ONSETS = "b br c d dr f g gr h j k kl l m n p pr qu r s sh st t th tr v w y z".split()
_VOWELS = "a e i o u ai ea ou".split()
_CODAS = ["", "", "", "n", "r", "s", "l", "m", "t", "nd", "sk"]


def invented_word(rng: Random) -> str:
    """A pronounceable word that is most likely in no pool, so that a reader of it can only copy it."""
    syllables = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2, 2, 3)))]
    return "".join(syllables) + rng.choice(_CODAS)


def invented_name(rng: Random) -> str:
    """An invented word with a capital letter."""
    return invented_word(rng).capitalize()


def zh_name(rng: Random) -> str:
    """A Chinese name: one surname and one or two given characters."""
    return rng.choice(ZH_SURNAMES) + "".join(rng.choices(ZH_GIVEN, k=rng.choice((1, 2, 2))))


def zh_invented_word(rng: Random) -> str:
    """One to three Chinese characters in any order."""
    return "".join(rng.choices(ZH_CHARS, k=rng.choice((1, 2, 2, 3))))


def number(rng: Random) -> str:
    """A whole number of one to four digits, without a leading zero."""
    return str(rng.randrange(10 ** rng.choice((1, 2, 2, 3, 4))))
