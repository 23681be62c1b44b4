"""Normalisation of short answers exactly as the published VQA scorers do it, quirks included.

The order of the steps, the punctuation list, the digits, the articles and the contractions are the
official scorer's (version of 2021-03-11, "Fixed processing answers bug"); a cleaner rule would be
another metric with the same name. `RULES` holds the versions in use, which differ by points.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pumice.core.registry import Registry

PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
ARTICLES = frozenset({"a", "an", "the"})
DIGITS = {
    word: digit
    for word, digit in zip(
        "none zero one two three four five six seven eight nine ten".split(),
        "0 0 1 2 3 4 5 6 7 8 9 10".split(),
        strict=True,
    )
}
# Keys with a capital never match, since words are lower-cased first; somebody'd loses its
# apostrophe. Both are so in the official table and are kept.
CONTRACTIONS = dict(
    pair.split("=", 1)
    for pair in """
aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've
hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's
howd=how'd howll=how'll hows=how's Id've=I'd've I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd
itd've=it'd've it'dve=it'd've itll=it'll let's=let's maam=ma'am mightnt=mightn't
mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustnt=mustn't mustve=must've
neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at 'ows'at='ow's'at
'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've she's=she's shouldve=should've
shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd
somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll
somebodys=somebody's someoned=someone'd someoned've=someone'd've someone'dve=someone'd've
someonell=someone'll someones=someone's somethingd=something'd somethingd've=something'd've
something'dve=something'd've somethingll=something'll thats=that's thered=there'd
thered've=there'd've there'dve=there'd've therere=there're theres=there's theyd=they'd
theyd've=they'd've they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas
wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll
whatre=what're whats=what's whatve=what've whens=when's whered=where'd wheres=where's
whereve=where've whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's
whove=who've whyll=why'll whyre=why're whys=why's wont=won't wouldve=would've wouldnt=wouldn't
wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll
yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
you'dve=you'd've youll=you'll youre=you're youve=you've
""".split()
)

_DIGIT_COMMA = re.compile(r"\d,\d")
# The official pattern has `(?!<=` where a look-behind was meant. As written it only asks that no
# digit follows, so "3." loses its period and "2.0" keeps it.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
# The official call passes re.UNICODE where `count` belongs, so only this many periods go.
_MAX_PERIODS = int(re.UNICODE)


def clean_whitespace(text: str) -> str:
    """Line breaks and tabs become spaces; the ends are stripped."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def process_punctuation(text: str) -> str:
    """Deletes or blanks punctuation, deciding for each mark by the whole original text."""
    delete_all = _DIGIT_COMMA.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        delete = delete_all or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if delete else " ")
    return _PERIOD.sub("", out, count=_MAX_PERIODS)


def process_digits_and_articles(text: str) -> str:
    """Lower case, number words to digits, articles dropped, contractions restored."""
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 18)
def normalise(text: str) -> str:
    """The official scorer's full processing of one answer."""
    return process_digits_and_articles(process_punctuation(clean_whitespace(text)))


@lru_cache(maxsize=1 << 18)
def normalise_m4c(text: str) -> str:
    """The processing of M4C, with which LLaVA scores TextVQA and makes uploads.

    Commas and question marks go first, and "'s" becomes a word of its own: "men's" -> "men 's".
    """
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(words)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a published scorer reads an answer and an annotator's; `agreed`: all wrote the same."""

    answer: Callable[[str, bool], str]
    truth: Callable[[str, bool], str]
    agreed: Callable[[Sequence[str]], bool]


def _unless_agreed(text: str, agreed: bool) -> str:
    return clean_whitespace(text) if agreed else normalise(text)


def _both(read: Callable[[str], str]) -> Callable[[str, bool], str]:
    return lambda text, _: read(text)


def _same(truths: Sequence[str]) -> bool:
    return len(set(truths)) <= 1


RULES: Registry[Rule] = Registry(
    "VQA scorer",
    {
        # Nothing at all is normalised where all annotators agree.
        "2021": Rule(
            _unless_agreed, _unless_agreed, lambda truths: _same([*map(clean_whitespace, truths)])
        ),
        # Before 2021-03-11: the answer always, annotators' punctuation only; LAVIS has it so.
        "before-2021": Rule(
            _both(normalise),
            lambda text, agreed: text if agreed else process_punctuation(text),
            _same,
        ),
        # OpenFlamingo's and lmms-eval's.
        "always": Rule(lambda text, _: normalise(text), lambda text, _: normalise(text), _same),
        "m4c": Rule(
            lambda text, _: normalise_m4c(text), lambda text, _: normalise_m4c(text), _same
        ),
    },
)


def prepare(text: str, truths: Sequence[str], rule: str = "2021") -> str:
    """The answer as this scorer compares it, which may depend on the annotators' answers."""
    chosen = RULES[rule]
    return chosen.answer(text, chosen.agreed(truths))


def vqa_accuracy(prepared: str, truths: Sequence[str], rule: str = "2021") -> float:
    """Mean over the annotators of min(1, matches among the others / 3), as officially defined.

    Leaving each annotator out in turn makes one vote worth 0.3, two 0.6, three 0.9 and four 1.
    """
    chosen = RULES[rule]
    agreed = chosen.agreed(truths)
    matches = [chosen.truth(truth, agreed) == prepared for truth in truths]
    votes = sum(matches)
    return sum(min(1.0, (votes - own) / 3) for own in matches) / len(truths)
