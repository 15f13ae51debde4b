"""Where images come from: files, archives, and the formats in which data sets are published.

A source lists its images without reading them; each is then read on its own, in any order
and any number of times, so that `shards build` can look at all of them before it decides on
splits. A further kind of source is one file here with a function that returns a Source, and its
line in opening.py.

Names become keys and never paths: nothing is extracted to a place that a name decides. What
turns out to be no image is reported by the build, not skipped here, so that nobody wonders where
it is. No source can run code: where a format would (pickles), only what its published files
consist of is interpreted.
"""

from pipeline.data.sources.keys import unique_keys
from pipeline.data.sources.opening import normalize_source, open_source
from pipeline.data.sources.source import Source, SourceImage

__all__ = ["Source", "SourceImage", "normalize_source", "open_source", "unique_keys"]
