"""Read the flags of every command: Fire splits, pydantic checks, then work starts.

Fire alone would run the function first and complain about a misspelt flag afterwards, and would
turn `--model 1.3` into a number. So Fire is given a function that only collects, with every value
left a string; a pydantic model (one per command) turns strings into types; what is unknown, missing
or wrong ends with one line and exit status 2.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.markup import escape

from anyflow_deploy.cli.json_output import reserve_stdout
from anyflow_deploy.cli.terminal import (
    handle_sigterm_as_ctrl_c,
    print_version,
    replace_unencodable,
)
from anyflow_deploy.errors import AnyFlowError, suggestion
from anyflow_deploy.progress import console

DONE, WORK_ERROR, USAGE_ERROR, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses; docs/reference/exit-status.md says what each means."""

StepCount = Annotated[int, Field(ge=1, le=1000)]
Steps = Annotated[
    tuple[StepCount, ...], BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v)
]
Words = Annotated[
    tuple[str, ...], BeforeValidator(lambda v: tuple(v.split(",")) if isinstance(v, str) else v)
]
Numbers = Annotated[
    tuple[float, ...], BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v)
]
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v),
]
JsonFlag = Annotated[
    bool,
    Field(alias="json", description="print the result as one JSON document on standard output"),
]
"""The flag of the field `json_output`; docs/reference/json.md lists what is printed."""

_OTHER_TOOLS_FLAGS: tuple[tuple[tuple[str, ...], set[str], str], ...] = (
    (
        ("--negative-prompt", "--guidance-scale", "--guidance", "--cfg", "--cfg-scale"),
        {"prompt"},
        "guidance is distilled into the model, which takes one prompt and no scale. Leave it out.",
    ),
    (
        ("--size", "--resolution"),
        {"height", "width"},
        "the size is given as --height and --width, in pixels.",
    ),
    (
        ("--fps", "--frame-rate"),
        {"frames"},
        "the frame rate is the model's, and --frames chooses how long the video is. Leave it out.",
    ),
    (("--num-inference-steps", "--num-steps"), {"steps"}, "the number of steps is --steps."),
    (("--num-frames", "--length"), {"frames"}, "the number of frames is --frames."),
)
"""Flags that people know from other programs, the fields that a command has to have for the
sentence to be true, and the sentence."""


