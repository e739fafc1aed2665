"""MLflow, which shows what the records say: `raysearch.tracking` keeps it up to date, these modules know how.

Where to find what:

    runs        session, entries, links
    the front   registry
    the UI      pages
"""
