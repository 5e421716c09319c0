"""The texts of the sample world (sample_world.py): its towns, animals and people, and sentences about them.

A text is a pair (English, Chinese); "a|b" in it separates alternatives, {x} is a slot.
"""

from itertools import permutations, product
from typing import NamedTuple

Text = tuple[str, str]
LANGS = ("en", "zh")


def _table(text: str) -> tuple[tuple[str, ...], ...]:
    """Turn "sun=太阳, tall grass=草丛" into (("sun", "太阳"), ("tall grass", "草丛"))."""
    return tuple(tuple(cell.strip() for cell in row.split("=")) for row in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# -- the entities of the world, and what is known about them

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
    statements: Text

    @property
    def canonical(self) -> Text:
        return tuple(text.split("|")[0] for text in self.statements)


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

# -- sentences

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


class Slot(NamedTuple):
    """One thing that users tell about themselves, and the question that asks for it later."""

    values: tuple[tuple[str, ...], ...]  # of each language
    statement: Text
    reply: Text
    question: Text
    answer: Text


SLOTS = (
    Slot(NAMES,
         ("My name is {v}.|I am {v}.|You can call me {v}.", "我叫{v}。|我的名字是{v}。|你可以叫我{v}。"),
         ("Nice to meet you, {v}!", "很高兴认识你，{v}！"),
         ("What is my name?|Do you remember my name?|Please say my name.",
          "我叫什么名字？|你还记得我的名字吗？|请说出我的名字。"), ("Your name is {v}.", "你叫{v}。")),
    Slot(PLACES,
         ("I live in {v}.|My home is in {v}.|I have a flat in {v}.", "我住在{v}。|我的家在{v}。|我现在住在{v}。"),
         ("{v} is a nice place.", "{v}是个好地方。"),
         ("Where do I live?|Do you remember where I live?|Where is my home?",
          "我住在哪里？|你还记得我住哪儿吗？|我的家在哪里？"), ("You live in {v}.", "你住在{v}。")),
    Slot(MEALS,
         ("I like to eat {v}.|The food I like best: {v}.|When I am hungry, I choose {v}.",
          "我最喜欢吃{v}。|我最爱的食物是{v}。|饿的时候，我就想吃{v}。"),
         ("I see, you like {v}.", "明白了，你喜欢{v}。"),
         ("What do I like to eat?|Do you remember which food I like?|Which food do I like best?",
          "我最喜欢吃什么？|你还记得我爱吃什么吗？|我最爱的食物是什么？"), ("You like {v}.", "你最喜欢吃{v}。")),
    Slot(NUMBERS,
         ("My room is {v}.|My room number is {v}.|I sleep in room {v}.",
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
TOOLS = {  # description, parameters, question, answer ({r}: `answer_value` of the result)
    "calculate_math": ("Calculate", {"expression": "string"}, MATH, ("The result is {r}.", "结果是{r}。")),
    "unit_converter": ("Convert units", {"value": "integer", "from_unit": "string", "to_unit": "string"},
        ("Convert {x} {a} to {b}.|How many {b} are in {x} {a}?|Change {x} {a} into {b}.",
         "把{x}{a}换算成{b}。|{x}{a}等于多少{b}？|{x}{a}是多少{b}？"),
        ("{x} {a} equal {r} {b}.", "{x}{a}等于{r}{b}。")),
    "get_current_weather": ("Get weather", {"location": "string"},
        ("What is the weather in {x}?|How is the weather in {x} today?|Tell me the weather in {x}.|Is it warm in {x}?",
         "{x}的天气怎么样？|今天{x}天气如何？|告诉我{x}的天气。|{x}现在暖和吗？"),
        ("In {x} it is {a}, {r}.", "{x}现在{a}，{r}。")),
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
