"""The flags of the second assignment; train.py adds them to its own."""

import argparse

from support.command import Parser, number


def add_flags(parser: Parser) -> None:
    """Adds the group "posters"."""
    flag = parser.add_argument_group("posters").add_argument
    text = "a film's title in its introduction: left out, or kept"
    flag("--titles", choices=("hide", "keep"), default="hide", help=text)
    text = "read the words on the pictures, and add what they say to the image embedding"
    flag("--poster-text", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = "measure as many training images as dev has, too: how much is memory"
    flag("--train-recall", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = "films of like genres (Jaccard index) count in part as positives of InfoNCE"
    flag("--soft-positives", choices=("none", "genres"), default="none", help=text)
    text = "of InfoNCE's target, that goes to soft positives"
    flag("--soft-share", type=number(float, 0, 1), default=0.2, help=text)
