"""The page of scripts/systems.py, from its numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

Numbers = dict[str, Any]  # of one section, as scripts/systems.py keeps them


def page(kept: dict[str, Numbers], source: str) -> str:
    """Markdown of all sections that were measured; ``source`` is the file of the numbers, from the page's folder."""
    parts = ["# The context models side by side", _introduction(kept, source)]
    for needed, section in (
        (("bits", "costs"), main_table),
        (("bits",), bits),
        (("bits",), own_transforms),
        (("groupedmixer",), groupedmixer),
        (("econtextformer",), econtextformer),
        (("nlaic",), nlaic),
        (("msp",), msp),
    ):
        if all(name in kept for name in needed):
            parts += section(*(kept[name] for name in needed))
    return "\n\n".join(parts) + "\n"


def _introduction(kept: dict[str, Numbers], source: str) -> str:
    text = ""
    if "bits" in kept:
        found = kept["bits"]
        text = (
            f"All models share the transforms and the hyperprior of `{found['base']}`, unless said otherwise. "
            f"It turned {found['pictures']} pictures ({found['pixels'] / 1e6:.1f} Mpixel) into integers, once for each "
            "quality, by scalar quantisation, and every model predicts these same integers: the bits of a model are "
            "what an ideal coder needs with its probabilities, all steps in one exact pass. Fewer bits are smaller "
            "files of the very same pictures. Times are of whole pictures through the Python API with the model "
            "loaded. "
        )
    runs: dict[tuple[str, ...], list[str]] = {}
    for name, section in kept.items():
        made = section["made"]
        machine = f"{made['cpu']}, {made['threads']} of {made['cores']} cores, torch {made['torch']}"
        runs.setdefault((made["command"], made["date"][:10], machine), []).append(name)
    for (command, date, machine), names in runs.items():
        what = "" if len(runs) == 1 else f" ({', '.join(names)})"
        text += f"Measured{what} with `{command}` on {date}: {machine}. "
    if len(runs) > 1:
        text += "Each was measured with the weights of its time. "
    return f"{text}All numbers: [{source}]({source})."


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def against_reference(found: Numbers) -> dict[str, float]:
    """Percent of bits of every model against the reference: mean over the qualities of the ratio of summed bits.

    Empty if the reference was not measured.
    """
    if found["reference"] not in found["models"]:
        return {}
    totals = {name: [y + z for y, z in zip(e["y"], e["z"], strict=True)] for name, e in found["models"].items()}
    reference = totals[found["reference"]]
    return {
        name: 100 * (statistics.fmean(a / b for a, b in zip(total, reference, strict=True)) - 1)
        for name, total in totals.items()
    }


def main_table(found: Numbers, cost: Numbers) -> list[str]:
    percent, models = against_reference(found), cost["models"]
    rows = []
    for name, entry in models.items():
        own = found["own_transforms"].get(name)
        saved = f"BD-rate {_percent(own['bd_rate'])} against `{found['base']}`" if own else _percent(percent.get(name))
        kmac = [f"{entry[key]:.1f}" for key in ("kmac", "decoder_kmac")]
        counts = [str(entry[key]) for key in ("steps", "streams")]
        seconds = [f"{entry['times'][key]:.2f}" for key in ("encode", "decode")]
        rows.append([
            f"`{name}`", saved, f"{entry['parameters'] / 1e6:.2f}", *kmac, *counts, *seconds,
            "" if entry["memory_mb"] is None else f"{entry['memory_mb']:.0f}", _training(entry["training"]),
        ])  # fmt: skip
    head = [
        "model", f"bits against `{found['reference']}`", "parameters (M)", "kMAC/px", "kMAC/px, decoder", "steps",
        "streams", "encode (s)", "decode (s)", "memory (MB)", "training",
    ]  # fmt: skip
    pictures = _numbers(entry["times"]["pictures"] for entry in models.values())
    text = (
        "Parameters and kMAC/px are those of the context model, the next column is the whole decoder but for the "
        "refinement, 2.5 kMAC/px that came later. Steps and "
        f"streams are those of a picture of {_size(cost['size'])}. Times are medians of {pictures} pictures at quality "
        f"{cost['quality']:g} (fewer for models of many steps), memory is the peak of a process that encodes and "
        "decodes one. Models with transforms of their own are compared by whole files, below. Training is the last run "
        "of each model, in brackets the part that it trained; all runs are in training.md."
    )
    apart = [f"`{name}`" for name, entry in models.items() if not entry["shipped"]]
    if apart:
        text += f" {', '.join(apart)}: no weights come with lic, training.md says how to make them."
    return ["## All models", table(head, rows), text, *_main_reading(percent, found["reference"], models)]


