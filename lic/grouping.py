"""Which pictures of many go through the networks together: those of one padded size, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

from lic.model.config import HYPER_DOWNSAMPLING

CPU_PIXELS = 2**19  # of a batch, padded; half of it is 2 % slower, a quarter 10 %
CUDA_PIXELS = 2**22
_WAITING = 8  # batches' worth of pixels that wait for pictures like them

Size = tuple[int, int]
Source = TypeVar("Source")
Item = TypeVar("Item")
Result = TypeVar("Result")


def padded_size(width: int, height: int) -> Size:
    """Width and height of the pixels that the networks see."""
    n = HYPER_DOWNSAMPLING
    return -(-width // n) * n, -(-height // n) * n


def batches(items: Iterable[tuple[Hashable, Size, Item]], limit: int) -> Iterator[list[Item]]:
    """Items of one key and padded size, at most ``limit`` pixels of them, or one.

    Items are (key, padded size, item). They keep their order in a batch. Few are held at a time, so what gives them may
    be long.
    """
    waiting: dict[Hashable, list[Item]] = {}  # the key whose first item has waited longest comes first
    pixels_of: dict[Hashable, int] = {}
    for key, size, item in items:
        like, pixels = (key, size), size[0] * size[1]
        waiting.setdefault(like, []).append(item)
        pixels_of[like] = pixels_of.get(like, 0) + pixels
        if pixels_of[like] + pixels > limit:
            del pixels_of[like]
            yield waiting.pop(like)
        while sum(pixels_of.values()) > _WAITING * limit:
            oldest = next(iter(waiting))
            del pixels_of[oldest]
            yield waiting.pop(oldest)
    yield from waiting.values()


def in_batches(
    sources: Iterable[Source],
    prepare: Callable[[Source], tuple[Hashable, Size, Item]],
    code: Callable[[list[Item]], list[Result]],
    limit: int,
) -> list[Result]:
    """The result of each source, in their order.

    ``prepare`` gives (key, padded size, item) of a source, and ``code`` the results of a batch of items. Raises what
    either raises for the first source in order that fails, when it is coded alone; those after it may not be coded.
    """
    results: dict[int, Result] = {}
    failure: tuple[int, Exception] | None = None

    def prepared() -> Iterator[tuple[Hashable, Size, tuple[int, Item]]]:
        nonlocal failure
        for number, source in enumerate(sources):
            if failure is not None:
                return
            try:
                key, size, item = prepare(source)
            except Exception as error:
                failure = number, error
                return
            yield key, size, (number, item)

    def attempt(batch: list[tuple[int, Item]]) -> None:
        nonlocal failure
        batch = [entry for entry in batch if failure is None or entry[0] < failure[0]]
        if not batch:
            return
        try:
            coded = code([item for _, item in batch])
        except Exception as error:
            if len(batch) == 1:
                failure = batch[0][0], error
                return
            for entry in batch:  # which one it was, and the others
                attempt([entry])
        else:
            results.update(zip((number for number, _ in batch), coded, strict=True))

    for batch in batches(prepared(), limit):
        attempt(batch)
    if failure is not None:
        raise failure[1]
    return [results[number] for number in range(len(results))]
