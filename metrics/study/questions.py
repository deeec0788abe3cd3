"""The two published questionnaires: what is asked of each clip, and of a page as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from rawaudio.config import as_written
from rawaudio.errors import UserError

GRADES = ("bad", "poor", "fair", "good", "excellent")  # 1 to 5, ITU-T P.800


@dataclass(frozen=True)
class Question:
    """One question. Its answers are numbers: from `first` on, one for each word."""

    field: str  # of the answers: recording_0_FIELD of a clip, FIELD of a page
    title: str
    text: str
    words: tuple[str, ...] = GRADES  # () for the digits, which are the study's to choose
    first: int = 1


@dataclass(frozen=True)
class Questionnaire:
    """What listeners are asked."""

    task: str
    of_clips: tuple[Question, ...]
    of_pages: tuple[Question, ...] = field(default=())  # where all clips are of one method


DIGIT = Question("digit", "Word", "Which word do you hear?", (), 0)

QUESTIONNAIRES = {
    "music": Questionnaire(
        "Listen to each piece of music to its end, then say how it sounds and how musical it is.",
        (
            Question("quality", "Fidelity", "How clear is the sound, free of noise and artefacts?"),
            Question("musicality", "Musicality", "How much is it like music that people play?"),
        ),
    ),
    "speech": Questionnaire(
        "Listen to each voice, then say which word you heard and how easily you understood it. "
        "If you are not sure, choose what it is most like.",
        (DIGIT, Question("intelligibility", "Intelligibility", "How easy is it to understand?")),
        (
            Question("quality", "Quality", "How good do these voices sound, all in all?"),
            Question("diversity", "Diversity", "How much do the voices differ, as of many people?"),
        ),
    ),
}


def check_words(words: list[str]) -> None:
    """UserError for words that a question cannot offer."""
    if len(set(words)) != len(words) or len(words) < 2:
        raise UserError(f"words={as_written(words)}: two or more are needed, each once")
