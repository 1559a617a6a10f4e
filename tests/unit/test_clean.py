"""Cleaning: what is changed, what is left out and why, what must never be touched."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.schema.clean import CleanConfig, Pii, UnicodeForm
from data_prep.clean import Cleaner
from data_prep.prepare import prepare
from data_prep.records import Message, Origin, Pair, Record, Reject, TextRecord, ToolCall, Vote, texts_of
from data_prep.repetition import repeated_share
from tests.unit.prep_kit import files, model_folder, prep_config, write_jsonl

ORIGIN = Origin("a.jsonl", 7)
ALL = CleanConfig(
    unicode=UnicodeForm.NFC, control_characters=True, whitespace=True, mask_pii=list(Pii), max_repetition=0.9
)


def chat(question: str, answer: str) -> Record:
    return Record(ORIGIN, (Message("user", question), Message("assistant", answer, train=True)))


def cleaned(text: str, **settings: object) -> str:
    made = Cleaner(CleanConfig(**settings))(TextRecord(ORIGIN, text))  # type: ignore[arg-type]
    assert isinstance(made, TextRecord)
    return made.text


def reason(record: Record, **settings: object) -> str:
    made = Cleaner(CleanConfig(**settings))(record)  # type: ignore[arg-type]
    assert isinstance(made, Reject) and not made.counts and made.origin == ORIGIN
    return made.reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\u2028d\x0ce\x85f", "a\nb\nc\nd\ne\nf"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("a\x00b\x1b\u200bc\ufeffd\u2060e\xadf", "abcdef"),
        ("👩\u200d💻 ❤\ufe0f\u200d🔥 🏃🏽\u200d♀\ufe0f", "👩\u200d💻 ❤\ufe0f\u200d🔥 🏃🏽\u200d♀\ufe0f"),
        ("a\u200db 👩\u200d x\u200cy", "ab 👩 xy"),
        ("می\u200cخواهم क्\u200dष", "می\u200cخواهم क्\u200dष"),  # Persian and Hindi are written with joiners
        ("שלום\u200f!", "שלום\u200f!"),
        ("if admin\u202e:", "if admin:"),  # no right-to-left letter: it only misleads
        (
            "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
            "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        ),
        ("hi\U000e0069\U000e0067", "hi"),  # text smuggled in tags
        ("中文，标点。", "中文，标点。"),
    ],
)
def test_control_characters(text: str, expected: str) -> None:
    assert cleaned(text, control_characters=True) == expected
    assert cleaned(expected, control_characters=True) == expected


def test_white_space_and_unicode_forms() -> None:
    assert cleaned("  a \u3000\n\n\n\n b\t\n", whitespace=True) == "a\n\n b"
    assert cleaned("e\u0301 Ａ", unicode=UnicodeForm.NFC) == "é Ａ"
    assert cleaned("e\u0301 Ａ①", unicode=UnicodeForm.NFKC) == "é A1"


def test_nothing_is_done_by_default() -> None:
    cleaner, record = Cleaner(CleanConfig()), chat("a \r\n", "b\x00 jane@example.com")
    assert cleaner.idle and cleaner(record) is record and not cleaner.masked


def test_every_turn_is_cleaned_and_what_is_no_text_is_not() -> None:
    schema = {"type": "function", "function": {"name": "mail", "description": " to jane@example.com  "}}
    call = ToolCall("mail", {"to": "jane@example.com", "body": "  def f():\n\treturn 1 \u200b\n", "n": 1}, "c1")
    record = Record(
        ORIGIN,
        (
            Message("system", " Write to jane@example.com \r\n"),
            Message("user", "x\u200by "),
            Message("assistant", "", train=True, reasoning=" She is jane@example.com ", calls=(call,)),
            Message("tool", " sent ", name="mail", call_id="c1", images=("a b .png ",)),
            Message("assistant", "ok ", train=True),
        ),
        (schema,),
    )
    cleaner = Cleaner(ALL)
    made = cleaner(record)
    assert isinstance(made, Record)
    assert [m.content for m in made.messages] == ["Write to <EMAIL>", "xy", "", "sent", "ok"]
    assert made.messages[2].reasoning == "She is <EMAIL>"
    # White space in arguments is code or a path: only what cannot be seen goes, and personal data.
    assert made.messages[2].calls == (
        ToolCall("mail", {"to": "<EMAIL>", "body": "  def f():\n\treturn 1 \n", "n": 1}, "c1"),
    )
    assert made.tools == (schema,) and made.messages[3].images == ("a b .png ",)
    assert cleaner.masked == {"rows normalised": 1, "email masked": 3}


def test_pairs_and_votes_are_cleaned() -> None:
    pair = Pair(ORIGIN, chat("q ", "good "), chat("q ", "bad "))
    made = Cleaner(ALL)(pair)
    assert isinstance(made, Pair) and texts_of(made) == ["q", "good", "bad"]
    vote = Cleaner(ALL)(Vote(ORIGIN, chat("q ", "a "), False))
    assert isinstance(vote, Vote) and texts_of(vote) == ["q", "a"] and not vote.liked


def test_a_turn_that_cleaning_empties_leaves_the_record_out() -> None:
    assert reason(chat("hello", "\u200b\u200b"), control_characters=True) == "empty assistant turn after cleaning"
    assert Cleaner(ALL)(Pair(ORIGIN, chat("q", "a"), chat("q", "a "))).reason.endswith("after cleaning")  # type: ignore[union-attr]


def test_filters_and_their_reasons() -> None:
    record = chat("What is it?", "A secret: 4711.")
    assert reason(record, min_chars=27) == "too few characters"
    assert reason(record, max_chars=25) == "too many characters"
    assert Cleaner(CleanConfig(min_chars=26, max_chars=26))(record) is record
    assert reason(record, drop_matching=["foo", r"\d{4}"]) == "matches clean.drop_matching"
    assert reason(record, keep_matching=["secret", "^Dear"]) == "does not match clean.keep_matching"
    assert Cleaner(CleanConfig(keep_matching=["^What", "secret"]))(record) is record
    assert reason(chat("hello", "do it again and again\n" * 20), max_repetition=0.5) == "repetitive"


def test_expressions_see_the_text_before_masks_and_masks_are_counted_where_records_stay() -> None:
    cleaner = Cleaner(CleanConfig(drop_matching=["@example"], mask_pii=[Pii.email]))
    assert isinstance(cleaner(chat("a@example.com", "ok")), Reject)
    cleaner(chat("a@other.com b@other.com", "ok"))
    assert cleaner.masked["email masked"] == 2


def test_rows_left_out_before_cleaning_show_no_personal_data_where_it_is_masked(tmp_path: Path) -> None:
    """Each fault below shows what it met; the first cuts the address, so that no rule would know it."""
    turns: list[dict[str, object]] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    odd: list[list[dict[str, object]]] = [
        [{**turns[0], "role": "from the long letter of ann.mustermann@example.com"}, turns[1]],
        [{"o'ann@example.com": "user", "content": "q"}, turns[1]],
        [turns[0], {**turns[1], "weight": "ann@example.com"}],
        [turns[0], {**turns[1], "weight": 13812345678}],
        [turns[0], {**turns[1], "tool_calls": ['{"type": "ann@example.com"}', "ann@example.com"]}],
    ]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}, *({"messages": each} for each in odd)])
    cfg = prep_config(tmp_path, files(tmp_path / "a.jsonl"))
    for kinds, shows in (([], True), (list(Pii), False)):
        cfg.clean = CleanConfig(mask_pii=kinds)
        made = prepare(cfg, model_folder(tmp_path / "model"))
        written = (made.path / "rejects.jsonl").read_text() + (made.path / "report.html").read_text()
        assert made.manifest["rejects"]["total"] == len(odd)
        assert [part in written for part in ("ann", "13812345678")] == [shows, shows]


def test_repetition() -> None:
    assert repeated_share("one\ntwo\nthree") == 0
    assert repeated_share("abcd\nabcd\nabcd\nabcd") == 0.75
    words = " ".join(f"w{i}" for i in range(20))
    assert repeated_share(words) == 0
    assert repeated_share(f"{words} {words}") == 0.5
    assert repeated_share("请" * 40) > 0.9  # no spaces, no lines
    sentence = "甲方应当在合同签订后三十日内支付全部款项并开具发票"
    assert repeated_share(sentence) == 0 < 0.5 <= repeated_share(sentence * 2)


def test_languages() -> None:
    pytest.importorskip("py3langid")
    english = chat("Please tell me about my contract.", "Your contract can be cancelled every month.")
    chinese = chat("请帮我取消合同，谢谢。", "好的，您的合同已经取消，请查收邮件。")
    cleaner = Cleaner(CleanConfig(languages=["en"]))
    rejected = cleaner(chinese)
    assert isinstance(rejected, Reject) and (rejected.reason, rejected.detail) == ("in another language", "zh")
    assert cleaner(english) is english
    assert Cleaner(CleanConfig(languages=["zh"]))(chinese) is chinese
    # What cannot be told stays, and is counted.
    numbers = chat("1 + 1", "2")
    assert cleaner(numbers) is numbers
    assert cleaner.masked["rows whose language cannot be told, kept"] == 1
    with pytest.raises(ConfigError, match="'xx' is not known"):
        Cleaner(CleanConfig(languages=["en", "xx"]))


def test_languages_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        Cleaner(CleanConfig(languages=["en"]))
    assert "crosstune[languages]" in str(caught.value.remedy)
