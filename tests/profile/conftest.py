"""Property tests here write files: their time says nothing on a busy machine, so they have no deadline."""

from hypothesis import settings

settings.register_profile("aim_profile", deadline=None)
settings.load_profile("aim_profile")
