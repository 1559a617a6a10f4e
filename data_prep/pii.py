"""Personal data in texts, found by rules and replaced by a mark: ``<EMAIL>``, ``<PHONE>``, ``<IP>``, ...

The rules would rather miss than hit what is no personal data: a mask in the wrong place damages what a model learns.
Numbers with check digits count only if these are right. Names and addresses of people are not looked for: no rule finds
them. A text that must be free of personal data needs more than this.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable

from configs.schema.clean import Pii

# Where a number may begin and end. Letters of scripts without spaces may stand beside it ("卡号4111..."), ASCII letters
# and digits may not; nor may it be a part of a decimal number, a version or a path.
_BEGIN = r"(?<![A-Za-z0-9_])(?<![A-Za-z0-9_][.\-/])"
_END = r"(?![A-Za-z0-9_])(?![.\-/][A-Za-z0-9_])"

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+'-])(?!git@[\w.-]+:)[A-Za-z0-9_][A-Za-z0-9._%+'-]{0,63}"
    # Not the domain: icon@2x.png, and the product of two matrices, a@b.sum().
    r"@(?!\dx\.)(?:[A-Za-z0-9\u00c0-\u024f](?:[A-Za-z0-9\u00c0-\u024f-]{0,61}[A-Za-z0-9\u00c0-\u024f])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![A-Za-z0-9_(-])"
)

_IP = re.compile(
    r"(?<![\w.:])(?<![A-Za-z]/)(?:\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\w)|[23][0-9A-Fa-f]{0,3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]))",
    re.ASCII,
)
_VERSION = re.compile(r"(?:\bv|version|release|build|ver\.|section|chapter|§|版本|第)[\s:：#]*$", re.IGNORECASE)
"""What before four numbers with dots makes them no address."""

_IBAN = re.compile(_BEGIN + r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![a-z0-9])")
_IBAN_LENGTHS = (
    "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BI27BR29BY28CH21CR22CY28CZ24DE22DJ27DK18DO28EE20EG29ES24FI18FK18FO18FR27GB22"
    "GE22GI23GL18GR27GT28HN28HR21HU28IE22IL23IQ23IS26IT27JO30KW30KZ20LB28LC32LI21LT20LU20LV21LY25MC27MD24ME22MK19MN20"
    "MR27MT31MU30NI28NL18NO15OM23PK24PL28PS29PT25QA29RO24RS22RU33SA24SC31SD18SE24SI19SK24SM27SO23ST25SV28TL23TN24TR26"
    "UA29VA22VG24XK20YE30"
)
"""Country and length, of the IBAN registry (SWIFT, release 99)."""
_LENGTH_OF = {_IBAN_LENGTHS[i : i + 2]: int(_IBAN_LENGTHS[i + 2 : i + 4]) for i in range(0, len(_IBAN_LENGTHS), 4)}

# 14 to 19 digits as they are written: together, in fours, or in the groups of American Express and Diners.
_CARD = re.compile(
    _BEGIN + r"(?:\d{14,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|\d{4}([ -])\d{6}\2\d{4,5})" + _END, re.ASCII
)
_ISSUER = re.compile(  # Visa, Mastercard, Amex, Diners, JCB, Discover, UnionPay, Maestro, Mir
    r"4(?:.{15}|.{18})$|(?:5[1-5]|2[2-7]).{14}$|3[47].{13}$|3(?:0[0-5]|[689]\d).{11}$|35.{14}$"
    r"|6(?:011|4[4-9].|5..).{12}$|62.{14,17}$|(?:5018|5020|5038|5893|6304|6759|676[1-3]).{8,15}$"
)

_ID_CARD_CN = re.compile(
    _BEGIN + r"[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx]" + _END, re.ASCII
)

_COUNTRY = r"(?:7(?=[ ./(-]{0,2}[3-9])|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|[2-9]\d\d)"
_PHONE_END = r"(?![A-Za-z0-9_])(?![.\-/]\d)"
_PHONE = re.compile(
    r"(?<![A-Za-z0-9_.\-/+])(?:"
    # As it is written for callers from abroad: +49 (0)30 1234567, 0044 20 7946 0958.
    rf"(?:\+|(?<![0-9] )00(?=\d{{1,3}}[ (/-])){_COUNTRY}(?:[ ./()-]{{0,2}}\d){{6,12}}"
    # North America: (555) 123-4567, 555.123.4567, +1 555 123 4567.
    r"|(?:\+?1[ .-]?)?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[.-])\d{3}[.-]\d{4}|\+1[ .-]?[2-9]\d{2}[ .-]?\d{3}[ .-]?\d{4}"
    # China: 13812345678, 138 1234 5678; 010-12345678.
    r"|(?:\+?86[ -]?)?1[3-9]\d([ -]?)\d{4}\1\d{4}|(?:\+?86[ -]?)?(?:[(（]0\d{2,3}[)）] ?|0\d{2,3}-)\d{7,8}"
    r")" + _PHONE_END,
    re.ASCII,
)
_CALLED_PHONE = re.compile(  # Tel. 030 / 1234567, phone number is 1234567, 电话：1234567
    r"(?:(?<![^\W\d_])(?:tele(?:fon|phone)|tel|phone|mobile?|handy|fax|whatsapp|cell)(?:nummer|[ ](?:number|no|nr))?"
    r"|(?:电话|手机|座机|热线|传真|联系方式)(?:号码|号)?)[ ]?(?:is|ist|是|为)?[\s.:：#]{1,3}"
    r"(?P<number>(?!\d{4}-\d\d-\d\d)\(?\d(?:[ ()/.-]{0,3}\d){5,13})" + _PHONE_END,
    re.IGNORECASE,
)

_Span = tuple[int, int]


class PiiMasker:
    """Replaces personal data of some kinds.

    Args:
        kinds: what is looked for.
    """

    def __init__(self, kinds: Iterable[Pii]) -> None:
        wanted = set(kinds)
        self._rules = [rule for rule in _RULES if rule[0] in wanted]

    def __call__(self, text: str, found: Counter[str]) -> str:
        """The text with marks. What was masked is added to `found`, by kind."""
        if not _ANY_HINT.search(text):
            return text
        for kind, hint, pattern, span_of in self._rules:
            if hint.search(text):
                text = _masked(text, kind, pattern, span_of, found)
        return text


def _masked(
    text: str,
    kind: Pii,
    pattern: re.Pattern[str],
    span_of: Callable[[re.Match[str]], _Span | None],
    found: Counter[str],
) -> str:
    made, done = [], 0
    for match in pattern.finditer(text):
        span = span_of(match)
        if span is not None:
            made += [text[done : span[0]], f"<{kind.value.upper()}>"]
            done = span[1]
            found[kind.value] += 1
    return "".join([*made, text[done:]]) if done else text


def _whole(match: re.Match[str]) -> _Span:
    return match.span()


def _number(match: re.Match[str]) -> _Span:
    return match.span("number")


def _iban(match: re.Match[str]) -> _Span | None:
    """As much of the match as the country's numbers are long, if the check digits are right (ISO 13616)."""
    left, end = _LENGTH_OF.get(match[0][:2], 0), 0
    while left and end < len(match[0]):
        left -= match[0][end] != " "
        end += 1
    number = match[0][:end].replace(" ", "")
    if left or not number or match[0][end : end + 1].strip():
        return None
    right = int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1
    return (match.start(), match.start() + end) if right else None


