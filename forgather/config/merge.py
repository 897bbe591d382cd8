"""Merges what a child writes over what it inherits: a written tag replaces, no tag merges.

| child writes | over | result |
|---|---|---|
| mapping without tag | mapping, or a node's arguments | merged key by key; the node's tag stays |
| mapping without tag | null, or nothing | the mapping |
| mapping without tag | `!ref`, or an expression | an error naming the place to override |
| anything with a tag, scalar, list | anything | replaced |
| `!patch:SPEC {...}` | node | another type, arguments merged |
| `!replace {...}` | anything | a plain mapping, not merged |
| `!delete` | a key | gone; of nothing: an error |
| `!append`, `!prepend` | list or mapping (or null, nothing) | joined at that end |

The parent's order is kept and new keys go last. A merged tree holds none of the five merge tags, but below `set` of a
`!project`: what stands there is merged into the other project's tree, and means what it says when that is known.
"""

from forgather.config.paths import format_path
from forgather.config.problems import Collector
from forgather.config.tree import Key, ListValue, MappingValue, Scalar, Tag, Value

Path = tuple[str | int, ...]

# The tags whose mapping holds arguments that a child may merge into.
_OPEN_TAGS = ("singleton", "factory", "partial", "function", "project", "code", "values")


def merge(base: Value | None, over: Value, path: Path, problems: Collector) -> Value | None:
    """`over` merged into `base` (None for nothing). None when the result is that nothing stands there."""
    name = over.tag.name if over.tag else None
    if name == "delete":
        _delete(base, over, path, problems)
        return None
    if name in ("append", "prepend"):
        return _join(base, over, path, problems)
    if name == "patch":
        return _patch(base, over, path, problems)
    if name == "replace":
        if not isinstance(over, MappingValue):
            fix = "write the value without a tag: a scalar or list replaces anyway"
            problems.add(over.place, "!replace takes a mapping", fix=fix)
            return over.retagged(None)
        return _fresh(over.retagged(None), path, problems)
    if name is None and isinstance(over, MappingValue) and base is not None:
        return _merge_mapping(base, over, path, problems)
    return _fresh(over, path, problems)


def _merge_mapping(base: Value, over: MappingValue, path: Path, problems: Collector) -> Value:
    arguments = _arguments(base)
    if arguments is not None:
        return _merge_keys(arguments, over, path, problems)
    reason = _why_closed(base)
    if reason is not None:
        shown = format_path(path)
        fix = f"{reason[1]}, or replace it here by !replace {{...}}"
        problems.add(
            over.place, f"{shown!r} is {reason[0]} ({base.place}), and a mapping cannot merge into it", fix=fix
        )
        return base
    return _fresh(over, path, problems)


def _arguments(value: Value) -> MappingValue | None:
    """The mapping that a child's mapping merges into, tag kept; None when there is none."""
    is_open = value.tag is None or value.tag.name in _OPEN_TAGS
    if isinstance(value, MappingValue) and is_open:
        return value
    if value.is_call and isinstance(value, ListValue):  # positionals, which keywords may join
        star = Key("*", value.place)
        return MappingValue({star: value.retagged(None)}, value.place, value.tag)
    if is_open and value.tag is not None and isinstance(value, Scalar) and value.is_empty:
        return MappingValue({}, value.place, value.tag)
    return None


def _why_closed(value: Value) -> tuple[str, str] | None:
    """What stands in the way of merging a mapping, and what to do; None when a mapping simply replaces."""
    if not isinstance(value, Scalar):
        return None
    if value.tag is not None and value.tag.name == "ref":
        root = str(value.content).strip()
        return f"!ref {root}", f"override {root!r}, the place it refers to"
    if value.tag is not None and value.tag.name == "symbol":
        return str(value.tag), "a symbol has no arguments: write !singleton:, !factory: or !partial: here"
    if value.is_template:
        return str(value.content), "override the place that the expression reads"
    return None


def _merge_keys(base: MappingValue, over: MappingValue, path: Path, problems: Collector) -> MappingValue:
    is_project = base.tag is not None and base.tag.name == "project"
    items = dict(base.items)
    for key, value in over.items.items():
        merge_key = _merge_set if is_project and key == "set" else merge
        merged = merge_key(items.get(key), value, (*path, str(key)), problems)
        if merged is None:
            items.pop(key, None)
        else:
            items[key] = merged
    return MappingValue(items, base.place, base.tag)


def _merge_set(base: Value | None, over: Value, path: Path, problems: Collector) -> Value | None:
    """`set` of a `!project`, whose values are overrides that wait for the tree they are meant for."""
    name = over.tag.name if over.tag else None
    if not isinstance(over, MappingValue) or name not in (None, "replace"):
        return merge(base, over, path, problems)
    below = base if isinstance(base, MappingValue) and name is None else MappingValue({}, over.place)
    return _merge_overrides(below, over, path, problems)


