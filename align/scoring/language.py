"""Whether a text is in a language: by its script, and by the little words of languages that share one.

A heuristic, without a model or a dependency. It tells the thirty languages below apart in texts of a sentence or more.
A word or two may be of several; then the language asked for is given the benefit of the doubt.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import cache
from typing import Final

_SCRIPTS: Final[dict[str, dict[str, str]]] = {
    "LATIN": {
        "en": "the of and to is in that it was for with as are this you be have not on i my",
        "de": "der die das und ist nicht ich zu den mit ein eine von auf für dem sich wir auch es",
        "fr": "le la les et est des un une que pas pour dans je vous qui du au ce avec nous",
        "es": "el la los las y es que de en un una por con para no se del al lo como",
        "pt": "o a os as e é que de em um uma por com para não se do da no na",
        "it": "il la gli le e è che di in un una per con non si del della sono ma come",
        "pl": "i w na nie to jest się z do że jak o co ale po tak dla od są przez",
        "fi": "ja on ei se että hän oli ovat mutta kun niin tai joka minä sinä kuin myös mitä olen ole",
        "sw": "na ya wa kwa ni katika za la cha kuwa hii huo yake yangu lakini sana kama hiyo au watu",
        "vi": "và là của không có cho một những được tôi bạn người trong với các này để đã khi như",
    },
    "CYRILLIC": {
        "ru": "и в не на что я он как это но с по вы мы или был есть для она они",
        "uk": "і в не на що я він як це але з та у є ви ми або для вона вони",
        "bg": "и в не на че аз той как това но с по се да е са за от ще ли",
    },
    "ARABIC": {
        "ar": "في من على أن إلى هذا التي لا ما عن مع هو هي كان هذه الذي أو لم قد كل",
        "fa": "که در را این از به است با آن برای می شما هم تا خود ها بود یک های ما",
        "ur": "کے میں کی ہے اور سے کا کو نے پر ہیں کہ یہ ہو نہیں آپ ایک بھی تھا لیے",
    },
    "DEVANAGARI": {
        "hi": "है में की के और का से को हैं नहीं यह पर भी कि था हो एक ने लिए मैं",
        "mr": "आहे आणि या व ते हे ही नाही मी तो ती आहेत होते एक पण तर मध्ये करा आपण साठी",
        "ne": "छ र हो को मा यो पनि छन् म लागि भने तपाईं गर्न गर्नुहोस् थियो हुन्छ लाई एक तर छैन",
    },
    "BENGALI": {"bn": ""},
    "GURMUKHI": {"pa": ""},
    "GUJARATI": {"gu": ""},
    "TAMIL": {"ta": ""},
    "TELUGU": {"te": ""},
    "KANNADA": {"kn": ""},
    "MALAYALAM": {"ml": ""},
    "THAI": {"th": ""},
    "HEBREW": {"he": ""},
    "HANGUL": {"ko": ""},
    "HIRAGANA": {"ja": ""},
}
"""Script, as Unicode names its characters -> language -> its commonest little words."""

_SCRIPT_OF: Final = {language: script for script, languages in _SCRIPTS.items() for language in languages}
LANGUAGES: Final = frozenset(_SCRIPT_OF)
_PUNCTUATION: Final = ".,;:!?…\"'“”‘’«»()[]{}*_#-–—।،؛؟"


def speaks(text: str, language: str) -> bool:
    """Whether `text` is in `language`, one of `LANGUAGES`.

    It is if no script has more of its letters than the language's, and no other language of that script more of its
    little words. A text without letters is in none.

    Example:
        >>> speaks("Das ist nicht der Weg.", "de"), speaks("That is not the way.", "de"), speaks("42", "en")
        (True, False, False)
    """
    text = unicodedata.normalize("NFC", text)
    scripts = Counter(filter(None, map(_script, text)))
    if scripts["HIRAGANA"]:
        scripts["HIRAGANA"] += scripts.pop("CJK", 0)  # Japanese writes with both
    script = _SCRIPT_OF[language]
    if not scripts or scripts[script] < max(scripts.values()):
        return False
    words = Counter(word.strip(_PUNCTUATION) for word in text.lower().split())
    hits = {each: sum(words[word] for word in little.split()) for each, little in _SCRIPTS[script].items()}
    return hits[language] == max(hits.values())


@cache
def _script(character: str) -> str | None:
    """The script of a letter or of a mark on one."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    script = unicodedata.name(character, "").partition(" ")[0]
    return {"KATAKANA": "HIRAGANA", "COMBINING": None}.get(script, script)
