"""Devices of the tests are made before a plan asks for others."""

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
  assert len(jax.devices()) == 8
