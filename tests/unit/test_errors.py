from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Iterator

import pytest

from heliostat import errors
from heliostat.errors import HeliostatError

SAMPLES = {"str": "this", "int": 3, "float": 0.5, "bool": True, "tuple": ("these", "those"), "Mapping": {"a": 1}}


def every(error: type[HeliostatError]) -> Iterator[type[HeliostatError]]:
    yield error
    for each in error.__subclasses__():
        yield from every(each)


def sample(error: type[HeliostatError]) -> HeliostatError:
    if "__init__" not in {name for base in error.__mro__[:-3] for name in vars(base)}:
        return error("what happened, and what to do")
    arguments = {}
    for name, parameter in list(inspect.signature(error.__init__).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = str(parameter.annotation).split("[")[0].split("|")[0].strip()
        arguments[name] = SAMPLES[kind.rpartition(".")[2]]
    return error(**arguments)


@pytest.mark.parametrize("error", sorted(set(every(HeliostatError)), key=lambda each: each.__name__))
def test_every_error_survives_pickling_with_its_text(error: type[HeliostatError]) -> None:
    raised = sample(error)
    copy = pickle.loads(pickle.dumps(raised))
    assert type(copy) is error
    assert str(copy) == str(raised) != ""
    assert vars(copy) == vars(raised)


@pytest.mark.parametrize("error", sorted(set(every(HeliostatError)), key=lambda each: each.__name__))
def test_every_error_has_a_status_and_an_exit_code(error: type[HeliostatError]) -> None:
    assert 400 <= error.http_status < 600
    assert 1 <= error.exit_code <= 9


def test_every_error_is_in_the_package_and_in_the_tree_at_its_top() -> None:
    known = {each.__name__ for each in every(HeliostatError) if each.__module__.startswith(errors.__name__)}
    assert len(known) > 70
    assert known == set(errors.__all__) == set(re.findall(r"\w+Error", errors.__doc__ or ""))
    assert all(issubclass(getattr(errors, name), HeliostatError) for name in known)
