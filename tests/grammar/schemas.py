"""JSON schemas as people write them for documents, forms and charts, as many as are asked for.

Every schema is supported, and its shortest values are short: strings, arrays and recursions are bounded or may end at
once, so that even a model with random weights comes to an end once it is drawn towards closing tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

FIELDS = (
    *("vendor", "customer", "street", "city", "postcode", "country", "phone", "comment", "title", "author", "subject"),
    *("invoice number", "due-date", "iban", "vat_id", "unit", "sku", "x", "y", "label", "series", "legend", "source"),
    *(
        "prénom",
        "naïveté",
        "größe",
        "straße",
        "имя",
        "адрес",
        "名前",
        "住所",
        "总额",
        "이름",
        "emoji 🙂",
        'quote"d',
        "back\\slash",
    ),
)
WORDS = (
    *(
        "red",
        "green",
        "blue",
        "cash",
        "card",
        "transfer",
        "EUR",
        "USD",
        "JPY",
        "paid",
        "open",
        "overdue",
        "bar",
        "line",
    ),
    *(
        "pie",
        "north",
        "south",
        "yes",
        "no",
        "n/a",
        "ÄÖÜ",
        "日本",
        "中文",
        "한국",
        "да",
        "нет",
        "✓",
        "🙂",
        "a b",
        'say "hi"',
        "tab\tbed",
    ),
)
PATTERNS = (
    "^[A-Z]{2}[0-9]{4}$",
    "^\\d{1,3}(,\\d{3}){0,2}\\.\\d{2}$",
    "^[a-z]+(-[a-z]+){0,2}$",
    "^(INV|RCP)-[0-9]{3,6}$",
    "^#[0-9a-fA-F]{6}$",
    "^[A-Z][a-zé]{0,8}( [A-Z][a-z]{0,8})?$",
    "^[^\"<>]{1,12}$",
    "[0-9]",
)  # fmt: skip
FORMATS = ("date", "time", "uuid", "ipv4", "date-time", "hostname")


def generate_schemas(count: int, seed: int) -> list[Schema]:
    """`count` schemas, all different, that follow from `seed`."""
    schemas: dict[str, Schema] = {}
    index = 0
    while len(schemas) < count:
        maker = _Maker(random.Random(f"{seed}/{index}"))
        schema = maker.root(ROOTS[index % len(ROOTS)])
        schemas.setdefault(repr(schema), schema)
        index += 1
    return list(schemas.values())


class _Maker:
    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def root(self, kind: Callable[[_Maker], Schema]) -> Schema:
        schema = kind(self)
        if self.chance.random() < 0.3:
            schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
        if self.chance.random() < 0.3:
            schema["title"] = self.chance.choice(FIELDS).title()
        return schema

    def names(self, count: int) -> list[str]:
        return self.chance.sample(FIELDS, count)

    def one(self, *choices: Any) -> Any:
        return self.chance.choice(choices)

    def object(self, properties: Schema, *, optional: float = 0.3, closed: float = 0.9) -> Schema:
        """An object of these properties, each optional by chance, and open to others by chance."""
        required = [name for name in properties if self.chance.random() > optional]
        schema: Schema = {"type": "object", "properties": properties}
        if required:
            schema["required"] = required
        if self.chance.random() < closed:
            schema["additionalProperties"] = False
        elif self.chance.random() < 0.5:
            schema["additionalProperties"] = self.scalar()
        return schema

    def array(self, items: Schema, *, most: int = 3) -> Schema:
        schema: Schema = {"type": "array", "items": items, "maxItems": self.chance.randint(1, most)}
        if self.chance.random() < 0.5:
            schema["minItems"] = self.chance.randint(0, schema["maxItems"])
        return schema

    def nullable(self, schema: Schema) -> Schema:
        return {"anyOf": [schema, {"type": "null"}]}

    def string(self) -> Schema:
        kind = self.chance.randrange(5)
        if kind == 0:
            return {"type": "string", "pattern": self.one(*PATTERNS), "maxLength": 24}
        if kind == 1:
            return {"type": "string", "format": self.one(*FORMATS)}
        if kind == 2:
            return {"type": "string", "enum": self.chance.sample(WORDS, self.chance.randint(1, 5))}
        least = self.chance.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": self.chance.randint(least, 16)}

    def number(self) -> Schema:
        kind = self.chance.randrange(6)
        if kind == 0:
            return {"type": "integer"}
        if kind == 1:
            return {"type": "number", "minimum": 0, "exclusiveMaximum": self.one(1, 100, 1000.5)}
        if kind == 2:
            return {"type": "integer", "multipleOf": self.one(2, 5, 10, 25)}
        if kind == 3:
            return {"type": "number", "exclusiveMinimum": self.one(-273.15, 0, 0.5), "maximum": 9999.99}
        low = self.chance.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + self.chance.randint(0, 2000)}

    def scalar(self) -> Schema:
        kind = self.chance.randrange(8)
        if kind < 3:
            return self.string()
        if kind < 5:
            return self.number()
        if kind == 5:
            return {"type": "boolean"}
        if kind == 6:
            return {"const": self.one(*WORDS, 1, -2.5, True, None)}
        return self.nullable(self.string())

    def value(self, depth: int) -> Schema:
        """Anything: scalars alone at the bottom."""
        if depth == 0 or self.chance.random() < 0.5:
            return self.scalar()
        if self.chance.random() < 0.5:
            return self.array(self.value(depth - 1))
        return self.object({name: self.value(depth - 1) for name in self.names(self.chance.randint(1, 3))})


def _form(make: _Maker) -> Schema:
    return make.object({name: make.scalar() for name in make.names(make.chance.randint(1, 6))})


def _receipt(make: _Maker) -> Schema:
    item = make.object({"name": make.string(), "quantity": make.number(), "price": make.number()}, optional=0.2)
    properties = {
        "vendor": make.string(),
        "date": {"type": "string", "format": "date"},
        "items": make.array(item, most=2),
        "total": {"type": "number", "minimum": 0},
        "currency": {"enum": ["EUR", "USD", "GBP", "JPY"]},
        "paid": {"type": "boolean"},
    }
    kept = ["items", *make.chance.sample([name for name in properties if name != "items"], make.chance.randint(1, 4))]
    return make.object({name: properties[name] for name in kept})


def _invoice(make: _Maker) -> Schema:
    """Shared definitions, as tools write them that know classes."""
    party = make.object({"name": make.string(), "country": make.nullable(make.string())})
    line = make.object({"sku": make.string(), "amount": make.number()}, optional=0.0)
    properties = {
        "number": make.string(),
        "seller": {"$ref": "#/$defs/Party"},
        "buyer": make.nullable({"$ref": "#/$defs/Party"}),
        "lines": make.array({"$ref": "#/$defs/Line"}, most=2),
    }
    return {**make.object(properties), "$defs": {"Party": party, "Line": line}}


def _chart(make: _Maker) -> Schema:
    point = {
        "type": "array",
        "prefixItems": [make.number(), make.number()],
        "minItems": 2,
        "maxItems": 2,
    }
    series = make.object({"label": make.string(), "points": make.array(point)}, optional=0.0)
    properties = {
        "kind": {"enum": make.chance.sample(["bar", "line", "pie", "scatter"], make.chance.randint(1, 4))},
        "axis": make.object({"x": make.string(), "y": make.nullable(make.string())}),
        "series": make.array(series, most=2),
    }
    return make.object(properties)


def _table(make: _Maker) -> Schema:
    cell = {"type": make.chance.sample(["integer", "boolean", "null"], make.chance.randint(1, 3))}
    return make.array(make.array(make.one(cell, make.string())), most=3)


def _union(make: _Maker) -> Schema:
    """Alternatives told apart by a constant; written with oneOf or anyOf."""
    options = []
    for kind in make.chance.sample(["text", "image", "table", "chart"], make.chance.randint(2, 4)):
        name = make.one(*FIELDS)
        options.append(
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, name: make.scalar()},
                "required": ["kind"] if make.chance.random() < 0.3 else ["kind", name],
                "additionalProperties": False,
            }
        )
    return {make.one("oneOf", "anyOf"): options}


def _tree(make: _Maker) -> Schema:
    """Recursion that may end at once."""
    children = {"type": "array", "items": {"$ref": "#/$defs/Node"}, "maxItems": make.chance.randint(1, 2)}
    node = {
        "type": "object",
        "properties": {"label": make.string(), "children": children},
        "required": ["label"],
        "additionalProperties": False,
    }
    return {"$ref": "#/$defs/Node", "$defs": {"Node": node}}


def _linked(make: _Maker) -> Schema:
    properties = {make.one("value", "name"): make.scalar(), "next": make.nullable({"$ref": "#"})}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _merged(make: _Maker) -> Schema:
    first, second = make.names(2)
    base = {"type": "object", "properties": {first: make.scalar()}, "required": [first]}
    more = {"properties": {second: make.scalar()}, "required": [second]}
    return {"allOf": [base, more], "type": "object", "maxProperties": 2}


def _record(make: _Maker) -> Schema:
    """A map whose keys are not known."""
    if make.chance.random() < 0.5:
        return {"type": "object", "additionalProperties": make.scalar(), "maxProperties": make.chance.randint(1, 3)}
    pattern = make.one("^[a-z]{1,6}$", "^\\d{4}$", "^q[1-4]$")
    return {
        "type": "object",
        "patternProperties": {pattern: make.scalar()},
        "additionalProperties": False,
        "maxProperties": make.chance.randint(1, 3),
    }


def _nested(make: _Maker) -> Schema:
    return make.object({name: make.value(2) for name in make.names(make.chance.randint(1, 3))})


def _plain(make: _Maker) -> Schema:
    return make.one(
        make.scalar(), make.array(make.scalar()), {"enum": [*make.chance.sample(WORDS, 3), 1, None, [True]]}
    )


ROOTS = (_form, _receipt, _invoice, _chart, _table, _union, _tree, _linked, _merged, _record, _nested, _plain)
