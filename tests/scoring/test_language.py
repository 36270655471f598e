from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from align.scoring.language import LANGUAGES, speaks

SENTENCES = {
    "ar": "أنا لا أعرف أين هو الكتاب الذي كان على الطاولة في البيت.",
    "bg": "Аз не знам къде е книгата, която беше на масата, но ще я намеря.",
    "bn": "আমি জানি না বইটি কোথায়, এটি টেবিলের উপরে ছিল।",
    "de": "Ich weiß nicht, wo das Buch ist, aber es lag auf dem Tisch.",
    "en": "I do not know where the book is, but it was on the table.",
    "es": "No sé dónde está el libro, pero estaba en la mesa de la cocina.",
    "fa": "من نمی‌دانم کتاب کجا است، اما این کتاب در خانه بود.",
    "fi": "En tiedä, missä kirja on, mutta se oli pöydällä ja minä luin sitä.",
    "fr": "Je ne sais pas où est le livre, mais il était sur la table de la cuisine.",
    "gu": "મને ખબર નથી કે પુસ્તક ક્યાં છે, તે ટેબલ પર હતું.",
    "he": "אני לא יודע איפה הספר, אבל הוא היה על השולחן.",
    "hi": "मुझे नहीं पता कि किताब कहाँ है, लेकिन वह मेज पर थी और मैं उसे पढ़ता था।",
    "it": "Non so dove sia il libro, ma era sul tavolo della cucina e non è più lì.",
    "ja": "本がどこにあるのか分かりませんが、テーブルの上にありました。",
    "kn": "ಪುಸ್ತಕ ಎಲ್ಲಿದೆ ಎಂದು ನನಗೆ ಗೊತ್ತಿಲ್ಲ, ಅದು ಮೇಜಿನ ಮೇಲೆ ಇತ್ತು.",
    "ko": "책이 어디에 있는지 모르겠지만, 식탁 위에 있었습니다.",
    "ml": "പുസ്തകം എവിടെയാണെന്ന് എനിക്കറിയില്ല, അത് മേശപ്പുറത്തായിരുന്നു.",
    "mr": "पुस्तक कुठे आहे हे मला माहीत नाही, पण ते टेबलावर होते आणि मी ते वाचत होतो.",
    "ne": "मलाई किताब कहाँ छ थाहा छैन, तर यो टेबलमा थियो र म पढ्दै थिएँ।",
    "pa": "ਮੈਨੂੰ ਨਹੀਂ ਪਤਾ ਕਿ ਕਿਤਾਬ ਕਿੱਥੇ ਹੈ, ਪਰ ਇਹ ਮੇਜ਼ ਉੱਤੇ ਸੀ।",
    "pl": "Nie wiem, gdzie jest książka, ale była na stole i nie ma jej w domu.",
    "pt": "Não sei onde o livro está, mas ele estava em uma mesa da cozinha.",
    "ru": "Я не знаю, где книга, но она была на столе, и я читал её.",
    "sw": "Sijui kitabu kiko wapi, lakini kilikuwa juu ya meza katika nyumba yangu na watu wa hapa.",
    "ta": "புத்தகம் எங்கே என்று எனக்குத் தெரியவில்லை, அது மேசையில் இருந்தது.",
    "te": "పుస్తకం ఎక్కడ ఉందో నాకు తెలియదు, అది బల్లపై ఉంది.",
    "th": "ฉันไม่รู้ว่าหนังสืออยู่ที่ไหน แต่มันอยู่บนโต๊ะ",
    "uk": "Я не знаю, де книга, але вона була на столі, і це була моя книга з дому.",
    "ur": "مجھے نہیں معلوم کہ کتاب کہاں ہے، لیکن یہ میز پر تھی اور میں نے اس کو پڑھا۔",
    "vi": "Tôi không biết quyển sách ở đâu, nhưng nó đã ở trên bàn và tôi đọc những trang này.",
}


LATIN = ("de", "en", "es", "fr", "it", "pt")


def test_every_language_has_a_sentence() -> None:
    assert SENTENCES.keys() == LANGUAGES


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_is_in_its_language_and_in_no_other(language: str) -> None:
    assert {other for other in LANGUAGES if speaks(SENTENCES[language], other)} == {language}


@pytest.mark.parametrize("text", ["", "42 + 1 = 43", "!?", "🙂"])
def test_without_letters_there_is_no_language(text: str) -> None:
    assert not any(speaks(text, language) for language in LANGUAGES)


def test_a_word_is_given_the_benefit_of_the_doubt() -> None:
    assert speaks("Hello", "en")
    assert speaks("Hallo", "de")
    assert not speaks("Hello", "ru")


def test_case_and_foreign_names_do_not_matter() -> None:
    assert speaks(SENTENCES["en"].upper(), "en")
    assert speaks(SENTENCES["ko"] + " GPT-4", "ko")
    assert speaks("वह " + SENTENCES["hi"] + " Delhi", "hi")


def test_chinese_is_not_japanese_and_few_latin_letters_do_not_make_it_english() -> None:
    text = "我不知道书在哪里,但是它在桌子上。GPT"
    assert not speaks(text, "ja")
    assert not speaks(text, "en")


def test_real_texts_are_in_their_language(align_data: Path) -> None:
    korean = json.loads((align_data / "sft" / "ko_alpaca_data.json").read_text(encoding="utf-8"))
    english = json.loads((align_data / "sft" / "lima.json").read_text(encoding="utf-8"))
    korean_texts = [row["output"] for row in korean if len(row["output"]) > 100][:500]
    assert sum(speaks(text, "ko") for text in korean_texts) >= 470  # the others are code, or lists of English words
    told = Counter(language for row in english[:500] for language in LATIN if speaks(row["output"], language))
    assert told == {"en": 491, "pt": 6, "es": 2, "de": 1}  # the nine, read by eye, are
