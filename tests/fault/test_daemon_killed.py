"""SIGKILL of the daemon, the spawner and shims at random moments of a mixed load: nothing is lost, nothing stays behind.

BOXSHIP_KILLS=N takes another number of kills than the few that the time of a test run allows; what is looked at is in
`support.campaign`, which can be run by itself too.
"""

from __future__ import annotations

import os
import random
import shutil

import pytest

from support.campaign import NEEDS, ROUND, Campaign
from support.daemon import daemon

MISSING = [name for name in NEEDS if not shutil.which(name)]
pytestmark = [
    pytest.mark.root, pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not installed (see tests/packages.txt)"),
]
KILLS = int(os.environ.get("BOXSHIP_KILLS", "12"))


@pytest.mark.timeout(240 + KILLS * 10)
def test_killed_at_random_moments() -> None:
    with daemon() as d:
        campaign = Campaign(d, random.randrange(1 << 30))
        try:
            campaign.open()
            for done in range(0, KILLS, ROUND):
                campaign.round(min(ROUND, KILLS - done))
            campaign.end()
        except AssertionError as error:
            raise AssertionError(f"{error}\n{campaign.report()}") from error
        finally:
            campaign.close()
