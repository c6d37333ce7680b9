"""The texts of the demonstration: a long system prompt that two requests share."""

from __future__ import annotations

from importlib import resources

SYSTEM = "handbook"
TITLES = {"customer": "summarise a customer's message", "colleague": "summarise a colleague's e-mail"}
"""The requests, in order, by the name of their text."""


def read(name: str) -> str:
    """A text; lines of a paragraph are joined, so that the files can be wrapped for people."""
    text = (resources.files(__name__) / f"{name}.txt").read_text(encoding="utf-8").strip()
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def conversation(name: str) -> list[dict[str, str]]:
    """A request as a chat: the system prompt, then the user's text."""
    return [{"role": "system", "content": read(SYSTEM)}, {"role": "user", "content": read(name)}]
