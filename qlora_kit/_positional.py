"""For what an older kit wrote: arguments by position, as functions took them then."""
from functools import wraps
from inspect import signature


def positional(function):
    """`function`, with keyword-only parameters taken by position as well."""
    names = list(signature(function).parameters)

    @wraps(function)
    def call(*args, **options):
        return function(**dict(zip(names, args, strict=False)), **options)

    return call