def _main_reading(percent: dict[str, float], reference: str, models: dict[str, Any]) -> list[str]:
    fewer = {name: -value for name, value in percent.items() if value < 0 and name in models}
    if not fewer:
        return []
    seconds = {name: models[name]["times"]["decode"] for name in fewer}
    best, quickest = max(fewer, key=lambda name: fewer[name]), min(fewer, key=lambda name: seconds[name])
    text = (
        f"`{best}` needs the fewest bits, {fewer[best]:.1f} % fewer than `{reference}`, "
        f"and decodes in {seconds[best]:.2f} s."
    )
    if quickest != best:
        text += (
            f" Of all that need fewer bits than `{reference}`, `{quickest}` decodes fastest: "
            f"{fewer[quickest]:.1f} % fewer in {seconds[quickest]:.2f} s."
        )
    return [text]


def bits(found: Numbers) -> list[str]:
    percent, models = against_reference(found), found["models"]
    rows = []
    for name, entry in models.items():
        rates = [f"{(y + z) / found['pixels']:.4f}" for y, z in zip(entry["y"], entry["z"], strict=True)]
        rows.append([f"`{name}`", *rates, _percent(percent.get(name)), f"{100 * _excess(entry):+.2f} %"])
    qualities = [f"{quality:g}" for quality in found["qualities"]]
    head = ["bpp at quality", *qualities, f"against `{found['reference']}`", "streams against estimate"]
    shares = [
        100 * statistics.fmean(z / (y + z) for y, z in zip(entry["y"], entry["z"], strict=True))
        for entry in models.values()
    ]
    checked = _numbers(entry["checked"] for entry in models.values())
    agree = max(abs(_excess(entry)) for entry in models.values()) < 0.01
    text = (
        "Bits of y and z over pixels; the percentage is the mean over the qualities of the ratio of all bits. z takes "
        f"{min(shares):.1f} to {max(shares):.1f} % of them. The last column is the check by the real coder: the bytes "
        f"of all streams against the estimate, at quality {found['quality']:g} on {checked} pictures. They "
        f"{'agree within 1 %' if agree else 'DIFFER by more than 1 %'}."
    )
    return ["## Bits at equal integers", table(head, rows), text]


def _excess(entry: dict[str, Any]) -> float:
    """Of the coder's bytes over the estimate, relative."""
    return entry["bytes"] / entry["estimate"] - 1


def own_transforms(found: Numbers) -> list[str]:
    if not found["own_transforms"]:
        return []
    rows = []
    for name, entry in found["own_transforms"].items():
        for label, bpp, psnr, rate in (
            (found["base"], entry["base_bpp"], entry["base_psnr"], ""),
            (name, entry["bpp"], entry["psnr"], _percent(entry["bd_rate"])),
        ):
            points = [f"{r:.4f}, {p:.2f}" for r, p in zip(bpp, psnr, strict=True)]
            rows.append([f"`{label}`, {entry['pictures']} pictures", *points, rate])
    head = ["bpp, dB at quality", *(f"{quality:g}" for quality in found["qualities"]), "BD-rate"]
    text = (
        f"These models code other integers than `{found['base']}`. So whole files are compared at equal PSNR: "
        "bits against it (BD-rate), on the same pictures."
    )
    return ["## Models with transforms of their own", table(head, rows), text]


def groupedmixer(found: Numbers) -> list[str]:
    rows, readings = [], []
    for name, entry in found["models"].items():
        seconds, kmac = entry["seconds"], entry["kmac"]
        cells = [f"{seconds[way]:.3f} s, {kmac[way]:.1f} kMAC/px" for way in ("cached", "recomputed")]
        faster = seconds["recomputed"] / seconds["cached"]
        rows.append([f"`{name}`", str(entry["steps"]), *cells, f"{faster:.1f}"])
        same = (
            "both predict the same" if entry["difference"] == 0 else f"predictions DIFFER by {entry['difference']:.2g}"
        )
        readings.append(
            f"`{name}`: {kmac['recomputed'] / kmac['cached']:.1f} times the work without the cache; {same}."
        )
    head = ["model", "steps", "keys and values kept", "every step recomputed", "times faster"]
    text = f"All steps of the context model for a picture of {_size(found['size'])}, without coder and transforms."
    return ["## GroupedMixer: cached against recomputed decoding", table(head, rows), " ".join([text, *readings])]


def econtextformer(found: Numbers) -> list[str]:
    parts = ["## eContextformer: what each saving saves"]
    crop, whole = _size(found["crop"]), _size(found["size"])
    for name, entry in found["models"].items():
        rows = []
        first, last = (entry["crop"][i] for i in (0, -1))
        for row, large in zip(entry["crop"], entry["whole"], strict=True):
            rows.append([
                row["name"], f"{row['steps']:,}", f"{row['attention']:.2f}", f"{row['linear']:.2f}",
                f"{_work(first) / _work(row):.1f}", f"{row['seconds']:.3f}", f"{first['seconds'] / row['seconds']:.1f}",
                f"{large['steps']:,}", f"{_work(large):.2f}", f"{_work(entry['whole'][0]) / _work(large):.1f}",
            ])  # fmt: skip
        head = [
            f"`{name}`", f"steps, {crop}", "attention (kMAC/px)", "linear (kMAC/px)", "times less work", "seconds",
            "times faster", f"steps, {whole}", "kMAC/px", "times less work",
        ]  # fmt: skip
        grouped = entry["crop"][1]
        on_whole = _work(entry["whole"][0]) / _work(entry["whole"][-1])
        text = (
            f"The context model alone. {entry['raster_steps']} steps in raster order were measured and multiplied: "
            "each computes the window around one token, and all cost the same. The grouped ways predict the same. "
            f"All savings together: {_work(first) / _work(last):.0f} times fewer operations and "
            f"{first['seconds'] / last['seconds']:.0f} times less time than raster order on the crop, {on_whole:.0f} "
            "times fewer operations on the whole picture (the paper, against its predecessor: about 145 and 210). "
            f"Without the rearrangement into groups the others save {_work(grouped) / _work(last):.1f} times the "
            f"operations and {grouped['seconds'] / last['seconds']:.1f} times the time."
        )
        parts += [table(head, rows), text]
    return parts


