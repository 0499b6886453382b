"""A module that has exactly the classes, methods, properties and enums of a TensorRT release, and
does nothing.

It is made from the release's own stubs (tools/tensorrt_stubs.py). Whatever TensorRT lacks is an
AttributeError here, and a call with arguments it does not take is a TypeError. What happens on a
call comes from `behaviour`, a dictionary `"Class.method" -> function`; without one, a method
answers None or True if its signature says so, and fails otherwise. Every call is noted in `calls`.
"""

from __future__ import annotations

import ast
import enum
import functools
import inspect
import re
import types
from collections.abc import Callable
from typing import Any

Behaviour = dict[str, Callable[..., Any]]


class FakeTensorRTModule(types.ModuleType):
    """The stand-in of one release.

    Args:
        name: of the module.
        stub: text of its `__init__.pyi`.
        version: what `__version__` is.
        behaviour: see the module's text; may be filled later.
    """

    def __init__(self, name: str, stub: str, version: str, behaviour: Behaviour) -> None:
        super().__init__(name)
        self.__version__ = version
        self.behaviour = behaviour
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for item in _parse(stub).body:
            if isinstance(item, ast.ClassDef):
                setattr(self, item.name, _make_class(self, item, item.name))

    def make_object(self, name: str, **state: Any) -> Any:
        """An object as TensorRT would hand it out, with private state of the stand-in's own."""
        kind = getattr(self, name)
        made = kind.__new__(kind)
        made.__dict__.update(state, _ready=True)
        return made

    def calls_of(self, name: str) -> list[dict[str, Any]]:
        """Arguments of every call of a method, in order."""
        return [arguments for method, arguments in self.calls if method == name]


_parse = functools.cache(ast.parse)


def _make_class(surface: FakeTensorRTModule, node: ast.ClassDef, path: str) -> Any:
    names = [
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]
    if "__members__" in names:
        return enum.IntEnum(node.name, [name for name in names if name != "__members__"], start=0)
    inner = {
        item.name: _make_class(surface, item, f"{path}.{item.name}")
        for item in node.body
        if isinstance(item, ast.ClassDef)
    }
    base = getattr(surface, ast.unparse(node.bases[0]), object) if node.bases else object
    body: dict[str, Any] = dict(inner)
    settable: set[str] = set()
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            body[item.target.id] = _make_attribute(
                surface, path, item.target.id, item.annotation, inner
            )
            settable.add(item.target.id)
    methods: dict[str, list[ast.FunctionDef]] = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            marks = [ast.unparse(mark) for mark in item.decorator_list]
            if any(mark.endswith(".setter") for mark in marks):
                settable.add(item.name)
            elif "property" in marks:
                body[item.name] = _Property(surface, path, item.name)
            elif "staticmethod" not in marks:
                methods.setdefault(item.name, []).append(item)
    for name, forms in methods.items():
        if (
            not name.startswith("__")
            or name == "__init__"
            or f"{node.name}.{name}" in surface.behaviour
        ):
            body[name] = _make_method(surface, path, name, forms)
    if "__init__" not in body and base is object:
        body["__init__"] = _no_constructor
    made = type(node.name, (base,), body)
    made.__setattr__ = _make_setattr(made, settable | getattr(base, "_settable", set()))  # type: ignore[method-assign, assignment]
    made._settable = settable  # type: ignore[attr-defined]
    return made


def _no_constructor(self: Any, *_: Any) -> None:
    raise TypeError(f"{type(self).__name__}: No constructor defined!")


def _make_attribute(
    surface: FakeTensorRTModule, path: str, name: str, annotation: ast.expr, inner: dict[str, Any]
) -> Any:
    """A constant of a nested enum (`Logger.ERROR`), or a plain attribute."""
    text = ast.unparse(annotation)
    if text.startswith("typing.ClassVar"):
        kind = inner.get(text.rstrip("]").rsplit(".", 1)[-1])
        return kind[name] if kind is not None and name in kind.__members__ else None
    return _Property(surface, path, name)


class _Property:
    def __init__(self, surface: FakeTensorRTModule, path: str, name: str) -> None:
        self._surface, self._path, self._name = surface, path, name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        if self._name in instance.__dict__:
            return instance.__dict__[self._name]
        act = self._surface.behaviour.get(f"{self._path}.{self._name}")
        if act is None:
            raise AssertionError(
                f"the stand-in has no behaviour for property {self._path}.{self._name}"
            )
        return act(instance)

    def __set__(self, instance: Any, value: Any) -> None:
        self._surface.calls.append((f"{self._path}.{self._name}", {"value": value}))
        instance.__dict__[self._name] = value


def _make_setattr(kind: type, settable: set[str]) -> Callable[[Any, str, Any], None]:
    """pybind11's classes take no new attributes; Python classes derived from them do."""

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if type(self) is kind and name not in settable and not name.startswith("_"):
            raise AttributeError(
                f"{kind.__name__!r} object has no attribute {name!r} that can be set"
            )
        object.__setattr__(self, name, value)

    return set_attribute


def _signature(form: ast.FunctionDef) -> inspect.Signature:
    plain, defaults = form.args.args, form.args.defaults
    first = len(plain) - len(defaults)
    return inspect.Signature(
        [
            inspect.Parameter(
                argument.arg,
                # pybind11 calls parameters without a name arg0, arg1, …: they cannot be given by
                # name
                (
                    inspect.Parameter.POSITIONAL_ONLY
                    if index == 0 or re.fullmatch(r"arg\d+", argument.arg)
                    else inspect.Parameter.POSITIONAL_OR_KEYWORD
                ),
                default=None if index >= first else inspect.Parameter.empty,
            )
            for index, argument in enumerate(plain)
        ]
    )


def _make_method(
    surface: FakeTensorRTModule, path: str, name: str, forms: list[ast.FunctionDef]
) -> Callable[..., Any]:
    signatures: list[
        inspect.Signature
    ] = []  # made at the first call: most of a thousand methods see none
    returns = forms[0].returns

    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        bound = None
        signatures[:] = signatures or [_signature(form) for form in forms]
        for signature in signatures:
            try:
                bound = signature.bind(self, *arguments, **named)
                break
            except TypeError:
                continue
        if bound is None:
            raise TypeError(
                f"{path}.{name}(): incompatible function arguments: {arguments} {named}; it takes"
                f" {signatures}"
            )
        for value in [*([self] if name != "__init__" else []), *arguments, *named.values()]:
            root = type(value).__mro__[-2] if type(value) is not object else object
            if vars(surface).get(root.__name__) is root and not getattr(
                value, "_ready", issubclass(root, int)
            ):
                raise TypeError(
                    f"{type(value).__name__}.__init__() must be called when overriding __init__"
                )
        given = dict(list(bound.arguments.items())[1:])
        surface.calls.append((f"{path}.{name}", given))
        if name == "__init__":
            self.__dict__["_ready"] = True
        act = surface.behaviour.get(f"{path}.{name}")
        if act is not None:
            return act(self, *given.values())
        answers = ast.unparse(returns) if returns else "typing.Any"
        if answers == "None":
            return None
        if answers == "builtins.bool":
            return True
        raise AssertionError(
            f"the stand-in has no behaviour for {path}.{name}, which answers {answers}"
        )

    method.__name__ = name
    return method
