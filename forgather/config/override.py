"""`key.path=value`: the same merge as a child file's, for one place, from the command line or a Python call."""

from collections.abc import Collection, Mapping

from forgather.config.merge import merge
from forgather.config.names import did_you_mean, nearest
from forgather.config.paths import Step, format_path, parse_path
from forgather.config.problems import Collector, problem
from forgather.config.read import read_word
from forgather.config.tree import Key, ListValue, MappingValue, Place, Scalar, Value, located

Keys = tuple[str | int, ...]

# What a project node has, written or not.
PROJECT_KEYS = ("dir", "config", "args", "with", "set")


def parse_word(word: str) -> tuple[str, Value]:
    """The path and the value of one `key.path=value` word. Raises Problems."""
    path, equals, text = word.partition("=")
    if not equals:
        raise problem(Place(word), "a word after the command must be key.path=value")
    return path.strip(), read_word(text, word)


def python_overrides(values: Mapping[str, object]) -> list[tuple[str, Value]]:
    """The overrides of a Python call, `{"main.steps": 50}`. Raises Problems."""
    made = []
    for path, value in values.items():
        place = Place(f"set[{path!r}]")
        try:
            made.append((path, value if isinstance(value, Value) else located(value, place)))
        except TypeError as error:
            raise problem(place, str(error), fix="give objects by given={...} when building") from None
    return made


def apply_override(
    tree: MappingValue, path: str, value: Value, problems: Collector, parameters: Collection[str] = ()
) -> MappingValue:
    """`tree` with `value` merged in at `path`; `parameters` are names that lie elsewhere, to say so."""
    try:
        steps = parse_path(path)
    except ValueError as error:
        problems.add(value.place, str(error), fix='write key.path=value, as in main.steps=50 or rules["a.b"]=1')
        return tree
    name = str(steps[1 if steps[0].key == "args" and len(steps) > 1 else 0].key)
    if name in parameters:
        fix = f"give it by --{name.replace('_', '-')} VALUE, in Python and in a !project by args"
        problems.add(value.place, f"{name!r} is a parameter, and words override targets", fix=fix)
        return tree
    made: Value | None = tree
    with problems.collecting():
        made = _Override(value, problems).descend(tree, steps, (), is_open=False)
    assert isinstance(made, MappingValue), "an override goes below the root"
    return made


class _Override:
    """One value on its way down to its place. `is_open`: keys that do not exist may be named here."""

    def __init__(self, value: Value, problems: Collector) -> None:
        self.value = value
        self.problems = problems

    def descend(self, here: Value | None, steps: tuple[Step, ...], done: Keys, *, is_open: bool) -> Value | None:
        if not steps:
            return merge(here, self.value, done, self.problems)
        assert here is not None, "a missing part was made on the way"
        key, rest = steps[0].key, steps[1:]
        if isinstance(here, ListValue) and isinstance(key, int):
            return self._into_list(here, key, rest, done)
        holder = _as_mapping(here)
        if holder is None or isinstance(key, int):
            raise problem(self.value.place, f"{format_path(done)!r} has no part {key!r}: {_described(here)}")
        if here.tag is not None and here.tag.name == "project":
            if key == "set":
                return self._into_set(holder, rest, done)
            self._refuse_unknown_part(key, done)
            is_open = True
        child = holder.get(key)
        is_open = is_open or here.place.line == 0  # a mapping that another word made
        if child is None and not (is_open or here.is_call):
            where = f" in {format_path(done)!r}" if done else ""
            raise problem(self.value.place, f"nothing is called {key!r}{where}", fix=_instead(key, holder))
        if rest and (child is None or (is_open and isinstance(child, Scalar) and child.content is None)):
            child, is_open = MappingValue({}, self.value.place), True
        made = self.descend(child, rest, (*done, key), is_open=is_open)
        items = dict(holder.items)
        if made is None:
            items.pop(key, None)  # type: ignore[call-overload]
        else:
            items[holder.key(key) if key in holder else Key(key, self.value.place)] = made
        return MappingValue(items, holder.place, holder.tag)

    def _refuse_unknown_part(self, key: str, done: Keys) -> None:
        if key not in PROJECT_KEYS:
            inside = format_path((*done, "set", key))
            fix = f"{did_you_mean(key, PROJECT_KEYS, what='its keys')}; an override inside it is {inside}=VALUE"
            raise problem(self.value.place, f"the project {format_path(done)!r} has no {key!r}", fix=fix)

    def _into_set(self, project: MappingValue, rest: tuple[Step, ...], done: Keys) -> Value | None:
        """What follows `set` is one path, checked against the other project's tree; merging knows what `set` is."""
        place, value = self.value.place, self.value
        if rest:
            value = MappingValue({Key(format_path(each.key for each in rest), place): value}, place)
        return merge(project, MappingValue({Key("set", place): value}, place), done, self.problems)

    def _into_list(self, here: ListValue, index: int, rest: tuple[Step, ...], done: Keys) -> Value:
        count = len(here.items)
        if not -count <= index < count:
            fix = f"it has {count} items; add one by {format_path(done)}=!append [VALUE]"
            raise problem(self.value.place, f"{format_path(done)!r} has no item {index}", fix=fix)
        index %= count
        made = self.descend(here.items[index], rest, (*done, index), is_open=False)
        added = [] if made is None else [made]
        return ListValue([*here.items[:index], *added, *here.items[index + 1 :]], here.place, here.tag)


def _instead(key: str, holder: MappingValue) -> str:
    """The next action for a key that is not in `holder`: the one that was meant, or where a new one is written."""
    known = [str(name) for name in holder.items]
    near = nearest(key, known)
    if near is not None:
        return f"did you mean {near!r}?"
    public = [name for name in known if not name.startswith("_")]
    known_here = did_you_mean(key, public, what="known here")
    return f"{known_here}; an override changes what is there: to add {key}, write it in a config that extends this one"


def _as_mapping(value: Value) -> MappingValue | None:
    if isinstance(value, MappingValue):
        return value
    if (
        value.tag is not None
        and isinstance(value, Scalar)
        and value.is_empty
        and value.tag.name not in ("symbol", "ref")
    ):
        return MappingValue({}, value.place, value.tag)
    if value.is_call and isinstance(value, ListValue):
        return MappingValue({Key("*", value.place): value.retagged(None)}, value.place, value.tag)
    return None


def _described(value: Value) -> str:
    if value.tag is not None and value.tag.name == "ref" and isinstance(value, Scalar):
        return f"it is !ref {value.content} ({value.place}); override that place"
    kind = "a list" if isinstance(value, ListValue) else "a mapping" if isinstance(value, MappingValue) else "a scalar"
    return f"it is {value.tag or kind} ({value.place})"