def _merge_overrides(base: MappingValue, over: MappingValue, path: Path, problems: Collector) -> MappingValue:
    items = dict(base.items)
    for key, value in over.items.items():
        merged = _merge_override(items.get(key), value, (*path, str(key)), problems)
        if merged is None:
            items.pop(key, None)
        else:
            items[key] = merged
    return MappingValue(items, base.place, base.tag)


def _merge_override(base: Value | None, over: Value, path: Path, problems: Collector) -> Value | None:
    """One override over another of the same place; None when that leaves none."""
    name = over.tag.name if over.tag else None
    below = base.tag.name if base is not None and base.tag else None
    if base is None:
        return over
    if name == "delete":
        return None
    if name is None and isinstance(over, MappingValue):
        if isinstance(base, MappingValue):
            return _merge_overrides(base, over, path, problems)
        return over.retagged(Tag("replace")) if below == "delete" else over
    if name in ("append", "prepend"):
        if isinstance(base, ListValue) and isinstance(over, ListValue) and below in (None, name):
            items = [*over.items, *base.items] if name == "prepend" else [*base.items, *over.items]
            return ListValue(items, base.place, base.tag)
        fix = "write here what both are to do"
        problems.add(over.place, f"!{name} cannot join the override at {base.place}", fix=fix)
    return over


def _delete(base: Value | None, over: Value, path: Path, problems: Collector) -> None:
    if not (isinstance(over, Scalar) and over.is_empty):
        problems.add(over.place, "!delete takes no value", fix="write the key with !delete and nothing more")
    if base is None:
        problems.add(over.place, f"!delete of {format_path(path)!r}, but nothing is there", fix="remove this line")


def _patch(base: Value | None, over: Value, path: Path, problems: Collector) -> Value:
    assert over.tag is not None, "a patch is known by its tag"
    if base is None or not base.is_call or base.tag is None:
        what = "nothing" if base is None else "no node with arguments"
        fix = f"write !singleton:{over.tag.spec}, !factory: or !partial:"
        problems.add(over.place, f"!patch of {format_path(path)!r}, but {what} is there", fix=fix)
        return _fresh(over.retagged(Tag("singleton", over.tag.spec)), path, problems)
    node = base.retagged(Tag(base.tag.name, over.tag.spec), over.place)
    if isinstance(over, Scalar) and over.is_empty:
        return node
    if not isinstance(over, MappingValue):
        problems.add(over.place, "!patch takes a mapping of arguments")
        return node
    return _merge_mapping(node, over.retagged(None), path, problems)


def _join(base: Value | None, over: Value, path: Path, problems: Collector) -> Value:
    assert over.tag is not None, "a join is known by its tag"
    goes_first = over.tag.name == "prepend"
    base = _joinable(base, over)
    if isinstance(over, ListValue) and isinstance(base, ListValue):
        addition = _fresh(over.retagged(None), path, problems)
        assert isinstance(addition, ListValue), "settling keeps the kind"
        items = [*addition.items, *base.items] if goes_first else [*base.items, *addition.items]
        return ListValue(items, base.place, base.tag)
    if isinstance(over, MappingValue) and isinstance(base, MappingValue):
        merged = _merge_keys(base, over, path, problems)
        moved = {key: merged.items[key] for key in over.items if key in merged.items}
        kept = {key: value for key, value in merged.items.items() if key not in moved}
        return MappingValue({**moved, **kept} if goes_first else {**kept, **moved}, base.place, base.tag)
    kind = "list" if isinstance(over, ListValue) else "mapping" if isinstance(over, MappingValue) else "scalar"
    there = "nothing" if base is None else f"what stands at {base.place}"
    fix = "it joins a list to a list, or a mapping to a mapping"
    problems.add(over.place, f"!{over.tag.name} cannot join a {kind} to {there}", fix=fix)
    return over.retagged(None) if base is None else base


def _joinable(base: Value | None, over: Value) -> Value | None:
    """What is joined to: nothing, null and a node without arguments are empty, of the kind that `over` is."""
    is_empty = isinstance(base, Scalar) and base.content is None and (base.tag is None or base.is_call)
    if base is not None and not is_empty:
        return base
    place, tag = (over.place, None) if base is None or base.tag is None else (base.place, base.tag)
    if isinstance(over, ListValue):
        return ListValue([], place, tag)
    return MappingValue({}, place, tag) if isinstance(over, MappingValue) else base


def _fresh(value: Value, path: Path, problems: Collector) -> Value:
    """`value` as it stands when nothing is below it: merge tags inside are settled."""
    if isinstance(value, MappingValue):
        return _merge_keys(MappingValue({}, value.place, value.tag), value, path, problems)
    if isinstance(value, ListValue):
        items = []
        for index, item in enumerate(value.items):
            if item.tag is not None and item.tag.name in ("delete", "patch", "append", "prepend"):
                fix = "list items are not merged; write the list whole, or give its items names in a mapping"
                problems.add(item.place, f"!{item.tag.name} of a list item", fix=fix)
                continue
            merged = merge(None, item, (*path, index), problems)
            assert merged is not None, "only !delete leaves nothing"
            items.append(merged)
        return ListValue(items, value.place, value.tag)
    return value