def _card(match: re.Match[str]) -> _Span | None:
    """The match, if an issuer's numbers begin so and the check digit is right (ISO 7812, H. P. Luhn)."""
    digits = match[0].replace(" ", "").replace("-", "")
    if not _ISSUER.match(digits) or len(set(digits)) == 1:
        return None
    doubled = (sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return match.span() if (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0 else None


def _id_card_cn(match: re.Match[str]) -> _Span | None:
    """The match, if the check digit is right (GB 11643-1999)."""
    total = sum(int(d) * pow(2, 17 - i, 11) for i, d in enumerate(match[0][:17]))
    return match.span() if "10X98765432"[total % 11] == match[0][17].upper() else None


def _ip(match: re.Match[str]) -> _Span | None:
    """The match, if it is an address that all the world can reach, and is not rather a version: those are nobody's.

    Four single digits are a version or one of a few public name servers.
    """
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return None
    version = len(match[0]) == 7 or _VERSION.search(match.string, max(0, match.start() - 16), match.start())
    return match.span() if address.is_global and not (address.version == 4 and version) else None


_ANY_HINT = re.compile("[0-9@]")
_Rule = tuple[Pii, re.Pattern[str], re.Pattern[str], Callable[[re.Match[str]], _Span | None]]

_RULES: tuple[_Rule, ...] = (
    (Pii.email, re.compile("@"), _EMAIL, _whole),
    (Pii.iban, re.compile(r"[A-Z]{2}\d\d", re.ASCII), _IBAN, _iban),
    (Pii.id_card_cn, re.compile(r"\d{17}", re.ASCII), _ID_CARD_CN, _id_card_cn),
    (Pii.credit_card, re.compile(r"\d{4}[ -]?\d{4}", re.ASCII), _CARD, _card),
    (Pii.phone, re.compile(r"\d(?:[ ./()-]{0,2}\d){6}", re.ASCII), _PHONE, _whole),
    (Pii.phone, re.compile(r"\d(?:[ ()/.-]{0,3}\d){5}", re.ASCII), _CALLED_PHONE, _number),
    (Pii.ip, re.compile(r"\d\.\d{1,3}\.\d|:[0-9A-Fa-f]{0,4}:", re.ASCII), _IP, _ip),
)
"""Kind, what a text must hold at least, what may be one, and where in the match it stands if it is one.

What a text must hold is found fast, so that most texts are passed over. The order matters: what has check digits comes
before what could be taken for a part of it.
"""
