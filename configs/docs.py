"""The text under each field of a schema, for help texts and error messages: written once, beside the field."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any


def field_docs(schema: type[Any]) -> dict[str, str]:
    """Field name -> its docstring on one line, inherited fields included. Fields without a docstring are left out."""
    docs: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                docs[statement.target.id] = " ".join(str(following.value.value).replace("``", "`").split())
    return docs


def summary(schema: type[Any]) -> str:
    """First line of a class's docstring."""
    return (inspect.getdoc(schema) or "").partition("\n")[0]
