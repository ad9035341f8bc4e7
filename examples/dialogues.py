"""Questions and answers that R. Wallace wrote for the chatbot A.L.I.C.E., from the package python-aiml."""

from importlib import metadata
from xml.etree import ElementTree

LEFT_OUT = "std-german.aiml", "std-sextalk.aiml", "std-65percent.aiml"
LONGEST = 160


def pairs() -> list[tuple[str, str]]:
    """Questions in lower case without punctuation, and their answers, where both are plain text. PackageNotFoundError."""
    found = set()
    for file in metadata.distribution("python-aiml").files or ():
        if file.match("standard/std-*.aiml") and file.name not in LEFT_OUT:
            for category in ElementTree.parse(str(file.locate())).iter("category"):
                question, answer = (_plain(category.find(name)) for name in ("pattern", "template"))
                if question and answer and len(question + answer) <= LONGEST:
                    found.add((question.lower(), answer))
    return sorted(found)


def _plain(element: ElementTree.Element | None) -> str:
    """The text of an element, without wildcards; "" where it holds other elements, or none was found."""
    return "" if element is None or len(element) else " ".join((element.text or "").replace("*", "").split())
