"""Personal data is masked; what only looks like it is not."""

from __future__ import annotations

from collections import Counter

import pytest

from configs.schema.clean import Pii
from data_prep.pii import PiiMasker

MASK_ALL = PiiMasker(Pii)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail jane.doe+x@mail.example.com.", "mail <EMAIL>."),
        ("邮箱是zhang_wei@qq.com请联系", "邮箱是<EMAIL>请联系"),
        ("DE89 3704 0044 0532 0130 00 BITTE", "<IBAN> BITTE"),
        ("GB29NWBK60161331926819, BE68 5390 0754 7034 BANK", "<IBAN>, <IBAN> BANK"),
        ("card 4111 1111 1111 1111, thanks", "card <CREDIT_CARD>, thanks"),
        ("378282246310005 or 3782-822463-10005", "<CREDIT_CARD> or <CREDIT_CARD>"),
        ("身份证11010519491231002X。", "身份证<ID_CARD_CN>。"),
        ("+49 (0)30 1234567 or 0044 20 7946 0958", "<PHONE> or <PHONE>"),
        ("Call (555) 223-4567, 555.223.4567 or +1 555 223 4567", "Call <PHONE>, <PHONE> or <PHONE>"),
        ("手机13812345678，座机010-12345678，+86 138 1234 5678", "手机<PHONE>，座机<PHONE>，<PHONE>"),
        ("Tel. 030 / 1234567; phone number is 5551234567", "Tel. <PHONE>; phone number is <PHONE>"),
        ("请拨打电话：12345678", "请拨打电话：<PHONE>"),
        ("from 93.184.216.34:8080, 地址93.184.216.34。", "from <IP>:8080, 地址<IP>。"),
        ("ping 2606:4700:4700::1111", "ping <IP>"),
    ],
)
def test_personal_data(text: str, expected: str) -> None:
    found: Counter[str] = Counter()
    assert MASK_ALL(text, found) == expected
    assert found.total() == expected.count("<")
    assert MASK_ALL(expected, Counter()) == expected


@pytest.mark.parametrize(
    "text",
    [
        "version 11.22.33.44, v12.22.33.44, Chrome/120.1.2.3, 1.2.3.4",
        "192.168.1.1, 127.0.0.1, 8.8.8.8, 1.2.840.113549.1.1.11, 300.1.1.1",
        "12:34:56, a::b, abc::def, 00:1b:44:11:3a:b7",
        "icon@2x.png, a@b.sum(), git@github.com:org/repo.git, @decorator, user@localhost",
        "2024-01-15, 2024-01-01T00:00:00+0100, 20240115123456, 1700000000000",
        "978-3-16-148410-0, 3.14159265358979, 1,234,567.89, 10 20 30 40 50 60 70",
        "4111 1111 1111 1112, 1234567890123456, 4111111111111111a, x4111111111111111",  # check digit, issuer, hex
        "DE00 3704 0044 0532 0130 00, XX89 3704 0044 0532 0130 00",
        "110105194912310021, 110105194913310026",  # check digit, month
        "foo_13812345678, 0x13812345678, uuid 550e8400-e29b-41d4-a716-446655440000",
        "+5 10 15 20 25, Article 12 (3), phone: 2024-01-15, The phone was 1234567",
    ],
)
def test_what_is_none(text: str) -> None:
    assert MASK_ALL(text, Counter()) == text


def test_only_the_kinds_that_are_asked_for() -> None:
    text = "a@b.org 4111111111111111"
    assert PiiMasker([Pii.email])(text, Counter()) == "<EMAIL> 4111111111111111"
    assert PiiMasker([Pii.credit_card])(text, Counter()) == "a@b.org <CREDIT_CARD>"
