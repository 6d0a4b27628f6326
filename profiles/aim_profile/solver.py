"""HiGHS (https://highs.dev), which solves linear and integer programmes, without what it prints."""

from __future__ import annotations

import highspy

INFINITY = highspy.kHighsInf


class Solver(highspy.Highs):
    """highspy's Highs, silent: its own constructor prints a banner on stdout before anybody can turn output off."""

    def __init__(self) -> None:
        super(highspy.Highs, self).__init__()  # of what it wraps, not its own
        self.callbacks = []
        self.setOptionValue("output_flag", False)
        self.setOptionValue("threads", 1)
