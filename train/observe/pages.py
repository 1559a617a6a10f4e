"""HTML pages of our own templates."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def html_page(package: str, template: str, /, **values: Any) -> str:
    """A page.

    Args:
        package: whose folder ``templates`` has the template.
        template: file name.
        values: for the template; all text in them is escaped, and one that is missing is an error.
    """
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
