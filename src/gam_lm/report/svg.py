"""A picture made part of a page: matplotlib's SVG without what clashes with other pictures there."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
REFERENCE = re.compile(r"url\(#([^)]+)\)")

OF_THE_PAGE = {"#000000": "currentColor", "#ffffff": "none", "#e5e5e5": "var(--line)"}
"""Ink, paper and grid are what they are on the page, light or dark."""


def inline(path: Path, prefix: str, label: str) -> str:
    """The SVG of a file as an element of a page.

    Its width follows the page, ``label`` is what a screen reader says, and every id that something in it refers to starts with ``prefix``, so that two
    pictures do not take each other's; the other ids go, and so does the metadata.
    """
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.parse(path).getroot()
    for child in root.findall(f"{{{SVG}}}metadata"):
        root.remove(child)
    elements = list(root.iter())
    used = {value[1:] for each in elements if (value := each.get(f"{{{XLINK}}}href", "")).startswith("#")}
    used |= {name for each in elements for value in each.attrib.values() for name in REFERENCE.findall(value)}
    for each in elements:
        for key, value in list(each.attrib.items()):
            if key == "id":
                if value in used:
                    each.set(key, prefix + value)
                else:
                    del each.attrib[key]
            elif key == f"{{{XLINK}}}href" and value[1:] in used:
                each.set(key, f"#{prefix}{value[1:]}")
            elif key == "style":
                for colour, name in OF_THE_PAGE.items():
                    value = value.replace(colour, name)
                each.set(key, value)
            elif "url(#" in value:
                each.set(key, REFERENCE.sub(lambda found: f"url(#{prefix}{found[1]})", value))
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.set("role", "img")
    root.set("aria-label", label)
    return ElementTree.tostring(root, encoding="unicode")
