"""Hooks of the whole suite: the compatibility matrix is collected wherever its tests run."""

pytest_plugins = ["tests.contract.plugin"]