class Options(BaseModel):
    """The flags of one command: a field is a flag, its description the help, its type the check.

    The class docstring is the command's help. `POSITIONAL` names the fields that may be given
    without a flag, in order. `VERDICT` says what exit status 1 means beside an error; the help has
    it, too. `BARE` has the value of each flag that may be given without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    POSITIONAL: typing.ClassVar[tuple[str, ...]] = ()
    EXAMPLES: typing.ClassVar[tuple[str, ...]] = ()
    VERDICT: typing.ClassVar[str] = ""
    BARE: typing.ClassVar[dict[str, str]] = {}

    @property
    def prints_json(self) -> bool:
        """Whether standard output is for a JSON document alone."""
        return bool(getattr(self, "json_output", False))


O = TypeVar("O", bound=Options)  # noqa: E741 - the letter for options


def run(program: str, options_type: type[O], work: Callable[[O], int]) -> None:
    """Run a console script: parse its flags, do its work, and exit.

    Exit status: what `work` returns; 2 for wrong flags; 1 for an `AnyFlowError`, a missing package
    or a file system that refuses; 130 after Ctrl-C or SIGTERM. docs/reference/exit-status.md says
    the same to users.
    """
    replace_unencodable()
    handle_sigterm_as_ctrl_c()
    words = sys.argv[1:]
    if "--help" in words or "-h" in words:
        Console(highlight=False).print(*build_help(program, options_type), sep="\n")
        sys.exit(DONE)
    if print_version(program, words):
        sys.exit(DONE)
    try:
        options = parse_options(options_type, words)
    except AnyFlowError as error:
        console.print(
            f"[bold red]error:[/] {escape(str(error))}\n[dim]{program} --help lists every flag.[/]"
        )
        sys.exit(USAGE_ERROR)
    try:
        with reserve_stdout() if options.prints_json else contextlib.nullcontext():
            status = work(options)
        sys.exit(status)
    except AnyFlowError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(WORK_ERROR)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("anyflow_deploy"):
            raise
        console.print(
            f"[bold red]error:[/] this needs {error.name}, which is not installed. Run: pip install"
            " 'anyflow-deploy\\[export]'"
        )
        sys.exit(WORK_ERROR)
    except OSError as error:  # a full disk, a folder that may not be read: for the user to fix
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(WORK_ERROR)
    except KeyboardInterrupt as stop:  # its text says what was kept
        console.print(f"interrupted; {escape(str(stop)) or 'nothing half-written was left'}.")
        sys.exit(INTERRUPTED)


def parse_options(options: type[O], words: list[str]) -> O:
    """Turn words of a command line into checked options.

    Raises:
        AnyFlowError: an unknown flag (with the nearest known one), a wrong type, a missing or
            surplus argument.
    """
    positional, flags = _collect_flags(_normalize_words(options, words))
    if len(positional) > len(options.POSITIONAL):
        surplus = positional[len(options.POSITIONAL)]
        raise AnyFlowError(
            f"surplus argument {surplus!r}; a flag's value follows its name, as in --steps 4."
        )
    for name, value in zip(options.POSITIONAL, positional, strict=False):
        if name in flags:
            raise AnyFlowError(f"{name} was given twice: {value!r} and --{name} {flags[name]!r}.")
        flags[name] = value
    try:
        return options.model_validate(flags)
    except ValidationError as error:
        raise AnyFlowError(_first_problem(options, error)) from None


def _normalize_words(options: type[Options], words: list[str]) -> list[str]:
    """Write every flag of the words as `--name=value`, so that Fire need not guess.

    Fire would read `--verify BUNDLE` as a flag and its value, `--prompt` at the end as "True",
    `--noprompt` as "False", and would take what follows `--` or `-` for itself.
    """
    fields = {f.alias or name: f for name, f in options.model_fields.items()}
    result, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            result.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if flag in ("-", "--"):
            raise AnyFlowError(
                f"{word!r} means nothing here. A value that starts with a dash is given as"
                " --prompt=-x."
            )
        if not flag.startswith("--") or name not in fields:
            raise _unknown_flag_error(flag, fields)
        if not equals:
            value = _next_value(flag, fields[name].annotation, options.BARE.get(name), rest)
        result.append(f"--{name}={value}")
    return result


def _next_value(flag: str, annotation: Any, bare: str | None, rest: list[str]) -> str:
    """Take a flag's value from the words that follow it.

    Args:
        flag: as it was typed.
        annotation: the type of its field.
        bare: its value where it has none of its own.
        rest: the words; the value is removed.
    """
    if annotation is bool:
        return "True"
    if bare is not None and (not rest or rest[0].startswith("--")):
        return bare
    value = rest.pop(0) if rest else "--"
    if value.startswith("-") and not value[1:2].isdigit():
        raise AnyFlowError(
            f"{flag} needs a value; one that starts with a dash is given as {flag}=-x."
        )
    return value


def _unknown_flag_error(flag: str, fields: Iterable[str]) -> AnyFlowError:
    name = flag.replace("_", "-")
    known = set(fields)
    for names, needed, sentence in _OTHER_TOOLS_FLAGS:
        if name in names and known >= needed:
            return AnyFlowError(f"unknown flag {name}: {sentence}")
    flags = [f"--{field.replace('_', '-')}" for field in fields]
    return AnyFlowError(f"unknown flag {name}.{suggestion(name, flags)}")


def _collect_flags(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Let Fire split the words into arguments and flags; all values stay strings."""
    import fire  # with asyncio, which --help does not need
    from fire.decorators import SetParseFn

    calls: list[tuple[list[str], dict[str, str]]] = []

    @SetParseFn(str)  # type: ignore[untyped-decorator]  # Fire has no types
    def collect(*positional: str, **flags: str) -> None:
        calls.append((list(positional), flags))

    fire.Fire(collect, command=words, name="anyflow")
    return calls[0]


def _first_problem(options: type[Options], error: ValidationError) -> str:
    problem = error.errors()[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    label = name if name in options.POSITIONAL else f"--{name.replace('_', '-')}"
    if problem["type"] == "missing":
        return f"{label} is missing: {options.model_fields[name].description}."
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, Exception):
        return str(cause)
    message = problem["msg"]  # the first letter alone: it may end in a pattern
    return f"{label} is {problem['input']!r}: {message[:1].lower()}{message[1:]}."


def build_help(program: str, options: type[Options]) -> list[Any]:
    """Build the help of a command, as objects that rich prints."""
    from rich.table import Table

    usage = "".join(f" {name.upper()}" for name in options.POSITIONAL)
    flags = Table(box=None, padding=(0, 2, 0, 2), show_header=False)
    flags.add_column(no_wrap=True, style="bold")
    flags.add_column(no_wrap=True, style="dim")
    flags.add_column()
    for name, field in options.model_fields.items():
        silent = field.is_required() or field.default is False or field.default in (None, "", ())
        default = "" if silent else f" [dim](default {_format_default(field.default)})[/]"
        label = (
            name.upper()
            if name in options.POSITIONAL
            else f"--{(field.alias or name).replace('_', '-')}"
        )
        flags.add_row(label, _type_name(field.annotation), f"{field.description}{default}")
    flags.add_row("--help", "switch", "print this")
    flags.add_row("--version", "switch", "print name and version")
    examples = [f"  {example}" for example in options.EXAMPLES]
    head = f"[bold]usage:[/] {program}{usage} [dim]\\[flags][/]"
    paragraphs = inspect.cleandoc(options.__doc__ or "").split("\n\n")
    # The console wraps lines
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    if options.VERDICT:
        text += f"\n\nExit status 1, beside errors: {options.VERDICT}."
    return [head, "", text, "", flags, "", *examples]


def _format_default(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _type_name(annotation: Any) -> str:
    names = {int: "number", float: "number", str: "text", bool: "switch"}
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return "numbers" if typing.get_origin(annotation) is tuple else names.get(annotation, "path")
