"""Errors a user can meet, in one tree.

CocodiffError
├── ConfigError    (ValueError)    a field, a cluster or a pipeline that cannot work, with its numbers
├── MismatchError  (ValueError)    ranks that should agree do not: which field, which ranks
├── LaunchError    (RuntimeError)  ranks that cannot find each other, or a backend that cannot serve
├── PatchError     (RuntimeError)  a wrapped pipeline that is no longer what `wrap` made of it
├── UsageError     (RuntimeError)  no call has ended yet, one still runs, or gradients were asked for
└── CopiesDifferError (RuntimeError)  sender and receiver of a slow link did not hold the same
"""

from __future__ import annotations


class CocodiffError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(CocodiffError, ValueError):
    """A setting cannot work as given. The message carries the numbers and the cure."""


class MismatchError(CocodiffError, ValueError):
    """Ranks were given different things. The message names the field and the ranks."""


class LaunchError(CocodiffError, RuntimeError):
    """The ranks of this run cannot be found, joined or served by the chosen backend."""


class PatchError(CocodiffError, RuntimeError):
    """A wrapped pipeline was changed behind our back, or asked for what wrapping cannot give."""


class UsageError(CocodiffError, RuntimeError):
    """A wrapped pipeline was asked for what it cannot give now. The message says what to do first."""


class CopiesDifferError(CocodiffError, RuntimeError):
    """Sender and receiver of a slow link did not hold the same copies: what was drawn is wrong."""
