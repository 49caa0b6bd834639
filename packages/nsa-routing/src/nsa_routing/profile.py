"""Profiles: per device, which backends to try in which order. YAML files, validated when loaded."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from nsa_routing.problem import OPS

SHIPPED = Path(__file__).parent / "profiles"


class Profile(BaseModel):
    """A validated profile.

    Fields:
        name: what reports call it.
        order: backend names for every op, best first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    order: Mapping[str, Sequence[str]]

    @field_validator("order")
    @classmethod
    def _orders_every_op_once(cls, order: Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]]:
        if set(order) != set(OPS):
            raise ValueError(f"expected exactly the ops {list(OPS)}, got {list(order)}")
        for op, names in order.items():
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{op}: expected one or more different backends, got {names}")
        return MappingProxyType({op: tuple(names) for op, names in order.items()})  # loaded once, shared by all


class _Loader(yaml.SafeLoader):
    """A key that appears twice in a mapping is an error; YAML's own loaders let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key, deep) for key, _ in node.value]
            twice = next(key for number, key in enumerate(keys) if key in keys[:number])
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {twice!r}", node.start_mark)
        return mapping


@cache
def load_profile(name_or_path: str | Path) -> Profile:
    """The shipped profile of that name, or the profile at that path (anything with a `.yaml` suffix).

    Raises:
        ValueError: no such profile, malformed YAML, or contents that do not validate; names file, key and value.

    Example:
        >>> load_profile("base").order["combine"]
        ('sdpa',)
    """
    path = Path(name_or_path)
    if path.suffix != ".yaml":
        path = SHIPPED / f"{name_or_path}.yaml"
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        shipped = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
        raise ValueError(f"profile: expected one of {shipped} or a .yaml file, got {str(name_or_path)!r}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {error}") from error
    try:
        return Profile.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'document'}: {item['msg']}, got {item['input']!r}"
            for item in error.errors()
        )
        raise ValueError(f"{path}: {problems}") from error
