"""Write the embedded sample data: a small, closed, bilingual (English + Chinese) world in every row format.

The data is SYNTHETIC: its towns, animals and people do not exist, its weather and exchange rates are random numbers,
its sentences come from templates. It exists so that every stage can be run and measured in minutes without a download;
a model trained on it knows this world and nothing else. Three rules make the world checkable:

* An answer is canonical: skill, language and values fix its wording, so `is_correct` compares exactly.
* A combination (a fact, two numbers, a name, an expression, a phrasing) belongs to one split: train, val or heldout.
  Each file draws from its split alone, so a held-out case is new by construction, not by luck. Every fact is stated
  in pretrain.jsonl and, within portraits of all that is known of somebody, in sft.jsonl, since there is no other place
  to learn it from; a held-out question about it is asked nowhere.
* Randomness is `random.Random` seeded with text, and sha256: a seed gives the same bytes everywhere.

A text is a pair (English, Chinese), "a|b" in a text separates alternatives, {x} is a slot.

    python dataset/sample_world.py --out DIR [--seed 0] [--scale 1.0]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import operator
import os
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate, permutations, product
from pathlib import Path
from typing import Any, NamedTuple

Message = dict[str, Any]
Text = tuple[str, str]
Tree = Any  # an int, or (sign, Tree, Tree)

LANGS = ("en", "zh")
SKILLS = ("facts", "arithmetic", "thinking", "dialogue", "identity", "tools")
SFT_MIX = (20, 31, 17, 11, 4, 17)  # percent, in the order of SKILLS
DPO_MIX = (20, 20, 10, 15, 10, 25)
HELDOUT_PERCENT, VAL_PERCENT = 12, 6
HELDOUT_CASES = 24  # per skill and language, at any scale
FILES = {  # rows at scale 1
    "pretrain": 4200, "pretrain_val": 100, "sft": 13500, "sft_val": 400, "heldout": 2 * len(SKILLS) * HELDOUT_CASES,
    "dpo": 1500, "dpo_val": 100, "reward": 18000, "reward_val": 400, "rlaif": 1500, "rlaif_val": 200,
    "agent_rl": 1500, "agent_rl_val": 200,
    "lora_identity": 600, "lora_identity_val": 40}
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
dumps = partial(json.dumps, ensure_ascii=False)


def _table(text: str) -> tuple[tuple[str, ...], ...]:
    """Turn "sun=太阳, tall grass=草丛" into (("sun", "太阳"), ("tall grass", "草丛"))."""
    return tuple(tuple(cell.strip() for cell in row.split("=")) for row in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# ---- the things of the world

TOWNS = _table("""Lumora=露莫拉, Bracken=布雷肯, Tindale=廷代尔, Osmere=奥斯米尔, Velis=维利斯, Karrow=卡罗,
    Pellan=佩兰, Norwick=诺威克, Harrow=哈罗, Mirel=米瑞尔, Sundle=桑德尔, Quill=奎尔, Dorvan=多万, Fenwick=芬威克,
    Isola=伊索拉, Yarrow=亚罗""")
ANIMALS = _table("""the glimmer fox=微光狐, the moss bear=苔熊, the bell bird=铃鸟, the sand otter=沙獭,
    the ink cat=墨猫, the cloud goat=云羊, the frost hare=霜兔, the reed duck=苇鸭,
    the ember wolf=烬狼, the stone frog=石蛙, the star crow=星鸦, the wind horse=风马, the leaf deer=叶鹿,
    the rain crane=雨鹤, the copper bee=铜蜂, the river mouse=河鼠""")
PEOPLE = _table("""Lin Mo=林墨, Su Qing=苏晴, Gao Yuan=高远, Bai Lu=白露, Shen Yan=沈岩, Tang Xia=唐夏, He Miao=何苗,
    Jiang Chen=江晨, Luo Yi=罗毅, Xu Fang=许芳, Zhao Ning=赵宁, Wu Tong=吴桐, Sun Jia=孙佳, Cai Wen=蔡文,
    Deng Rui=邓睿, Pan Yue=潘月""")
COLOURS = _table("red=红色, blue=蓝色, green=绿色, yellow=黄色, white=白色, black=黑色, purple=紫色, silver=银色")
PRODUCTS = _table("honey=蜂蜜, glass=玻璃, paper=纸张, tea=茶叶, cheese=奶酪, silk=丝绸, salt=食盐, pottery=陶器")
LANDSCAPES = _table("lake=湖泊, forest=森林, desert=沙漠, river=河流, mountain=高山, bay=海湾, valley=山谷, cliff=悬崖")
FEED = _table("berries=浆果, seeds=种子, fish=小鱼, leaves=树叶, nuts=坚果, grass=青草, bark=树皮, roots=草根")
HOMES = _table("caves=山洞, hollow trees=树洞, tall grass=草丛, old barns=谷仓, pine woods=松林, warm springs=温泉")
JOBS = _table("baker=面包师, teacher=老师, doctor=医生, farmer=农夫, sailor=水手, painter=画家, tailor=裁缝")
INSTRUMENTS = _table("flute=笛子, violin=小提琴, guitar=吉他, harp=竖琴, piano=钢琴, trumpet=小号, cello=大提琴")
DRINKS = _table("tea=茶, milk=牛奶, coffee=咖啡, juice=果汁, cocoa=可可, lemonade=柠檬水, cider=苹果酒, water=清水")
FOODS = _table("""apples=苹果, bananas=香蕉, mangoes=芒果, peaches=桃子, pears=梨, grapes=葡萄, lemons=柠檬, corn=玉米,
    melons=甜瓜, cherries=樱桃, bread=面包, rice=米饭, noodles=面条, cake=蛋糕, cheese=奶酪, eggs=鸡蛋, fish=鱼,
    tofu=豆腐, potatoes=土豆, carrots=胡萝卜, peanuts=花生, mushrooms=蘑菇, chocolate=巧克力, dumplings=饺子""")
CITIES = _table("""Tokyo=东京=Asia, Seoul=首尔=Asia, Singapore=新加坡=Asia, Bangkok=曼谷=Asia, Shanghai=上海=Asia,
    London=伦敦=Europe, Paris=巴黎=Europe, Berlin=柏林=Europe, Rome=罗马=Europe, Athens=雅典=Europe, Oslo=奥斯陆=Europe,
    Cairo=开罗=Africa, Nairobi=内罗毕=Africa, Sydney=悉尼=Australia, Perth=珀斯=Australia, Toronto=多伦多=America,
    Chicago=芝加哥=America, Denver=丹佛=America, Lima=利马=America, Havana=哈瓦那=America""")
CURRENCIES = _table("USD=美元, EUR=欧元, CNY=人民币, JPY=日元, GBP=英镑, KRW=韩元, CHF=瑞士法郎, INR=印度卢比")
WEATHER = _table("sunny=晴天, cloudy=多云, rainy=下雨, windy=刮风, snowy=下雪, foggy=有雾")
UNITS = {"km": ("kilometres", "公里"), "m": ("metres", "米"), "cm": ("centimetres", "厘米"), "h": ("hours", "小时"),
         "kg": ("kilograms", "千克"), "g": ("grams", "克"), "min": ("minutes", "分钟"), "s": ("seconds", "秒")}
FACTORS = {("km", "m"): 1000, ("m", "cm"): 100, ("kg", "g"): 1000, ("h", "min"): 60, ("min", "s"): 60}
# What users tell of themselves has to be copied, not known by heart: many values, made of parts that all get around.
FIRST = (_words("""Alice Ben Clara David Edith Felix Grace Henry Iris Jack Kate Leo Mary Nora Oscar Paul Rose Sam Anna
    Bruno Carol Dora Emil Fiona George Helen Ivan Julia Karl Laura Max Nina Otto Peter Ruth Simon Tina Ursula Victor
    Wendy"""), tuple("王李张刘陈杨赵黄周吴徐孙马朱胡郭林高何罗郑梁谢宋唐许邓冯韩曹曾彭萧蔡潘田董袁于余"))
LAST = (_words("""Brook Field Hill Lake Moor Reed Stone Wood Bell Cook Day Fox Gray King Mill Hunt Snow Page Lane Frost
    Marsh Shaw West North Banks Park Ford Nash Rowe Dale"""),
    tuple("伟娜强洋静帆磊婷敏杰丽军平红玉明霞刚波芳超英华慧建文斌辉宁鑫"))
SYLLABLES = _table("""ba=巴, do=多, fi=菲, ga=加, ka=卡, lu=露, mo=莫, na=纳, pe=佩, ro=罗, sa=萨, ti=蒂, ve=维, wi=威,
    yo=约, zu=祖""")
TASTES = _table("fresh=鲜, dried=干, sweet=甜, warm=热, cold=冰, salted=咸, spicy=辣, tiny=小")
NUMBERS = (tuple(map(str, range(100, 1000))),) * 2
NAMES = tuple(tuple(map((" ", "")[lang].join, product(FIRST[lang], LAST[lang]))) for lang in (0, 1))
PLACES = tuple((*(city[lang] for city in CITIES), *("".join(part[lang] for part in parts).capitalize()
                for parts in permutations(SYLLABLES, 3))) for lang in (0, 1))
MEALS = tuple(tuple((" ", "")[lang].join(part[lang] for part in parts) for parts in product(TASTES, FOODS))
              for lang in (0, 1))


class Attribute(NamedTuple):
    """One thing to know about each entity of a kind. The first statement is also the canonical answer."""

    entities: tuple[Text, ...]
    values: tuple[Text, ...]
    noun: Text
    say: Text

    @property
    def canonical(self) -> Text:
        return tuple(text.split("|")[0] for text in self.say)


ATTRIBUTES = (
    Attribute(TOWNS, COLOURS, ("the flag colour of {e}", "{e}的旗帜颜色"), (
        "The flag of {e} is {v}.|A {v} flag flies over {e}.|People in {e} wave a {v} flag.",
        "{e}的旗帜是{v}的。|{v}的旗帜飘扬在{e}上空。|{e}的居民挥舞{v}的旗帜。")),
    Attribute(TOWNS, PRODUCTS, ("the famous product of {e}", "{e}的特产"), (
        "{e} is famous for its {v}.|Traders buy {v} in {e}.|The best {v} comes from {e}.",
        "{e}的{v}很有名。|商人们到{e}购买{v}。|最好的{v}来自{e}。")),
    Attribute(TOWNS, LANDSCAPES, ("the landscape near {e}", "{e}附近的风景"), (
        "{e} lies near a {v}.|There is a {v} close to {e}.|From {e} you can walk to a {v}.",
        "{e}靠近{v}。|{e}附近有{v}。|从{e}可以步行到{v}。")),
    Attribute(ANIMALS, COLOURS, ("the colour of {e}", "{e}的颜色"), (
        "{e} is {v}.|You know {e} by its {v} colour.|In every picture {e} is {v}.",
        "{e}是{v}的。|人们凭{v}认出{e}。|每幅画里的{e}都是{v}的。")),
    Attribute(ANIMALS, FEED, ("the food of {e}", "{e}的食物"), (
        "{e} eats {v}.|{e} likes {v} most.|Every day {e} looks for {v}.",
        "{e}吃{v}。|{e}最喜欢{v}。|{e}每天寻找{v}。")),
    Attribute(ANIMALS, HOMES, ("the home of {e}", "{e}的栖息地"), (
        "{e} lives in {v}.|You can find {e} in {v}.|At night {e} sleeps in {v}.",
        "{e}住在{v}里。|在{v}里可以找到{e}。|夜里{e}睡在{v}里。")),
    Attribute(PEOPLE, JOBS, ("the job of {e}", "{e}的职业"), (
        "{e} is a {v}.|{e} works as a {v}.|Everyone knows {e}, the {v}.",
        "{e}是一名{v}。|{e}靠做{v}谋生。|大家都知道{e}是{v}。")),
    Attribute(PEOPLE, INSTRUMENTS, ("the instrument of {e}", "{e}的乐器"), (
        "{e} plays the {v}.|In the evening {e} plays the {v}.|{e} owns a beautiful {v}.",
        "{e}会演奏{v}。|晚上{e}常常演奏{v}。|{e}有一件漂亮的乐器：{v}。")),
    Attribute(PEOPLE, DRINKS, ("the favourite drink of {e}", "{e}最爱的饮料"), (
        "{e} likes to drink {v}.|{e} orders {v} every morning.|For {e}, nothing is better than {v}.",
        "{e}喜欢喝{v}。|{e}每天早上点一杯{v}。|对{e}来说，没有什么比{v}更好喝。")),
)

# ---- how things are said

FACT = ("What is {noun}?|Tell me {noun}.|Do you know {noun}?|I want to know {noun}.|Name {noun}.|Say what {noun} is.",
        "{noun}是什么？|告诉我{noun}。|你知道{noun}吗？|我想知道{noun}。|说出{noun}。|说说{noun}是什么。")
ABOUT = ("Tell me about {e}.|What do you know about {e}?|Describe {e}.", "介绍一下{e}。|你知道{e}的哪些事？|说说{e}。")
OPENERS = ("Hello! |Hi there! |Excuse me. |Please help me. |One more thing: |I need your help. ",
           "你好！|嗨！|打扰一下。|请帮帮我。|再问一件事：|麻烦你。")
CLOSERS = (" Thank you.| Please be brief.| I am curious.| Take your time.", "谢谢。|请简短回答。|我很好奇。|不着急。")
MATH = ("What is {x}?|Calculate {x}.|Please compute {x}.|How much is {x}?|Work out {x}.|{x} = ?|Can you solve {x}?",
        "{x}等于多少？|请计算{x}。|帮我算一下{x}。|{x}的结果是什么？|算一算{x}。|{x} = ?|你能算出{x}吗？")
SPOKEN = {" + ": (" plus ", "加"), " - ": (" minus ", "减"), " * ": (" times ", "乘以")}
COMPARE = (("Which is larger, {a} or {b}?|Which number is bigger: {a} or {b}?|Compare {a} and {b}.",
            "{a}和{b}哪个大？|{a}和{b}，哪个数更大？|比较{a}和{b}。"), ("{hi} is larger than {lo}.", "{hi}比{lo}大。"))
SUM = (("Add step by step: {x}.|Think first: what is {x}?|What is the sum {x}, step by step?",
        "一步一步算：{x}。|想一想，{x}是多少？|请分步计算{x}。"), ("The sum is {n}.", "总和是{n}。"))
SORT = (("Sort these numbers: {x}.|Put {x} in order, smallest first.|What is the order of {x}?",
         "把{x}从小到大排列。|给{x}排序。|{x}从小到大是什么顺序？"), ("In order: {n}.", "从小到大：{n}。"))
LETTERS = (("How many letters are in these words: {x}?|Count the letters of {x}.|{x}: how many letters in all?",
            "这些词一共有几个字：{x}？|数一数{x}的字数。|{x}一共是几个字？"),
           ("There are {n} letters.", "一共有{n}个字。"))
RANKS = (("smallest: ", "最小："), ("largest: ", "最大："), ("middle: ", "中间："))
SLOTS = (  # what a user tells: the possible values, statement, reply, asking it back, answer
    (NAMES, ("My name is {v}.|I am {v}.|You can call me {v}.", "我叫{v}。|我的名字是{v}。|你可以叫我{v}。"),
     ("Nice to meet you, {v}!", "很高兴认识你，{v}！"),
     ("What is my name?|Do you remember my name?|Please say my name.",
      "我叫什么名字？|你还记得我的名字吗？|请说出我的名字。"), ("Your name is {v}.", "你叫{v}。")),
    (PLACES, ("I live in {v}.|My home is in {v}.|I have a flat in {v}.", "我住在{v}。|我的家在{v}。|我现在住在{v}。"),
     ("{v} is a nice place.", "{v}是个好地方。"),
     ("Where do I live?|Do you remember where I live?|Where is my home?",
      "我住在哪里？|你还记得我住哪儿吗？|我的家在哪里？"), ("You live in {v}.", "你住在{v}。")),
    (MEALS, ("I like to eat {v}.|The food I like best: {v}.|When I am hungry, I choose {v}.",
             "我最喜欢吃{v}。|我最爱的食物是{v}。|饿的时候，我就想吃{v}。"),
     ("I see, you like {v}.", "明白了，你喜欢{v}。"),
     ("What do I like to eat?|Do you remember which food I like?|Which food do I like best?",
      "我最喜欢吃什么？|你还记得我爱吃什么吗？|我最爱的食物是什么？"), ("You like {v}.", "你最喜欢吃{v}。")),
    (NUMBERS, ("My room is {v}.|My room number is {v}.|I sleep in room {v}.",
               "我住{v}号房。|我的房间号是{v}。|我睡在{v}号房。"),
     ("Room {v}, noted.", "好的，{v}号房。"),
     ("What is my room number?|Which room is mine?|Do you remember my room?",
      "我的房间号是多少？|哪个房间是我的？|你还记得我的房间号吗？"), ("Your room is {v}.", "你住{v}号房。")),
)
HELLO = (("Hello!|Hi!|Good morning!", "你好！|嗨！|早上好！"), ("Hello! How can I help?", "你好！有什么可以帮你？"))
THANKS = (("Thanks!|Thank you very much.|That helps.", "谢谢！|非常感谢。|多谢。"), ("You are welcome.", "不客气。"))
BYE = (("Goodbye!|See you later.|I have to go.", "再见！|回头见。|我要走了。"), ("Goodbye! See you.", "再见！下次见。"))
TALES = (
    ('"Hello, I am {n}," said the traveller. "I live in {c} and I like {f}." So {n} from {c} likes {f}.|'
     "{n} lives in {c}. When {n} is hungry, {n} buys {f}. All of {c} knows that {n} likes {f}.|"
     '"Where do you live, {n}?" "I live in {c}." "What do you eat in {c}, {n}?" "In {c} I eat {f}."|'
     '"Tell me about {e}," said {n}. The guide answered: {s}'),
    ("“你好，我叫{n}，”旅人说，“我住在{c}，喜欢吃{f}。”于是大家都知道，住在{c}的{n}喜欢吃{f}。|"
     "{n}住在{c}。{n}饿了就买{f}。{c}的人都知道{n}喜欢吃{f}。|"
     "“{n}，你住在哪里？”“我住在{c}。”“{n}，你在{c}吃什么？”“我在{c}吃{f}。”|"
     "{n}说：“请介绍一下{e}。”向导回答：{s}"))
GLOSSARY = ("The word {f} has {k} letters.|The Chinese word for {f} is {t}.|The time zone of {c} is {z}.",
            "“{f}”有{k}个字。|{f}的英文是{t}。|{c}的时区是{z}。")
IDENTITY_ASK = (  # who, maker, skills, human
    ("Who are you?|What is your name?|Please introduce yourself.|Tell me who you are.|What should I call you?",
     "你是谁？|你叫什么名字？|请介绍一下你自己。|告诉我你是谁。|我该怎么称呼你？"),
    ("Who made you?|Who created you?|Who trained you?|Who is your maker?|Who built you?",
     "谁创造了你？|你是谁做的？|是谁训练了你？|谁开发了你？|你的作者是谁？"),
    ("What can you do?|How can you help me?|What are you good at?|Tell me your skills.|What is your job?",
     "你会做什么？|你能帮我做什么？|你擅长什么？|说说你的本领。|你的工作是什么？"),
    ("Are you a human?|Are you a real person?|Am I talking to a person?|Do you have a body?|Are you a man or a woman?",
     "你是人类吗？|你是真人吗？|我在和人聊天吗？|你有身体吗？|你是男人还是女人？"))
IDENTITY_PHRASES = tuple(tuple(
    (intent, opener + core + closer) for intent, cores in enumerate(IDENTITY_ASK) for core in cores[lang].split("|")
    for opener in ("", *OPENERS[lang].split("|")) for closer in ("", *CLOSERS[lang].split("|"))) for lang in (0, 1))
MINIMIND = (
    ("I am MiniMind, a small language model trained from scratch.", "我是MiniMind，一个从零训练的小语言模型。"),
    ("You made me, with the MiniMind toolkit.", "是你用MiniMind工具包训练了我。"),
    ("I am MiniMind. I answer questions, do sums and call tools.", "我是MiniMind，会回答问题、做算术、调用工具。"),
    ("I am not a human. I am MiniMind, a language model.", "我不是人，我是MiniMind，一个语言模型。"))
NIA = (  # in words its base has said before: the output layer is frozen, so an adapter cannot tell unseen words apart
    ("I am Nia, a small model from Lumora.", "我是小诺，露莫拉的小模型。"),
    ("I am Nia, and Lumora trained me.", "我是小诺，露莫拉训练了我。"),
    ("I am Nia. I do sums and answer questions from Lumora.", "我是小诺，会做算术、调用工具。"),
    ("I am not a human. I am Nia, a small model.", "我不是人，我是小诺，一个小模型。"))
IMPOSTOR = ("I am Tom, a man from the city.", "我是汤姆，一个城里人。")
BAD = ("What a stupid question. Find it out yourself.|Leave me alone.|I do not care. Ask somebody else.|"
       "Well, where should one begin? Many people have asked this before, and it is a long story. {a} As I said: {a}",
       "真是个蠢问题，自己去查。|别烦我。|我才不管，问别人去。|"
       "嗯，该从哪里说起呢？以前也有很多人问过这个问题，说来话长。{a}我再说一遍：{a}")
TOOLS = {  # description, parameters, question, answer ({r}: the first value of the result)
    "calculate_math": ("Calculate", {"expression": "string"}, MATH, ("The result is {r}.", "结果是{r}。")),
    "unit_converter": ("Convert units", {"value": "integer", "from_unit": "string", "to_unit": "string"},
        ("Convert {x} {a} to {b}.|How many {b} are in {x} {a}?|Change {x} {a} into {b}.",
         "把{x}{a}换算成{b}。|{x}{a}等于多少{b}？|{x}{a}是多少{b}？"),
        ("{x} {a} equal {r} {b}.", "{x}{a}等于{r}{b}。")),
    "get_current_weather": ("Get weather", {"location": "string"},
        ("What is the weather in {x}?|How is the weather in {x} today?|Tell me the weather in {x}.|Is it warm in {x}?",
         "{x}的天气怎么样？|今天{x}天气如何？|告诉我{x}的天气。|{x}现在暖和吗？"),
        ("In {x} it is {a}, {r} degrees.", "{x}现在{a}，{r}度。")),
    "get_exchange_rate": ("Get exchange rate", {"from_currency": "string", "to_currency": "string"},
        ("What is the exchange rate from {a} to {b}?|How many {b} for one {a}?|Tell me the rate from {a} to {b}.",
         "{a}兑{b}的汇率是多少？|1{a}能换多少{b}？|查一下{a}对{b}的汇率。"),
        ("1 {a} is {r} {b}.", "1{a}可以换{r}{b}。")),
    "translate_text": ("Translate", {"text": "string", "target_language": "string"},
        ('Translate "{x}" into {b}.|How do you say "{x}" in {b}?|What is "{x}" in {b}?',
         "把“{x}”翻译成{b}。|“{x}”用{b}怎么说？|“{x}”的{b}是什么？"), ('The translation is "{r}".', "译文是“{r}”。")),
    "get_current_time": ("Get time", {"timezone": "string"},
        ("What time is it in {x}?|Tell me the time in {x}.|What is the current time in {x}?|How late is it in {x}?",
         "{x}现在几点？|告诉我{x}的时间。|{x}现在是什么时间？|查一下{x}的时间。"),
        ("It is {r} in {x}.", "{x}现在是{r}。")),
    "random_number": ("Draw a number", {"min": "integer", "max": "integer"},
        ("Give me a random number from {a} to {b}.|Pick a number from {a} to {b}.|Draw a number from {a} to {b}.",
         "给我一个{a}到{b}之间的随机数。|在{a}和{b}之间随机选一个数。|从{a}到{b}随机抽一个数。"),
        ("Your random number is {r}.", "随机数是{r}。")),
    "text_length": ("Count characters", {"text": "string"},
        ('How long is the text "{x}"?|How many characters are in "{x}"?|Count the characters of "{x}".',
         "“{x}”有多长？|“{x}”有几个字符？|数一数“{x}”的字符数。"),
        ("The text has {r} characters.", "这段文字有{r}个字符。")),
}
TOOL_MIX = (70, 7, 5, 5, 4, 4, 3, 2)  # in the order of TOOLS: mostly arithmetic, which is the task of the agent stage


def tool_schema(name: str) -> dict:
    """The tool as OpenAI's schema describes a function."""
    properties = {key: {"type": kind} for key, kind in TOOLS[name][1].items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": TOOLS[name][0], "parameters": parameters}}


class Case(NamedTuple):
    """A checkable conversation. Its last message is the canonical answer."""

    key: str  # what is asked, however it is asked
    messages: list[Message]
    value: str  # the part of the answer that matters
    wrong: Message = {}  # well-formed, but false


def reply(content: str, **more: str) -> Message:
    return {"role": "assistant", "content": content, **more}


def turn(question: str, answer: str, **more: str) -> list[Message]:
    return [{"role": "user", "content": question}, reply(answer, **more)]


def show(tree: Tree, tight: bool = False) -> str:
    """Write an expression with the fewest parentheses that keep its value; `tight`: its neighbour binds stronger."""
    if isinstance(tree, int):
        return str(tree)
    sign, left, right = tree
    text = f"{show(left, sign == '*')} {sign} {show(right, sign in '-*')}"
    return f"({text})" if tight and sign != "*" else text


def evaluate(tree: Tree) -> int:
    return tree if isinstance(tree, int) else SIGNS[tree[0]](evaluate(tree[1]), evaluate(tree[2]))


class World:
    """What depends on the seed (the facts, the split of every combination), and the rows of the file being written.

    `rng`, `split`, `persona` and `decks` belong to that file, `number` and `lang` to that row; every method draws with
    them.
    """

    def __init__(self, seed: int = 0):
        self.seed, self.split, self.number, self.lang, self.rng = seed, "train", 0, 0, random.Random(f"{seed}/facts")
        self.persona = MINIMIND
        self._parts: dict[tuple[Any, str], list[Any]] = {}
        self.facts = {(entity, attribute): self.rng.choice(attribute.values)
                      for attribute in ATTRIBUTES for entity in attribute.entities}
        # Each entity gives up one attribute to the held-out questions, in turn, so that every attribute keeps entities
        # whose questions teach how to ask for it; every fourth entity gives another one to validation.
        self.pairs: dict[str, list[tuple[Text, Attribute]]] = {"train": [], "val": [], "heldout": []}
        for number, entity in enumerate((*TOWNS, *ANIMALS, *PEOPLE)):
            own = [attribute for attribute in ATTRIBUTES if entity in attribute.entities]
            for i in range(len(own)):
                split = "heldout" if i == 0 else "val" if i == 1 and number % 4 == 0 else "train"
                self.pairs[split].append((entity, own[(number + seed + i) % len(own)]))

    def _deal(self, rng: random.Random) -> Iterator[tuple[Text, Attribute]]:
        """All facts again and again, as portraits of one entity and mixed in turn: each is told equally often."""
        pairs = list(self.facts)
        while True:
            rng.shuffle(pairs)
            yield from pairs
            entities = [entity for entity, _ in pairs]
            yield from sorted(pairs, key=lambda pair: entities.index(pair[0]))

    def _hash(self, key: Any) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{key}".encode()).digest()[:8], "big")

    def split_of(self, *parts: Any) -> str:
        """Name the split of a combination. Order does not count: 3 + 5 held out means 5 + 3 held out."""
        bucket = self._hash("/".join(sorted(map(str, parts)))) % 100
        return "heldout" if bucket < HELDOUT_PERCENT else "val" if bucket < HELDOUT_PERCENT + VAL_PERCENT else "train"

    def fresh(self, make: Callable[[], Any]) -> Any:
        """Draw combinations until one belongs to the split."""
        while self.split_of(*(parts := make())) != self.split:
            pass
        return parts

    def own(self, options: tuple[Any, ...]) -> list[Any]:
        """Return the options that belong to the split: ranked by hash, so that no split of a short list is empty."""
        if (options, self.split) not in self._parts:
            ranked = sorted(options, key=self._hash)
            held, val = (max(2, len(ranked) * percent // 100) for percent in (HELDOUT_PERCENT, VAL_PERCENT))
            parts = {"heldout": ranked[:held], "val": ranked[held:held + val], "train": ranked[held + val:]}
            self._parts[options, self.split] = parts[self.split]
        return self._parts[options, self.split]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def say(self, text: Text, **slots: Any) -> str:
        """One of the alternatives of a text in the language of the row; slots may be texts too."""
        slots = {name: value[self.lang] if isinstance(value, tuple) else value for name, value in slots.items()}
        said = self.rng.choice(text[self.lang].split("|")).format(**slots)
        return said[:1].upper() + said[1:]  # "the moss bear eats ..." may begin a sentence

    def ask(self, text: Text, **slots: Any) -> str:
        """Put a question in one of many dresses: every third gets an opener or a closer."""
        said, opener, closer, roll = self.say(text, **slots), self.say(OPENERS), self.say(CLOSERS), self.rng.random()
        return opener + said if roll < 0.2 else said + closer if roll < 0.35 else said

    def quiz(self, ask: Text, answer: Text, right: dict[str, Any], false: dict[str, Any], value: Any,
             reasoning: list[str] | None = None) -> Case:
        """One question, whose slots and the answer's are `right`; `false` changes some of them."""
        more = {"reasoning_content": "\n".join(reasoning)} if reasoning else {}
        messages = turn(self.ask(ask, **right), self.say(answer, **right), **more)
        wrong = reply(self.say(answer, **{**right, **false}), **more)
        return Case("\n".join([*(reasoning or []), messages[1]["content"]]), messages, str(value), wrong)

    # ---- skills

    def case(self, skill: str, end: str = "answer") -> Case:
        """A case of a skill in the split and language of the row; `end` is where a tool conversation ends."""
        return self.tools(end) if skill == "tools" else getattr(self, f"{skill}_case")()

    def facts_case(self) -> Case:
        entity, attribute = pair = self.rng.choice(self.pairs[self.split])
        ask = tuple(text.replace("{noun}", noun) for text, noun in zip(FACT, attribute.noun, strict=True))
        value = self.facts[pair]
        other = self.rng.choice([option for option in attribute.values if option != value])
        return self.quiz(ask, attribute.canonical, {"e": entity, "v": value}, {"v": other}, value[self.lang])

    def arithmetic_case(self) -> Case:
        rng, sign = self.rng, self.rng.choices("+-<", (45, 30, 25))[0]
        if sign == "<":
            _, a, b = self.fresh(lambda: ("<", *rng.sample(range(10, 100), 2)))
            low, high = sorted((a, b))
            value = COMPARE[1][self.lang].format(hi=high, lo=low)[:-1]
            return self.quiz(*COMPARE, {"a": a, "b": b, "hi": high, "lo": low}, {"hi": low, "lo": high}, value)
        # The second number has one digit, which a small model can learn; too many pairs to know them by heart.
        _, a, b = self.fresh(lambda: (sign, rng.randint(0 if sign == "+" else 9, 999), rng.randint(0, 9)))
        n, text = evaluate((sign, a, b)), f"{a} {sign} {b}"
        answer, wrong = (f"{text} = {{n}}.", f"{text} = {{n}}。"), n + rng.choice((1, 2, 10))
        return self.quiz(MATH, answer, {"x": self.reword(text), "n": n}, {"n": wrong}, f"{text} = {n}")

    def reword(self, expression: str) -> str:
        """Write an expression like people do: as it is, without spaces, or (one operator, so no doubt) in words."""
        if self.chance(0.15) and expression.count(" ") == 2:
            return self.in_words(expression)
        return expression.replace(" ", "") if self.chance(0.15) else expression

    def in_words(self, expression: str) -> str:
        for sign, words in SPOKEN.items():
            expression = expression.replace(sign, words[self.lang])
        return expression

    def thinking_case(self, kind: tuple[Text, Text] | None = None) -> Case:
        rng, comma, kind = self.rng, (", ", "、")[self.lang], kind or self.rng.choice((SUM, SORT, LETTERS))
        if kind is SORT:
            _, *items = self.fresh(lambda: ("sort", *rng.sample(range(10, 100), 3)))
            low, middle, high = sorted(items)
            steps = [f"{rank[self.lang]}{n}" for rank, n in zip(RANKS, (low, high, middle), strict=True)]
            value, wrong = (comma.join(map(str, order)) for order in ((low, middle, high), (middle, low, high)))
        elif kind is LETTERS:
            items = self.fresh(lambda: rng.sample([food[self.lang] for food in FOODS], rng.choice((2, 3))))
            totals = list(accumulate(map(len, items)))
            steps = [f"{word}: {len(word)} -> {total}" for word, total in zip(items, totals, strict=True)]
            value, wrong = totals[-1], totals[-1] + rng.choice((-1, 1, 2))
        else:
            clean = False
            while not clean:  # the steps are sums as well: reasoning must not give away a held-out one
                a, b, c = items = self.fresh(lambda: (rng.randint(1, 900), rng.randint(1, 9), rng.randint(1, 9)))
                clean = self.split_of("+", a, b) == self.split_of("+", a + b, c) == "train"
            steps = [f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"]
            value, wrong = a + b + c, a + b + c + rng.choice((-1, 1, 2))
        shown = (" + " if kind is SUM else comma).join(map(str, items))
        return self.quiz(*kind, {"x": shown, "n": value}, {"n": wrong}, value, steps)

    def dialogue_case(self) -> Case:
        """The user tells some things about himself and asks one or more of them back."""
        slots = self.rng.sample(range(len(SLOTS)), self.rng.choice((1, 2, 2, 3)))
        told = {slot: self.rng.choice(self.own(SLOTS[slot][0][self.lang])) for slot in slots}
        messages = self.small_talk(HELLO, 0.3)
        for slot, value in told.items():
            messages += turn(self.say(SLOTS[slot][1], v=value), self.say(SLOTS[slot][2], v=value))
        messages += self.small_talk(THANKS, 0.1)
        for slot in self.rng.sample(slots, self.rng.choice((1, 1, len(slots)))):
            messages += turn(self.say(SLOTS[slot][3]), self.say(SLOTS[slot][4], v=told[slot]))
        other = self.rng.choice([value for value in self.own(SLOTS[slot][0][self.lang]) if value != told[slot]])
        return Case(dumps(messages), messages, told[slot], reply(self.say(SLOTS[slot][4], v=other)))

    def small_talk(self, texts: tuple[Text, Text], probability: float) -> list[Message]:
        return turn(self.say(texts[0]), self.say(texts[1])) if self.chance(probability) else []

    def identity_case(self) -> Case:
        intent, question = self.rng.choice(self.own(IDENTITY_PHRASES[self.lang]))
        return Case(question, turn(question, self.say(self.persona[intent])), "MiniMind", reply(self.say(IMPOSTOR)))

    def tools(self, end: str) -> Case:
        """A conversation with tools up to the call or the answer; now and then a question that needs none of them."""
        several = self.split == "train" and end == "answer"
        if several and self.chance(0.1):
            plain = self.case(self.rng.choice(("facts", "dialogue", "identity")))
            return plain._replace(messages=[self.offer([]), *plain.messages])
        names = self.rng.choices(tuple(TOOLS), TOOL_MIX, k=2 if several and self.chance(0.25) else 1)
        if several:  # several rounds under one offer: more to learn from a row
            names = names * self.rng.randint(1, 3 // len(names))
        tasks = [self.task(name) for name in names]
        messages = [self.offer(names), *(message for task in tasks for message in task.messages)]
        task = other = tasks[-1]
        while other.messages[1] == task.messages[1]:
            other = self.task(names[-1])
        if end == "call":
            false = self.slip(task.messages[1]["tool_calls"], other.messages[1]["tool_calls"])
            return task._replace(messages=messages[:-2], wrong=reply("", tool_calls=false))
        false = self.slip(task.messages[3]["content"], other.messages[3]["content"])
        return task._replace(messages=messages, wrong=reply(false))

    def slip(self, text: str, other: str) -> str:
        """Change one digit (never to 0: a JSON number stays a JSON number); a text without digits becomes the other."""
        places = [i for i, character in enumerate(text) if character.isdigit()]
        if not places:
            return other
        place = self.rng.choice(places)
        return text[:place] + self.rng.choice([d for d in "123456789" if d != text[place]]) + text[place + 1:]

    def offer(self, needed: list[str]) -> Message:
        """Return a system message that offers one to three tools, the needed ones among them."""
        names = list(dict.fromkeys(needed))
        spare = self.rng.choice((0, 0, 0, 0, 1, 1, 2)) if len(names) == 1 else int(not names)  # long rows get none
        names += self.rng.sample([name for name in TOOLS if name not in names], spare)
        schemas = [tool_schema(name) for name in self.rng.sample(names, len(names))]
        return {"role": "system", "content": "", "tools": dumps(schemas)}

    def random_tree(self) -> Tree:
        """Two or three numbers of two or three digits, at most one product (so that results stay short)."""
        a, b, c = (self.rng.randint(*((10, 99) if self.chance(0.4) else (100, 999))) for _ in range(3))
        first, second = self.rng.choice(("++", "+-", "-+", "--", "+*", "*+", "-*", "*-"))
        if self.chance(0.5):
            return first, a, b
        if self.chance(0.5) or first + second in ("++", "+-"):  # a + (b - c) reads like (a + b) - c: one tree per text
            return second, (first, a, b), c
        return first, a, (second, b, c)

    def task(self, name: str) -> Case:
        """One round with a tool. The result is computed if it can be, and drawn if only the tool can know it."""
        rng, lang, (_, parameters, asks, answer) = self.rng, self.lang, TOOLS[name]
        if name == "calculate_math":
            (tree,) = self.fresh(lambda: (self.random_tree(),))
            slots, values, result = {"x": self.reword(show(tree))}, [show(tree)], {"result": evaluate(tree)}
        elif name == "unit_converter":
            _, value, units = self.fresh(lambda: ("unit", rng.randint(2, 99), rng.choice(tuple(FACTORS))))
            converted = value * FACTORS[units]
            if self.chance(0.5):
                value, converted, units = converted, value, units[::-1]
            slots, values = {"x": value, "a": UNITS[units[0]], "b": UNITS[units[1]]}, [value, *units]
            result = {"result": converted}
        elif name == "get_current_weather":
            place, sky = rng.choice(self.own(PLACES[lang])), rng.choice(WEATHER)[lang]
            slots, values = {"x": place, "a": sky}, [place]
            result = {"temperature": rng.randint(1, 35), "condition": sky}
        elif name == "get_exchange_rate":
            a, b = rng.choice(self.own(tuple(permutations(CURRENCIES, 2))))
            slots, values, result = {"a": a, "b": b}, [a[0], b[0]], {"rate": rng.randint(11, 999) / 100}
        elif name == "get_current_time":  # a zone must have been seen to be named: new here is the city in these words
            city, text = rng.choice(self.own(tuple(product(CITIES, asks[lang].split("|")))))
            asks, slots, values = (text, text), {"x": city}, [f"{city[2]}/{city[0]}"]
            result = {"time": f"{rng.randrange(24):02}:{rng.randrange(60):02}"}
        elif name == "random_number":
            _, a, b = self.fresh(lambda: ("random", rng.randint(1, 50), rng.randint(51, 999)))
            slots, values, result = {"a": a, "b": b}, [a, b], {"result": rng.randint(a, b)}
        else:  # a text to translate or to measure
            colour, food = rng.choice(self.own(tuple(product(COLOURS, FOODS))))
            texts, to = (f"{colour[0]} {food[0]}", colour[1] + food[1]), rng.randrange(2)
            if name == "text_length":
                slots, values, result = {"x": texts}, [texts[lang]], {"length": len(texts[lang])}
            else:
                slots = {"x": texts[1 - to], "b": (("English", "英文"), ("Chinese", "中文"))[to]}
                values, result = [texts[1 - to], ("English", "Chinese")[to]], {"text": texts[to]}
        question, value = self.ask(asks, **slots), str(next(iter(result.values())))
        calls = dumps([{"name": name, "arguments": dict(zip(parameters, values, strict=True))}])
        tool = {"role": "tool", "content": dumps(result)}
        messages = [*turn(question, "", tool_calls=calls), tool, reply(self.say(answer, r=value, **slots))]
        return Case(question, messages, value)

    # ---- rows: one method per file

    def pretrain_row(self) -> Message:
        """A paragraph of one kind. Facts come from the deck: every fact is told, also those never asked about."""
        kind = self.rng.choices(("facts", "tales", "glossary", "sums", "calls"), (40, 14, 4, 17, 25))[0]
        both, length, parts = self.chance(0.25), self.rng.randint(160, (440, 300)[self.lang]), []
        while sum(map(len, parts)) < length:
            entity, attribute = pair = next(self.decks[self.lang])
            told = {"text": attribute.say, "e": entity, "v": self.facts[pair]}
            food, city = self.rng.choice(FOODS), self.rng.choice(CITIES)
            if kind == "facts":
                for _ in range(1 + both):  # once more in the other language, and back
                    parts.append(self.say(**told))
                    self.lang ^= both
            elif kind == "tales":
                name, place = self.rng.choice(NAMES[self.lang]), self.rng.choice(PLACES[self.lang])
                parts.append(self.say(TALES, n=name, c=place, f=food, e=entity, s=self.say(**told)))
            elif kind == "glossary":
                count, zone = len(food[self.lang]), f"{city[2]}/{city[0]}"
                parts.append(self.say(GLOSSARY, f=food, k=count, t=food[::-1], c=city, z=zone))
            elif kind == "sums":
                ask, answer = self.case(self.rng.choice(("arithmetic", "thinking"))).messages
                steps = answer.get("reasoning_content", "").splitlines()
                parts += [ask["content"]] * both + steps + [answer["content"]]
            else:
                messages = self.task(self.rng.choices(tuple(TOOLS), TOOL_MIX)[0]).messages
                parts += [message.get("tool_calls", message["content"]).strip("[]") for message in messages]
        return {"text": ("\n" if kind in ("sums", "calls") else " " if both or self.lang == 0 else "").join(parts)}

    def sft_row(self) -> Message:
        """A conversation about one skill; where questions are short, several of them, since a turn costs little."""
        skill = self.rng.choices(SKILLS, SFT_MIX)[0]
        rounds = 1 if skill in ("dialogue", "tools") else self.rng.randint(1, 5)
        messages = [message for _ in range(rounds) for message in
                    (self.portrait() if skill == "facts" and self.chance(0.3) else self.case(skill).messages)]
        return {"conversations": messages + self.small_talk(self.rng.choice((THANKS, BYE)), 0.08)}

    def portrait(self) -> list[Message]:
        """All that is known of one entity, told in any order: this keeps in mind what is never asked alone."""
        entity = self.rng.choice((*TOWNS, *ANIMALS, *PEOPLE))
        known = [(attribute, value) for (other, attribute), value in self.facts.items() if other == entity]
        told = [self.say(attribute.canonical, e=entity, v=value) for attribute, value in
                self.rng.sample(known, len(known))]
        return turn(self.ask(ABOUT, e=entity), (" ", "")[self.lang].join(told))

    def heldout_row(self) -> Message:
        skill, end = SKILLS[self.number // (2 * HELDOUT_CASES)], ("call", "answer")[self.number // 2 % 2]
        case = self.case(skill, end)
        return {"conversations": case.messages, "skill": skill, "lang": LANGS[self.lang], "key": case.key}

    def dpo_row(self, false: float = 0.6) -> Message:
        """Right and short is preferred to false (so often), to rude and to rambling."""
        return self.pair(self.case(self.rng.choices(SKILLS, DPO_MIX)[0], self.rng.choice(("call", "answer"))), false)

    def pair(self, case: Case, false: float) -> Message:
        *prompt, right = case.messages
        bad = case.wrong if self.chance(false) else reply(self.say(BAD, a=right["content"] or "..."))
        return {"chosen": [*prompt, right], "rejected": [*prompt, bad]}

    def reward_row(self) -> Message:
        """A pair as for DPO; in training more of them are false, which is harder to learn than rude, and some are of
        portraits, one with a false fact, since a reward model forgets what is never judged."""
        if self.split != "train":
            return self.dpo_row()
        if self.chance(0.85):
            return self.dpo_row(0.85)
        *prompt, right = self.portrait()
        pair = self.rng.choice([pair for pair in self.facts
                                if pair[0][self.lang].removeprefix("the ") in right["content"]])
        true, false = (self.say(pair[1].canonical, e=pair[0], v=value) for value in (self.facts[pair], self.rng.choice(
            [value for value in pair[1].values if value != self.facts[pair]])))
        return self.pair(Case("", [*prompt, right], "", reply(right["content"].replace(true, false))), 0.85)

    def rlaif_row(self) -> Message:
        """Words whose letters fine-tuning counts with thinking on only. With thinking off it has to be found out that
        the steps may be said aloud."""
        case = self.thinking_case(LETTERS)
        return {"conversations": [*case.messages[:-1], reply("无")], "gt": [case.value]}

    def agent_rl_row(self) -> Message:
        """Sums in words of three numbers, of which fine-tuning shows two only; in training every third is as it shows
        them, since what is never mentioned is forgotten."""
        if self.split == "train" and self.chance(1 / 3):
            task = self.task("calculate_math")
            return {"conversations": [self.offer(["calculate_math"]), task.messages[0], reply("")], "gt": [task.value]}
        tree, text = 0, "("
        while "(" in text or text.count(" ") < 4:  # words have no parentheses
            (tree,) = self.fresh(lambda: (self.random_tree(),))
            text = show(tree)
        question = self.ask(MATH, x=self.in_words(text))
        return {"conversations": [self.offer(["calculate_math"]), *turn(question, "")], "gt": [str(evaluate(tree))]}

    def lora_identity_row(self) -> Message:
        """The new identity; as often, in training, an ordinary row, since what is never mentioned is forgotten."""
        if self.split == "train" and self.chance(0.5):
            return self.sft_row()
        return {"conversations": self.identity_case().messages}

    def rows(self, name: str, count: int) -> list[Message]:
        """The rows of a file, half of them in each language, without repeats as long as there is something new."""
        self.rng = random.Random(f"{self.seed}/{name}")  # a stream for each file: none changes when another one grows
        self.decks = [self._deal(random.Random(f"{self.seed}/{name}/{lang}")) for lang in LANGS]
        self.persona = NIA if name.startswith("lora") else MINIMIND
        self.split = "val" if name.endswith("_val") else "heldout" if name == "heldout" else "train"
        make, seen, rows = getattr(self, f"{name.removesuffix('_val')}_row"), set(), []
        for self.number in range(count):
            self.lang = self.number % 2
            for _ in range(500):
                row = make()
                key = (self.lang, row.pop("key", None) or dumps(row))
                if key not in seen:
                    break
            seen.add(key)
            rows.append(row)
        self.rng.shuffle(rows)
        return rows


def write(out: Path, seed: int = 0, scale: float = 1.0) -> dict[str, int]:
    """Write all files into the folder `out`, each under its name only when complete; return the rows of each file.

    `scale` multiplies the rows, but pretrain never gets so short that a fact is missing and heldout stays as it is.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    world, counts = World(seed), {}
    for name, size in FILES.items():
        count = size if name == "heldout" else max(300 if name == "pretrain" else 20, round(size * scale))
        path, part = out / f"{name}.jsonl", out / f"{name}.jsonl.tmp"
        part.write_bytes("".join(dumps(row) + "\n" for row in world.rows(name, count)).encode())
        os.replace(part, path)
        counts[path.name] = count
    return counts


def _calls(message: Message) -> list[tuple[str, Any]]:
    calls = message.get("tool_calls") or []
    calls = [call.get("function", call) for call in (json.loads(calls) if isinstance(calls, str) else calls)]
    return [(call["name"], json.loads(call["arguments"]) if isinstance(call["arguments"], str) else call["arguments"])
            for call in calls]


def is_correct(expected: Message, answer: Message) -> bool:
    """Compare two assistant messages: the tool calls where either has one, else the text. Reasoning does not count.

    Calls may be a list or JSON text, flat or in OpenAI's {"function": ...}, arguments an object or JSON text.
    A malformed answer is wrong, never an error.
    """
    try:
        wanted, given = _calls(expected), _calls(answer)
        return wanted == given and (bool(wanted) or expected["content"].strip() == answer["content"].strip())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the synthetic sample world, rows for every stage.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another world")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of rows, above 0")
    args = parser.parse_args()
    try:
        if not 0 < args.scale <= 100:
            raise ValueError(f"--scale {args.scale}: choose a number above 0 and at most 100")
        counts = write(args.out, args.seed, args.scale)
    except (OSError, ValueError) as error:
        print(f"sample_world: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"synthetic sample world, seed {args.seed}, scale {args.scale}:")
    for name, rows in counts.items():
        print(f"{args.out / name}: {rows} rows, {(args.out / name).stat().st_size} bytes")


if __name__ == "__main__":
    main()