def nlaic(found: Numbers) -> list[str]:
    rows, readings = [], []
    for way, steps in found["paper_counts"].items():
        rows.append([f"{found['paper_channels']} channels, {way}", f"{steps:,}", "", "", "", ""])
    for name, entry in found["models"].items():
        decoding = {}
        for way, steps in entry["counts"].items():
            seconds = entry["step_seconds"][way]
            decoding[way] = steps * seconds["decoding"]
            cells = []
            for part in ("context alone", "decoding"):
                cells += [f"{1000 * seconds[part]:.2f}", f"{steps * seconds[part]:.1f}"]
            rows.append([f"`{name}`, {entry['channels']} channels, {way}", f"{steps:,}", *cells])
        readings.append(
            f"The wavefronts of `{name}`, {entry['streams']} streams, decode "
            f"{decoding['raster order'] / decoding['wavefronts']:.0f} times faster than raster order and "
            f"{decoding['row by row'] / decoding['wavefronts']:.1f} times faster than row by row."
        )
    text = (
        f"The latents of a picture of {_size(found['size'])}: the network alone, and decoding them with coder and "
        "hyperprior. The wavefronts were timed as a whole. Of the other two orders the time of a step was measured on "
        "grids of four rows (for raster order, of four columns too), where a step holds one or two rows of a channel, "
        "and multiplied."
    )
    head = ["order", "steps", "network: ms a step", "s", "decoding: ms a step", "s"]
    return ["## NLAIC: raster order, rows and wavefronts", table(head, rows), " ".join([text, *readings])]


def msp(found: Numbers) -> list[str]:
    sizes, models = [_size(size) for size in found["sizes"]], found["models"]
    rows = []
    for name, entry in models.items():
        kmac = [f"{entry[key]:.1f}" for key in ("kmac", "decoder_kmac")]
        rows.append([f"`{name}`", *kmac, *map(str, entry["steps"]), f"{entry['decode']:.2f}"])
    head = ["profile", "kMAC/px", "kMAC/px, decoder", *(f"steps, {s}" for s in sizes), f"decode {sizes[-1]} (s)"]
    constant = all(len(set(entry["steps"])) == 1 for entry in models.values())
    text = (
        f"The number of steps {'does not depend' if constant else 'DEPENDS'} on the size. Decoding is all of it, from "
        "file to pixels."
    )
    raster_rows, gains, own = [], [], []
    for name, entry in found["raster"].items():
        total = entry["steps"] * entry["step_seconds"]
        factors = [total / profile["decode"] for profile in models.values()]
        if name in models:
            own.append(f"{total / models[name]['decode']:.0f} (`{name}`)")
        else:
            gains.append(f"with that of `{name}` {min(factors):.0f} to {max(factors):.0f}")
        cells = [f"{entry['steps']:,}", f"{1000 * entry['step_seconds']:.2f}", f"{total:.0f}"]
        raster_rows.append([f"`{name}`", *cells, *(f"{factor:.0f}" for factor in factors)])
    raster_head = ["network in raster order", "steps", "ms a step", "seconds", *(f"times `{name}`" for name in models)]
    reading = (
        "Raster order is estimated: the time of a step, which codes one position (and one channel group, or one "
        f"channel) with the network of a model, is measured on a crop and multiplied by the steps for {sizes[-1]}. "
        "Coder and transforms are left out of it, so these numbers are too small. The last columns divide them by "
        "the time that a profile takes for all of its decoding. Raster order takes, with the profile's own network, "
        f"{', '.join(own)} times as long{''.join(f', {gain}' for gain in gains)}."
    )
    return ["## MSP: constant steps", table(head, rows), text, table(raster_head, raster_rows), reading]


def _work(row: dict[str, Any]) -> float:
    return row["attention"] + row["linear"]


def _size(size: list[int]) -> str:
    return "{}x{}".format(*size)


def _numbers(values: Iterable[int]) -> str:
    """ "6", or "6 or 2"."""
    return " or ".join(map(str, sorted(set(values), reverse=True)))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f} %"


def _training(entry: dict[str, Any]) -> str:
    counts = [f"{entry[key]:,} {unit}" for key, unit in (("steps", "steps"), ("megapixels", "Mpixel")) if key in entry]
    return f"{', '.join(counts)} ({entry['part']})" if counts else ""
