"""The errors of model/cli.py, under the module that programs outside this repository import them from."""

from model.cli import Failure, UserError

__all__ = ["Failure", "UserError"]
