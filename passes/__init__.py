"""The algorithms, one per file. Imported as `fxcompress.passes`."""

if __name__ == "passes":
    raise ImportError(
        "this directory was imported as `passes`, because the root of the repository is on sys.path; "
        "its import name is `fxcompress.passes`"
    )
