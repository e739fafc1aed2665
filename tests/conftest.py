"""Laws are no stopwatches: an example that a busy machine draws out is no failure."""

from hypothesis import settings

settings.register_profile("raysearch", deadline=None)
settings.load_profile("raysearch")
